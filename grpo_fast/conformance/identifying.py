"""From readings to what a loss computes: the order in which it is probed, and the options they add up to."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..terms import GMPO
from . import (
    advantages,
    alignment,
    counted,
    floors,
    kl,
    level,
    masking,
    measuring,
    penalised,
    policy,
    remainder,
    valued,
    weights,
)
from .calling import Batch, CallFailed, Loss, batch
from .comparing import DEFAULTS, checked
from .progress import Progress
from .report import Finding, about, number


class Reading(NamedTuple):
    """What was read of a loss: its options, as far as there are any, and what was noticed on the way."""

    options: dict[str, Any] | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    per_token: bool
    parts: Mapping[str, Any] = {}  # what was read where there are no options


def read(loss: Loss, progress: Progress) -> Reading:
    """Probe the loss.

    Raises
    ------
    CallFailed
        It raised an error on a batch of ordinary numbers.
    """
    progress.stage("policy term")
    random = is_random(loss)
    if random:
        return Reading(None, tuple(random), (), False)
    try:
        reading = _read(loss, progress)
        reading = reading._replace(findings=tuple(_as_called(loss, finding) for finding in reading.findings))
    except ZeroDivisionError:  # what was there at first is there no more
        random = is_random(loss, 100)
        if not random:
            raise
        return Reading(None, tuple(random), (), False)
    finally:
        loss.padded = loss.tied = loss.swapped = False
    if any(finding.severity == "differs" for finding in reading.findings):  # is it chance that it looks so?
        random = is_random(loss, 10)
    return Reading(None, tuple(random), (), False) if random else reading


def _as_called(loss: Loss, finding: Finding) -> Finding:
    """The finding with its example as the loss was called, where that was with other arrays in their places."""
    at = finding.example
    if at is None or finding.topic == "other arrays":
        return finding
    if loss.swapped:
        at = at._replace(old_logps=at.ref_logps, ref_logps=at.old_logps)
    return finding._replace(example=at._replace(ref_logps=at.old_logps) if loss.tied else at)


def _read(loss: Loss, progress: Progress) -> Reading:
    findings: list[Finding] = []
    notes: list[str] = []
    findings += alignment.swapped(loss)
    loss.swapped = bool(findings)
    of_advantages = [] if findings else penalised.read(loss)
    loss.tied = bool(of_advantages)
    findings += of_advantages
    found = policy.read(loss)
    progress.tick()
    findings += found.findings
    notes += found.notes
    together = advantages.together(loss)
    if together or (found.kind == "none" and found.surrogate is None):
        return Reading(None, tuple(together or findings), tuple(notes), False)
    taken = advantages.read(loss)
    findings += taken.findings
    notes += taken.notes
    progress.stage("KL term")
    term = kl.read(loss, found.scale, found.width)
    findings += term.findings
    if not about("to reference", found.findings):
        findings += kl.of_advantages(loss, found.scale, found.width)
    findings += remainder.read(loss, found.scale, found.width, term)

    progress.stage("mask")
    unit = _unit(loss, batch(np.full((1, found.width), measuring.LOGP)), found.scale)
    unit_of_kl = _unit(loss, measuring.of_kl(np.ones((1, found.width), bool)), found.scale) if term.there else 0.0
    of_policy = masking.effective(loss, measuring.of_policy)
    of_kl = masking.effective(loss, measuring.of_kl) if term.there else None
    applied = of_policy is None and of_kl is None
    if of_policy is not None:
        findings.append(of_policy._replace(what=f"{of_policy.what} (policy term)"))
    if of_kl is not None and (of_policy is None or of_kl.what != of_policy.what):
        findings.append(of_kl._replace(what=f"{of_kl.what} (KL term)"))
    if applied:
        shifted = alignment.read(loss, masking.base, taken.per_token)
        findings += shifted.findings
        findings += masking.leaks(loss, taken.per_token, shifted.names)
        findings += masking.rows_mixed(loss)

    progress.stage("aggregation")
    findings += counted.read(loss)
    found_weights = measuring.Weights(None, None, None, 1.0)
    if unit and np.isfinite(unit) and applied:
        found_weights = weights.read(loss, measuring.of_policy, unit)
        if unit_of_kl and np.isfinite(unit_of_kl) and term.there:
            findings += _kl_aggregation(loss, found_weights, unit_of_kl, term.findings)
    elif not unit and not about("no gradient", found.findings):
        notes.append("its policy term has no gradient, so that the weights of tokens could not be read")
    elif not applied:
        guessed = _aggregation_without_mask(loss, unit)
        found_weights = guessed._replace(findings=(), notes=()) if guessed is not None else found_weights

    progress.stage("level")
    one = measuring.measured(loss, measuring.of_policy(np.ones((1, 3), bool)), unit) if unit else None
    surrogate, of_level = found.surrogate, "token"
    if one is not None and np.isfinite(one).all() and one.sum() > 0:
        levels = level.read(loss, found, one[0], taken.per_token)
        if isinstance(levels.surrogate, GMPO):  # of which that of a token is the shadow
            findings = [x for x in findings if x.topic != "both bounds"]
        findings += levels.findings
        found_weights = weights.for_values(loss, found_weights, measuring.of_policy, levels.divisor)
        surrogate, of_level = levels.surrogate, levels.level or ""
        if applied and not levels.findings and not about("steep", findings):
            found_values = valued.read(loss, found.width, of_level == "token")
            findings = [x for x in findings if not (found_values and x.topic == "masked advantages")] + found_values
        findings += counted.beside_dropped(loss, found.trust_region, of_level == "token")
        option, more = kl_ratio(loss, term.option, of_level, float(one[0].mean()))
        term = term._replace(option=option)
        findings += more
    if applied:
        found_weights = floors.read(loss, found_weights)
    findings += [x for x in found_weights.findings if not _follows(x, findings, surrogate)]
    if about("temperature", findings) and found_weights.constant and np.isclose(found_weights.constant, 0.25):
        of_4 = (x._replace(what=x.what.replace("1/τ", "4/τ")) if x.topic == "temperature" else x for x in findings)
        findings = [x for x in of_4 if x.topic != "factor"]
    notes += found_weights.notes
    parts = _parts(surrogate, found.trust_region, term, of_level, found_weights)
    if any(part is None for part in parts.values()):
        known = {name: x for name, x in _told(parts).items() if x is not None}
        if surrogate is None and "normalizer" in known:  # whose unit is not known
            known = {name: x for name, x in known.items() if name not in ("aggregation", "normalizer")}
        return Reading(None, tuple(findings), tuple(notes), taken.per_token, known)
    options = {name: x for name, x in parts.items() if x is not _NONE}
    try:
        checked(options)
    except (TypeError, ValueError) as error:
        text = f"grpo_loss refuses what it computes: {error}"
        findings.append(Finding("differs", text, "", ", ".join(f"{k}={v!r}" for k, v in _told(options).items())))
        return Reading(None, tuple(findings), tuple(notes), taken.per_token, _told(options))
    if isinstance(options.get("normalizer"), measuring.Normalizer):
        notes.append("options['normalizer'] is a function: call it with the mask for the number that grpo_loss takes")
    return Reading(_told(options), tuple(findings), tuple(notes), taken.per_token)


def _follows(finding: Finding, others: list[Finding], surrogate: Any) -> bool:
    """Whether a finding about the weights is only what another one looks like there."""
    unclear = surrogate is None or about("nonlinear", others)
    return (
        (finding.topic == "irregular" and about("leak", others))
        or (finding.topic == "factor" and unclear)
        or (finding.topic == "empty sequence" and about("mixed rows", others))
    )


def _answer(loss: Loss, at: Batch) -> tuple[float, Any]:
    """Loss and gradient; 0 in place of one that would have to be measured."""
    if not loss.gives_gradient:
        return loss.value(at), np.zeros(1)
    found = loss(at)
    return found.loss, found.grad


def is_random(loss: Loss, times: int = 4) -> list[Finding]:
    """Whether the same batch, a small one or one with many tokens, has another loss or gradient another time."""
    for at in (masking.base(), masking.base(np.ones((16, 24), bool))):
        try:
            answers = [_answer(loss, at) for _ in range(1 + times)]
        except CallFailed:
            return []
        first, grad = answers[0]
        # Sums may be added up in another order each time, on some devices.
        room = 1e3 * loss.eps * (abs(first) + float(np.abs(grad).sum()))
        for value, other in answers[1:]:
            of_loss, of_grad = abs(value - first), float(np.abs(other - grad).max())
            if of_loss > room or of_grad > room:  # and it is not NaN
                amount = f"{first!r} and {value!r}" if of_loss > room else f"a gradient off by {number(of_grad)}"
                text = "is another number every time: it is random, or keeps a state from call to call"
                return [Finding("differs", text, f"the same input {times + 1} times", amount, at)]
    return []


def _unit(loss: Loss, at: Batch, scale: float) -> float:
    """The gradient of a token of weight 1 in batches like this one."""
    grad = loss(at).grad
    assert grad is not None
    return float(grad.sum()) / scale


def _aggregation_without_mask(loss: Loss, unit: float) -> measuring.Weights | None:
    """What it divides by where nothing is masked, for a loss whose mask is wrong."""
    kept, loss.takes = loss.takes, tuple(name for name in loss.takes if name != "mask")
    try:
        return weights.read(loss, lambda mask: measuring.of_policy(np.ones_like(mask)), unit)
    except CallFailed:
        return None
    finally:
        loss.takes = kept


def _kl_aggregation(
    loss: Loss, policy_weights: measuring.Weights, unit: float, of_kl: Iterable[Finding]
) -> list[Finding]:
    found = weights.read(loss, measuring.of_kl, unit, " in the KL term")
    if found.powers == policy_weights.powers:
        return []
    if found.powers is None and (policy_weights.powers is None or about("digits", of_kl)):
        return []
    how, other = (
        f"a token's weight is {weights.formula(x)}" if x.powers is not None else "in another way"
        for x in (found, policy_weights)
    )
    text = f"the KL term is averaged otherwise than the policy term: {how}, in the policy term {other}"
    return [Finding("differs", text, "sequences of unequal length", "", measuring.of_kl(measuring.ragged([1, 2], 1)))]


def kl_ratio(loss: Loss, option: Any, of_level: str, weight: float) -> tuple[Any, list[Finding]]:
    """The KL term with whose ratio weighs it: each token's own, or the sequence's."""
    if option is None or option.importance_weighted is False or of_level != "sequence":
        return option, []
    x, l = np.array([-0.2, 0.1, 0.3]), np.array([0.4, -0.7, 1.1])
    at = level.sequence_of(loss, x, 0.0, l)
    answer = loss(at)
    assert answer.grad is not None
    tol = max(1e-7, loss.exactness * 100)
    k, _ = kl.estimate(type(option), l)
    for weighted, ratio in ((True, np.exp(x)), ("sequence", np.exp(x.mean()) + 0 * x)):
        value = weight * option.beta * float(np.sum(ratio * k))
        if abs(answer.loss - value) <= tol * weight * option.beta * float(np.sum(np.abs(ratio * k))):
            return option._replace(importance_weighted=weighted), []
    text = "the ratio that weighs the KL term is neither the token's own nor the sequence's"
    return option, [Finding("differs", text, "a sequence whose tokens have different ratios", "", at)]


#: In place of a part that the loss has not, where None would say that it could not be read.
_NONE = object()


def _parts(surrogate: Any, region: Any, term: kl.KLTerm, of_level: str, found: measuring.Weights) -> dict[str, Any]:
    """The keyword arguments of `grpo_loss`; None where one could not be read."""
    return {
        "surrogate": surrogate,
        "trust_region": _NONE if region is None else region,
        "kl": term.option if term.there else _NONE,
        "importance_sampling_level": of_level or None,
        "aggregation": found.aggregation,
        "normalizer": _NONE if found.normalizer is None else found.normalizer,
    }


def _told(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts without what is as it is when left out, but for the first that anybody asks about."""
    always = ("surrogate", "aggregation")
    return {name: x for name, x in parts.items() if x is not _NONE and (name in always or x != DEFAULTS[name])}

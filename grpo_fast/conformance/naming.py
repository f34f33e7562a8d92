"""Findings of what the battery shows, beside those that were read: each kind told once, with its smallest input."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import shrinking
from .calling import Batch, CallFailed, Loss, batch
from .cases import Case
from .comparing import DEFAULTS, Miss, checked, compare, expected
from .report import Finding, Severity, about, number


def of_misses(
    loss: Loss, options: Mapping[str, Any], misses: Sequence[Miss], named: Iterable[Finding]
) -> list[Finding]:
    """What is to be told of these misses, beside what is ``named``."""
    named = list(named)
    findings: list[Finding] = []
    rest = list(misses)

    def take(wanted: Any) -> list[Miss]:
        nonlocal rest
        taken = [miss for miss in rest if wanted(miss)]
        rest = [miss for miss in rest if not wanted(miss)]
        return taken

    ordinary = [m for m in misses if m.case.severity == "differs" and m.case.kind != "empty sequence"]
    masked = take(lambda m: m.case.kind == "masked")
    if any(m.how in ("raises", "is not finite") for m in ordinary):  # it is so without padding, too
        masked = [m for m in masked if not any(m.how == x.how for x in ordinary)]
    # What finite padding does is told already where it does something, and an ordinary miss is no matter of NaN.
    explained = {id(miss) for miss in masked if miss.how in ("differs", "differs slightly")}
    findings += _of_masked(loss, options, [miss for miss in masked if id(miss) not in explained])
    empty = take(lambda m: m.case.kind in ("empty", "empty sequence") and m.how in ("raises", "is not finite"))
    if any(m.how in ("raises", "is not finite") for m in ordinary):
        empty = [m for m in empty if not any(m.how == x.how for x in ordinary)]
    findings += _of_empty(empty)
    small = take(lambda m: m.how == "differs slightly")
    told = about("digits", named) or about("clamped", named)
    if not told and not any(m.how == "differs" and m.case.severity == "differs" for m in rest):
        findings += _of_small(loss, options, small)
    if any(finding.severity == "differs" for finding in named):
        raised = [m for m in rest if m.how == "raises"]
        return findings + _raising(loss, raised)
    findings += _raising(loss, take(lambda m: m.how == "raises"))
    clamped = about("clamped", named)
    far = take(lambda m: m.case.kind == "far")
    if far and not clamped and not any(m.case.severity == "differs" for m in rest):
        findings.append(_one(loss, options, far, "fragile", "is another formula, or overflows, at log-ratios above 20"))
    tiny = take(lambda m: m.case.kind == "tiny")
    if tiny and not rest:
        findings.append(_one(loss, options, tiny, "fragile", "loses its digits where the KL is tiny"))
    ties = take(lambda m: m.case.kind == "tie")
    if ties and not rest:
        only = "has another gradient exactly" if all(m.where == "gradient" for m in ties) else "differs exactly"
        text = f"{only} at a bound, and nowhere else: it compares otherwise there, or rounds the ratio otherwise"
        findings.append(_one(loss, options, ties, "fragile", text))
    nothing = take(lambda m: m.case.kind == "empty")
    if nothing and not rest:
        findings.append(_one(loss, options, nothing, "fragile", "is not 0 where no token counts"))
    if rest:
        findings.append(_one(loss, options, rest, "differs", _text(rest)))
    return findings


#: What is told of misses that are all of one kind.
_OF_KIND = {
    "per token": "differs where advantages are one per token",
    "A = 0": "rows with A = 0 count otherwise",
    "many": "differs where there are many rows or tokens, and not where there are few",
    "empty sequence": "a sequence without a token changes the result: it counts otherwise",
    "ratios": "differs where ratios are far from 1, in a way that has no name here",
}


def _text(misses: Sequence[Miss]) -> str:
    if all(m.how == "is not finite" for m in misses):
        return "is not finite on finite inputs"
    if all(m.where == "gradient" for m in misses):
        return "the loss agrees, its gradient does not"
    kinds = {m.case.kind for m in misses}
    return _OF_KIND.get(kinds.pop() if len(kinds) == 1 else "", "differs in a way that has no name here")


def _of_masked(loss: Loss, options: Mapping[str, Any], misses: Sequence[Miss]) -> list[Finding]:
    if not misses:
        return []
    names = sorted({m.case.array for m in misses if m.case.array}, key=("logps", "old_logps", "ref_logps").index)
    are_nan = [math.isnan(m.case.value) for m in misses if m.case.array]
    which = "infinity" if not any(are_nan) else "NaN" if all(are_nan) else "NaN or infinity"
    of = "loss" if any(m.where == "loss" for m in misses) else "gradient"
    text = f"{which} at a masked position makes the {of} NaN"
    if all(m.how == "raises" for m in misses):
        text = f"{which} at a masked position raises {misses[0].message}"
    where = f"where the mask is 0, in {', '.join(names)}" if names else "where the mask is 0"
    finding = _one(loss, options, misses, "fragile", text)
    return [finding._replace(where=where)]


def _of_empty(misses: Sequence[Miss]) -> list[Finding]:
    findings = []
    for kind, what in (("empty sequence", "a sequence without a token"), ("empty", "a batch without a token")):
        some = [m for m in misses if m.case.kind == kind]
        if not some:
            continue
        miss = some[0]
        if miss.how == "raises":
            text = f"{what} raises an error: {miss.message}"
        elif math.isnan(miss.found):
            text = f"{what} makes the {miss.where} NaN (0/0)"
        else:
            text = f"{what} makes the {miss.where} {number(miss.found)}"
        mask = np.array([[False], [True]] if kind == "empty sequence" else [[False]])
        findings.append(Finding("fragile", text, "", "", batch(np.full(mask.shape, -0.5), mask=mask)))
    if len(findings) == 2:  # the second follows from the first
        findings.pop()
    return findings


def _of_small(loss: Loss, options: Mapping[str, Any], misses: Sequence[Miss]) -> list[Finding]:
    if not misses:
        return []

    def relative(miss: Miss) -> float:
        return abs((miss.found - miss.expected) / miss.expected) if miss.expected else 0.0

    worst = max(misses, key=relative)
    text = "agrees to some digits only: a small constant in a denominator or a log, or a part computed in float32"
    amount = f"{number(worst.found)} off by {number(worst.found - worst.expected)}"
    amount += f", {number(relative(worst))} of it" if worst.expected else ""
    finding = _one(loss, options, [worst], "fragile", text)
    return [finding._replace(amount=f"at most {amount}, {worst.where}")]


def _raising(loss: Loss, misses: Sequence[Miss]) -> list[Finding]:
    if not misses:
        return []
    miss = min(misses, key=lambda m: m.case.at.logps.size)
    severity: Severity = "differs" if any(m.case.severity == "differs" for m in misses) else "fragile"

    def raises(at: Batch) -> bool:
        try:
            loss(at)
        except CallFailed as error:
            return str(error) == miss.message
        return False

    at = shrinking.smallest(miss.case.at, raises)
    return [Finding(severity, f"raises {miss.message}", miss.case.name, "", at)]


def _one(loss: Loss, options: Mapping[str, Any], misses: Sequence[Miss], severity: Severity, text: str) -> Finding:
    """A finding of these misses, with the smallest input that shows what the smallest of them does."""
    miss = min(misses, key=lambda m: m.case.at.logps.size)

    def again(at: Batch) -> Miss | None:
        if miss.case.kind == "masked" and (not at.mask.any() or np.isfinite(_masked_numbers(at)).all()):
            return None  # that is a matter of empty batches, or of ordinary ones
        if not np.isfinite(expected(options, at, loss.takes)[0]):
            return None  # what is not finite would have come out from under the mask
        found = compare(loss, options, miss.case._replace(at=at))
        return found if found is not None and (found.how, found.where) == (miss.how, miss.where) else None

    at = shrinking.smallest(miss.case.at, lambda at: again(at) is not None)
    found = again(at) or miss
    amount = f"{found.where} {number(found.found)} instead of {number(found.expected)}"
    return Finding(severity, text, miss.case.name, amount, at)


def _masked_numbers(at: Batch) -> Any:
    return np.concatenate([x[~at.mask] for x in (at.logps, at.old_logps, at.ref_logps)])


# --- what was asked for, beside what was found ------------------------------------------------------------------------
def of_options(
    asked: Mapping[str, Any],
    found: Mapping[str, Any],
    takes: Iterable[str],
    cases: Iterable[Case],
    named: Iterable[Finding],
) -> list[Finding]:
    """What differs between the options that a loss was to have and those that it has, beside what is ``named``.

    Each has an input that shows it, on which the reference itself differs if only that is another.
    """
    findings: list[Finding] = []
    cases = sorted(cases, key=lambda case: case.at.logps.size)
    for name, default in DEFAULTS.items():
        if name in _MEAN:
            continue
        wanted, has = asked.get(name, default), found.get(name, default)
        if wanted == has:
            continue
        for text, value in _texts(name, wanted, has):
            example, amount = _example(asked, dict(asked) | {name: value}, found, takes, cases)
            findings.append(Finding("differs", text, "", amount, example))
    texts = _of_mean(asked, found)
    if texts and not about("denominator", named):
        other = {name: x for name, x in asked.items() if name not in _MEAN}
        other |= {name: found[name] for name in _MEAN if name in found}
        example, amount = _example(asked, other, found, takes, cases)
        findings += [Finding("differs", text, "", amount, example) for text in texts]
    return findings


_MEAN = ("aggregation", "normalizer")


def _example(
    asked: Mapping[str, Any], other: Mapping[str, Any], found: Mapping[str, Any], takes: Iterable[str], cases: Any
) -> tuple[Batch | None, str]:
    """The smallest input on which these options differ, in the loss or else in its gradient, and by how much."""
    try:
        checked(other)
    except (TypeError, ValueError):  # such as VESPO at another level
        other = found

    def values(at: Batch, of_gradient: bool) -> tuple[float, float]:
        (one, grad), (two, other_grad) = (expected(options, at, takes) for options in (asked, other))
        if not of_gradient:
            return one, two
        i = np.unravel_index(int(np.argmax(np.abs(grad - other_grad))), grad.shape)
        return float(grad[i]), float(other_grad[i])

    def differ(at: Batch, of_gradient: bool) -> bool:
        one, two = values(at, of_gradient)
        return bool(np.isfinite([one, two]).all() and abs(one - two) > 1e-3 * max(abs(one), abs(two)))

    for of_gradient, what in ((False, "loss"), (True, "gradient")):
        for case in cases:
            if case.severity == "differs" and differ(case.at, of_gradient):
                at = shrinking.smallest(case.at, partial(differ, of_gradient=of_gradient))
                one, two = values(at, of_gradient)
                return at, f"{what} {number(two)} instead of {number(one)}, by this alone"
    return None, ""


def _of_mean(asked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs in the mean over tokens and sequences."""
    texts: list[str] = []
    wanted, has = (options.get("aggregation", DEFAULTS["aggregation"]) for options in (asked, found))
    norms = asked.get("normalizer"), found.get("normalizer")
    if norms[0] is not None and not callable(norms[0]) and (norms[1] is None or callable(norms[1])):
        counted = "tokens" if has == "token-mean" else "sequences" if norms[1] is None else repr(norms[1])
        texts.append(
            f"micro-batches do not add: divides by the {counted} of each call, not by normalizer={norms[0]:g} (a mean "
            "of means)"
        )
    elif wanted != has:
        means = " (a mean of means)" if has == "seq-mean-token-mean" else ""
        texts.append(f"aggregates as {has!r}{means}, not as {wanted!r}{_by(norms[1])}")
    elif norms[0] != norms[1] and not (callable(norms[0]) and callable(norms[1])):
        texts.append(f"the normalizer is {_shown(norms[1])}, not {_shown(norms[0])}")
    return texts


def _by(normalizer: Any) -> str:
    return "" if normalizer is None else f", with normalizer={_shown(normalizer)}"


def _shown(x: Any) -> str:
    return f"{x:g}" if isinstance(x, float) else "what is counted" if x is None else repr(x)


def _texts(name: str, wanted: Any, has: Any) -> Iterable[tuple[str, Any]]:
    """What is to be told of an option, and the value with that alone another."""
    word = _WORDS.get(name, name)
    if type(wanted) is type(has) and hasattr(has, "_fields"):
        for field in has._fields:
            a, b = getattr(wanted, field), getattr(has, field)
            if a != b:
                forgotten = ": it is forgotten" if field == "beta" and b == 1 else ""
                yield f"{field} of the {word} is {b!r}, not {a!r}{forgotten}", wanted._replace(**{field: b})
    elif has is None:
        yield f"has no {word}, where {wanted!r} was asked for", has
    elif wanted is None:
        yield f"has a {word} that was not asked for: {has!r}", has
    else:
        yield f"{word} is {has!r}, not {wanted!r}", has


_WORDS = {"kl": "KL term", "trust_region": "trust region", "surrogate": "policy term"}

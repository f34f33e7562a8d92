"""A loss beside `grpo_fast.reference.grpo_loss`: what is expected, how far a right one may be off, and where."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..reference import shared, times
from ..terms import SAPO, VESPO, Options
from .calling import Batch, CallFailed, Loss
from .cases import Case

Floats = NDArray[np.float64]
#: In units of eps times the sizes of what is summed: a difference below it is rounding.
ROUNDING = 32
#: A difference below it, relative to the same sizes, is told as such: a small constant added somewhere, or a part that
#: is computed in float32.
SMALL = 1e-6


class Miss(NamedTuple):
    """A case in which a loss is not what the reference is."""

    case: Case
    how: str  # "raises", "is not finite", "differs slightly", "differs"
    where: str  # "loss" or "gradient"
    found: float
    expected: float
    message: str = ""


def checked(options: Mapping[str, Any]) -> Options:
    """The `Options` that these are, a normalizer that is a function of the mask left out, or the error for them."""
    normalizer = options.get("normalizer")
    return Options(**dict(options) | {"normalizer": None if callable(normalizer) else normalizer})


#: What `grpo_loss` does when it is told nothing.
DEFAULTS: dict[str, Any] = Options()._asdict()


def with_numbers(options: Mapping[str, Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The options for a batch with this mask: a normalizer that is a function of it, called."""
    normalizer = options.get("normalizer")
    return dict(options) | {"normalizer": normalizer(mask) if callable(normalizer) else normalizer}


def expected(options: Mapping[str, Any], at: Batch, takes: Iterable[str]) -> tuple[float, Floats]:
    """Loss and gradient of the reference; on-policy where the loss takes no ``old_logps``."""
    old = at.old_logps if "old_logps" in takes else None
    mask = at.mask if "mask" in takes else np.ones_like(at.mask)
    found = reference.grpo_loss(
        at.logps, old, at.advantages, at.ref_logps, mask=mask, **with_numbers(options, mask), grad=True
    )
    assert found.grad is not None
    return found.loss, np.asarray(found.grad, np.float64)


@np.errstate(all="ignore")
def sizes(options: Mapping[str, Any], at: Batch, takes: Iterable[str]) -> tuple[float, Floats]:
    """Σ c_i·(|w·s| + its slopes + β·(e^(−l) + l² + |l| + 1)), of the whole batch and of each row, at its tokens.

    That is what the terms of the textbook formula are made of, so that rounding in them, and cancellation in k3, is a
    small multiple of eps times it. The log-ratio itself is rounded, by eps·|log ρ|, and by eps·|log π_θ| more where
    log π_θ is added and taken away, as in the ratio of GSPO-token: relative to ρ that is as much.
    """
    given = DEFAULTS | with_numbers(options, at.mask)
    mask = at.mask if "mask" in takes else np.ones_like(at.mask)
    tokens = reference._Tokens.of(at.logps, mask, None)
    level, surrogate, kl = given["importance_sampling_level"], given["surrogate"], given["kl"]
    logp = tokens.each("logps", at.logps)
    A = tokens.each("advantages", at.advantages, True)
    x = logp - tokens.each("old_logps", at.old_logps) if "old_logps" in takes else 0 * logp
    rho = np.exp(shared(x, tokens, level))
    parts = reference.policy_term(surrogate, x, A, logp, tokens, level)
    size = np.sum([np.abs(part) for part in parts], axis=0)
    if isinstance(surrogate, SAPO):
        size = size * (1 + max(surrogate) * np.minimum(rho, 10))
    if isinstance(surrogate, VESPO):
        size = size * (1 + sum(surrogate) * np.minimum(1 + rho, 20))
    size = size * (1 + (np.abs(x) + np.abs(logp)) / ROUNDING)
    if kl is not None:
        l = logp - tokens.each("ref_logps", at.ref_logps)
        weight = np.maximum(1.0, np.exp(x)) if kl.importance_weighted or kl.gradient == "score" else np.ones_like(x)
        if kl.importance_weighted == "sequence":
            weight = np.maximum(weight, rho)
        size = size + times(kl.beta, weight * (np.exp(-l) + l * l + np.abs(l) + 1))
    c = reference.aggregation_weights(given["aggregation"], tokens.counts, given["normalizer"])
    of_rows = c * tokens.sums(size)
    spread = np.zeros(at.logps.shape)
    spread[tokens.keep] = tokens.spread(of_rows)
    return float(of_rows.sum()), spread


def misses(
    loss: Loss, options: Mapping[str, Any], cases: Iterable[Case], tick: Callable[[], object] = lambda: None
) -> tuple[list[Miss], int]:
    """The cases in which the loss is off, and how many there are."""
    found: list[Miss] = []
    count = 0
    for case in cases:
        count += 1
        tick()
        miss = compare(loss, options, case)
        if miss is not None:
            found.append(miss)
    return found, count


def compare(loss: Loss, options: Mapping[str, Any], case: Case) -> Miss | None:
    """The first way in which the loss is off in one case, or None."""
    value, grad = expected(options, case.at, loss.takes)
    try:
        answer = loss(case.at)
    except CallFailed as error:
        return Miss(case, "raises", "loss", np.nan, value, str(error))
    size, rows = sizes(options, _finite(case.at), loss.takes)
    room = loss.eps * ROUNDING * _inputs(loss, case.at)
    if not abs(answer.loss - value) <= room * size + 1e-300:
        return Miss(case, _how(answer.loss - value, size), "loss", answer.loss, value)
    if not loss.gives_gradient or answer.grad is None:
        return None
    low, high = (grad, grad) if case.kind != "tie" else _hull(options, case.at, loss.takes)
    off = np.maximum(low - answer.grad, answer.grad - high)
    wrong = ~(off <= room * rows + 1e-300)
    if not wrong.any():
        return None
    i = np.unravel_index(int(np.nanargmax(np.where(wrong, np.nan_to_num(off, nan=1e300, posinf=1e300), -1))), off.shape)
    how = _how(float(off[i]), float(rows[i]))
    return Miss(case, how, "gradient", float(answer.grad[i]), float(grad[i]))


def _how(off: float, size: float) -> str:
    if not np.isfinite(off):
        return "is not finite"
    return "differs slightly" if abs(off) <= SMALL * size else "differs"


def _inputs(loss: Loss, at: Batch) -> float:
    """What float32 makes of the inputs alone, in the same units."""
    if loss.eps < 1e-10:
        return 1.0
    return 1.0 + max(float(np.abs(x[at.mask]).max(initial=0)) for x in (at.logps, at.old_logps, at.ref_logps))


def _finite(at: Batch) -> Batch:
    """The batch with 0 in place of what is masked."""
    logps, old, ref = (np.where(at.mask, x, 0.0) for x in (at.logps, at.old_logps, at.ref_logps))
    return at._replace(logps=logps, old_logps=old, ref_logps=ref)


def _hull(options: Mapping[str, Any], at: Batch, takes: Iterable[str]) -> tuple[Floats, Floats]:
    """The least and the greatest gradient around a kink, 0 among them: there frameworks share it out as they like."""
    shift = 1e-9 if float(at.logps[0, 0]) < 0 else 0.0
    around = [expected(options, at._replace(logps=at.logps + d), takes)[1] for d in (-shift, 0.0, shift)]
    slack = 1e-7 * np.max(np.abs(around), axis=0)
    return np.minimum(np.min(around, axis=0), 0) - slack, np.maximum(np.max(around, axis=0), 0) + slack

"""Whose ratio it is: each token's, or one for a sequence; read from one sequence whose tokens have different ratios."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..terms import CISPO, GMPO, SAPO, VESPO, Clip, Unclipped
from .calling import Batch, Loss, batch
from .numbers import tidy
from .policy import Policy
from .report import Finding, number, rounded

Floats = NDArray[np.float64]
#: log of the ratio that each token of a sequence has, of the log-ratios of its tokens.
_RATIOS: dict[str, Callable[[Floats], Floats]] = {
    "token": lambda x: x,
    "sequence": lambda x: np.full_like(x, x.mean()),
    "product": lambda x: np.full_like(x, x.sum()),
    "arithmetic": lambda x: np.full_like(x, np.log(np.exp(x).mean())),
}

_WIDE = 8.0  # a log-ratio beyond the bounds of GMPO


class LevelFound(NamedTuple):
    """What was read of the level; the surrogate is another one where that of a token was only its shadow."""

    level: str | None
    surrogate: Any
    findings: tuple[Finding, ...] = ()
    divisor: str = "n_i"  # of the sum of a sequence's log-ratios: its tokens, the width of the padding, or 1


def sequence_of(loss: Loss, x: Floats, A: Any = 1.0, l: Any = 0.0, mask: Any = None) -> Batch:
    """A batch of one sequence with these log-ratios, whose tokens are improbable."""
    logp = loss.improbable - np.maximum(0, -x) - np.maximum(0, -np.asarray(l))
    return batch([logp], [logp - x], [A], [logp - l], None if mask is None else [mask])


def read(loss: Loss, policy: Policy, weights: Floats, per_token: bool) -> LevelFound:
    """Read the level; ``weights`` are those of the tokens in a sequence of three, up to a factor.

    Only the value is looked at, but for the last question, since one may be right without the other.
    """
    surrogate = policy.surrogate
    is_vespo = isinstance(surrogate, VESPO)
    if "old_logps" not in loss.takes or policy.kind == "constant" or surrogate is None:
        return LevelFound("sequence" if is_vespo else "token", surrogate)
    low = policy.inside[0] if policy.inside[0] < -1e-6 else policy.inside[1] if policy.inside[1] > 1e-6 else -1e-3
    x = low * np.array([0.9, 0.1, 0.4])
    if isinstance(surrogate, CISPO) and surrogate.ratio_max <= 1:  # elsewhere all weights are at that bound
        x = math.log(surrogate.ratio_max) - np.array([0.9, 0.1, 0.4])
    elif isinstance(surrogate, CISPO) and surrogate.ratio_min >= 1:
        most = min(1.0, math.log(surrogate.ratio_max / surrogate.ratio_min))
        x = math.log(surrogate.ratio_min) + most * np.array([0.9, 0.1, 0.4])
    weight = policy.sign * weights / weights.sum() * _total(loss, surrogate, x)
    fits = _fitting(loss, surrogate, weight, x)
    if is_vespo:
        if "product" in fits:
            return LevelFound("sequence", surrogate)
        text = f"VESPO's weight is of {_whose(fits)} ratio, not of the product over the sequence"
        return LevelFound("sequence", surrogate, (Finding("differs", text, "", "", sequence_of(loss, x)),))
    if not fits:
        text = "the ratio of a sequence's tokens is neither each one's own nor a mean of the sequence"
        value = _value(loss, x) / weight.mean()
        amount = f"Σ s = {number(value)} for ρ = {[rounded(r) for r in np.exp(x)]}"
        return LevelFound(None, surrogate, (Finding("differs", text, "", amount, sequence_of(loss, x)),))
    bounded = _bounded(surrogate)
    findings: list[Finding] = []
    if "sequence" in fits and isinstance(surrogate, (Clip, Unclipped)):
        gmpo = _gmpo(loss, weight)
        if gmpo is not None:
            return gmpo
    if bounded is not None:
        y = bounded * np.array([1.5, -1.6, 0.4])
        again = _fitting(loss, surrogate, weight, y)
        if "sequence" in fits and "token" not in fits and "sequence" not in again:
            text = "the ratio is the sequence's where nothing is clipped, and another where a token is"
            findings.append(Finding("differs", text, "", "", sequence_of(loss, y)))
        fits = [name for name in fits if name in again] or fits
    if fits[0] == "product":
        text = "the sequence's ratio is the product of its tokens' (exp of the sum), not their geometric mean"
        findings.append(Finding("differs", text, "sequences of two tokens or more", "", sequence_of(loss, x[:2])))
    if fits[0] == "arithmetic":
        text = "the sequence's ratio is the mean of its tokens' (a mean of exps), not the exp of the mean log-ratio"
        findings.append(Finding("differs", text, "tokens with different ratios", "", sequence_of(loss, x[:2])))
    if fits[0] == "token":
        return LevelFound("token", surrogate, tuple(findings))
    level = "sequence"
    if per_token and loss.gives_gradient and not isinstance(surrogate, CISPO):
        level = _whose_advantage(loss, x)
    of_width = _divisor(loss, surrogate, fits[0], low)
    divisor = "1" if fits[0] == "product" else "T" if of_width else "n_i"
    if isinstance(surrogate, CISPO) or level == "sequence_token":  # no gradient goes through the sequence's ratio
        divisor = "n_i"
    return LevelFound(level, surrogate, (*findings, *of_width), divisor)


def _whose(fits: list[str]) -> str:
    return "each token's" if "token" in fits else "the geometric mean's" if "sequence" in fits else "another"


def _value(loss: Loss, x: Floats, mask: Any = None, A: float = 1.0) -> float:
    return loss.policy_value(sequence_of(loss, x, A, mask=mask))


def _total(loss: Loss, surrogate: Any, x: Floats) -> float:
    """The sum of the weights, by the value where all ratios are 1, so that the gradient may be wrong."""
    at = sequence_of(loss, 0 * x)
    return abs(_value(loss, 0 * x) / float(_s(surrogate, 0 * x, at)[0]))


def _s(surrogate: Any, log_ratio: Floats, at: Batch) -> Floats:
    """s of these tokens, A = 1, each a sequence of its own with this log-ratio."""
    logp = at.logps[0]
    tokens = reference._Tokens.of(logp, None, np.arange(logp.size + 1))
    s = reference.policy_term(surrogate, log_ratio, np.ones_like(logp), logp, tokens, "sequence")[0]
    return s.astype(np.float64)


def _fitting(loss: Loss, surrogate: Any, weight: Floats, x: Floats) -> list[str]:
    at = sequence_of(loss, x)
    value = _value(loss, x)
    tol = max(1e-7, loss.exactness * 100)
    found = []
    for name, log_ratio in _RATIOS.items():
        expected = float(np.sum(weight * _s(surrogate, log_ratio(x), at)))
        spread = float(np.sum(np.abs(weight * _s(surrogate, log_ratio(x), at))))
        if abs(value - expected) <= max(min(tol, 1e-2 * np.ptp(x) ** 2), 72 * loss.eps) * spread:
            found.append(name)
    return found


def _bounded(surrogate: Any) -> float | None:
    """A log-ratio at which the surrogate is bent where A > 0."""
    if isinstance(surrogate, Clip) and 0 < surrogate.epsilon_high < math.inf:
        return math.log1p(surrogate.epsilon_high)
    if isinstance(surrogate, CISPO) and 1 < surrogate.ratio_max < math.inf:
        return math.log(surrogate.ratio_max)
    return 0.5 if isinstance(surrogate, SAPO) else None


def _gmpo(loss: Loss, weight: Floats) -> LevelFound | None:
    """GMPO, if each token's log-ratio is bounded within the geometric mean, or None.

    The mean of these log-ratios is 0, so that ρ is 1, which neither clips nor a trust region leaves out. With one above
    the upper bound and one below the lower one the sum of the bounded ones is upper − lower; with the second split in
    two, lower counts twice. Where there is no lower bound the sums are the same.
    """
    total = float(weight.sum())

    def mean(x: Floats, A: float) -> float:
        value = A * _value(loss, x, A=A) / total
        return 3 * math.log(value) if 0 < value < math.inf else math.nan

    bounds: dict[float, tuple[float, float]] = {}
    error = loss.exactness
    for A in (1.0, -1.0):
        two, three = (A * mean(A * _WIDE * np.array(x), A) for x in ([1, -1, 0], [1, -0.5, -0.5]))
        if math.isnan(two) or math.isnan(three):
            return None
        # In the direction of A: what bounds from above, and what from below.
        low = two - three
        high = two + (low if low > 1e-6 else _WIDE)
        bounds[A] = (
            tidy(high, error) if high < 0.999 * _WIDE else math.inf,
            tidy(low, error) if 1e-6 < low < 0.49 * _WIDE else math.inf,
        )
    (high, other_low), (low, other_high) = bounds[1.0], bounds[-1.0]
    x = _WIDE * np.array([0.9, -0.6, -0.3])
    expected = total * math.exp(float(np.clip(x, -other_low, high).mean()))
    if min(*bounds[1.0], *bounds[-1.0]) == math.inf or min(*bounds[1.0], *bounds[-1.0]) < 0:
        return None
    if abs(_value(loss, x) - expected) > max(1e-7, min(100 * loss.exactness, 0.01)) * abs(expected):
        return None
    if other_low == other_high == math.inf:
        return LevelFound("sequence", GMPO(low, high))
    what = (
        "clamps each token's log-ratio on both sides, whatever the sign of A: the minimum with it unclamped is missing"
    )
    if high == low == math.inf:
        what = "takes the larger of the clamped and the unclamped log-ratio (max for min) of each token"
        low, high = other_low, other_high
    example = sequence_of(loss, _WIDE * np.array([-1.0, 0.5, 0.5]))
    return LevelFound("sequence", GMPO(low, high), (Finding("differs", what, "log-ratios far from 0", "", example),))


def _whose_advantage(loss: Loss, x: Floats) -> str:
    A = np.array([1.0, 2.0, 4.0])
    grad, zero = loss(sequence_of(loss, x, A)).grad, loss(sequence_of(loss, x, 0 * A)).grad
    assert grad is not None
    assert zero is not None
    grad = (grad - zero)[0]
    return "sequence_token" if np.allclose(grad / grad[0], A, rtol=1e-4) else "sequence"


def _divisor(loss: Loss, surrogate: Any, ratio: str, low: float) -> list[Finding]:
    """Whether the mean log-ratio of a sequence is divided by its tokens, or by the width of the padding."""
    if "mask" not in loss.takes or ratio != "sequence":
        return []
    mask = np.array([True, True, False, False])
    x = low * np.array([0.9, 0.5, 0.0, 0.0])
    one = _value(loss, 0 * x, mask)
    value = _value(loss, x, mask)
    at = sequence_of(loss, x)
    scale = _s(surrogate, 0 * x, at)[:2].sum()
    of_tokens, of_width = (
        one * _s(surrogate, np.full(4, x.sum() / by), at)[:2].sum() / scale for by in (x[mask].size, x.size)
    )
    error = max(1e-7, loss.exactness * 100)
    if abs(value - of_tokens) <= error * abs(of_tokens) or abs(value - of_width) > error * abs(of_width):
        return []
    text = "the sequence's log-ratio is divided by the padded width, not by the number of its tokens"
    amount = f"Σ s = {number(value / one * 2)} for ρ = {[rounded(r) for r in np.exp(x[:2])]} and two masked tokens"
    return [Finding("differs", text, "every sequence with padding", amount, sequence_of(loss, x, mask=mask))]

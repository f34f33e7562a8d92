"""Which policy term a curve is: Clip, CISPO and Unclipped by their bounds, SAPO and VESPO by their shape."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..terms import CISPO, SAPO, VESPO, Clip, Unclipped
from .curves import Bounds, Curve, Tokens
from .numbers import tidy
from .report import Finding, Topic, number

Mask = NDArray[np.bool_]


_BOTH: Topic = "both bounds"


# --- by bounds --------------------------------------------------------------------------------------------------------
def bounded(tokens: Tokens, bounds: dict[int, Bounds]) -> tuple[Any, list[Finding]]:
    """The option with these bounds, and what is wrong with them."""
    error = tokens.loss.exactness / 1000  # a bound is a value, which is known to the rounding of a sum or two
    up, down = bounds[1], bounds[-1]
    if tokens.kind == "weight":
        return _cispo(tokens, up, down, error)
    if up[:2] == down[:2] == (0.0, math.inf):
        return Unclipped(), []
    if up.low == 0 and up.high >= 1 and down.low <= 1 < down.high:
        return _clip(tokens, up, down, error)
    low, high = max(up.low, down.low), min(up.high, down.high)
    option, topic = Clip(_below(low, error), _above(high, error)), _BOTH
    if up.low > 0 and up.high == math.inf and down.low == 0 and down.high < math.inf:
        what = (
            "takes the larger of the clipped and the unclipped term (max for min): it clips where it should not, and "
            "does not where it should"
        )
        amount = f"flat for A > 0 below ρ = {number(up.low)} and for A < 0 above {number(down.high)}"
        option = Clip(_below(up.low, error), _above(down.high, error))
    elif up.low > 0 and up.high < math.inf:
        what = "clips ρ on both sides whatever the sign of A: the minimum with the unclipped term is missing"
        amount = f"flat for A > 0 below ρ = {number(up.low)} as above {number(up.high)}"
    else:
        what, topic = "is bounded otherwise than a clipped surrogate", ""
        amount = f"A > 0: {number(up.low)} ≤ ρ ≤ {number(up.high)}; A < 0: {number(down.low)} ≤ ρ ≤ {number(down.high)}"
    x = -1.0 if up.low > 0 else 1.0
    return option, [Finding("differs", what, "outside of the clip's range", amount, tokens.at(x, 1.0), topic)]


def _below(b: float, error: float) -> float:
    # First the bound itself, which may be that of float32: 1.2 is 1.20000005 there, and ε no rounding of 0.2.
    b = tidy(b, error)
    return tidy(1 - b, error / max(1 - b, 1e-3)) if 0 < b <= 1 else math.inf


def _above(b: float, error: float) -> float:
    b = tidy(b, error)
    return tidy(b - 1, error / max(b - 1, 1e-3)) if 1 <= b < math.inf else math.inf


def _clip(tokens: Tokens, up: Bounds, down: Bounds, error: float) -> tuple[Any, list[Finding]]:
    high, low = _above(up.high, error), _below(down.low, error)
    delta = math.inf if down.high == math.inf else tidy(down.high, error)
    if delta > 1 + high or delta == math.inf:
        return Clip(low, high, delta), []
    if abs(delta - 1 - high) <= 100 * error:
        both = (
            "both bounds of the clip act" if low < math.inf else "the upper bound of the clip acts, not the lower one,"
        )
        what = f"{both} where A < 0: no gradient comes back once ρ is above 1 + ε_high"
        amount = f"s/A = {number(delta)} for every ρ above it, where A < 0"
        return Clip(low, high), [Finding("differs", what, "A < 0 and ρ > 1 + ε_high", amount, tokens.at(1.0, -1.0))]
    what = "for A < 0 the ratio is bounded below 1 + ε_high"
    amount = f"at {number(delta)}, where 1 + ε_high is {number(1 + high)}"
    return Clip(low, high), [Finding("differs", what, "A < 0", amount, tokens.at(1.0, -1.0))]


def _cispo(tokens: Tokens, up: Bounds, down: Bounds, error: float) -> tuple[Any, list[Finding]]:
    high = tidy(min(up.high, down.high), error)
    low = tidy(max(up.low, down.low), error)
    option = CISPO(high, min(low, high))
    # A bound that lies where the token is dropped is not seen, and does not matter.
    seen = [(b.high, high, b.most) for b in (up, down)] + [(-b.low, -low, -b.least) for b in (up, down)]
    if all(math.isclose(has, one, rel_tol=100 * error) or math.isfinite(edge) for has, one, edge in seen):
        return option, []
    what = "the weight of the policy gradient has other bounds where A < 0"
    amount = f"{number(down.low)} … {number(down.high)}, and {number(up.low)} … {number(up.high)} where A > 0"
    return None, [Finding("differs", what, "A < 0", amount, tokens.at(2.0, -1.0))]


def notes(bounds: dict[int, Bounds], error: float) -> Iterable[str]:
    """That a clip was of the log-ratio, if its bounds are round there and not as they stand."""
    high, low = bounds[1].high, bounds[-1].low
    if 0 < low < 1 < high < math.inf:
        logs = tidy(-math.log(low), 10 * error), tidy(math.log(high), 10 * error)
        digits = [len(f"{x:.12g}") for x in (*logs, tidy(1 - low, 10 * error), tidy(high - 1, 10 * error))]
        if max(digits[:2]) + 4 < min(digits[2:]):
            yield f"the clip is of log ρ, at −{logs[0]:g} and {logs[1]:g}: the same formula with these ε"


# --- by shape ---------------------------------------------------------------------------------------------------------
def smooth(tokens: Tokens, curves: dict[int, Curve], kept: dict[int, Mask], tol: float) -> Any:
    """SAPO or VESPO with these values, or None."""
    return _vespo(curves, kept, tol) if tokens.kind == "weight" else _sapo(curves, kept, tol)


def _sapo(curves: dict[int, Curve], kept: dict[int, Mask], tol: float) -> Any:
    taus = []
    for sign, curve in curves.items():
        with np.errstate(all="ignore"):
            tau = float(2 / curve.value[curve.x.size // 2])  # s/A is 2/τ at ρ = 1
            if not 0 < tau < math.inf:
                return None
            one = np.ones_like(curve.x)
            expected = reference.surrogate_term(SAPO(tau, tau), np.exp(curve.x), one, curve.logp)[0]
        room = 10 * tol * expected + curve.noise
        if not np.all(np.abs(curve.value - expected)[kept[sign]] <= room[kept[sign]]):
            return None
        taus.append(tidy(tau, tol / 100))
    return SAPO(*taus)


def _vespo(curves: dict[int, Curve], kept: dict[int, Mask], tol: float) -> Any:
    found: list[float] = []
    for sign, curve in curves.items():
        near = kept[sign] & (np.abs(curve.x) <= 1.5) & (curve.value > 0)
        if near.sum() < 10:
            return None
        x, log_value = curve.x[near], np.log(curve.value[near])
        system = np.stack([x, 1 - np.exp(x)], axis=1)
        (k, lam), *_ = np.linalg.lstsq(system, log_value, rcond=None)
        if np.abs(system @ (k, lam) - log_value).max() > 1e3 * tol or lam < -1e-6 or k < -1e-6:
            return None
        found += [tidy(x, tol) if x > 1e-6 else 0.0 for x in (k, lam)]
    trivial = [(k, lam) in ((0.0, 0.0), (1.0, 0.0)) for k, lam in (found[:2], found[2:])]  # φ = 1, and φ = ρ
    return None if all(trivial) else VESPO(*found)


# --- none of these ----------------------------------------------------------------------------------------------------
def unknown(tokens: Tokens, curve: Curve, sign: int, off: Mask) -> Finding:
    """That a curve is none of these, with its numbers; or what is missing in it."""
    i = min(np.flatnonzero(off), key=lambda i: abs(curve.x[i]))
    rows = [f"{number(math.exp(x))}: {number(v)}, {number(g)}" for x, v, g in _sampled(curve)]
    what = _other_function(curve) or "the policy term is none that grpo_loss has"
    amount = f"ρ: s/A, its gradient/A, for A {'>' if sign > 0 else '<'} 0: " + "; ".join(rows)
    return Finding("differs", what, f"log ρ = {number(curve.x[i])}", amount, tokens.at(float(curve.x[i]), float(sign)))


def _other_function(curve: Curve) -> str:
    """What the ratio is instead, if near 1 it is a known function of log ρ."""
    near = np.abs(curve.x) < 0.16
    x, value = curve.x[near], curve.value[near]
    for text, expected in (("log ρ", x), ("1 + log ρ", 1 + x)):
        fits = np.abs(value - expected) <= 1e-6
        if fits.sum() >= 4 and not np.allclose(value[fits], np.exp(x[fits]), atol=1e-6):
            return f"the ratio is {text}: its exp is missing"
    with np.errstate(all="ignore"):
        powers = np.log(value / value[x == 0])[x != 0] / x[x != 0]
    power = tidy(float(np.median(powers)), 1e-6)
    if (np.abs(powers - power) <= 1e-5).sum() >= 4 and power > 0 and power != 1:
        if power == 2 and np.allclose(curve.slope[near][x == 0], value[x == 0], rtol=1e-4):
            return "the policy term is multiplied by ρ once more, which is held constant"
        return f"the ratio is ρ^{number(power)}: log-probabilities are divided by {number(tidy(1 / power, 1e-5))} in it"
    return ""


def _sampled(curve: Curve) -> Iterable[tuple[float, float, float]]:
    for x in (-1.5, -0.5, -0.1, 0.0, 0.1, 0.5, 1.5):
        i = int(np.argmin(np.abs(curve.x - x)))
        yield float(curve.x[i]), float(curve.value[i]), float(curve.slope[i])

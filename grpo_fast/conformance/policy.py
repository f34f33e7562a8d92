"""The policy term of one token, read along log ρ for either sign of A: s/A and (∂s/∂logp)/A, apart from each other.

A batch of one token has no level and no aggregation: the loss is −c·s + c·β·k, and what remains of it when that of
A = 0 is taken away is s alone, whatever the KL term. Value and gradient are read each for itself: that tells a weight
which is held constant from one that is not.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import terms
from ..terms import CISPO, SAPO, TV, Band, BinaryKL, Clip, Unclipped
from .calling import Batch, CallFailed, Loss, batch
from .numbers import bisect, is_round, tidy
from .report import Finding, number

Floats = NDArray[np.float64]
#: log π of the more probable of π_θ and π_old: far below 0, where no trust region of probabilities acts; and near 0,
#: where it has room to.
ANCHOR = -9.0
_NEAR = -0.01
_STEPS = np.concatenate([np.arange(1, 61) * 0.05, np.arange(7, 25) * 0.5, [13, 14, 16, 18, 21, 24, 28, 34, 42, 60]])
GRID = np.concatenate([-_STEPS[::-1], [0.0], _STEPS])
#: A log-ratio as large as this is not where a surrogate is clipped: bounds there are of the log-ratio itself.
_CLAMPS = 4.0


class Curve(NamedTuple):
    """s/A and (∂s/∂logp)/A over ``x`` = log ρ, for one sign of A; divided by the token's weight in the loss."""

    x: Floats
    value: Floats
    slope: Floats
    logp: Floats
    noise: Floats  # of the slope, which is a difference: the rounding of what it is a difference of


class Policy(NamedTuple):
    """What was read of the policy term."""

    scale: float  # of the loss: its slope at ρ = 1 for A = 1, with the sign that a loss has
    surrogate: Any  # an option of `grpo_loss`, or None
    trust_region: Any
    kind: Literal["ratio", "weight", "constant", "none"]  # s = f(ρ)·A, w(ρ)·A·log π_θ, no ρ, or nothing
    width: int  # of the batch of equal tokens that stood for one
    inside: tuple[float, float]  # an interval of log ρ in which nothing is bounded for A > 0
    clamp: tuple[float, float]  # bounds of the log-ratio itself
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


class _Tokens:
    """One token of the loss, or, if it does not react to one, several that are equal."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.width = 1

    def at(self, x: float, A: float, anchor: float = ANCHOR) -> Batch:
        logp, old = (anchor, anchor - x) if x >= 0 else (anchor + x, anchor)
        shape = (1, self.width)
        return batch(np.full(shape, logp), np.full(shape, old), [A])

    def of(self, x: float, A: float, anchor: float = ANCHOR) -> tuple[float, float]:
        """−loss and the sum of −∂loss/∂logps, less those of A = 0."""
        found = self.loss(self.at(x, A, anchor))
        without = self.loss(self.at(x, 0.0, anchor))
        assert found.grad is not None
        assert without.grad is not None
        # adding 0.0 makes 0.0 of −0.0
        return without.loss - found.loss + 0.0, float(np.sum(without.grad) - np.sum(found.grad)) + 0.0


def read(loss: Loss) -> Policy:
    """Read the policy term of a loss."""
    tokens = _Tokens(loss)
    nothing = Policy(1.0, None, None, "none", 1, (-0.1, 0.1), (-math.inf, math.inf))
    for tokens.width in (1, 3, 6):
        first = tokens.of(0.0, 1.0)
        if all(map(math.isfinite, first)) and any(first):
            break
    else:
        return nothing._replace(findings=(_no_reaction(loss, tokens),))
    kind = _kind(tokens)
    scale = first[0] / ANCHOR if kind == "weight" else first[1] or first[0]
    findings = [*_sign(tokens, scale), *_linearity(tokens, scale)]
    scale = abs(scale)
    if "old_logps" not in loss.takes:
        note = "it takes no old_logps: on-policy, ρ = 1, which is old_logps=None"
        surrogate = CISPO(math.inf) if kind == "weight" else Unclipped()
        if not first[1]:
            findings.append(_without_gradient(tokens))
        return nothing._replace(
            scale=scale, surrogate=surrogate, kind=kind, width=tokens.width, findings=tuple(findings), notes=(note,)
        )
    curves = {sign: _curve(tokens, sign, scale, kind) for sign in (1, -1)}
    named = _named(tokens, curves, kind, scale)
    return named._replace(scale=scale, width=tokens.width, findings=(*findings, *named.findings))


# --- before the curves ------------------------------------------------------------------------------------------------
def _no_reaction(loss: Loss, tokens: _Tokens) -> Finding:
    tokens.width = 3
    where = "one sequence, A = 1 beside A = 0, at ρ = 1"
    example = tokens.at(0.0, 1.0)
    if not math.isfinite(loss(example).loss):
        return Finding("differs", "is NaN or infinite for one sequence with an advantage of 1", where, "", example)
    shifted = [loss(batch(np.full((2, 2), -1.0), advantages=A)).grad for A in ([1.0, -1.0], [6.0, 4.0])]
    if shifted[0] is not None and shifted[0].any() and np.allclose(shifted[0], shifted[1], rtol=1e-4):
        what = "normalises the advantages over the batch inside of the loss: their mean and scale do not matter"
        example = batch(np.full((2, 2), -1.0), advantages=[6.0, 4.0])
        return Finding("differs", what, "advantages (6, 4) give the gradient of (1, −1)", "", example)
    return Finding("differs", "does not depend on the advantages", where, "neither loss nor gradient changes", example)


def _kind(tokens: _Tokens) -> Literal["ratio", "weight"]:
    """Whether s is proportional to log π_θ, as those with a weight that is held constant."""
    near, far = tokens.of(0.0, 1.0, _NEAR)[0], tokens.of(0.0, 1.0, 100 * _NEAR)[0]
    return "weight" if near and abs(far / near - 100) < 0.01 else "ratio"


def _sign(tokens: _Tokens, scale: float) -> Iterable[Finding]:
    if scale < 0:
        what = "the sign of the policy term is reversed: minimising this lowers the probability of what is rewarded"
        amount = f"∂loss/∂logp = {number(abs(scale))} where it should be {number(-abs(scale))}"
        yield Finding("differs", what, "A = 1, ρ = 1", amount, tokens.at(0.0, 1.0))
    positive, negative = (tokens.of(0.0, A)[1] or tokens.of(0.0, A)[0] for A in (1.0, -1.0))
    if abs(positive + negative) > 1e-4 * abs(positive):
        what = "tokens with A < 0 weigh otherwise than those with A > 0"
        if negative == 0:
            what = "tokens with A < 0 are left out"
        elif abs(positive - negative) <= 1e-4 * abs(positive):
            what = "the sign of A does not matter"
        amount = f"{number(negative)} at A = −1, {number(positive)} at A = 1"
        yield Finding("differs", what, "at ρ = 1", amount, tokens.at(0.0, -1.0))


def _linearity(tokens: _Tokens, scale: float) -> Iterable[Finding]:
    def factor(A: float) -> float:
        one, many = tokens.of(0.0, math.copysign(1.0, A)), tokens.of(0.0, A)
        return many[1] / one[1] if one[1] else many[0] / one[0] if one[0] else abs(A)

    for sign in (1, -1):
        wrong = next((A for A in (2.0, 5.0, 10.0, 30.0, 100.0) if abs(factor(sign * A) / A - 1) > 1e-4), None)
        if wrong is None:
            continue
        most = factor(sign * 1e4)
        if abs(factor(sign * 2e4) / most - 1) < 1e-6 and most > 1:
            what = f"advantages are clamped at {number(tidy(sign * most, 1e-5))}"
        else:
            what = "is not linear in the advantage"
        amount = f"A = {sign * wrong:g} counts {number(factor(sign * wrong))} times as much as A = {sign}"
        yield Finding("differs", what, "at ρ = 1", amount, tokens.at(0.0, sign * wrong))


def _without_gradient(tokens: _Tokens) -> Finding:
    what = "the policy term has no gradient: the ratio is detached (a stop-gradient too many)"
    return Finding("differs", what, "everywhere", "∂s/∂logp = 0 where s = ρA", tokens.at(0.0, 1.0))


# --- the curves -------------------------------------------------------------------------------------------------------
def _curve(tokens: _Tokens, sign: int, scale: float, kind: str, anchor: float = ANCHOR) -> Curve:
    found, noise = [], []
    for x in GRID:
        try:
            found.append(tokens.of(x, float(sign), anchor))
            grad = tokens.loss(tokens.at(x, 0.0, anchor)).grad
            assert grad is not None
            noise.append(float(np.abs(grad).sum()))
        except CallFailed:
            found.append((math.nan, math.nan))
            noise.append(0.0)
    points = np.array(found).T / (sign * scale)
    first = tokens.of(0.0, 1.0)
    if (first[0] if kind == "weight" or not first[1] else -first[1]) * (ANCHOR if kind == "weight" else -1) < 0:
        points = -points  # a loss whose sign is reversed is read as if it were not: that has been told
    logp = np.where(GRID >= 0, anchor, anchor + GRID)
    value = points[0] / logp if kind == "weight" else points[0]
    return Curve(GRID, value, points[1], logp, 16 * tokens.loss.eps * np.array(noise) / scale)


class _Bounds(NamedTuple):
    """Of one sign of A: where the value is flat (ρ), and beyond which log ρ nothing is left of it."""

    low: float
    high: float
    least: float
    most: float


def _named(tokens: _Tokens, curves: dict[int, Curve], kind: Any, scale: float) -> Policy:
    tol = tokens.loss.exactness * 10
    none = (-math.inf, math.inf)
    policy = Policy(scale, None, None, kind, tokens.width, (-0.1, 0.1), none)
    both = np.concatenate([curves[1].value, curves[-1].value])
    if kind == "ratio" and np.allclose(both, both[0], rtol=1e-6, atol=0):
        what = "the ratio is against its own detached self: it is 1 always, and never clips; old_logps is not used"
        amount = f"s/A = {number(both[0])} at ρ = {number(math.exp(3))} as at ρ = 1"
        finding = Finding("differs", what, "every ρ but 1", amount, tokens.at(1.0, 1.0))
        slopes = np.concatenate([curves[1].slope, curves[-1].slope])
        if not slopes.any():
            return policy._replace(surrogate=Unclipped(), kind="constant", findings=(_without_gradient(tokens),))
        return policy._replace(surrogate=Unclipped(), kind="constant", findings=(finding,))
    dropped = {sign: _dropped(tokens, curve, sign) for sign, curve in curves.items()}
    kept = {sign: (dropped[sign][0] < c.x) & (c.x < dropped[sign][1]) for sign, c in curves.items()}
    near = {sign: _curve(tokens, sign, scale, kind, _NEAR) for sign in curves}
    region, findings = _region(tokens, dropped, {s: _dropped(tokens, curve, s, _NEAR) for s, curve in near.items()})
    smooth = _sapo(curves, kept, tol) if kind == "ratio" else _vespo(curves, kept, tol)
    if smooth is not None:
        findings += _slopes(tokens, curves, kept, {}, kind, smooth)
        inside = (max(-1.0, dropped[1][0] / 2), min(1.0, dropped[1][1] / 2))
        return policy._replace(surrogate=smooth, trust_region=region, inside=inside, findings=tuple(findings))
    bounds = {sign: _flat(tokens, curves[sign], sign, kind, scale, tol, dropped[sign]) for sign in curves}
    clamp, bounds = _clamps(bounds)
    for sign, curve in curves.items():
        expected = np.clip(np.exp(np.clip(curve.x, *clamp)), bounds[sign].low, bounds[sign].high)
        off = kept[sign] & (np.abs(curve.value - expected) > tol * expected * (1 + np.abs(curve.x)))
        if off.any():
            return policy._replace(findings=(*findings, _unknown(tokens, curve, sign, expected, off)))
    surrogate, more = _surrogate(tokens, bounds, kind)
    findings += more
    findings += _slopes(tokens, curves, kept, bounds, kind, None, clamp)
    low = max(-1.0, math.log(bounds[1].low) / 2 if bounds[1].low > 0 else -1.0, dropped[1][0] / 2)
    high = min(1.0, math.log(bounds[1].high) / 2, dropped[1][1] / 2)
    if any(map(math.isfinite, clamp)):
        findings.append(_clamped(tokens, clamp))
    notes = _notes(bounds, tokens.loss.exactness)
    return policy._replace(
        surrogate=surrogate,
        trust_region=region,
        inside=(low, high),
        clamp=clamp,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _clamped(tokens: _Tokens, clamp: tuple[float, float]) -> Finding:
    low, high = clamp
    bounds = f"±{high:g}" if -low == high else f"{high:g}" if low == -math.inf else f"{low:g}"
    severity: Any = "fragile" if min(abs(low), abs(high)) >= 20 else "differs"
    beyond = high + 1 if high < math.inf else low - 1
    A = -1.0 if high < math.inf else 1.0
    what = f"the log-ratio is clamped at {bounds}: no gradient beyond"
    return Finding(severity, what, f"|log ρ| > {min(abs(low), abs(high)):g}", "", tokens.at(beyond, A))


# --- bounds -----------------------------------------------------------------------------------------------------------
def _dropped(tokens: _Tokens, curve: Curve, sign: int, anchor: float = ANCHOR) -> tuple[float, float]:
    """Between which log-ratios a token keeps its policy term: where it falls to 0 at once, value and gradient."""

    def gone(x: float) -> bool:
        return tokens.of(x, float(sign), anchor) == (0.0, 0.0)

    bounds = [-math.inf, math.inf]
    zero = (curve.value == 0) & (curve.slope == 0)
    middle = int(np.flatnonzero(curve.x == 0)[0])
    for side, places in ((0, range(middle, -1, -1)), (1, range(middle, curve.x.size))):
        first = next((i for i in places if zero[i]), None)
        if first is None or first == middle:
            continue
        last = first + 1 if side == 0 else first - 1
        edge = bisect(gone, float(curve.x[last]), float(curve.x[first]))
        before = edge - math.copysign(1e-6 * max(1.0, abs(edge)), edge)
        if abs(tokens.of(before, float(sign), anchor)[0]) > 1e-6 * abs(tokens.of(0.0, float(sign), anchor)[0]) * min(
            1.0, math.exp(before)
        ):
            bounds[side] = edge
    return bounds[0], bounds[1]


def _flat(
    tokens: _Tokens, curve: Curve, sign: int, kind: str, scale: float, tol: float, dropped: tuple[float, float]
) -> _Bounds:
    """At which ρ the value stops to fall and to grow, at the ends of what is kept: where two of its values are one."""
    found = []
    for side in (-1, 1):
        edge = dropped[0 if side < 0 else 1]
        ends = [edge - side * d * max(1.0, abs(edge)) for d in (1e-3, 1e-2)] if math.isfinite(edge) else GRID[[0, 1]]
        ends = [abs(x) * side for x in ends] if math.isinf(edge) else ends
        values = [_value_at(tokens, curve, x, sign, kind, scale) for x in ends]
        found.append(values[0] if abs(values[0] - values[1]) <= tol * abs(values[0]) else None)
    low, high = found
    return _Bounds(0.0 if low is None else low, math.inf if high is None else high, *dropped)


def _value_at(tokens: _Tokens, curve: Curve, x: float, sign: int, kind: str, scale: float) -> float:
    """The value of a curve at another place, with its own sign."""
    at = tokens.at(x, float(sign))
    value = tokens.of(x, float(sign))[0] / (sign * scale) / (float(at.logps[0, 0]) if kind == "weight" else 1.0)
    middle = int(np.flatnonzero(curve.x == 0)[0])
    own = tokens.of(0.0, float(sign))[0] / (sign * scale) / (ANCHOR if kind == "weight" else 1.0)
    return value if own * curve.value[middle] >= 0 else -value


def _clamps(bounds: dict[int, _Bounds]) -> tuple[tuple[float, float], dict[int, _Bounds]]:
    """The bounds of the log-ratio itself, told from those of the ratio by where they lie; and the bounds without."""
    low, high = -math.inf, math.inf
    for sign, b in bounds.items():
        if b.low > 0 and math.log(b.low) <= -_CLAMPS and is_round(math.log(b.low), 1e-4):
            low = round(2 * math.log(b.low)) / 2
            bounds[sign] = b = b._replace(low=0.0)
        if b.high < math.inf and math.log(b.high) >= _CLAMPS and is_round(math.log(b.high), 1e-4):
            high = round(2 * math.log(b.high)) / 2
            bounds[sign] = b._replace(high=math.inf)
    return (low, high), bounds


def _surrogate(tokens: _Tokens, bounds: dict[int, _Bounds], kind: str) -> tuple[Any, list[Finding]]:
    """The option with these bounds, and what is wrong with them."""
    error = tokens.loss.exactness
    up, down = bounds[1], bounds[-1]
    if kind == "weight":
        high = tidy(min(up.high, down.high), error)
        low = tidy(max(up.low, down.low), error)
        option = CISPO(high, low)
        # A bound that lies where the token is dropped is not seen, and does not matter.
        seen = [(b.high, high, b.most) for b in (up, down)] + [(-b.low, -low, -b.least) for b in (up, down)]
        if all(math.isclose(has, one, rel_tol=100 * error) or math.isfinite(edge) for has, one, edge in seen):
            return option, []
        what = "the weight of the policy gradient has other bounds where A < 0"
        amount = f"{number(down.low)} … {number(down.high)}, and {number(up.low)} … {number(up.high)} where A > 0"
        return option, [Finding("differs", what, "A < 0", amount, tokens.at(2.0, -1.0))]

    def below(b: float) -> float:
        return tidy(1 - b, error / max(1 - b, 1e-3)) if 0 < b < 1 else math.inf

    def above(b: float) -> float:
        return tidy(b - 1, error / max(b - 1, 1e-3)) if 1 <= b < math.inf else math.inf

    pessimistic = up.low == 0 and (down.high == math.inf or down.high > 1)
    if up.low == 0 and down.low == 0 and up.high == math.inf and down.high == math.inf:
        return Unclipped(), []
    if pessimistic and up.high >= 1 and down.low <= 1:
        high, low = above(up.high), below(down.low)
        delta = math.inf if down.high == math.inf else tidy(down.high, error)
        if delta > 1 + high or delta == math.inf:
            return Clip(low, high, delta), []
        if abs(delta - 1 - high) <= 100 * error:
            what = "both bounds of the clip act where A < 0: no gradient comes back once ρ is above 1 + ε_high"
            amount = f"s/A = {number(delta)} for every ρ above it, where A < 0"
            return Clip(low, high), [Finding("differs", what, "A < 0 and ρ > 1 + ε_high", amount, tokens.at(1.0, -1.0))]
        what = "for A < 0 the ratio is bounded below 1 + ε_high"
        amount = f"at {number(delta)}, where 1 + ε_high is {number(1 + high)}"
        return Clip(low, high), [Finding("differs", what, "A < 0", amount, tokens.at(1.0, -1.0))]
    low, high = (max(up.low, down.low), min(up.high, down.high))
    option = Clip(below(low), above(high))
    if up.low > 0 and up.high == math.inf and down.low == 0 and down.high < math.inf:
        what = (
            "takes the larger of the clipped and the unclipped term (max for min): it clips where it should not, and "
        )
        what += "does not where it should"
        amount = f"flat for A > 0 below ρ = {number(up.low)} and for A < 0 above {number(down.high)}"
        option = Clip(below(up.low), above(down.high))
    elif up.low > 0 and up.high < math.inf:
        what = "clips ρ on both sides whatever the sign of A: the minimum with the unclipped term is missing"
        amount = f"flat for A > 0 below ρ = {number(up.low)} as above {number(up.high)}"
    else:
        what = "is bounded otherwise than a clipped surrogate"
        amount = f"A > 0: {number(up.low)} ≤ ρ ≤ {number(up.high)}; A < 0: {number(down.low)} ≤ ρ ≤ {number(down.high)}"
    x = -1.0 if up.low > 0 else 1.0
    return option, [Finding("differs", what, "outside of the clip's range", amount, tokens.at(x, 1.0))]


def _notes(bounds: dict[int, _Bounds], error: float) -> Iterable[str]:
    """That a clip was of the log-ratio, if its bounds are round there and not as they stand."""
    high, low = bounds[1].high, bounds[-1].low
    if 0 < low < 1 < high < math.inf:
        logs = tidy(-math.log(low), 10 * error), tidy(math.log(high), 10 * error)
        digits = [len(f"{x:.12g}") for x in (*logs, tidy(1 - low, 10 * error), tidy(high - 1, 10 * error))]
        if max(digits[:2]) + 4 < min(digits[2:]):
            yield f"the clip is of log ρ, at −{logs[0]:g} and {logs[1]:g}: the same formula with these ε"


# --- smooth ones ------------------------------------------------------------------------------------------------------
def _sapo(curves: dict[int, Curve], kept: dict[int, NDArray[np.bool_]], tol: float) -> Any:
    middle = np.flatnonzero(GRID == 0)[0]
    taus = []
    for sign, curve in curves.items():
        tau = 2 / curve.value[middle] if curve.value[middle] > 0 else math.nan
        with np.errstate(all="ignore"):
            expected = 4 / tau / (1 + np.exp(-tau * (np.exp(curve.x) - 1)))
        if not np.all(np.abs(curve.value - expected)[kept[sign]] <= tol * expected[kept[sign]] * 10):
            return None
        taus.append(tidy(tau, tol))
    return SAPO(*taus)


def _vespo(curves: dict[int, Curve], kept: dict[int, NDArray[np.bool_]], tol: float) -> Any:
    kind: Any = getattr(terms, "VESPO", None)
    if kind is None:
        return None
    found: list[float] = []
    for sign, curve in curves.items():
        near = kept[sign] & (np.abs(curve.x) <= 1.5) & (curve.value > 0)
        if near.sum() < 10:
            return None
        x, log_value = curve.x[near], np.log(curve.value[near])
        system = np.stack([x, 1 - np.exp(x)], axis=1)
        (k, lam), *_ = np.linalg.lstsq(system, log_value, rcond=None)
        if np.abs(system @ (k, lam) - log_value).max() > 1e3 * tol or lam <= 1e-6:
            return None
        found += [tidy(k, 1e3 * tol), tidy(lam, 1e3 * tol)]
    return kind(*found)


# --- trust regions ----------------------------------------------------------------------------------------------------
_Edges = dict[int, tuple[float, float]]


def _region(tokens: _Tokens, far: _Edges, dropped: _Edges) -> tuple[Any, list[Finding]]:
    """The trust region with these bounds of log ρ, told from others by how they move with the probabilities.

    ``far`` are those of improbable tokens, ``dropped`` those of probable ones.
    """
    edges = [x for bounds in dropped.values() for x in bounds]
    if not any(map(math.isfinite, edges)):
        return None, []
    error = max(tokens.loss.exactness, 1e-8)
    if all(np.allclose(dropped[s], far[1], rtol=10 * error, atol=10 * error) for s in dropped):
        low, high = far[1]
        return Band(tidy(math.exp(low), 10 * error), tidy(math.exp(high), 10 * error)), []
    other = 3 * _NEAR
    moved = {s: _edges_near(tokens, s, dropped[s], other) for s in dropped}
    pairs = list(zip(edges, [x for bounds in moved.values() for x in bounds], strict=True))
    if math.isinf(dropped[1][0]) and math.isinf(dropped[-1][1]):
        for option, measure in ((TV, _tv), (BinaryKL, _binary_kl)):
            deltas = []
            for edge, again in (pairs[1], pairs[2]):
                sizes = [measure(edge, _NEAR), measure(again, other)] if math.isfinite(edge) else [math.inf] * 2
                deltas.append(tidy(sizes[0], 100 * error) if np.isclose(*sizes, rtol=1e3 * error) else math.nan)
            if not any(map(math.isnan, deltas)):
                most = 1.0 if option is TV else 1e300
                return option(*(min(delta, most) for delta in deltas)), []
    what = "drops tokens outside of a region that is none of grpo_loss' trust regions"
    amount = "; ".join(
        f"A {'>' if s > 0 else '<'} 0: log ρ in {number(a)} … {number(b)}" for s, (a, b) in dropped.items()
    )
    sign, edge = next((s, x) for s, bounds in dropped.items() for x in bounds if math.isfinite(x))
    return None, [Finding("differs", what, "", amount, tokens.at(1.1 * edge, float(sign), _NEAR))]


def _edges_near(tokens: _Tokens, sign: int, bounds: tuple[float, float], anchor: float) -> tuple[float, float]:
    found = []
    for edge in bounds:
        if math.isinf(edge):
            found.append(edge)
            continue

        def gone(x: float) -> bool:
            return tokens.of(x, float(sign), anchor) == (0.0, 0.0)

        found.append(bisect(gone, 0.0, 60.0 if edge > 0 else -60.0))
    return found[0], found[1]


def _moved(x: float, anchor: float) -> tuple[float, float]:
    return (anchor, anchor - x) if x >= 0 else (anchor + x, anchor)


def _tv(x: float, anchor: float) -> float:
    logp, old = _moved(x, anchor)
    return abs(math.exp(logp) - math.exp(old))


def _binary_kl(x: float, anchor: float) -> float:
    logp, old = _moved(x, anchor)
    return math.exp(old) * (old - logp) - math.expm1(old) * math.log(math.expm1(old) / math.expm1(logp))


# --- gradients --------------------------------------------------------------------------------------------------------
def _slopes(
    tokens: _Tokens,
    curves: dict[int, Curve],
    kept: dict[int, NDArray[np.bool_]],
    bounds: dict[int, _Bounds],
    kind: str,
    smooth: Any,
    clamp: tuple[float, float] = (-math.inf, math.inf),
) -> list[Finding]:
    """What is wrong with the gradient, given that the value is known."""
    if not tokens.loss.gives_gradient:
        return []
    tol = tokens.loss.exactness * 100
    for sign, curve in curves.items():
        rho = np.exp(curve.x)
        free = (clamp[0] < curve.x) & (curve.x < clamp[1])
        if smooth is not None and kind == "ratio":
            tau = smooth.tau_pos if sign > 0 else smooth.tau_neg
            with np.errstate(all="ignore"):
                gate = 1 / (1 + np.exp(-tau * (rho - 1)))
            expected = 4 * gate * (1 - gate) * rho
            size = rho / (1 + rho) ** 2
        elif kind == "weight":
            expected = size = curve.value
        else:
            low, high = bounds[sign].low, bounds[sign].high
            free &= (low < rho) & (rho < high)
            expected, size = np.where(free, rho, 0.0), rho
        room = tol * size * (1 + np.abs(curve.x)) + curve.noise
        off = kept[sign] & (np.abs(curve.slope - expected) > room)
        if not off.any():
            continue
        return [_wrong_slope(tokens, curve, sign, expected, off, free, kind, size, tol)]
    return []


def _wrong_slope(
    tokens: _Tokens,
    curve: Curve,
    sign: int,
    expected: Floats,
    off: NDArray[np.bool_],
    free: NDArray[np.bool_],
    kind: str,
    size: Floats,
    tol: float,
) -> Finding:
    i = min(np.flatnonzero(off), key=lambda i: abs(curve.x[i]))
    where = f"A {'>' if sign > 0 else '<'} 0, log ρ = {number(curve.x[i])}"
    amount = f"(∂s/∂logp)/A = {number(curve.slope[i])} instead of {number(expected[i])}"
    example = tokens.at(float(curve.x[i]), float(sign))
    rho = np.exp(curve.x)
    if not np.any(curve.slope):
        return _without_gradient(tokens)
    if kind == "weight":
        product = curve.value * (1 + curve.logp)
        changes = np.abs(np.gradient(curve.value)) > 1e-9 * np.abs(curve.value)
        if np.all(np.abs(curve.slope - product)[off] <= 100 * tol * size[off] * (1 + np.abs(curve.logp[off]))):
            what = (
                "the stop-gradient is missing: the weight of log π_θ, which is to be held constant, is differentiated"
            )
            return Finding("differs", what, where, amount, example)
        flat = ~changes
        if flat.any() and np.all(np.abs(curve.slope)[flat & off] == 0) and not (off & changes).any():
            return Finding("differs", "log-probabilities beyond the bound lose their gradient", where, amount, example)
    elif np.all(free[off]) and np.all(np.abs(curve.slope[off]) == 0):
        what = "tokens lose their gradient within the bounds of the value"
        return Finding("differs", what, where, amount, example)
    elif not free[off].any() and np.all(
        np.abs(curve.slope - rho)[off] <= 10 * tol * rho[off] * (1 + np.abs(curve.x[off]))
    ):
        what = "clipped tokens keep their gradient: the clip is of the value alone (straight-through)"
        return Finding("differs", what, where, amount, example)
    what = "the policy term's gradient is not that of its value"
    return Finding("differs", what, where, amount, example)


def _unknown(tokens: _Tokens, curve: Curve, sign: int, expected: Floats, off: NDArray[np.bool_]) -> Finding:
    i = min(np.flatnonzero(off), key=lambda i: abs(curve.x[i]))
    rows = [f"{number(math.exp(x))}: {number(v)}, {number(g)}" for x, v, g in _sampled(curve)]
    what = "the policy term is none that grpo_loss has"
    amount = f"ρ: s/A, its gradient/A, for A {'>' if sign > 0 else '<'} 0: " + "; ".join(rows)
    return Finding("differs", what, f"log ρ = {number(curve.x[i])}", amount, tokens.at(float(curve.x[i]), float(sign)))


def _sampled(curve: Curve) -> Iterable[tuple[float, float, float]]:
    for x in (-1.5, -0.5, -0.1, 0.0, 0.1, 0.5, 1.5):
        i = int(np.argmin(np.abs(curve.x - x)))
        yield float(curve.x[i]), float(curve.value[i]), float(curve.slope[i])


Reader = Callable[[Loss], Policy]

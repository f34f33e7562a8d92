"""One token of a loss along log ρ, for either sign of A: value and gradient apart, and where they stop or break.

A batch of one token has no level and no aggregation: the loss is −c·s + c·β·k, and what remains of it when that of
A = 0 is taken away is s alone, whatever the KL term.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .calling import Batch, CallFailed, Loss, batch
from .numbers import bisect, is_round

Floats = NDArray[np.float64]
#: s = f(ρ)·A, w(ρ)·A·log π_θ, without a ρ, or nothing at all.
Kind: TypeAlias = Literal["ratio", "weight", "constant", "none"]
#: log π of the more probable of π_θ and π_old, where a trust region of probabilities has room to act.
NEAR = -0.01
_STEPS = np.concatenate([np.arange(1, 61) * 0.05, np.arange(7, 25) * 0.5, [13, 14, 16, 18, 21, 24, 28, 34, 42, 60]])
GRID = np.concatenate([-_STEPS[::-1], [0.0], _STEPS])
#: A log-ratio at which ρ and numbers near 1 have digits in common.
_ROUNDED = 10.0
#: A log-ratio as large as this is not where a surrogate is clipped: bounds there are of the log-ratio itself.
_CLAMPS = 4.0


class Curve(NamedTuple):
    """s/A and (∂s/∂logp)/A over ``x`` = log ρ for one sign of A, in units of that at ρ = 1; of weights, s/(A·logp)."""

    x: Floats
    value: Floats
    slope: Floats
    logp: Floats
    noise: Floats  # of the value, which is a difference: the rounding of what it is a difference of
    slope_noise: Floats


class Bounds(NamedTuple):
    """Of one sign of A: where the value is flat (ρ), and beyond which log ρ nothing is left of it."""

    low: float
    high: float
    least: float
    most: float


def pair(x: float, anchor: float) -> tuple[float, float]:
    """log π_θ and log π_old with this log ρ, of which the greater is ``anchor``."""
    return (anchor, anchor - x) if x >= 0 else (anchor + x, anchor)


class Tokens:
    """One token of the loss, or, if it does not react to one, several that are equal."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.width = 1
        self.kind: Kind = "ratio"
        self.scale = {1: 1.0, -1: 1.0}  # s/A at ρ = 1, for either sign of A
        self.slope_scale = 1.0  # what makes the slope that of the value, where it is a multiple of it
        self.failed: dict[float, CallFailed] = {}  # the errors that it raised, by log ρ
        self._without: dict[tuple[float, float, int], tuple[float, Floats]] = {}

    @property
    def far(self) -> float:
        """log π of the more probable of π_θ and π_old, unless given."""
        return self.loss.improbable

    def at(self, x: float, A: float, anchor: float | None = None) -> Batch:
        """The batch with this log ρ; the more probable of the two is ``anchor``, or as improbable as can be."""
        logp, old = pair(x, self.far if anchor is None else anchor)
        shape = (1, self.width)
        return batch(np.full(shape, logp), np.full(shape, old), [A])

    def of(self, x: float, A: float, anchor: float | None = None) -> tuple[float, float]:
        """−loss and the sum of −∂loss/∂logps, less those of A = 0."""
        anchor = self.far if anchor is None else anchor
        found = self.loss(self.at(x, A, anchor))
        assert found.grad is not None
        loss, grad = self._at_0(x, anchor)
        # adding 0.0 makes 0.0 of −0.0
        return loss - found.loss + 0.0, float(np.sum(grad) - np.sum(found.grad)) + 0.0

    def _at_0(self, x: float, anchor: float) -> tuple[float, Floats]:
        """Loss and gradient for A = 0."""
        key = (float(x), anchor, self.width)
        if key not in self._without:
            found = self.loss(self.at(x, 0.0, anchor))
            assert found.grad is not None
            self._without[key] = found.loss, found.grad
        return self._without[key]

    def value_at(self, logp: float, old: float) -> float:
        """c·s of tokens with these log-probabilities, A = 1."""
        return self.loss.policy_value(batch(np.full((1, self.width), logp), np.full((1, self.width), old)))

    def relative(self, x: float, sign: int, anchor: float | None = None) -> tuple[float, float]:
        """Value and slope as in a `Curve`."""
        value, slope = self.of(x, float(sign), anchor)
        value, slope = value / (sign * self.scale[sign]), slope / (sign * self.scale[sign])
        logp = pair(x, self.far if anchor is None else anchor)[0]
        return (value / logp if self.kind == "weight" else value), slope * self.slope_scale

    def noise(self, x: float, anchor: float | None = None) -> tuple[float, float]:
        """The rounding of what value and slope are differences of."""
        loss, grad = self._at_0(x, self.far if anchor is None else anchor)
        unit = 16 * self.loss.eps / abs(self.scale[1])
        # The gradient of a KL term, which ρ may weigh, is 0 here as the sum of what is not.
        parts = self.loss.eps * math.exp(max(x, 0.0)) if "ref_logps" in self.loss.takes else 0.0
        return unit * abs(loss), unit * float(np.abs(grad).sum()) + parts

    def curve(self, sign: int, anchor: float | None = None) -> Curve:
        """The curve over `GRID`; NaN where the loss raises an error."""
        rows = []
        anchor = self.far if anchor is None else anchor
        grid = GRID[np.abs(GRID) < self.far - self.loss.least - 1e-6]
        for x in grid:
            try:
                rows.append((*self.relative(x, sign, anchor), *self.noise(x, anchor)))
            except CallFailed as error:
                self.failed[float(x)] = error
                rows.append((math.nan, math.nan, 0.0, 0.0))
        value, slope, noise, slope_noise = np.array(rows).T
        return Curve(grid, value, slope, np.where(grid >= 0, anchor, anchor + grid), noise, slope_noise)


def dropped(tokens: Tokens, curve: Curve, sign: int, anchor: float | None = None) -> tuple[float, float]:
    """Between which log-ratios a token keeps its policy term: where it falls to 0 at once, value and gradient."""

    def gone(x: float) -> bool:
        return tokens.of(x, float(sign), anchor) == (0.0, 0.0)

    bounds = [-math.inf, math.inf]
    middle = curve.x.size // 2
    zero = (curve.value == 0) & (curve.slope == 0)
    for side, places in ((0, range(middle, -1, -1)), (1, range(middle, curve.x.size))):
        first = next((i for i in places if zero[i]), None)
        if first is None or first == middle:
            continue
        last = first + 1 if side == 0 else first - 1
        edge = bisect(gone, float(curve.x[last]), float(curve.x[first]))
        before = edge - math.copysign(1e-6 * max(1.0, abs(edge)), edge)
        least = 1e-6 * min(1.0, math.exp(before)) + 1e3 * tokens.noise(before, anchor)[0]
        if abs(tokens.relative(before, sign, anchor)[0]) > least:
            bounds[side] = edge
    return bounds[0], bounds[1]


def flat(tokens: Tokens, curve: Curve, sign: int, tol: float, edges: tuple[float, float]) -> Bounds:
    """At which ρ the value stops to fall and to grow, at the ends of what is kept: where two of its values are one."""
    found: list[float | None] = []
    for side, edge in zip((-1, 1), edges, strict=True):
        if math.isfinite(edge):
            ends = [edge - side * d * max(1.0, abs(edge)) for d in (10 * tol, 100 * tol)]
        else:
            # The farthest ones whose value is more than rounding.
            told = np.flatnonzero(
                (curve.noise <= tol * np.abs(curve.value)) & np.isfinite(curve.value) & (side * curve.x > 0)
            )
            if told.size < 2:
                found.append(None)
                continue
            ends = [float(x) for x in curve.x[told[[0, 1] if side < 0 else [-1, -2]]]]
        level = _same(tokens, ends, sign, tol)
        if level is None and abs(ends[0]) > _ROUNDED:  # a sum of numbers as large as ρ has no digits there
            level = _same(tokens, [side * _ROUNDED, side * (_ROUNDED - 1)], sign, tol)
        found.append(level)
    low, high = found
    return Bounds(0.0 if low is None else low, math.inf if high is None else high, *edges)


def _same(tokens: Tokens, ends: list[float], sign: int, tol: float) -> float | None:
    """The value at these log-ratios, if it is the same."""
    one, other = (tokens.relative(x, sign)[0] for x in ends)
    return one if abs(one - other) <= tol * abs(one) and one > 0 else None


def clamps(bounds: dict[int, Bounds], kind: Kind, error: float) -> tuple[tuple[float, float], dict[int, Bounds]]:
    """The bounds of the log-ratio itself, told from those of the ratio by where they lie; and the bounds without.

    They are multiples of ½, far from 0, or on the side on which no clip bounds a ratio, below for A > 0 and above for
    A < 0; then as far on the other side.
    """

    def is_clamp(ratio: float, least: float) -> bool:
        return 0 < ratio < math.inf and abs(math.log(ratio)) >= least and is_round(math.log(ratio), 10 * error)

    low, high = -math.inf, math.inf
    least = {1: _CLAMPS, -1: _CLAMPS}
    if kind == "ratio":
        other_sides = [x for x in (bounds[1].low, bounds[-1].high) if is_clamp(x, 0.5)]
        if other_sides:
            nearest = min(abs(math.log(x)) for x in other_sides)
            least = dict.fromkeys(least, min(_CLAMPS, nearest - 1e-3))
    bounds = dict(bounds)
    for sign, b in bounds.items():
        if b.low < 1 and is_clamp(b.low, least[sign]):
            low = round(2 * math.log(b.low)) / 2
            bounds[sign] = b = b._replace(low=0.0)
        if b.high > 1 and is_clamp(b.high, least[sign]):
            high = round(2 * math.log(b.high)) / 2
            bounds[sign] = b._replace(high=math.inf)
    return (low, high), bounds

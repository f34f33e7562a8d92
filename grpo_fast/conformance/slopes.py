"""What is wrong with the gradient of a policy term whose value is known."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from .curves import Bounds, Curve, Floats, Tokens
from .numbers import bisect, tidy
from .report import Finding, Severity, Topic, number

Mask = NDArray[np.bool_]


def wrong(
    tokens: Tokens,
    curves: dict[int, Curve],
    kept: dict[int, Mask],
    bounds: dict[int, Bounds],
    smooth: Any,
    clamp: tuple[float, float] = (-math.inf, math.inf),
) -> list[Finding]:
    """The first finding, for a value within ``bounds``, or of SAPO or VESPO (``smooth``), and log ρ in ``clamp``."""
    if not tokens.loss.gives_gradient:
        return []
    tol = tokens.loss.exactness * 100
    for sign, curve in curves.items():
        rho = np.exp(curve.x)
        free = (clamp[0] < curve.x) & (curve.x < clamp[1])
        looked_at = kept[sign] & np.isfinite(curve.slope) & ~np.isin(np.round(curve.x, 9), clamp)  # not at the kink
        if tokens.kind == "weight":
            expected = size = curve.value
        elif smooth is not None:
            with np.errstate(all="ignore"):
                slope = reference.surrogate_term(smooth, rho, np.full_like(rho, sign), curve.logp)[1]
            expected = np.abs(slope).astype(np.float64)  # over A = ±1, which it has the sign of
            size = (1 + rho) * expected + rho / (1 + rho) ** 2
        else:
            free &= (bounds[sign].low < rho) & (rho < bounds[sign].high)
            looked_at &= ~np.isclose(rho, bounds[sign].low, rtol=1e-6) & ~np.isclose(rho, bounds[sign].high, rtol=1e-6)
            expected, size = np.where(free, rho, 0.0), rho
        # A temperature that was rounded to float32 is told elsewhere.
        room = (tol if smooth is None else max(tol, 1e-6)) * size * (1 + np.abs(curve.x)) + curve.slope_noise
        off = looked_at & (np.abs(curve.slope - expected) > room)
        if off.any():
            return [_named(tokens, curve, sign, expected, off, free, size, smooth is not None)]
    return []


def _named(
    tokens: Tokens, curve: Curve, sign: int, expected: Floats, off: Mask, free: Mask, size: Floats, smooth: bool
) -> Finding:
    tol = tokens.loss.exactness * 100
    i = min(np.flatnonzero(off), key=lambda i: abs(curve.x[i]))
    where = f"A {'>' if sign > 0 else '<'} 0, log ρ = {number(curve.x[i])}"
    amount = f"(∂s/∂logp)/A = {number(curve.slope[i])} instead of {number(expected[i])}"
    example = tokens.at(float(curve.x[i]), float(sign))
    what = "the policy term's gradient is not that of its value"
    severity: Severity = "differs"
    topic: Topic = ""
    if not np.any(curve.slope):
        return none(tokens)
    if tokens.kind == "weight":
        product = curve.value * (1 + curve.logp)
        edges = curve.value[[0, -1]]
        bounded = np.isclose(curve.value, edges[0], rtol=1e-6) | np.isclose(curve.value, edges[1], rtol=1e-6)
        if np.all(np.abs(curve.slope - product)[off] <= 100 * tol * size[off] * (1 + np.abs(curve.logp[off]))):
            what = (
                "the stop-gradient is missing: the weight of log π_θ, which is to be held constant, is differentiated"
            )
        elif bounded[off].all() and not curve.slope[off].any():
            what = "tokens whose weight is at its bound lose their gradient: they are dropped, not bounded"
    elif smooth and not np.any(curve.slope[off]) and abs(curve.x[i]) > 4:  # where the value is flat anyway
        edge = bisect(lambda x: tokens.relative(x, sign)[1] == 0, float(curve.x[i] * 0.8), float(curve.x[i]))
        what = f"the log-ratio is clamped at {number(tidy(edge, 1e-6))}: no gradient beyond"
        severity, topic = "fragile" if abs(edge) > 19.99 else "differs", "clamped"
    elif free[off].all() and not np.any(curve.slope[off]):
        what = "tokens lose their gradient within the bounds of the value"
    elif not free[off].any():
        rho = np.exp(curve.x)
        if np.all(np.abs(curve.slope - rho)[off] <= 10 * tol * rho[off] * (1 + np.abs(curve.x[off]))):
            what = "clipped tokens keep their gradient: the clip is of the value alone (straight-through)"
    return Finding(severity, what, where, amount, example, topic)


def none(tokens: Tokens) -> Finding:
    """That there is no gradient at all."""
    what = "the policy term has no gradient: the ratio is detached (a stop-gradient too many)"
    return Finding("differs", what, "everywhere", "∂s/∂logp = 0 where s = ρA", tokens.at(0.0, 1.0), "no gradient")

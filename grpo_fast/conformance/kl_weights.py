"""What weighs the KL term of one token: nothing, ρ, or something else; near ρ = 1 and far from it."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calling import Batch, batch
from .numbers import bisect, tidy
from .report import Finding, Topic, number

Floats = NDArray[np.float64]
#: log π_θ − log π_ref, and log ρ where a clip may be.
NEAR = np.array([-2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0])
_UNCLEAR: Topic = "unclear"
_FAR_RATIOS = (-1.0, 1.0, -3.0, 3.0)


def token(x: float, l: float, A: float, width: int) -> Batch:
    """A batch of equal tokens with these log ρ and log π_θ − log π_ref."""
    logp = -0.01 - max(0.0, -x) - max(0.0, -l)
    shape = (1, width)
    return batch(np.full(shape, logp), np.full(shape, logp - x), [A], np.full(shape, logp - l))


def near_one(relative: Floats, x: Floats, tol: float) -> bool | None:
    """Whether ρ multiplies the estimate; None if something else does."""
    if np.allclose(relative, 1, rtol=tol, atol=0):
        return False
    if np.allclose(relative, np.exp(x), rtol=tol, atol=0):
        return True
    return None


def otherwise(k_found: Floats, ratios: Floats, k: Any, tol: float, width: int) -> Finding:
    """What weighs the KL term, near ρ = 1, if it is not ρ."""
    x = ratios[:, None]
    i = 6  # l = 1
    what, topic = "the KL term is weighted by something other than ρ", _UNCLEAR
    if np.allclose(k_found, np.exp(-x) * k(NEAR), rtol=tol, atol=tol):
        what, topic = "the KL term is weighted by 1/ρ, not by ρ", ""
    elif np.allclose(k_found, k(NEAR - x), rtol=tol, atol=tol):
        what = "the KL term is of π_old, not of π_θ: it holds log π_old − log π_ref, and has no gradient"
        topic = "of old"
    amount = (
        f"{number(k_found[0, i] / k_found[len(ratios) // 2, i])} times as large at ρ = {number(math.exp(ratios[0]))}"
    )
    return Finding("differs", what, "A = 0, l = 1", amount, token(float(ratios[0]), 1.0, 0.0, width), topic)


def far_away(of: Any, at_one: float, weighted: bool, tol: float, width: int) -> list[Finding]:
    """Whether the weight is, far from ρ = 1, what it is near it."""
    found = {x: abs(of(x, 1.0)[0] / at_one) for x in _FAR_RATIOS}
    wrong = {x: v for x, v in found.items() if not abs(v / math.exp(x * weighted) - 1) <= 10 * tol}
    if not wrong:
        return []
    nothing = left_out(of, wrong, tol, width)
    if nothing:
        return nothing
    wrong = {x: wrong[x] for x in _nearest(wrong)}
    bounds = " and ".join(f"{number(tidy(v, 10 * tol))}" for v in wrong.values())
    what = f"the KL term is weighted by the clipped ratio: by {bounds} and no ρ beyond"
    amount = "; ".join(f"{number(v)} at ρ = {number(math.exp(x))}" for x, v in wrong.items())
    return [Finding("differs", what, "far from ρ = 1", amount, token(next(iter(wrong)), 1.0, 0.0, width))]


def left_out(of: Any, ratios: Iterable[float], tol: float, width: int) -> list[Finding]:
    """Whether the KL term is nothing at the first of these log-ratios on either side of 0, and beyond which."""

    def gone(x: float) -> bool:
        return bool(of(x, 1.0)[0] == 0)

    edges = [bisect(gone, 0.0, x) for x in _nearest(ratios) if gone(x)]
    if not edges:
        return []
    bounds = " or ".join(f"ρ {'<' if x < 0 else '>'} {number(tidy(math.exp(x), tol))}" for x in edges)
    amount = " and ".join(f"log ρ = {number(tidy(x, tol))}" for x in edges)
    what = f"the KL term is left out where {bounds}"
    x = round(1.1 * edges[0], 3)
    return [Finding("differs", what, "A = 0, l = 1", f"β·k = 0 beyond {amount}", token(x, 1.0, 0.0, width))]


def _nearest(ratios: Iterable[float]) -> list[float]:
    """The one nearest to 0 on either side of it."""
    nearest = {x < 0: x for x in sorted(ratios, key=abs, reverse=True)}
    return sorted(nearest.values())

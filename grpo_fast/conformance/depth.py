"""Whether improbable tokens are as others: log-probabilities that are clamped from below, found by moving both.

At ρ = 1 the gradient of the policy term is the same however probable the token is. Where it is another one below some
log-probability, that bound is of the log-probabilities, not of their ratio.
"""

import math

import numpy as np

from .calling import batch
from .curves import Tokens
from .numbers import bisect, tidy
from .report import Finding, Severity, number

_DEPTHS = (-3.0, -9.0, -15.0, -30.0, -60.0, -200.0)
#: The least log-probability in the battery's ordinary inputs.
_ORDINARY = -41.2


def read(tokens: Tokens) -> tuple[float, list[Finding]]:
    """The bound, −∞ where there is none, and what is to be told of it."""
    usual = tokens.of(0.0, 1.0, -0.5)[1]
    tol = max(1e-6, 10 * tokens.loss.exactness)

    def changed(anchor: float) -> bool:
        return abs(tokens.of(0.0, 1.0, anchor)[1] - usual) > tol * abs(usual)

    if not usual or not math.isfinite(usual) or changed(-1.0):
        return -math.inf, []
    first = next((i for i, depth in enumerate(_DEPTHS) if changed(depth)), None)
    if first is None:
        return -math.inf, []
    edge = bisect(changed, _DEPTHS[first - 1] if first else -1.0, _DEPTHS[first])
    if changed(0.99 * edge):
        return -math.inf, []
    edge = tidy(edge, 10 * tol)
    which, beyond = "log-probabilities", "there is no gradient, and the ratio does not change"
    if tokens.of(0.0, 1.0, edge - 1e-3)[1] != 0:
        which, beyond = "old log-probabilities", "the ratio is not π_θ/π_old"
    elif not _old_too(tokens, edge):
        which, beyond = "log-probabilities of π_θ alone", "there is no gradient, and the ratio is not π_θ/π_old"
    severity: Severity = "fragile" if edge < _ORDINARY else "differs"
    bound = number(edge).replace("-", "−")
    text = f"{which} below {bound} are clamped: {beyond}"
    gradient = number(tokens.of(0.0, 1.0, edge - 1.0)[1] / usual)
    amount = f"the gradient at ρ = 1 is {gradient} times that of probable tokens"
    return edge, [Finding(severity, text, f"log π < {bound}", amount, tokens.at(0.0, 1.0, edge - 1.0))]


def _old_too(tokens: Tokens, edge: float) -> bool:
    """Whether an old log-probability that is just below the bound counts as the bound."""
    logp = np.full((1, tokens.width), edge + 1e-4)
    below, at = (tokens.loss(batch(logp, np.full_like(logp, old))).loss for old in (edge - 1e-4, edge))
    return abs(below - at) <= 0.1 * 1e-4 * abs(at)

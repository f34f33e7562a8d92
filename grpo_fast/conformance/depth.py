"""Whether improbable tokens are as others: clamped from below, dropped, or less for a constant added to π.

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
    of_constant = _constant(tokens, usual, edge)
    if of_constant is not None:
        return edge, [of_constant]
    edge = tidy(edge, 10 * tol)
    bound = number(edge)
    value, gradient = tokens.of(0.0, 1.0, edge - 1.0)
    amount = f"the gradient at ρ = 1 is {number(gradient / usual)} times that of probable tokens"
    which = "log-probabilities"
    if gradient == 0 and value == 0:
        of_old, of_new = (tokens.value_at(*pair) == 0 for pair in ((edge + 0.1, edge - 0.1), (edge - 0.1, edge + 0.1)))
        whose = "log π_θ or log π_old" if of_old and of_new else "log π_old" if of_old else "log π_θ"
        text = f"tokens whose {whose} is below {bound} are dropped: they have neither value nor gradient"
    elif gradient != 0 and abs(tokens.of(0.0, 1.0, edge - 3.0)[1] / gradient - 1) < 1e-6:
        text = f"tokens whose log-probability is below {bound} count {number(gradient / usual)} times as much as others"
    elif gradient != 0:
        text = f"old {which} below {bound} are clamped: the ratio is not π_θ/π_old"
    elif _old_too(tokens, edge):
        text = f"{which} below {bound} are clamped: there is no gradient, and the ratio does not change"
    else:
        text = f"{which} of π_θ alone below {bound} are clamped: there is no gradient, and the ratio is not π_θ/π_old"
    return edge, [
        Finding(_severity(edge), text, f"log π < {bound}", amount, tokens.at(0.0, 1.0, edge - 1.0), "clamped")
    ]


def _severity(edge: float) -> Severity:
    return "fragile" if edge < _ORDINARY else "differs"


def _constant(tokens: Tokens, usual: float, edge: float) -> Finding | None:
    """A constant c that is added to π_old, or to π within the log: the gradient at ρ = 1 is π/(π + c) of the usual."""
    found = []
    for depth in (edge - 3.0, edge - 6.0, edge - 9.0):
        gradient = tokens.of(0.0, 1.0, depth)[1] / usual
        if not 0 < gradient < 1:
            return None
        found.append(math.exp(depth) * (1 / gradient - 1))
    if max(found) > min(found) * (1 + 1e-2):
        return None
    c = tidy(found[-1], 1e-3)
    tokens.loss.rough = 1e-6  # what it changes at the edge
    at = round(math.log(c), 1)
    value, usual_value = tokens.of(0.0, 1.0, at)[0], tokens.of(0.0, 1.0, -0.5)[0]
    to = "π_old" if abs(value - usual_value) > 0.1 * abs(usual_value) else "π within the log"
    text = f"a constant of {number(c)} is added to {to}: improbable tokens count less"
    amount = f"half as much at log π = {number(at)}"
    return Finding(_severity(math.log(c)), text, f"log π < {number(edge)}", amount, tokens.at(0.0, 1.0, at), "clamped")


def _old_too(tokens: Tokens, edge: float) -> bool:
    """Whether an old log-probability that is just below the bound counts as the bound."""
    logp = np.full((1, tokens.width), edge + 1e-4)
    below, at = (tokens.loss(batch(logp, np.full_like(logp, old))).loss for old in (edge - 1e-4, edge))
    return abs(below - at) <= 0.1 * 1e-4 * abs(at)

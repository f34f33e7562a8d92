"""Which trust region drops a token: told by how its bounds of log ρ move with the token's probability."""

import math
from typing import Any, TypeAlias

import numpy as np

from .. import reference
from ..terms import TV, Band, BinaryKL
from .calling import CallFailed, batch
from .curves import NEAR, Tokens, dropped, pair
from .numbers import bisect, tidy
from .report import Finding, number

#: For either sign of A, the log-ratios between which tokens are kept.
Edges: TypeAlias = dict[int, tuple[float, float]]


#: log π of the more probable of π_θ and π_old: the nearer to 0, the larger the δ that can be reached.
_ANCHORS = (NEAR, -1e-4, -1e-8, -1e-12)
#: A δ of `TV` and of `BinaryKL` that no two probabilities reach in float64.
_NEVER = {TV: 1.0, BinaryKL: 1000.0}


def read(tokens: Tokens, far: Edges, near: Edges) -> tuple[Any, list[Finding]]:
    """The trust region with these bounds: ``far`` are those of improbable tokens, ``near`` those of probable ones."""
    if not _is_bounded(near):
        # Is there one of a δ that is larger than those are probable?
        places = [(x, A) for x in (-30.0, -5.0, -1.0, 1.0, 5.0, 30.0) for A in (1.0, -1.0)]
        if not any(_is_gone(tokens, x, A) for x, A in places):
            return None, []
        near = _edges_at(tokens, _ANCHORS[-1])
        if not _is_bounded(near):
            return None, []
    error = max(tokens.loss.exactness, 1e-8)
    if all(np.allclose(near[s], far[1], rtol=10 * error, atol=10 * error) for s in near):
        low, high = far[1]
        return Band(tidy(math.exp(low), 10 * error), tidy(math.exp(high), 10 * error)), []
    for anchor in _ANCHORS if tokens.loss.eps < 1e-10 else _ANCHORS[:1]:
        option = _of_probabilities(tokens, anchor, near if anchor == NEAR else _edges_at(tokens, anchor), near, error)
        if option is not None:
            return option, []
    other = 3 * NEAR
    moved = {s: _edges_near(tokens, s, near[s], other) for s in near}
    delta = _of_sequences(tokens, near, moved)
    if delta:
        what = (
            f"drops whole sequences: those with A < 0 whose mean of log π_old − log π_θ is above {number(delta)}, as "
            "with rollout_is_weights=off_policy_sequence_mask(…)"
        )
        amount = f"s = 0 for two tokens with log ρ = {number(-2.5 * delta)} and {number(-0.1 * delta)}, A = −1"
        return None, [Finding("differs", what, "A < 0", amount, tokens.at(-1.1 * delta, -1.0, NEAR))]
    sign, edge = next((s, x) for s, bounds in near.items() for x in bounds if math.isfinite(x))
    what = "drops tokens outside of a region that is none of grpo_loss' trust regions"
    amount = _described(near, moved, other, error)
    return None, [Finding("differs", what, "", amount, tokens.at(1.1 * edge, float(sign), NEAR))]


def _is_gone(tokens: Tokens, x: float, A: float) -> bool:
    """Whether nothing is left of a token of the most probable ones; False where the loss raises an error."""
    try:
        return tokens.of(x, A, _ANCHORS[-1]) == (0.0, 0.0)
    except CallFailed:
        return False


def _is_bounded(edges: Edges) -> bool:
    return any(math.isfinite(x) for bounds in edges.values() for x in bounds)


def _edges_at(tokens: Tokens, anchor: float) -> Edges:
    """Between which log-ratios tokens are kept of which the more probable log π is ``anchor``."""
    return {sign: dropped(tokens, tokens.curve(sign, anchor), sign, anchor) for sign in (1, -1)}


def _of_probabilities(tokens: Tokens, anchor: float, edges: Edges, near: Edges, error: float) -> TV | BinaryKL | None:
    """`TV` or `BinaryKL`, if it has these ``edges`` at the anchor, and those that are ``near``."""
    if math.isfinite(edges[1][0]) or math.isfinite(edges[-1][1]):
        return None
    other = 3 * anchor
    moved = {s: _edges_near(tokens, s, edges[s], other) for s in edges}
    for option, measure in ((TV, _tv), (BinaryKL, _binary_kl)):
        deltas: list[float] = []
        sides = ((edges[1][1], moved[1][1], near[1][1]), (edges[-1][0], moved[-1][0], near[-1][0]))
        for edge, again, usual in sides:
            if math.isinf(edge):
                deltas.append(_NEVER[option])
                continue
            size, same = measure(edge, anchor), measure(again, other)
            others = [same] if math.isinf(usual) else [same, measure(usual, NEAR)]
            if not np.allclose(others, size, rtol=1e3 * error, atol=1e-9):
                break
            deltas.append(tidy(size, 100 * error) if size > 1e-9 else 0.0)
        # A side that is not seen may be reached by more probable tokens.
        if len(deltas) == 2 and (anchor == _ANCHORS[-1] or _NEVER[option] not in deltas):
            return option(*(min(delta, _NEVER[option]) for delta in deltas))
    return None


def _described(near: Edges, moved: Edges, anchor: float, error: float) -> str:
    """What is dropped: by π_θ − π_old, if it is that of all tokens, or by log ρ of probable ones."""
    pairs = [(s, x, moved[s][i]) for s in near for i, x in enumerate(near[s]) if math.isfinite(x)]
    if all(np.isclose(_tv(x, NEAR), _tv(y, anchor), rtol=1e3 * error) for _, x, y in pairs):
        parts = [
            f"A {'>' if s > 0 else '<'} 0 and π_θ − π_old {'>' if x > 0 else '<'} "
            f"{number(tidy(math.copysign(_tv(x, NEAR), x), 100 * error))}"
            for s, x, _ in pairs
        ]
        return f"dropped are {'; '.join(parts)}"
    kept = "; ".join(f"A {'>' if s > 0 else '<'} 0: log ρ in {number(a)} … {number(b)}" for s, (a, b) in near.items())
    return f"kept are {kept}, where the more probable of π_θ and π_old is {number(math.exp(NEAR))}"


def _of_sequences(tokens: Tokens, near: Edges, moved: Edges) -> float:
    """The δ of a mask of sequences: where all that is dropped has A < 0, and a mean of log-ratios below −δ; or 0."""
    ((low, high), (other, _)), positive = (near[-1], moved[-1]), near[1]
    if math.isinf(low) or math.isfinite(high) or any(map(math.isfinite, positive)):
        return 0.0
    error = 10 * max(tokens.loss.exactness, 1e-8)
    if not np.isclose(low, other, rtol=error):
        return 0.0
    for x in (np.array([[1.5 * low, 0.2 * low]]), np.array([[2.5 * low, 0.1 * low]])):  # their means: within, beyond
        at = batch(NEAR + x, np.full_like(x, NEAR), [-1.0])
        kept = tokens.loss.policy_value(at) != 0
        if kept != (x.mean() > low):  # of a mask of tokens the second one is kept
            return 0.0
    return tidy(-low, error)


def _edges_near(tokens: Tokens, sign: int, bounds: tuple[float, float], anchor: float) -> tuple[float, float]:
    found = []
    for edge in bounds:
        if math.isinf(edge):
            found.append(edge)
            continue

        def gone(x: float) -> bool:
            return tokens.of(x, float(sign), anchor) == (0.0, 0.0)

        found.append(bisect(gone, 0.0, 60.0 if edge > 0 else -60.0))
    return found[0], found[1]


def _tv(x: float, anchor: float) -> float:
    logp, old = pair(x, anchor)
    return abs(math.exp(logp) - math.exp(old))


def _binary_kl(x: float, anchor: float) -> float:
    logp, old = map(np.array, pair(x, anchor))
    return float(reference.binary_kl(logp, old))

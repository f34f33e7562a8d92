"""Which trust region drops a token: told by how its bounds of log ρ move with the token's probability."""

import math
from typing import Any, TypeAlias

import numpy as np

from .. import reference
from ..terms import TV, Band, BinaryKL
from .calling import batch
from .curves import NEAR, Tokens, pair
from .numbers import bisect, tidy
from .report import Finding, number

#: For either sign of A, the log-ratios between which tokens are kept.
Edges: TypeAlias = dict[int, tuple[float, float]]


def read(tokens: Tokens, far: Edges, near: Edges) -> tuple[Any, list[Finding]]:
    """The trust region with these bounds: ``far`` are those of improbable tokens, ``near`` those of probable ones."""
    edges = [x for bounds in near.values() for x in bounds]
    if not any(map(math.isfinite, edges)):
        return None, []
    error = max(tokens.loss.exactness, 1e-8)
    if all(np.allclose(near[s], far[1], rtol=10 * error, atol=10 * error) for s in near):
        low, high = far[1]
        return Band(tidy(math.exp(low), 10 * error), tidy(math.exp(high), 10 * error)), []
    other = 3 * NEAR
    moved = {s: _edges_near(tokens, s, near[s], other) for s in near}
    pairs = list(zip(edges, [x for bounds in moved.values() for x in bounds], strict=True))
    if math.isinf(near[1][0]) and math.isinf(near[-1][1]):
        for option, measure in ((TV, _tv), (BinaryKL, _binary_kl)):
            deltas = []
            for edge, again in (pairs[1], pairs[2]):
                sizes = [measure(edge, NEAR), measure(again, other)] if math.isfinite(edge) else [math.inf] * 2
                deltas.append(
                    tidy(sizes[0], 100 * error) if np.isclose(sizes[0], sizes[1], rtol=1e3 * error) else math.nan
                )
            if not any(map(math.isnan, deltas)):
                most = 1.0 if option is TV else 1e300
                return option(*(min(delta, most) for delta in deltas)), []
    delta = _of_sequences(tokens, near, moved)
    if delta:
        what = (
            f"drops whole sequences: those with A < 0 whose mean of log π_old − log π_θ is above {number(delta)}, as "
            "with rollout_is_weights=off_policy_sequence_mask(…)"
        )
        amount = f"s = 0 for two tokens with log ρ = {number(-2.5 * delta)} and {number(-0.1 * delta)}, A = −1"
        return None, [Finding("differs", what, "A < 0", amount, tokens.at(-1.1 * delta, -1.0, NEAR))]
    what = "drops tokens outside of a region that is none of grpo_loss' trust regions"
    amount = "; ".join(f"A {'>' if s > 0 else '<'} 0: log ρ in {number(a)} … {number(b)}" for s, (a, b) in near.items())
    sign, edge = next((s, x) for s, bounds in near.items() for x in bounds if math.isfinite(x))
    return None, [Finding("differs", what, "", f"kept are {amount}", tokens.at(1.1 * edge, float(sign), NEAR))]


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
        kept = tokens.loss(at).loss - tokens.loss(at._replace(advantages=np.zeros(1))).loss != 0
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

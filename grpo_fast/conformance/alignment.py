"""Whether each array is taken for what it is, and each of its numbers for its own token.

π_old and π_ref may be swapped, and an array shifted against the others: nothing of that shows in equal tokens.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .calling import Batch, CallFailed, Loss, batch
from .report import Finding, number

#: What is told of an array.
_WHAT = {
    "old_logps": "old log-probabilities",
    "ref_logps": "the reference's log-probabilities",
    "advantages": "advantages one per token, (B, T),",
}


class Shifted(NamedTuple):
    """What is read of the alignment: the arrays that are shifted, and how it is told."""

    names: tuple[str, ...]
    findings: tuple[Finding, ...]


def _two(name: str, over_rows: bool) -> Batch:
    """Two tokens that differ in this array alone, in one row or in two."""
    shape = (2, 1) if over_rows else (1, 2)
    values = np.array([1.0, 2.0] if name == "advantages" else [-1.0, -1.2]).reshape(shape)
    at = batch(np.full(shape, -1.0), advantages=0.0 if name == "ref_logps" else 1.0)
    return at._replace(**{name: values})


# --- swapped ----------------------------------------------------------------------------------------------------------
def swapped(loss: Loss) -> list[Finding]:
    """The finding that π_old and π_ref have changed places: the ratio is to the reference, the KL to the old policy."""
    if not {"old_logps", "ref_logps"} <= set(loss.takes):
        return []
    at = batch(np.full((1, 3), -1.5))
    down = at.logps - 0.05

    def kl(other: Batch) -> float:
        return loss.value(other._replace(advantages=np.zeros(1)))

    try:
        one, of_ref, of_old = (
            loss.policy_value(x) for x in (at, at._replace(ref_logps=down), at._replace(old_logps=down))
        )
        costs = kl(at), kl(at._replace(ref_logps=down)), kl(at._replace(old_logps=down))
    except CallFailed:
        return []
    if not one or not np.isfinite([one, of_ref, of_old, *costs]).all():
        return []
    error = max(1e-6, 10 * loss.exactness)
    to_the_reference = abs(of_ref / one - math.exp(0.05)) <= error and abs(of_old / one - 1) <= error
    room = 1e-9 * abs(one)
    if not to_the_reference or abs(costs[1] - costs[0]) > room or abs(costs[2] - costs[0]) <= room:
        return []
    what = "old_logps and ref_logps are swapped: the ratio is π_θ/π_ref, and the KL term is to the old policy"
    amount = f"s/A = {number(of_ref / one)} = π_θ/π_ref where π_θ = π_old"
    return [Finding("differs", what, "π_ref is not π_old", amount, at._replace(ref_logps=down), "other arrays")]


# --- shifted ----------------------------------------------------------------------------------------------------------
def read(loss: Loss, made: Any, per_token: bool) -> Shifted:
    """Which arrays are shifted; ``made`` makes batches of a mask, of A and of whether advantages are one per token."""
    names: list[str] = []
    findings: list[Finding] = []
    for name in _WHAT:
        if name not in loss.takes or (name == "advantages" and not per_token):
            continue
        at = made(np.ones((3, 4), bool), name == "advantages", 0.0 if name == "ref_logps" else 1.0)
        found = depends(loss, at, name)
        shift = None if found is None else shift_of(found, at.logps.shape)
        if shift is None:
            continue
        names.append(name)
        amount = f"the gradient of one token moves as {name} of another do"
        findings.append(Finding("differs", told(name, shift), "", amount, _two(name, over_rows=shift[0] != 0)))
    return Shifted(tuple(names), tuple(findings))


def depends(loss: Loss, at: Batch, name: str) -> NDArray[np.bool_] | None:
    """Whether the gradient of a token (first axis) moves with an array's number at another (second), or None."""
    try:
        before = loss(at).grad
        assert before is not None
        size = np.abs(before).max()
        moved = []
        for place in np.ndindex(at.logps.shape):
            values = getattr(at, name).copy()
            values[place] += 1e-3
            after = loss(at._replace(**{name: values})).grad
            assert after is not None
            moved.append((np.abs(after - before) > 1e-5 * size).ravel())
    except CallFailed:
        return None
    return np.array(moved).T


#: Rows and columns from a token to the one whose number it has, and how that is told.
_SHIFTS = {
    (0, -1): "that of the one before it in its row (shifted by one)",
    (0, 1): "that of the one behind it in its row (shifted by one)",
    (-1, 0): "that of the row before it",
    (1, 0): "that of the row behind it",
    (0, 0): "that of another",
}


def shift_of(found: NDArray[np.bool_], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The shift of an array of which each token has that of one other, as `depends` shows it; (0, 0) if it is none."""
    if found.sum(axis=1).max() > 1:
        return None

    def place(i: Any) -> tuple[int, ...]:
        return tuple(map(int, np.unravel_index(i, shape)))

    places = {place(token): place(row.argmax()) for token, row in enumerate(found) if row.any()}
    if sum(token != other for token, other in places.items()) <= len(found) // 2:
        return None
    for rows, columns in _SHIFTS:
        if sum((i + rows, t + columns) == other for (i, t), other in places.items()) > len(places) / 2:
            return rows, columns
    return 0, 0


def told(name: str, shift: tuple[int, int]) -> str:
    """What is told of an array with this shift."""
    return f"{_WHAT[name]} are not those of their token: each has {_SHIFTS[shift]}"

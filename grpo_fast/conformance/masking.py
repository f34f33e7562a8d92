"""Which tokens a loss counts, and what reaches it from those that are masked or belong to other rows.

The mask that a loss applies in truth is where its gradient is not 0 when all tokens are alike. What leaks is found by
changing the values at masked places, one array at a time, finitely.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calling import Batch, CallFailed, Loss
from .report import Finding, Topic, number, rounded

_LEAK: Topic = "leak"
_MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0]], bool)
_WHAT = {
    "logps": "log-probabilities",
    "old_logps": "old log-probabilities",
    "ref_logps": "the reference's log-probabilities",
    "advantages": "advantages",
}


def base(mask: NDArray[np.bool_] = _MASK, per_token: bool = False, A: float = 1.0) -> Batch:
    """A batch with small log-ratios of all kinds, below 0 so that nothing is clipped for A > 0."""
    rng = np.random.default_rng(5)
    old = rng.uniform(-1.5, -0.5, mask.shape)
    x = -rng.uniform(1e-5, 2e-4, mask.shape)
    advantages = rng.uniform(0.5, 1.5, mask.shape if per_token else len(mask)) * A
    return Batch(old + x, old, advantages, old + x - rng.uniform(-0.8, 0.8, mask.shape), mask)


def effective(loss: Loss, made: Callable[[NDArray[np.bool_]], Batch]) -> Finding | None:
    """What is wrong if the tokens that count, in what is ``made`` of a mask, are not those of the mask; or None."""
    if "mask" not in loss.takes:
        return None
    patterns = []
    masks = [_MASK, np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool), np.array([[0, 1, 1], [1, 1, 1]], bool)]
    for mask in masks:
        try:
            grad = loss(made(mask)).grad
        except CallFailed:
            return None
        assert grad is not None
        patterns.append(np.isnan(grad) | (np.abs(grad) > 1e-9 * np.nanmax(np.abs(grad), initial=1e-300)))
    if not any(pattern.any() for pattern in patterns):
        return None  # without a gradient, which is told elsewhere
    if all(map(np.array_equal, patterns, masks)):
        return None
    if all(pattern.all() for pattern in patterns) and _through_others(loss, made):
        text = "padding leaks: log-ratios of masked tokens enter the ratio of their sequence"
        at = made(np.array([[True, False]]))
        grad = loss(at).grad
        return Finding("differs", text, "a mask with zeros", f"∂loss/∂logps = {_rows(grad)}", at, "leak")
    text = next(
        (
            text
            for text, of in _PATTERNS.items()
            if all(np.array_equal(pattern, of(mask)) for pattern, mask in zip(patterns, masks, strict=True))
        ),
        "the tokens that count are not those of the mask",
    )
    wrong = next(mask for mask, pattern in zip(masks, patterns, strict=True) if not np.array_equal(mask, pattern))
    mask = _smallest(loss, made, wrong)
    at = made(mask)
    grad = loss(at).grad
    assert grad is not None
    amount = f"∂loss/∂logps = {_rows(grad)}"
    return Finding("differs", text, "a mask with zeros", amount, at)


def _rows(grad: Any) -> str:
    return str([[rounded(g) for g in row] for row in grad])


def _through_others(loss: Loss, made: Any) -> bool:
    """Whether the gradient of a token depends on a masked one of its row: then it is no term of its own."""
    at = made(np.array([[True, False]]))
    moved = at._replace(logps=at.logps - np.array([[0.0, 1e-3]]))
    before, after = loss(at).grad, loss(moved).grad
    return before is not None and after is not None and abs(after[0, 0] - before[0, 0]) > 1e-5 * abs(before[0, 0])


def _smallest(loss: Loss, made: Any, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A small mask where what counts is something else."""
    for rows in ([[1, 0]], [[0, 1]], [[1, 1, 0]], [[0, 1, 1]], [[1, 1]], [[1, 0, 1]]):
        small = np.array(rows, bool)
        grad = loss(made(small)).grad
        if grad is None or not np.isfinite(grad).all() or not grad.any():  # it is as of no token at all
            continue
        if not np.array_equal(grad != 0, small):
            return small
    return mask


def _shift(mask: NDArray[np.bool_], by: int, fill: bool = False) -> NDArray[np.bool_]:
    moved = np.full_like(mask, fill)
    if by > 0:
        moved[:, by:] = mask[:, :-by]
    else:
        moved[:, :by] = mask[:, -by:]
    return moved


_LATE = "the mask is shifted by one: a token counts if the one before it does (off by one)"
_EARLY = "the mask is shifted by one: a token counts if the one behind it does (off by one)"
_PATTERNS: dict[str, Callable[[NDArray[np.bool_]], NDArray[np.bool_]]] = {
    "the mask is not applied: masked tokens count like the others": np.ones_like,
    "the mask is inverted: what is masked counts, and nothing else": np.logical_not,
    _LATE: lambda mask: _shift(mask, 1),
    _EARLY: lambda mask: _shift(mask, -1),
    "the mask is shifted by one, round the end of the row (roll; token t counts if t − 1 does)": lambda mask: np.roll(
        mask, 1, axis=1
    ),
    "the mask is shifted by one, round the end of the row (roll; token t counts if t + 1 does)": lambda mask: np.roll(
        mask, -1, axis=1
    ),
    "the mask is shifted by one, and the first token always counts (off by one)": lambda mask: _shift(mask, 1, True),
    "the mask is shifted by one, and the last token always counts (off by one)": lambda mask: _shift(mask, -1, True),
    "the last token of each sequence is dropped (off by one)": lambda mask: mask & _shift(mask, -1),
    "the first token of each sequence is dropped (off by one)": lambda mask: mask & _shift(mask, 1),
    "the last position of the row is dropped (off by one)": lambda mask: (
        mask & (np.arange(mask.shape[1]) < mask.shape[1] - 1)
    ),
    "the first position of the row is dropped (off by one)": lambda mask: mask & (np.arange(mask.shape[1]) > 0),
    "one token behind each sequence counts, too (off by one)": lambda mask: mask | _shift(mask, 1),
    "one token before each sequence counts, too (off by one)": lambda mask: mask | _shift(mask, -1),
}


def leaks(loss: Loss, per_token: bool, known: Collection[str]) -> list[Finding]:
    """What reaches loss or gradient from masked places, but for arrays of which it is ``known``; finite numbers."""
    if "mask" not in loss.takes:
        return []
    findings = []
    for name in _WHAT:
        if name not in loss.takes or name in known or (name == "advantages" and not per_token):
            continue
        for A in (0.0, 1.0):
            at = base(per_token=name == "advantages", A=A)
            if name == "advantages" and A == 0:
                continue
            if not _reacts(loss, at, name):
                continue
            term = " into the KL term" if A == 0 else ""
            text, topic = f"padding leaks{term}: {_WHAT[name]} at masked places change the result", _LEAK
            if name == "advantages":
                topic = "masked advantages"
                text = "advantages of masked tokens enter the sequence's mean"
            small, amount = _small_leak(loss, at, name)
            findings.append(Finding("differs", text, "finite values where the mask is 0", amount, small, topic))
            break
    return findings


def _changed(at: Batch, name: str) -> Batch:
    values = getattr(at, name).copy()
    values[~at.mask] -= 0.7
    return at._replace(**{name: values})


def _reacts(loss: Loss, at: Batch, name: str) -> bool:
    try:
        before, after = loss(at), loss(_changed(at, name))
    except CallFailed:
        return False
    assert before.grad is not None
    assert after.grad is not None
    error = loss.exactness * 10
    size = max(np.abs(before.grad).max(initial=0), np.abs(after.grad).max(initial=0))
    moved = abs(before.loss - after.loss) > error * max(abs(before.loss), abs(after.loss), 1e-6)
    return bool(moved or np.abs(before.grad - after.grad).max(initial=0) > max(error * 100, 1e-7) * size)


def _small_leak(loss: Loss, at: Batch, name: str) -> tuple[Batch, str]:
    """One sequence of two tokens, of which one is masked and off, if that shows it; and by how much."""
    mask = np.array([[True, False]])
    one = np.full((1, 2), -1.0)
    small = Batch(one, one, np.ones((1, 2)) if at.advantages.ndim == 2 else np.ones(1), one, mask)
    if name == "ref_logps" or not at.advantages.any():
        small = small._replace(advantages=0 * small.advantages)
    if not _reacts(loss, small, name):
        small = at
    before, after = loss(small), loss(_changed(small, name))
    return _changed(small, name), f"loss {number(before.loss)} → {number(after.loss)} as masked {name} fall by 0.7"


def rows_mixed(loss: Loss) -> list[Finding]:
    """Whether the gradient of one row depends on the values of another."""
    for at in (Batch(*_TWO_ROWS), base(np.ones((3, 2), bool))):
        before = loss(at).grad
        assert before is not None
        parts = {
            "advantages": at._replace(advantages=np.append(at.advantages[:-1], 3 * at.advantages[-1])),
            "log-ratios": at._replace(logps=np.concatenate([at.logps[:-1], at.logps[-1:] - 1e-4])),
        }
        moved = {}
        for name, other in parts.items():
            after = loss(other).grad
            assert after is not None
            off = np.abs(after - before)[:-1].max()
            if off > max(loss.exactness * 100, 1e-7) * np.abs(before).max():
                moved[name] = f"moves by {number(off)} of {number(np.abs(before).max())} with the {name}"
        if moved:
            text = f"rows are mixed: the gradient of a row depends on the {' and the '.join(moved)} of another"
            return [Finding("differs", text, "two rows or more", ", ".join(moved.values()), at, "mixed rows")]
    return []


_TWO_ROWS = (
    np.array([[-0.5001], [-0.7001]]),
    np.array([[-0.5], [-0.7]]),
    np.array([1.0, 2.0]),
    np.array([[-0.6001], [-0.5001]]),
    np.ones((2, 1), bool),
)

"""How a loss takes advantages: one per sequence, one per token, and what it makes of the second."""

from typing import NamedTuple

import numpy as np

from .calling import Batch, CallFailed, Loss, batch
from .report import Finding, number


class Advantages(NamedTuple):
    """Whether advantages per token are taken as such."""

    per_token: bool
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def read(loss: Loss) -> Advantages:
    """Try advantages in both forms, on tokens that are alike otherwise."""
    findings: list[Finding] = []
    notes: list[str] = []
    if "(B, T)" not in loss.forms:
        return Advantages(False, (), ("it takes advantages one per sequence only",))
    if loss.form != "(B,)":
        notes.append("it takes advantages of shape (B, T), or what broadcasts to it, not (B,)")
        findings += _square(loss)
    A = np.array([[1.0, 2.0, 4.0], [3.0, 0.5, 1.5]])
    at = batch(np.full((2, 3), -0.5), advantages=A)
    try:
        grad, one, without = (loss(at._replace(advantages=a)).grad for a in (A, np.ones(2), np.zeros(2)))
    except CallFailed:
        return Advantages(False, tuple(findings), tuple(notes))
    assert grad is not None
    assert one is not None
    assert without is not None
    grad, one = grad - without, one - without
    if not one.any() or not np.isfinite(grad).all():
        return Advantages(False, tuple(findings), tuple(notes))
    tol = 1e-4
    with np.errstate(all="ignore"):
        found = grad / one
    if np.allclose(found, A, rtol=tol):
        return Advantages(True, tuple(findings), tuple(notes))
    means = A.mean(axis=1, keepdims=True) + 0 * A
    if np.allclose(found, means, rtol=tol):  # a level of sequences, or a mean over each
        return Advantages(True, tuple(findings), tuple(notes))
    if _mixes(loss, at):
        text = "advantages one per token, (B, T), are taken without an error and mixed over rows: (B, 1, T) × (B, T)"
        amount = f"the gradient is {_row(found[0])} times that of A = 1, for A = {_row(A[0])}"
        findings.append(Finding("fragile", text, "advantages of shape (B, T)", amount, _small(at)))
        return Advantages(False, tuple(findings), tuple(notes))
    text = "advantages one per token are not those of the tokens"
    if np.allclose(found, A[:, :1] + 0 * A, rtol=tol):
        text = "of advantages one per token only that of the first is used"
    amount = f"the gradient is {_row(found[0])} times that of A = 1, for A = {_row(A[0])}"
    findings.append(Finding("differs", text, "advantages of shape (B, T)", amount, at))
    return Advantages(False, tuple(findings), tuple(notes))


def _row(x: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> str:
    return str([float(number(v)) for v in x])


def _mixes(loss: Loss, at: Batch) -> bool:
    other = at.advantages.copy()
    other[1] *= 3
    first, second = loss(at).grad, loss(at._replace(advantages=other)).grad
    return first is not None and second is not None and not np.allclose(first[0], second[0], rtol=1e-6)


def _small(at: Batch) -> Batch:
    return Batch(*(x[:, :1] for x in at))


def _square(loss: Loss) -> list[Finding]:
    """Of a loss that refuses (B,): whether it takes it, along the wrong axis, where there are as many rows as columns."""
    kept, loss.form = loss.form, "(B,)"
    try:
        at = batch(np.full((2, 2), -0.5), advantages=[1.0, 3.0])
        grad = loss(at).grad
    except CallFailed:
        return []
    finally:
        loss.form = kept
    if grad is not None and abs(grad[0, 1] - grad[0, 0]) > 1e-6 * abs(grad[0, 0]):
        text = "advantages one per sequence, (B,), are broadcast along the tokens where B = T: a row has another's"
        return [Finding("fragile", text, "advantages of shape (B,), B = T; elsewhere an error", "", at)]
    return []

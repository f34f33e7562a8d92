"""How a loss takes advantages: one per sequence, one per token, and what it makes of the second."""

from typing import Any, NamedTuple

import numpy as np

from . import alignment
from .calling import Batch, CallFailed, Loss, batch, each
from .report import Finding, Severity, rounded


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
        found = np.where(one == 0, A, grad / one)
    if np.allclose(found, A, rtol=tol):
        return Advantages(True, tuple(findings), tuple(notes))
    means = A.mean(axis=1, keepdims=True) + 0 * A
    own_part = float(np.vdot(found - means, A - means) / np.vdot(A - means, A - means))
    if np.allclose(found, means + own_part * (A - means), rtol=tol):  # a level of sequences, or a mean over each
        return Advantages(True, tuple(findings), tuple(notes))
    if np.allclose(found, A.mean(), rtol=tol):  # rows are mixed, which is told elsewhere
        return Advantages(False, tuple(findings), tuple(notes))
    amount = f"the gradient is {_row(found[0])} times that of A = 1, for A = {_row(A[0])}"
    if _mixes(loss, at):
        text = "advantages one per token, (B, T), are taken without an error and mixed over rows: (B, 1, T) × (B, T)"
        if loss.form == "(B,)":
            return Advantages(False, tuple(findings), (*notes, text))
        findings.append(Finding("differs", text, "advantages of shape (B, T)", amount, _small(at)))
        return Advantages(False, tuple(findings), tuple(notes))
    own = alignment.depends(loss, at, "advantages")
    first_only = np.allclose(found, A[:, :1] + 0 * A, rtol=tol)
    alike = loss(at._replace(advantages=np.ones((2, 3)))).grad
    assert alike is not None
    as_one = np.allclose(alike - without, one, rtol=tol)
    if own is not None and not first_only and not own[~np.eye(6, dtype=bool)].any():
        if as_one:  # what it makes of them is told elsewhere
            return Advantages(True, tuple(findings), tuple(notes))
        if loss.form == "(B,)":
            text = "advantages one per token, (B, T), are taken without an error and count B times: (B, 1, T) × (B, T)"
            return Advantages(False, tuple(findings), (*notes, text))
    text = "advantages one per token, (B, T), are taken without an error and are not those of the tokens"
    if first_only:
        text = "of advantages one per token, (B, T), only that of the first is used, without an error"
    elif own is not None and (shift := alignment.shift_of(own, at.logps.shape)) is not None:
        text = alignment.told("advantages", shift)
    severity: Severity = "fragile" if loss.form == "(B,)" else "differs"
    findings.append(Finding(severity, text, "advantages of shape (B, T)", amount, at))
    return Advantages(False, tuple(findings), tuple(notes))


def together(loss: Loss) -> list[Finding]:
    """What the loss makes of the advantages of all rows together: their mean and their spread, taken out of them."""
    A = np.array([3.0, 1.0, -1.0])

    def grad(advantages: Any) -> Any:
        return loss(batch(np.full((3, 2), -1.0), advantages=advantages)).grad

    try:
        without, usual, shifted, scaled = (grad(x) for x in (0 * A, A, A + 5, 3 * A))
    except CallFailed:
        return []
    usual, shifted, scaled = usual - without, shifted - without, scaled - without
    if not np.any(usual) or not np.isfinite([usual, shifted, scaled]).all():
        return []
    no_mean, no_scale = (np.allclose(x, usual, rtol=1e-3, atol=1e-3 * np.abs(usual).max()) for x in (shifted, scaled))
    example = batch([[-1.0], [-1.0]], advantages=[6.0, 4.0])
    if no_mean and no_scale:
        text = "normalises the advantages over the batch inside of the loss: their mean and scale do not matter"
        amount = "advantages (8, 6, 4) and (9, 3, −3) give the gradient of (3, 1, −1)"
    elif no_mean:
        text = "subtracts the mean of the advantages over the batch inside of the loss"
        amount = "advantages (8, 6, 4) give the gradient of (3, 1, −1)"
    elif no_scale and "(B,)" in loss.forms and not np.allclose(np.abs(usual), np.abs(usual).max(), rtol=1e-3):
        text = "divides the advantages by their standard deviation, or another size of them, inside of the loss"
        amount = "advantages (9, 3, −3) give the gradient of (3, 1, −1)"
    else:
        return []
    return [Finding("differs", text, "two rows or more", amount, example)]


def _row(x: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> str:
    return str([rounded(v) for v in x])


def _mixes(loss: Loss, at: Batch) -> bool:
    """Whether the advantages of one row matter to another where they are one per token, and only there."""
    mixed = []
    for advantages in (at.advantages, np.array([1.0, 2.0])):
        other = advantages.copy()
        other[1] *= 3
        first, second = (loss(at._replace(advantages=x)).grad for x in (advantages, other))
        assert first is not None
        assert second is not None
        mixed.append(not np.allclose(first[0], second[0], rtol=1e-6))
    return mixed[0] and not mixed[1]


def _small(at: Batch) -> Batch:
    return each(at, lambda x: x[:, :1])


def _square(loss: Loss) -> list[Finding]:
    """Of a loss that refuses (B,): whether it takes it, along the wrong axis, where B = T."""
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

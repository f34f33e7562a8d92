"""A KL to the reference that is taken from the advantages, A − β·k, as from a reward, inside of the loss."""

import numpy as np
from numpy.typing import NDArray

from ..terms import K1, K2, K3, KL
from .calling import Batch, CallFailed, Loss, batch
from .kl import estimate
from .numbers import tidy
from .report import Finding, number

_ESTIMATORS: dict[str, type[KL]] = {
    "(log π_old − log π_ref)": K1,
    "k3 of log π_old − log π_ref": K3,
    "k2 of log π_old − log π_ref": K2,
}
#: log ρ, log π_old − log π_ref, A.
_PLACES = ((-0.5, 0.4, 1.0), (0.4, -0.3, -1.0), (0.05, 0.9, 0.3), (-0.05, -0.8, 0.0), (0.9, 0.2, -2.0))


def read(loss: Loss) -> list[Finding]:
    """The finding that a KL of the old policy is within the advantages; its gradient is that of ρ alone."""
    if not {"old_logps", "ref_logps"} <= set(loss.takes):
        return []
    try:
        scale = loss.value(_tokens(0.0, 0.0, 0.0)) - loss.value(_tokens(0.0, 0.0, 1.0))
        cost = loss.value(_tokens(0.0, 0.5, 0.0)) - loss.value(_tokens(0.0, 0.0, 0.0))
        if not np.isfinite([scale, cost]).all() or not scale or not cost:
            return []
        if np.abs(_answer(loss, _tokens(0.1, 0.0, 0.0))).max() > 1e-6 * abs(scale):  # it is of π_θ, or there is more
            return []
        for name, kind in _ESTIMATORS.items():
            beta = cost / scale / float(estimate(kind, 0.5)[0])
            if all(_same(loss, x, d, A, A - beta * float(estimate(kind, d)[0])) for x, d, A in _PLACES):
                beta = tidy(beta, max(1e-7, 10 * loss.exactness))
                what = (
                    f"the KL is within the advantages, A − {number(beta)}·{name}, as in a reward: it is clipped and "
                    "weighted as they are; grpo_loss is given such advantages, and no kl"
                )
                amount = f"A = 0 counts as {number(-cost / scale)} at log π_old − log π_ref = 0.5"
                return [
                    Finding("differs", what, "π_ref is not π_old", amount, _tokens(0.0, 0.5, 0.0, 1), "other arrays")
                ]
    except CallFailed:
        pass
    return []


def _tokens(x: float, d: float, A: float, width: int = 3) -> Batch:
    old = np.full((1, width), -1.5)
    return batch(old + x, old, [A], old - d)


def _same(loss: Loss, x: float, d: float, A: float, other: float) -> bool:
    """Whether the loss is as with this other advantage and without a distance from the reference."""
    found, expected = (_answer(loss, at) for at in (_tokens(x, d, A), _tokens(x, 0.0, other)))
    size = max(1e-3, float(np.abs(expected).max()))
    return bool(np.abs(found - expected).max() <= max(1e-7, 10 * loss.exactness) * size)


def _answer(loss: Loss, at: Batch) -> NDArray[np.float64]:
    """The loss and its gradient in a row, if it has one."""
    if not loss.gives_gradient:
        return np.array([loss.value(at)])
    found = loss(at)
    assert found.grad is not None
    return np.append(found.grad.ravel(), found.loss)

"""The weights c_i of tokens: a denominator that is a function of the batch, batches to read them from, and reading.

They are read from the gradient at ρ = 1, where every policy term has the slope A.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .calling import Batch, CallFailed, Loss, batch
from .report import Finding

Floats = NDArray[np.float64]
LOGP = -0.5


class Normalizer(NamedTuple):
    """A denominator that is a function of the batch: call it with the mask to have the number for `grpo_loss`.

    It is ``constant`` times the power of each of the ``factors``, such as ``("B", 1)``: "B" is the number of sequences,
    "B′" of those with a token, "N" of tokens, "T" the width, "max n" the length of the longest sequence; none below 1.
    """

    constant: float
    factors: tuple[tuple[str, float], ...]

    def __call__(self, mask: Any) -> float:
        """The denominator for a batch with this mask (B, T)."""
        keep = np.asarray(mask) != 0
        counts = keep.sum(axis=1)
        sizes = {"B": len(keep), "T": keep.shape[1], "N": counts.sum(), "B′": (counts > 0).sum()}
        sizes["max n"] = counts.max(initial=0)
        return float(self.constant * math.prod(max(float(sizes[name]), 1.0) ** p for name, p in self.factors))

    def __repr__(self) -> str:
        parts = [power(name, p) for name, p in self.factors]
        constant = [] if self.constant == 1 and parts else [f"{self.constant:g}"]
        return f"<{' · '.join(constant + parts)}, of each batch>"


class Weights(NamedTuple):
    """What was read of the weights."""

    aggregation: str | None
    normalizer: Any
    powers: dict[str, float] | None
    constant: float
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def ragged(lengths: Iterable[int], padding: int = 0) -> NDArray[np.bool_]:
    """The mask of sequences of these lengths, padded on the right by so much more."""
    lengths = np.array(list(lengths))
    return np.arange(lengths.max(initial=0) + padding) < lengths[:, None]


def of_policy(mask: NDArray[np.bool_]) -> Batch:
    """A batch whose gradient is −c_i·A, A = 1, ρ = 1, l = 0."""
    return batch(np.full(mask.shape, LOGP), advantages=np.ones(len(mask)), mask=mask)


def of_kl(mask: NDArray[np.bool_]) -> Batch:
    """A batch whose gradient is that of the KL term alone, the same for all tokens but for c_i."""
    logps = np.full(mask.shape, LOGP)
    return batch(logps, advantages=np.zeros(len(mask)), ref_logps=logps - 0.5, mask=mask)


def measured(loss: Loss, at: Batch, unit: float) -> Floats | None:
    """The weight of every position, or None if the loss raises an error there."""
    try:
        grad = loss(at).grad
    except CallFailed:
        return None
    assert grad is not None
    return np.asarray(grad / unit, np.float64)


def sizes(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What a weight may depend on."""
    counts = mask.sum(axis=1)
    return {
        "n_i": counts[:, None] * np.ones(mask.shape),
        "N": counts.sum(),
        "B": len(mask),
        "T": mask.shape[1],
        "B′": (counts > 0).sum(),
        "max n": counts.max(),
    }


def power(name: str, p: float) -> str:
    """A factor as it is written."""
    return name if p == 1 else f"{name}^{p:g}"

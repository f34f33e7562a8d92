"""Whether a peer's loss and gradient are right, but for rounding."""

import numpy as np
from batches import Batch
from loss_peers import BETA, EPSILON, Found

from grpo_fast import K3, Clip, reference


def expected(batch: Batch, level: str) -> tuple[Found, Found]:
    """The loss and the gradient by the reference, in float64, for clip bounds a little below ε and a little above."""
    logps, old_logps, ref_logps, advantages = (x.astype(np.float64) for x in batch[:4])
    rounding = 256 * float(np.finfo(batch.logps.dtype).eps)
    below, above = (
        reference.grpo_loss(
            logps,
            old_logps,
            advantages,
            ref_logps,
            mask=batch.mask,
            surrogate=Clip(epsilon),
            kl=K3(BETA, importance_weighted=False),
            importance_sampling_level=level,
            grad=True,
        )
        for epsilon in (EPSILON - rounding, EPSILON + rounding)
    )
    return (below.loss, below.grad), (above.loss, above.grad)


def check(found: Found, right: tuple[Found, Found], batch: Batch) -> None:
    """Assert that what a peer found is right but for rounding in the dtype of the batch.

    The loss is a sum of N terms of the size |A| + β, each rounded, in an order of the peer's own: √N roundings.
    An element of the gradient is a dozen operations on c·(|A|·ρ + β·r), of which the mean over a sequence may cost
    many. Where ρ is within rounding of a clip bound, the gradient on either side of it is right; and torch.minimum
    halves it at a tie, even one by rounding: about one in 10⁷ float32 tokens may be off.
    """
    eps = float(np.finfo(batch.logps.dtype).eps)
    size = float(np.abs(batch.advantages).max()) + BETA
    loss, grad = found
    assert abs(loss - right[0][0]) <= 8 * eps * batch.tokens**0.5 * size
    if grad is None:
        return
    assert grad.dtype == batch.logps.dtype
    mask = np.ones(grad.shape, dtype=bool) if batch.mask is None else batch.mask
    c = mask / (len(mask) * np.maximum(mask.sum(axis=1, keepdims=True), 1))
    off = np.minimum(*(np.abs(grad - g) for _, g in right))
    assert np.count_nonzero(off > 256 * eps * 2 * size * c) <= 1e-6 * grad.size

"""Whether the value of a policy term is averaged as its gradient is: at ρ = 1 each is the other's, up to one factor."""

import numpy as np

from .calling import CallFailed, Loss
from .measuring import of_policy
from .report import Finding, number

_FULL = np.ones((2, 3), bool)
_RAGGED = np.array([[1, 1, 0], [1, 0, 0]], bool)


def read(loss: Loss, width: int, of_tokens: bool) -> list[Finding]:
    """The finding that value and gradient are of other means, for the token level also of other tokens."""
    if not loss.gives_gradient:
        return []

    def per_gradient(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> float:
        at = of_policy(mask)
        with_a, without = (loss(x) for x in (at, at._replace(advantages=0 * at.advantages)))
        assert with_a.grad is not None
        assert without.grad is not None
        gradient = float((without.grad - with_a.grad).sum())
        return (without.loss - with_a.loss) / gradient if gradient else np.nan

    try:
        one = per_gradient(np.ones((1, width), bool))
        full = per_gradient(_FULL) / one if one else np.nan
        ragged = per_gradient(_RAGGED) / one if "mask" in loss.takes and of_tokens and one else 1.0
    except CallFailed:
        return []
    if not np.isfinite([full, ragged]).all() or not full:
        return []
    if abs(full - 1) > 1e-4:
        what = (
            f"the gradient of the policy term is {number(1 / full)} times that of its value in a batch of 2 × 3 tokens"
        )
        return [Finding("differs", what, "several tokens", "for one token it is that of its value", of_policy(_FULL))]
    if abs(ragged - 1) > 1e-4:
        what = "the value counts fewer tokens than the gradient where some are masked"
        if ragged > 1:
            what = "masked tokens count in the value, with ρ = 1: the log-probabilities are masked, not the loss"
        amount = f"value over gradient is {number(ragged)} times as large as without padding"
        return [Finding("differs", what, "a mask with zeros", amount, of_policy(np.array([[True, False]])))]
    return []

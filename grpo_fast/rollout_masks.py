"""Two masks for the place of `rollout_is_weights` in `grpo_loss`: `off_policy_sequence_mask`, `high_entropy_mask`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import as_given, counts_of, float_dtype, number, real, refuse_unless_finite, unmasked
from ._loss_inputs import expected_beside
from .rollout import refuse_bad_logps


@np.errstate(all="ignore")
def off_policy_sequence_mask(
    logps: ArrayLike,
    rollout_logps: ArrayLike,
    advantages: ArrayLike,
    delta: float,
    *,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
) -> NDArray[np.floating]:
    """1 for the tokens of sequences to learn from, 0 for those with A < 0 that the policy has moved too far away from.

    ::

        M = 1  where A ≥ 0  or  mean_t(log π_rollout − log π_θ) ≤ δ;  else 0

    over the unmasked tokens of a sequence. It multiplies ``rollout_is_weights``, or is them.

    Parameters
    ----------
    logps : (B, T) padded, or (N,) packed with ``cu_seqlens``, or (N,) alone, which is one sequence
        log π_θ of each token.
    rollout_logps : like ``logps``
        log π_rollout. A NaN is a missing one, and counts 0.
    advantages : one per sequence: (B,), (S,), (B, 1), (S, 1), or a number for one sequence
        A.
    delta : float, in [0, inf]
        δ, nats. What is exactly at it is kept.
    mask : like ``logps``, bools or 0/1, or None
        Which tokens count; what any array holds elsewhere is never used.
    cu_seqlens : (S + 1,) ints, or None
        Where packed sequences begin and end.

    Returns
    -------
    array, or tensor, like ``logps``
        0/1, in the dtype that computes: float32 for float32, bfloat16 and float16, else float64. 0 where masked.

    Raises
    ------
    TypeError, ValueError
        As `rollout_correction`.

    References
    ----------
    DeepSeek-V3.2, arXiv:2512.02556, Eq. 9. TRL ``off_policy_mask_threshold``.
    """
    array, expected = expected_beside("logps", logps, cu_seqlens)
    delta = number("delta", delta, "in [0, inf]", lambda x: x >= 0)
    counts = np.ones(array.size, np.bool_) if mask is None else expected.mask(mask).view(np.bool_)
    logp, rollout_logp = expected.per_token("logps", array), expected.per_token("rollout_logps", rollout_logps)
    refuse_bad_logps("logps", logp, rollout_logp, counts, expected.shape)
    lengths = counts_of(counts, expected.bounds)
    a = expected.per_sequence("advantages", advantages)
    refuse_unless_finite("advantages", a, lengths > 0)

    apart = rollout_logp[counts].astype(np.float64) - logp[counts]
    apart[np.isnan(apart)] = 0  # missing
    starts = np.cumsum(lengths) - lengths
    # reduceat wants every start inside the array, hence the 0; where a sequence is empty it does not matter what it is
    total = np.add.reduceat(np.append(apart, 0), starts) if lengths.size else np.zeros(0)
    keeps = (a >= 0) | (total / np.maximum(lengths, 1) <= delta)
    result = np.repeat(keeps, np.diff(expected.bounds)) & counts
    return as_given(logps, result.reshape(array.shape).astype(float_dtype(array)))


@np.errstate(all="ignore")
def high_entropy_mask(entropies: ArrayLike, quantile: float, *, mask: ArrayLike | None = None) -> NDArray[np.floating]:
    """1 for the tokens where the policy was least certain, 0 for the others: learning from the forking tokens alone.

    ::

        M = 1  where H ≥ the quantile of H over all unmasked tokens, interpolated linearly;  else 0

    Parameters
    ----------
    entropies : array of any shape
        H of the policy's distribution at each token, nats.
    quantile : float, in [0, 1]
        0.8 keeps the 20 % of highest entropy, as the paper does. TRL ``top_entropy_quantile`` is 1 − this.
    mask : like ``entropies``, bools or 0/1, or None
        Which tokens count; what is elsewhere is never looked at.

    Returns
    -------
    array, or tensor, like ``entropies``
        0/1, in its dtype (float64 for ints, float32 for bfloat16); 0 where masked.

    Raises
    ------
    TypeError, ValueError
        A mask of another shape, ``quantile`` outside its interval, or an unmasked entropy that is not finite.

    References
    ----------
    Beyond the 80/20 rule, arXiv:2506.01939.
    """
    array = real("entropies", entropies)
    quantile = number("quantile", quantile, "in [0, 1]", lambda x: 0 <= x <= 1)
    keep = unmasked("entropies", array, mask)
    refuse_unless_finite("entropies", array, keep)
    result = np.zeros(array.shape, float_dtype(array))
    if keep.any():
        h = array.astype(np.float64)
        result[keep & (h >= np.quantile(h[keep], quantile))] = 1
    return as_given(entropies, result)

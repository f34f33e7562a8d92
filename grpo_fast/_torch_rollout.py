"""`rollout_correction` and two masks for tensors, which are constants: no gradient, and outside of graphs."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Never

import torch

from . import rollout, rollout_masks
from ._checks import hides_unknown, refuse_unknown
from ._tensors import CAN_BE_SAID, Tensor, array, constant
from .rollout_stats import RolloutStats
from .rollout_terms import Reject, WeightLevel, WeightMode

#: What is of them is computed once per batch, on constants: no graph has to know it.
_outside_graphs: Any = torch.compiler.disable(
    **({"reason": "it is of constants, once per batch, and made outside of graphs"} if CAN_BE_SAID else {})
)


class RolloutCorrection(NamedTuple):
    """What `rollout_correction` returns; it prints as a table."""

    weights: Tensor  # like old_logps, of the dtype that computes: for ``rollout_is_weights`` of `grpo_loss`
    mask: Tensor  # bools; the mask less what is rejected
    stats: RolloutStats

    def __repr__(self) -> str:
        return repr(rollout.RolloutCorrection(self.weights.numpy(), self.mask.numpy(), self.stats))


@_outside_graphs
@hides_unknown
def rollout_correction(
    old_logps: Tensor,
    rollout_logps: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    lower: float | None = None,
    upper: float | None = None,
    reject: Reject | Iterable[Reject] = (),
    normalize: bool = False,
    **unknown: Never,
) -> RolloutCorrection:
    """Importance weights between trainer and sampler, and what they reject, as tensors without a gradient; their stats.

    As `grpo_fast.rollout_correction`, whose options, shapes and formulas these are. Not copied: contiguous tensors of
    float32 and float64, masks of bools, int64 ``cu_seqlens``.

    Parameters
    ----------
    old_logps, rollout_logps, mask, cu_seqlens : tensors, on the CPU
        Taken as constants, whether they require a gradient or not.
    level, mode, lower, upper, reject, normalize
        As in `grpo_fast.rollout_correction`.

    Returns
    -------
    RolloutCorrection
        ``weights``, float32 unless ``old_logps`` is float64 or holds ints; ``mask``, bools; ``stats``.

    Raises
    ------
    TypeError, ValueError
        As `grpo_fast.rollout_correction`, and: an argument is not a tensor, not dense, or not on the CPU.
    """
    if unknown:
        refuse_unknown(rollout_correction, unknown)
    weights, kept, stats = rollout.rollout_correction(
        array(constant("old_logps", old_logps, optional=False)),
        array(constant("rollout_logps", rollout_logps, optional=False)),
        mask=array(constant("mask", mask)),
        cu_seqlens=array(constant("cu_seqlens", cu_seqlens)),
        level=level,
        mode=mode,
        lower=lower,
        upper=upper,
        reject=reject,
        normalize=normalize,
    )
    return RolloutCorrection(torch.from_numpy(weights), torch.from_numpy(kept), stats)


@_outside_graphs
def off_policy_sequence_mask(
    logps: Tensor,
    rollout_logps: Tensor,
    advantages: Tensor,
    delta: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """1 for the tokens of sequences to learn from, 0 for those with A < 0 that the policy has moved too far away from.

    As `grpo_fast.off_policy_sequence_mask`. The tensors are taken as constants, whether they require a gradient or not,
    and the result has none.

    Raises
    ------
    TypeError, ValueError
        As there, and: an argument is not a tensor, not dense, or not on the CPU.
    """
    result = rollout_masks.off_policy_sequence_mask(
        array(constant("logps", logps, optional=False)),
        array(constant("rollout_logps", rollout_logps, optional=False)),
        array(constant("advantages", advantages, optional=False)),
        delta,
        mask=array(constant("mask", mask)),
        cu_seqlens=array(constant("cu_seqlens", cu_seqlens)),
    )
    return torch.from_numpy(result)


@_outside_graphs
def high_entropy_mask(entropies: Tensor, quantile: float, *, mask: Tensor | None = None) -> Tensor:
    """1 for the tokens where the policy was least certain, 0 for the others; as `grpo_fast.high_entropy_mask`.

    The tensors are taken as constants, whether they require a gradient or not, and the result has none.

    Raises
    ------
    TypeError, ValueError
        As there, and: an argument is not a tensor, not dense, or not on the CPU.
    """
    constants = constant("entropies", entropies, optional=False), constant("mask", mask)
    return torch.from_numpy(rollout_masks.high_entropy_mask(array(constants[0]), quantile, mask=array(constants[1])))

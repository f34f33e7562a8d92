"""Trainer and sampler: `rollout_correction`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, Never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import (
    Array,
    as_given,
    first_problem,
    flag,
    hides_unknown,
    refuse_unknown,
)
from ._kernels import rollout, threads
from ._kernels.blocks import blocks_in
from ._kernels.rollout_sums import RolloutTotals, empty_accumulators, merged
from ._kernels.tasks import perform
from ._kernels.tokens import Batch
from ._loss_inputs import expected_beside
from ._shares import all_sequences, begin_long, ranges_of
from .rollout_stats import RolloutStats
from .rollout_terms import Reject, RolloutOptions, WeightLevel, WeightMode

_LEVELS = {"token": rollout.TOKEN, "sequence": rollout.SEQUENCE, "geometric": rollout.GEOMETRIC}
#: The statistics and levels of `rollout.SequenceStatistics`, in its order; and of `rollout.TokenBands`.
_OF_SEQUENCES = [("ratio", level) for level in ("sequence", "geometric", "seq_min", "seq_max")] + [
    (statistic, level) for statistic in ("k2", "k3") for level in ("seq_sum", "seq_mean", "seq_max")
]
_OF_TOKENS = [(statistic, "token") for statistic in ("ratio", "k2", "k3")]


class RolloutCorrection(NamedTuple):
    """What `rollout_correction` returns; it prints as a table."""

    weights: NDArray[Any]  # like old_logps, of the dtype that computes: for ``rollout_is_weights`` of `grpo_loss`
    mask: NDArray[np.bool_]  # the mask less what is rejected
    stats: RolloutStats

    def __repr__(self) -> str:
        return f"{self.stats}\n{'weights':<40} {self.weights.dtype} {tuple(self.weights.shape)}"


@hides_unknown
def rollout_correction(
    old_logps: ArrayLike,
    rollout_logps: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    lower: float | None = None,
    upper: float | None = None,
    reject: Reject | Iterable[Reject] = (),
    normalize: bool = False,
    **unknown: Never,
) -> RolloutCorrection:
    """Importance weights between trainer and sampler, what they reject, and how far the two are apart.

    ::

        r = π_old/π_rollout = exp(old_logps − rollout_logps), held constant

        raw    = r_t                   level="token"
                 exp Σ_t log r_t       level="sequence", the product: TRL, verl, SkyRL
                 exp mean_t log r_t    level="geometric": ms-swift, AReaL, slime
        weight = clamp(raw, lower, upper)                    mode="truncate": TIS
                 raw where lower ≤ raw ≤ upper, else 0       mode="mask": IcePop, MIS
                 raw                                         mode="raw"

    in one pass over memory. The engine that samples rounds in another way than the one that trains, and both call the
    same weights their policy. Once per batch is enough: r does not change between optimiser steps.

    Parameters
    ----------
    old_logps : (B, T) padded, or (N,) packed with ``cu_seqlens``, or (N,) alone, which is one sequence
        log π_old of each token, the trainer's. float32, bfloat16 and float16 compute in float32, everything else in
        float64. What is of a whole sequence is float64 in any case.
    rollout_logps : like ``old_logps``
        log π_rollout, the sampler's. A NaN is a missing one: r = 1, and it is counted.
    mask : like ``old_logps``, bools or 0/1, or None
        Which tokens count. What any array holds elsewhere is never used; the weight is 0 there.
    cu_seqlens : (S + 1,) ints, or None
        Where packed sequences begin and end: from 0, never falling, to N.
    level : "token", "sequence" or "geometric"
        Of what the weight is; at the last two all tokens of a sequence have the same.
    mode : "truncate", "mask" or "raw"
        What becomes of a weight outside its bounds.
    lower, upper : float, in [0, inf], lower ≤ upper, or None
        The bounds, themselves inside; 0 and 2 unless given. None with mode "raw".
    reject : Reject, or any number of them
        What a token, or a whole sequence, must satisfy to be kept: all of them.
    normalize : bool
        Whether to divide the weights by their mean over unmasked tokens (zeros included), at another level than "token"
        over the sequences that have some. Then they depend on what else is in the batch.

    Returns
    -------
    RolloutCorrection
        ``weights``, like ``old_logps`` (a tensor, if that is one): 0 where masked or rejected. As
        ``rollout_is_weights`` of `grpo_loss` they leave the KL term and the denominators as they are (TRL, slime,
        AReaL, NeMo-RL). ``mask``: the mask less what is rejected. As ``mask`` of `grpo_loss` it changes both (verl,
        ms-swift). ``stats``: the `RolloutStats` of the weights before they are normalised. A sequence has the same bits
        in whichever batch, padding or packing it stands, on any number of threads, on any CPU.

    Raises
    ------
    TypeError, ValueError
        Shapes do not fit, an option is unknown or outside its interval, or an unmasked log-probability is not finite
        (a NaN in ``rollout_logps`` is allowed); the message has the first index.

    Notes
    -----
    Not copied: C-contiguous arrays of the dtype that computes, int64 ``cu_seqlens``, and masks of bools. Where an exp
    overflows, the result is infinite, never NaN.

    References
    ----------
    TIS: https://fengyao.notion.site/off-policy-rl. IcePop: arXiv:2510.18855. GLM-5: arXiv:2602.15763. The estimates of
    the KL: Schulman, http://joschu.net/blog/kl-approx.html.

    Examples
    --------
    >>> import numpy as np
    >>> from grpo_fast import rollout_correction
    >>> rollout_correction(np.log([0.05, 0.5]), np.log([0.5, 0.05])).weights.round(6).tolist()
    [0.1, 2.0]
    """
    if unknown:
        refuse_unknown(rollout_correction, unknown)
    options = RolloutOptions(level, mode, lower, upper, reject)
    flag("normalize", normalize)
    array, expected = expected_beside("old_logps", old_logps, cu_seqlens)
    weights = np.empty(expected.shape, expected.dtype)
    batch = Batch(
        logps=expected.per_token("old_logps", array),
        old_logps=expected.per_token("rollout_logps", rollout_logps),
        advantages=None,
        ref_logps=None,
        mask=None if mask is None else expected.mask(mask),
        weights=None,
        loss_weights=None,
        grad=weights.reshape(-1),
        bounds=expected.bounds,
        advantages_per_token=False,
        weights_per_token=False,
        loss_weights_per_token=False,
    )
    # A copy, of which the kernel takes what is rejected.
    kept = np.ones(batch.logps.size, np.uint8) if batch.mask is None else batch.mask.copy()
    totals = _compute(batch, options, kept)
    if totals.counts.suspect:
        counts = np.broadcast_to(np.True_ if batch.mask is None else batch.mask.view(np.bool_), batch.logps.shape)
        refuse_bad_logps("old_logps", batch.logps, batch.old_logps, counts, expected.shape)
    stats = RolloutStats.of(options, totals, len(batch.bounds) - 1)
    if normalize:
        _divide(batch.grad, stats.mean_to_divide_by)
    mask_of_kept = kept.view(np.bool_).reshape(expected.shape)
    return RolloutCorrection(as_given(old_logps, weights), as_given(old_logps, mask_of_kept), stats)


@lru_cache(maxsize=64)
def _rules(options: RolloutOptions) -> rollout.Rules:
    """The options as kernels know them, in arrays that nobody may write to, as all calls share them.

    (From a cache, since they are mostly those of the call before: 20 of the 50 microseconds of a small call.)
    """
    lower, upper = options.bounds
    below, above = (0.0, 0.0) if options.mode == "mask" else (lower, upper)
    bounds = rollout.Bounds(lower, upper, below, above)
    of_tokens = [options.band(*which) for which in _OF_TOKENS]
    rejects_tokens = any(each.level == "token" for each in options.reject)
    lows, highs = np.array([options.band(*which) for which in _OF_SEQUENCES]).T.copy()
    return rollout.Rules(
        _LEVELS[options.level],
        bounds,
        bounds if options.level == "token" else None,
        rollout.TokenBands(*(x for band in of_tokens for x in band)) if rejects_tokens else None,
        lows,
        highs,
    )


def _compute(batch: Batch, options: RolloutOptions, kept: Array) -> RolloutTotals:
    """The totals of a batch; writes the weights and what is kept on the way."""
    rules, may_reject = _rules(options), kept if options.reject else None
    with threads.tasks(2 * batch.logps.size) as tasks:
        accumulators = empty_accumulators(tasks)
        ranges, limit = all_sequences(batch), batch.logps.size
        long: list[int] = []
        if tasks > 1:
            ranges, limit, long = ranges_of(batch, tasks)
        arrays = batch.logps, batch.old_logps, batch.mask, batch.grad, batch.bounds
        if len(long) < len(batch.bounds) - 1 or tasks == 1:  # there are others
            perform(rollout.rollout, (*arrays, *rules, may_reject, ranges, limit, accumulators), tasks)
        for sequence in long:
            extent = begin_long(batch, sequence, accumulators)
            if extent.tokens:
                collected = np.empty(blocks_in(extent.stop - extent.start), rollout.COLLECTED)
                arguments = (batch, rules, may_reject, sequence, extent, collected, tasks)
                perform(rollout.collect_long, arguments, tasks)
                keeps, weight = rollout.conclude_long(batch, rules, extent.tokens, collected, accumulators)
                if not keeps or rules.weighs_tokens is None:
                    perform(rollout.spread_long, (batch, rules, may_reject, extent, keeps, weight, tasks), tasks)
    return merged(accumulators)


def refuse_bad_logps(name: str, logps: Array, rollout_logps: Array, keep: Array, shape: tuple[int, ...]) -> None:
    """Raise the ValueError for the first token that counts and is not finite, if any; ``logps`` has that name."""
    messages = (
        f"{name} must be finite where it is not masked, got {name}[{{i}}] = {{values[1]!r}}",
        "rollout_logps must be finite, or NaN where it is missing, got rollout_logps[{i}] = {values[2]!r}",
    )

    def problems(keep: Any, old: Any, rollout_: Any) -> dict[str, NDArray[np.bool_]]:
        bad = ~np.isfinite(old), np.isinf(rollout_)
        return {message: where & keep for message, where in zip(messages, bad, strict=True)}

    problem = first_problem(problems, [keep, logps, rollout_logps], shape)
    if problem:
        raise ValueError(problem)


def _divide(weights: Array, mean: float) -> None:
    """Divide the weights by their mean, in place; those that are 0 or infinite stay, and so do all if the mean is 0."""
    with np.errstate(all="ignore"):
        divisor = weights.dtype.type(mean)
    if divisor > 0:
        with threads.tasks(weights.size) as tasks:
            perform(rollout.divide, (weights, divisor, tasks), tasks)

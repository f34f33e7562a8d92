"""The loss at sequence level, where ρ is known only after all log-ratios of a sequence are summed.

For one ρ the policy term is linear in A on either side of 0. So one pass collects what does not depend on ρ, and leaves
∂k/∂l in the gradient's place (`collect`); `conclude` makes ρ, the sums and what the gradient consists of; `spread`
writes that, while the sequence is still in the cache.

The formulas are in `formulas`. One file, though a long one: what the three leave for each other is in no other.
"""

from typing import Any, NamedTuple

import numpy as np

from .blocks import BLOCK, RUN, block_count, share
from .compiling import compiled, inlined, subroutine
from .elementary import exp_of_any
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .formulas import count_clipped, is_weighted, kl_term, linear_factor, passes_through_ratio, surrogate_term
from .runs import (
    Scratch,
    absent_lanes,
    begin_block,
    end_block,
    fetch_gradient,
    larger_magnitude,
    load_distance,
    load_log_ratio,
    load_vector,
    load_weights,
    mask_of,
    one_nan,
    plus_if_given,
    prefetch_vector,
    scratch_for,
    store_gradient,
    tokens_from,
    zero_where,
)
from .simd import (
    align_stack,
    bits,
    full,
    full_like,
    lane_max,
    lane_min,
    lane_sum,
    lanes,
    load,
    store,
    tally,
    where,
    wide,
)
from .sums import Clipped, Contribution, Numerator, Sums, accumulate, accumulate_numerator
from .tasks import run
from .tokens import Batch, LossTerms, begin_sequence, weight_of_token
from .ways import CAREFUL, FAR, NEAR, far_enough, near_enough, plus_in, times, weighted_in, zero_in

# --- collect ----------------------------------------------------------------------------------------------------------
#: What is collected from each block of a sequence: sums, of tokens with A > 0 and with A < 0 apart where it says so.
COLLECTED = np.dtype(
    [
        ("log_ratio", np.float64),
        ("k", np.float64),  # the KL term, not weighted by ρ
        ("positive", np.float64),  # w·linear_factor
        ("negative", np.float64),
        ("positive_count", np.int64),
        ("negative_count", np.int64),
        ("suspect", np.int64),  # blocks in which something is not finite
    ]
)


class _RunLanes(NamedTuple):
    """What is collected from a run, in lanes."""

    log_ratio: Any
    k: Any
    positive: Any
    negative: Any
    positive_count: Any
    negative_count: Any
    check: Any  # Σ A + l + w: not finite if one of them is not
    farthest: Any  # |l|


@inlined
def _collect_run(way, terms, tokens, vectors, like):
    """The `_RunLanes` of so many vectors, in one of the `ways`; leaves ∂k/∂l in the gradient's place."""
    zero = full(like, 0.0)
    k = zero_in(way, zero)
    log_ratio = positive = negative = wide(zero)  # on which, as on ρ, neither the way nor the KL term may have a say
    check = farthest = zero
    positive_count = negative_count = bits(zero)
    v = 0
    while True:  # as in `token_level`
        prefetch_vector(tokens.logps, v)
        prefetch_vector(tokens.old_logps, v)
        prefetch_vector(tokens.ref_logps, v)
        absent = absent_lanes(tokens.mask, v, zero)
        logp = load_vector(tokens.logps, v)
        l = zero_where(absent, load_distance(logp, tokens.ref_logps, v))
        a = zero_where(absent, load_vector(tokens.advantages, v))
        w = load_weights(tokens.weights, absent, v)
        weighted = weighted_in(CAREFUL, w, linear_factor(terms.surrogate, a, zero_where(absent, logp)))
        log_ratio += wide(zero_where(absent, load_log_ratio(logp, tokens.old_logps, v)))
        k = plus_in(way, k, _collect_kl(way, terms.kl, tokens.grad, l, v))
        positive += wide(where(a > 0.0, weighted, zero))
        negative += wide(where(a < 0.0, weighted, zero))
        positive_count = tally(positive_count, a > 0.0)
        negative_count = tally(negative_count, a < 0.0)
        farthest = larger_magnitude(l, farthest)
        check = plus_if_given(check + a + l, w)
        v += 1
        if v >= vectors:
            break
    return _RunLanes(log_ratio, k, positive, negative, positive_count, negative_count, check, farthest)


@inlined
def _collect_kl(way, kl, grad, l, v):
    """k of one vector, 0 without a KL term; writes ∂k/∂l into the gradient's place if there is one."""
    if kl is None:
        return full_like(l, 0.0)
    term = kl_term(way, kl, l)
    store_gradient(grad, v, term.slope)
    return term.value


@inlined
def _plus_run(block, run):
    """The `_RunLanes` of a block, sums in float64, with those of a run."""
    return _RunLanes(
        block.log_ratio + run.log_ratio,
        block.k + wide(run.k),
        block.positive + run.positive,
        block.negative + run.negative,
        block.positive_count + run.positive_count,
        block.negative_count + run.negative_count,
        block.check + run.check,
        block.farthest,
    )


@subroutine(allocates=False)
def collect_block(batch, terms, sequence, start, stop, scratch, collected):
    """Fill one record of ``collected``, and leave ∂k/∂l in the gradient's place if there is a KL term.

    Runs are those of `token_level.token_block`.
    """
    align_stack()
    begin_block(batch, sequence, start, stop, scratch)
    like = scratch.vectors
    step = lanes(like)
    zero = full(like, 0.0)
    none, sums = bits(zero), wide(zero)
    block = _RunLanes(sums, sums, sums, sums, none, none, zero, zero)
    near = True
    i = start
    while i < stop:
        while near and i < stop:
            vectors = max(min(RUN, (stop - i) // step), 1)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _collect_run(NEAR, terms, tokens, vectors, like)
            near = near_enough(run.farthest)
            if near:
                block = _plus_run(block, run)
                i += vectors * step
        while not near and i < stop:
            vectors = max(min(RUN, (stop - i) // step), 1)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _collect_run(FAR, terms, tokens, vectors, like)
            near = near_enough(run.farthest)
            if far_enough(run.farthest):
                block = _plus_run(block, run)
            else:
                block = _plus_run(block, _collect_run(CAREFUL, terms, tokens, vectors, like))
            i += vectors * step
    if terms.kl is not None:
        end_block(batch.grad, start, stop, scratch)
    collected.log_ratio = lane_sum(block.log_ratio)
    collected.k = lane_sum(block.k)
    collected.positive = lane_sum(block.positive)
    collected.negative = lane_sum(block.negative)
    collected.positive_count = np.int64(lane_sum(block.positive_count))
    collected.negative_count = np.int64(lane_sum(block.negative_count))
    collected.suspect = not np.isfinite(collected.log_ratio + lane_sum(block.check))


@subroutine
def collect(batch, terms, sequence, start, stop, scratch, collected):
    """`collect_block` for each of the blocks of a sequence from ``start`` to ``stop``, as many as ``collected`` has."""
    for block in range(len(collected)):
        first = start + block * BLOCK
        collect_block(batch, terms, sequence, first, min(first + BLOCK, stop), scratch, collected[block])


# --- conclude ---------------------------------------------------------------------------------------------------------
class GradientCoefficients(NamedTuple):
    """The gradient of each token of a sequence: constant + kl_slope·∂k/∂l + weighted_advantage·w·A."""

    constant: float
    kl_slope: float
    weighted_advantage: float


@inlined
def _scalar_product(a, b):
    """a·b with 0·∞ = 0."""
    return 0.0 if a == 0.0 or b == 0.0 else a * b


@inlined
def _policy_sum(part, total):
    """Σ over a sequence of a part of the policy term, which is linear in A on either side of 0.

    ``part`` holds that for A = 1 and that for A = −1 in two of its lanes, and 0 in the others. The one for A = 1 is not
    negative, the other not positive: the largest and the least lane pick them.
    """
    gains = _scalar_product(np.float64(lane_max(part)), total.positive)
    return gains + _scalar_product(np.float64(lane_min(part)), -total.negative)


class _KLOfSequence(NamedTuple):
    """Σ of the KL term over a sequence; β times its derivative by log ρ, over all; and what multiplies ∂k/∂l."""

    value: float
    through_ratio: float
    slope_factor: float


@inlined
def _kl_of_sequence(kl, weighting, k, ratio):
    """The KL term's sum and derivatives, of Σ k and ρ."""
    if kl is None:
        return _KLOfSequence(0.0, 0.0, 0.0)
    if is_weighted(weighting):
        value = _scalar_product(ratio, k)
        return _KLOfSequence(value, _scalar_product(kl.beta, value), _scalar_product(kl.beta, ratio))
    return _KLOfSequence(k, 0.0, kl.beta)


@inlined
def _total_of(collected):
    """The sum of the records, written into the first; in this order, since some of it is rounded."""
    total = collected[0]
    for block in range(1, len(collected)):
        total.log_ratio += collected[block].log_ratio
        total.k += collected[block].k
        total.positive += collected[block].positive
        total.negative += collected[block].negative
        total.positive_count += collected[block].positive_count
        total.negative_count += collected[block].negative_count
        total.suspect += collected[block].suspect
    return total


@subroutine
def conclude(batch, terms, tokens, collected, accumulators, task, scratch):
    """Add a sequence of so many tokens to the task's accumulator, and return its `GradientCoefficients`, a plain tuple.

    Both are made of what was ``collected`` from its blocks, of which the first record is written to.
    """
    align_stack()
    total = _total_of(collected)
    one = full(batch.logps, 1.0)
    rho = exp_of_any(full_like(one, total.log_ratio / tokens))
    ratio = np.float64(lane_max(rho))
    store(scratch.vectors, 0, one - one)
    scratch.vectors[0], scratch.vectors[1] = 1.0, -1.0
    a = load(scratch.vectors, 0)
    term = surrogate_term(CAREFUL, terms.surrogate, where(a == 0.0, one, rho), a, one)
    kl = _kl_of_sequence(terms.kl, terms.weighting, total.k, ratio)

    none = bits(one - one)
    positive_count, negative_count = full_like(none, total.positive_count), full_like(none, total.negative_count)
    tokens_of_sign = where(a > 0.0, positive_count, where(a < 0.0, negative_count, none))
    clipped = count_clipped(CAREFUL, terms.surrogate, rho, a, Clipped(none, none, none))
    sums = Sums(
        surrogate=_policy_sum(term.value, total),
        kl=kl.value,
        ratio=tokens * ratio,
        ratio_squared=tokens * ratio * ratio,
        log_ratio=total.log_ratio,
    )
    clipped_tokens = Clipped(
        np.int64(lane_sum(clipped.low * tokens_of_sign)),
        np.int64(lane_sum(clipped.high * tokens_of_sign)),
        np.int64(lane_sum(clipped.hard * tokens_of_sign)),
    )
    accumulate(accumulators[task], Contribution(sums, clipped_tokens, total.suspect, ratio, ratio))
    if terms.mean_within:
        accumulate_numerator(accumulators[task], Numerator(sums.surrogate / tokens, sums.kl / tokens))

    factor = weight_of_token(terms, tokens)
    through_ratio, direct = -kl.through_ratio, 0.0
    if passes_through_ratio(terms.surrogate):
        through_ratio += _policy_sum(term.slope, total)
    else:
        direct = np.float64(lane_max(term.slope))
    return (
        -_scalar_product(factor, through_ratio / tokens),
        _scalar_product(factor, kl.slope_factor),
        -_scalar_product(factor, direct),
    )


# --- spread -----------------------------------------------------------------------------------------------------------
@subroutine(allocates=False)
def spread(grad, batch, terms, coefficients, sequence, start, stop, scratch):
    """Write the gradient of a sequence from ``start`` to ``stop``; with a KL term, ``grad`` holds ∂k/∂l before."""
    if grad is None:
        return
    begin_block(batch, sequence, start, stop, scratch)
    fetch_gradient(grad, start, stop, scratch)
    step = lanes(scratch.vectors)
    whole = (stop - start) // step
    end = start + whole * step
    tokens = tokens_from(batch, mask_of(batch.mask, start, stop, scratch), start, stop, scratch)
    if whole > 0:
        _spread_run(terms, tokens, whole, coefficients, scratch.vectors)
    if end < stop:
        tokens = tokens_from(batch, mask_of(batch.mask, end, stop, scratch), end, stop, scratch)
        _spread_run(terms, tokens, 1, coefficients, scratch.vectors)
    end_block(grad, start, stop, scratch)


@inlined
def _spread_run(terms, tokens, vectors, coefficients, like):
    """`spread` for so many vectors."""
    constant = full(like, coefficients.constant)
    kl_slope = full(like, coefficients.kl_slope)
    weighted_advantage = full(like, coefficients.weighted_advantage)
    for v in range(vectors):
        absent = absent_lanes(tokens.mask, v, constant)
        gradient = constant
        if terms.kl is not None:
            gradient = constant + times(kl_slope, load_vector(tokens.grad, v))
        if not passes_through_ratio(terms.surrogate):
            a = load_vector(tokens.advantages, v)
            w = load_weights(tokens.weights, absent, v)
            gradient = gradient + times(weighted_advantage, weighted_in(CAREFUL, w, a))
        store_gradient(tokens.grad, v, zero_where(absent, one_nan(gradient)))


# --- all of it --------------------------------------------------------------------------------------------------------
@subroutine
def _task(task, batch, terms, ranges, limit, accumulators):
    scratch = Scratch(*scratch_for(batch.logps, 0))
    blocks = np.empty(block_count(min(limit, len(batch.logps))), COLLECTED)  # before the host's mode is another
    host_mode = begin_ordinary_floats()
    for r in range(task, len(ranges), len(accumulators)):
        for sequence in range(ranges[r, 0], ranges[r, 1]):
            first, last = batch.bounds[sequence], batch.bounds[sequence + 1]
            if last - first <= limit:
                extent = begin_sequence(batch.mask, batch.grad, first, last, accumulators[task])
                if extent.tokens > 0:
                    collected = blocks[: block_count(extent.stop - extent.start)]
                    collect(batch, terms, sequence, extent.start, extent.stop, scratch, collected)
                    constant, kl_slope, weighted = conclude(
                        batch, terms, extent.tokens, collected, accumulators, task, scratch
                    )
                    coefficients = GradientCoefficients(constant, kl_slope, weighted)
                    spread(batch.grad, batch, terms, coefficients, sequence, extent.start, extent.stop, scratch)
    end_ordinary_floats(host_mode)


@compiled
def sequence_level(
    logps,
    old_logps,
    advantages,
    ref_logps,
    mask,
    weights,
    grad,
    bounds,
    advantages_per_token,
    weights_per_token,
    surrogate,
    kl,
    weighting,
    denominator,
    mean_within,
    ranges,
    limit,
    accumulators,
    room,
):
    """An entry, see `tasks`: adds the ranges of each task to its accumulator, and writes their gradient.

    A row of ``ranges`` is a range of sequences, of which those longer than ``limit`` are left out. Tasks, of which each
    has an accumulator, take the ranges in turns.

    The fields of `Batch` and of `LossTerms` come one by one: to look at the tuples takes Numba a microsecond more.
    """
    batch = Batch(
        logps,
        old_logps,
        advantages,
        ref_logps,
        mask,
        weights,
        grad,
        bounds,
        advantages_per_token,
        weights_per_token,
    )
    terms = LossTerms(surrogate, kl, weighting, denominator, mean_within)
    return run(_task, (batch, terms, ranges, limit, accumulators), room)


# --- one long sequence, on all threads --------------------------------------------------------------------------------
@subroutine
def _collect_share(task, batch, terms, sequence, extent, collected, tasks):
    first, last = share(len(collected), task, tasks)
    start, stop = extent.start + first * BLOCK, min(extent.start + last * BLOCK, extent.stop)
    scratch = Scratch(*scratch_for(batch.logps, 0))
    host_mode = begin_ordinary_floats()
    collect(batch, terms, sequence, start, stop, scratch, collected[first:last])
    end_ordinary_floats(host_mode)


@compiled
def collect_long(batch, terms, sequence, extent, collected, tasks, room):
    """An entry, see `tasks`: as `collect` for the extent of a sequence, to the bit."""
    return run(_collect_share, (batch, terms, sequence, extent, collected, tasks), room)


@compiled
def conclude_long(batch, terms, tokens, collected, accumulators):
    """As `conclude`, for the first of the accumulators and a caller in Python."""
    scratch = Scratch(*scratch_for(batch.logps, 0))
    host_mode = begin_ordinary_floats()
    coefficients = conclude(batch, terms, tokens, collected, accumulators, 0, scratch)
    end_ordinary_floats(host_mode)
    return coefficients


@subroutine
def _spread_share(task, batch, terms, coefficients, sequence, extent, tasks):
    first, last = share(block_count(extent.stop - extent.start), task, tasks)
    start, stop = extent.start + first * BLOCK, min(extent.start + last * BLOCK, extent.stop)
    scratch = Scratch(*scratch_for(batch.logps, 0))
    host_mode = begin_ordinary_floats()
    spread(batch.grad, batch, terms, coefficients, sequence, start, stop, scratch)
    end_ordinary_floats(host_mode)


@compiled
def spread_long(batch, terms, coefficients, sequence, extent, tasks, room):
    """An entry, see `tasks`: as `spread` for the extent of a sequence, to the bit."""
    return run(_spread_share, (batch, terms, coefficients, sequence, extent, tasks), room)

"""The loss at sequence level, where ρ is known only after all log-ratios of a sequence are summed.

For one ρ the policy term is linear in A on either side of 0. So one pass collects what does not depend on ρ, and leaves
∂k/∂l in the gradient's place (`collect`); `conclude` makes ρ, the sums and what the gradient consists of; `spread`
writes that, while the sequence is still in the cache.

The formulas are in `formulas`. One file, though a long one: what the three leave for each other is in no other.
"""

from typing import NamedTuple

import numba
import numpy as np

from .blocks import BLOCK, RUN, block_count, prefetch_ahead, prefetch_if_given, run_sum, share, vectors_in_run
from .compiling import compiled, inlined
from .elementary import exp_of_any, layout
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .formulas import count_clipped, kl_term, linear_factor, passes_through_ratio, surrogate_term, times
from .simd import align_stack, bits, full, full_like, lane_max, lane_min, lane_sum, lanes, load, tally, where, wide
from .sums import Clipped, Contribution, Numerator, Sums, accumulate, accumulate_numerator
from .tokens import (
    LossTerms,
    absent_lanes,
    begin_sequence,
    larger_magnitude,
    load_distance,
    load_log_ratio,
    load_tokens,
    load_values,
    load_weights,
    plus_if_given,
    store_gradient,
    times_if_given,
    weight_of_token,
    zero_where,
)

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


@compiled(allocates=False)
def collect_block(batch, terms, sequence, start, stop, collected):
    """Fill one record of ``collected``, and leave ∂k/∂l in the gradient's place if there is a KL term.

    In the fast way, and again in the careful way where the numbers left the range in which the fast one is right.
    """
    align_stack()
    zero = full(batch.logps, 0.0)
    careful = False
    while True:  # at most twice; a loop, so that the code is there once
        log_ratio = wide(zero)
        k = wide(zero)
        positive = wide(zero)
        negative = wide(zero)
        positive_count = bits(zero)
        negative_count = bits(zero)
        check = zero
        farthest = zero
        for run_start in range(start, stop, RUN * lanes(zero)):
            k_of_run = zero
            positive_of_run = zero
            negative_of_run = zero
            wide_k = wide(zero)
            wide_positive = wide_k
            wide_negative = wide_k
            for v in range(vectors_in_run(batch.logps, run_start, stop)):
                i = run_start + v * lanes(zero)
                whole = i + lanes(zero) <= len(batch.logps)
                prefetch_ahead(batch.logps, run_start, v)
                prefetch_if_given(batch.old_logps, run_start, v)
                prefetch_if_given(batch.ref_logps, run_start, v)
                absent = absent_lanes(batch.mask, i, stop, whole, zero)
                logp = load_tokens(batch.logps, i, whole)
                log_ratio += wide(zero_where(absent, load_log_ratio(logp, batch.old_logps, i, whole)))
                logp = zero_where(absent, logp)
                a = load_values(batch.advantages, batch.advantages_per_token, sequence, i, whole, zero)
                a = zero_where(absent, a)
                w = load_weights(batch.weights, batch.weights_per_token, sequence, i, whole, absent)
                weighted = times_if_given(w, linear_factor(terms.surrogate, a, logp))
                if_positive = where(a > 0.0, weighted, zero)
                if_negative = where(a < 0.0, weighted, zero)
                positive_of_run += if_positive
                negative_of_run += if_negative
                positive_count = tally(positive_count, a > 0.0)
                negative_count = tally(negative_count, a < 0.0)
                value, l = _collect_kl(batch, terms.kl, logp, absent, i, stop, whole, careful)
                k_of_run += value
                if careful:
                    wide_k += wide(value)
                    wide_positive += wide(if_positive)
                    wide_negative += wide(if_negative)
                farthest = larger_magnitude(l, farthest)
                check = plus_if_given(check + a + l, w)
            k += run_sum(k_of_run, wide_k, careful)
            positive += run_sum(positive_of_run, wide_positive, careful)
            negative += run_sum(negative_of_run, wide_negative, careful)
        collected.log_ratio = lane_sum(log_ratio)
        collected.k = lane_sum(k)
        collected.positive = lane_sum(positive)
        collected.negative = lane_sum(negative)
        finite = np.isfinite(collected.k + collected.positive + collected.negative)
        if careful or (lane_max(farthest) <= layout(zero).exp_limit and finite):
            break
        careful = True
    collected.positive_count = np.int64(lane_sum(positive_count))
    collected.negative_count = np.int64(lane_sum(negative_count))
    collected.suspect = not np.isfinite(collected.log_ratio + lane_sum(check))


@inlined
def _collect_kl(batch, kl, logp, absent, i, stop, whole, careful):
    """k and l of one vector, 0 without a KL term; writes ∂k/∂l into the gradient's place if there is one."""
    l = load_distance(logp, batch.ref_logps, absent, i, whole)
    if kl is None:
        return l, l
    term = kl_term(kl, l, careful)
    store_gradient(batch.grad, i, stop, term.slope)
    return term.value, l


@compiled
def collect(batch, terms, sequence, start, stop, collected):
    """`collect_block` for each of the blocks of a sequence from ``start`` to ``stop``, as many as ``collected`` has."""
    for block in range(len(collected)):
        first = start + block * BLOCK
        collect_block(batch, terms, sequence, first, min(first + BLOCK, stop), collected[block])


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
def _kl_of_sequence(kl, k, ratio):
    """The KL term's sum and derivatives, of Σ k and ρ."""
    if kl is None:
        return _KLOfSequence(0.0, 0.0, 0.0)
    if kl.importance_weighted:
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


@compiled
def conclude(batch, terms, tokens, collected, accumulators, task):
    """Add a sequence of so many tokens to the task's accumulator, and return its `GradientCoefficients`, a plain tuple.

    Both are made of what was ``collected`` from its blocks, of which the first record is written to.
    """
    align_stack()
    total = _total_of(collected)
    one = full(batch.logps, 1.0)
    rho = exp_of_any(full_like(one, total.log_ratio / tokens))
    ratio = np.float64(lane_max(rho))
    signs = np.zeros(lanes(batch.logps), batch.logps.dtype)
    signs[0], signs[1] = 1.0, -1.0
    a = load(signs, 0)
    term = surrogate_term(terms.surrogate, rho, a, one)
    kl = _kl_of_sequence(terms.kl, total.k, ratio)

    none = bits(one - one)
    positive_count, negative_count = full_like(none, total.positive_count), full_like(none, total.negative_count)
    tokens_of_sign = where(a > 0.0, positive_count, where(a < 0.0, negative_count, none))
    clipped = count_clipped(terms.surrogate, rho, a, Clipped(none, none, none))
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
    return -factor * (through_ratio / tokens), factor * kl.slope_factor, -factor * direct


# --- spread -----------------------------------------------------------------------------------------------------------
@compiled(allocates=False)
def spread(grad, batch, terms, coefficients, sequence, start, stop):
    """Write the gradient of a sequence from ``start`` to ``stop``; with a KL term, ``grad`` holds ∂k/∂l before."""
    if grad is None:
        return
    zero = full(batch.logps, 0.0)
    constant = full_like(zero, coefficients.constant)
    kl_slope = full_like(zero, coefficients.kl_slope)
    weighted_advantage = full_like(zero, coefficients.weighted_advantage)
    for i in range(start, stop, lanes(grad)):
        whole = i + lanes(grad) <= len(grad)
        absent = absent_lanes(batch.mask, i, stop, whole, zero)
        gradient = constant
        if batch.ref_logps is not None:
            gradient = constant + times(kl_slope, load_tokens(grad, i, whole))
        if not passes_through_ratio(terms.surrogate):
            a = load_values(batch.advantages, batch.advantages_per_token, sequence, i, whole, zero)
            w = load_weights(batch.weights, batch.weights_per_token, sequence, i, whole, absent)
            gradient = gradient + times(weighted_advantage, times_if_given(w, a))
        store_gradient(grad, i, stop, zero_where(absent, gradient))


# --- all of it --------------------------------------------------------------------------------------------------------
@compiled
def sequence_level(batch, terms, ranges, limit, accumulators, task):
    """Add the ranges that are a task's to its accumulator, and write their gradient; tasks take the ranges in turns.

    A row of ``ranges`` is a range of sequences, of which those longer than ``limit`` are left out.
    """
    host_mode = begin_ordinary_floats()
    for r in range(task, len(ranges), len(accumulators)):
        for sequence in range(ranges[r, 0], ranges[r, 1]):
            first, last = batch.bounds[sequence], batch.bounds[sequence + 1]
            if last - first <= limit:
                extent = begin_sequence(batch.mask, batch.grad, first, last, accumulators[task])
                if extent.tokens > 0:
                    collected = np.empty(block_count(extent.stop - extent.start), COLLECTED)
                    collect(batch, terms, sequence, extent.start, extent.stop, collected)
                    constant, kl_slope, weighted = conclude(batch, terms, extent.tokens, collected, accumulators, task)
                    coefficients = GradientCoefficients(constant, kl_slope, weighted)
                    spread(batch.grad, batch, terms, coefficients, sequence, extent.start, extent.stop)
    end_ordinary_floats(host_mode)


@compiled(parallel=True)
def sequence_level_parallel(batch, surrogate, kl, denominator, mean_within, ranges, limit, accumulators):
    """`sequence_level` for all tasks, one for each accumulator, on threads; to the bit the same for any number.

    The members of `LossTerms` come one by one: into a prange goes no tuple of tuples.
    """
    for task in numba.prange(len(accumulators)):
        terms = LossTerms(surrogate, kl, denominator, mean_within)
        sequence_level(batch, terms, ranges, limit, accumulators, task)


# --- one long sequence, on all threads --------------------------------------------------------------------------------
@compiled(parallel=True)
def collect_parallel(batch, surrogate, kl, denominator, mean_within, sequence, extent, collected, tasks):
    """As `collect` for the extent of a sequence, to the bit."""
    for task in numba.prange(tasks):
        first, last = share(len(collected), task, tasks)
        start, stop = extent.start + first * BLOCK, min(extent.start + last * BLOCK, extent.stop)
        terms = LossTerms(surrogate, kl, denominator, mean_within)
        host_mode = begin_ordinary_floats()
        collect(batch, terms, sequence, start, stop, collected[first:last])
        end_ordinary_floats(host_mode)


@compiled
def conclude_long(batch, terms, tokens, collected, accumulators):
    """As `conclude`, for the first of the accumulators and a caller in Python."""
    host_mode = begin_ordinary_floats()
    coefficients = conclude(batch, terms, tokens, collected, accumulators, 0)
    end_ordinary_floats(host_mode)
    return coefficients


@compiled(parallel=True)
def spread_parallel(batch, surrogate, kl, denominator, mean_within, coefficients, sequence, extent, tasks):
    """As `spread` for the extent of a sequence, to the bit."""
    for task in numba.prange(tasks):
        first, last = share(block_count(extent.stop - extent.start), task, tasks)
        start, stop = extent.start + first * BLOCK, min(extent.start + last * BLOCK, extent.stop)
        terms = LossTerms(surrogate, kl, denominator, mean_within)
        host_mode = begin_ordinary_floats()
        spread(batch.grad, batch, terms, coefficients, sequence, start, stop)
        end_ordinary_floats(host_mode)

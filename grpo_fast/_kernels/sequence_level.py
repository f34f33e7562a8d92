"""The loss at sequence level, where ρ is known only after all log-ratios of a sequence are summed.

For one ρ the policy term is linear in A on either side of 0. So one pass collects what does not depend on ρ, and leaves
the slope of the KL term in the gradient's place (`collect`); `conclude` makes ρ, the sums and what the gradient
consists of; `spread` writes that, while the sequence is still in the cache.

The formulas are in `formulas` and `penalties`. One file, though a long one: what the three leave for each other is in
no other.
"""

from typing import Any, NamedTuple

import numpy as np

from .blocks import BLOCK, RUN, block_count, share
from .compiling import compiled, inlined, inlined_or_none, subroutine
from .elementary import exp_of_any
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .formulas import (
    PolicyTerm,
    bounded_log_ratio,
    count_bounded,
    count_clipped,
    excess,
    linear_factor,
    ratio_of_sequence,
    surrogate_term,
    tokens_are_cut,
)
from .penalties import has_own_ratio, has_ratio_of_sequence, penalised_term, plus_weighted_penalty
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
    plus_if_not_negative,
    prefetch_vector,
    scratch_for,
    store_gradient,
    tokens_from,
    zero_beyond,
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
from .tokens import Batch, LossTerms, begin_sequence, numerator_within, weight_of_token
from .ways import CAREFUL, FAR, NEAR, exp_in, far_enough, near_enough, plus_in, times, weighted_in, zero_in

# --- collect ----------------------------------------------------------------------------------------------------------
#: What is collected from each block of a sequence: sums, of tokens with A > 0 and with A < 0 apart where it says so.
COLLECTED = np.dtype(
    [
        ("log_ratio", np.float64),
        ("bounded", np.float64),  # `bounded_log_ratio`
        ("k", np.float64),  # the KL term, not multiplied by the ρ of the sequence
        ("positive", np.float64),  # w·linear_factor
        ("negative", np.float64),
        ("weighted_k", np.float64),  # these three with the loss weights; 0 if there are none
        ("weighted_positive", np.float64),
        ("weighted_negative", np.float64),
        ("low", np.int64),  # `count_bounded`
        ("high", np.int64),
        ("positive_count", np.int64),
        ("negative_count", np.int64),
        ("suspect", np.int64),  # blocks in which something is not finite
    ]
)


class _Policy(NamedTuple):
    """Σ of what the policy term is linear in, of tokens with A > 0 and with A < 0, in lanes of float64."""

    positive: Any
    negative: Any


class _RunLanes(NamedTuple):
    """What is collected from a run, in lanes."""

    log_ratio: Any
    bounded: Any
    k: Any
    policy: _Policy
    weighted_k: Any  # with loss weights: in float64; else 0
    weighted_policy: _Policy  # with loss weights, else 0
    clipped: Clipped
    positive_count: Any
    negative_count: Any
    check: Any  # Σ A + l + w + u: not finite if one of them is not, or u is negative
    farthest: Any  # |l|, and |log ρ| where `has_own_ratio`


@inlined
def _collect_run(way, terms, tokens, vectors, like):
    """The `_RunLanes` of so many vectors, in one of the `ways`; leaves the KL term's slope in the gradient's place."""
    zero = full(like, 0.0)
    k = zero_in(way, zero)
    log_ratio = bounded = wide(zero)  # on which, as on ρ, neither the way nor the KL term may have a say
    policy = weighted_policy = _Policy(wide(zero), wide(zero))
    weighted_k = wide(zero)
    check = farthest = zero
    none = positive_count = negative_count = bits(zero)
    clipped = Clipped(none, none, none, none)
    v = 0
    while True:  # as in `token_level`
        prefetch_vector(tokens.logps, v)
        prefetch_vector(tokens.old_logps, v)
        prefetch_vector(tokens.ref_logps, v)
        absent = absent_lanes(tokens.mask, v, zero)
        logp = load_vector(tokens.logps, v)
        log_rho = zero_where(absent, load_log_ratio(logp, tokens.old_logps, v))
        l = zero_where(absent, load_distance(logp, tokens.ref_logps, v))
        a = zero_where(absent, load_vector(tokens.advantages, v))
        w = load_weights(tokens.weights, absent, v)
        u = load_weights(tokens.loss_weights, absent, v)
        weighted = weighted_in(CAREFUL, w, linear_factor(terms.surrogate, a, zero_where(absent, logp)))
        log_ratio += wide(log_rho)
        bounded += wide(bounded_log_ratio(terms.surrogate, log_rho, a))
        clipped = count_bounded(terms.surrogate, log_rho, a, clipped)
        penalised = penalised_term(terms.kl, way, terms.weighting, _own_ratio(way, terms.weighting, log_rho), l)
        _store_slope(penalised, way, u, tokens.grad, v)
        k = _plus_kl(penalised, way, k)
        weighted_k = plus_weighted_penalty(u, way, penalised, weighted_k)
        policy = _plus_policy(policy, a, weighted)
        weighted_policy = _plus_weighted_policy(u, weighted_policy, a, weighted)
        positive_count = tally(positive_count, a > 0.0)
        negative_count = tally(negative_count, a < 0.0)
        farthest = _farthest(terms.kl, terms.weighting, l, log_rho, farthest)
        check = plus_if_not_negative(plus_if_given(check + a + l, w), u)
        v += 1
        if v >= vectors:
            break
    return _RunLanes(
        log_ratio,
        bounded,
        k,
        policy,
        weighted_k,
        weighted_policy,
        clipped,
        positive_count,
        negative_count,
        check,
        farthest,
    )


@inlined
def _plus_policy(policy, a, x):
    """Both sums, with x where A is of their sign."""
    zero = full_like(x, 0.0)
    return _Policy(policy.positive + wide(where(a > 0.0, x, zero)), policy.negative + wide(where(a < 0.0, x, zero)))


@inlined
def _plus_weighted_policy(u, policy, a, x):
    if u is None:
        return policy
    return _plus_policy(policy, a, times(u, x))


@inlined
def _own_ratio(way, weighting, log_rho):
    """The token's own ρ, if it is needed."""
    if has_own_ratio(weighting):
        return exp_in(way, log_rho)
    return log_rho


@inlined
def _store_slope(penalised, way, u, grad, v):
    """Write the slope of the KL term into the gradient's place, times u, if there are both."""
    if penalised is not None:
        store_gradient(grad, v, weighted_in(way, u, penalised.slope))


@inlined
def _plus_kl(penalised, way, total):
    if penalised is None:
        return total
    return plus_in(way, total, penalised.value)


@inlined
def _farthest(kl, weighting, l, log_rho, farthest):
    """The largest magnitude of what an exp is taken of, in lanes."""
    if kl is None:
        return farthest
    farthest = larger_magnitude(l, farthest)
    if has_own_ratio(weighting):
        farthest = larger_magnitude(log_rho, farthest)
    return farthest


@inlined
def _plus_run(block, run):
    """The `_RunLanes` of a block, sums in float64, with those of a run."""
    return _RunLanes(
        block.log_ratio + run.log_ratio,
        block.bounded + run.bounded,
        block.k + wide(run.k),
        _plus(block.policy, run.policy),
        block.weighted_k + run.weighted_k,
        _plus(block.weighted_policy, run.weighted_policy),
        Clipped(
            block.clipped.low + run.clipped.low,
            block.clipped.high + run.clipped.high,
            block.clipped.hard,
            block.clipped.dropped,
        ),
        block.positive_count + run.positive_count,
        block.negative_count + run.negative_count,
        block.check + run.check,
        block.farthest,
    )


@inlined
def _plus(policy, other):
    return _Policy(policy.positive + other.positive, policy.negative + other.negative)


@subroutine(allocates=False)
def collect_block(batch, terms, sequence, start, stop, scratch, collected):
    """Fill one record of ``collected``, and leave the KL term's slope in the gradient's place if there is one.

    Runs are those of `token_level.token_block`.
    """
    align_stack()
    begin_block(batch, sequence, start, stop, scratch)
    like = scratch.vectors
    step = lanes(like)
    zero = full(like, 0.0)
    none, sums = bits(zero), wide(zero)
    policy = _Policy(sums, sums)
    clipped = Clipped(none, none, none, none)
    block = _RunLanes(sums, sums, sums, policy, sums, policy, clipped, none, none, zero, zero)
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
    collected.bounded = lane_sum(block.bounded)
    collected.k = lane_sum(block.k)
    collected.positive = lane_sum(block.policy.positive)
    collected.negative = lane_sum(block.policy.negative)
    collected.weighted_k = lane_sum(block.weighted_k)
    collected.weighted_positive = lane_sum(block.weighted_policy.positive)
    collected.weighted_negative = lane_sum(block.weighted_policy.negative)
    collected.low = np.int64(lane_sum(block.clipped.low))
    collected.high = np.int64(lane_sum(block.clipped.high))
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
    """The gradient of each token of a sequence.

    It is constant + uncut·(whether the token is not cut, `tokens_are_cut`) + kl_slope·(the KL term's slope) +
    (positive or negative, as A)·u·w·A.
    """

    constant: float
    uncut: float
    kl_slope: float
    positive: float
    negative: float


@inlined
def _scalar_product(a, b):
    """a·b with 0·∞ = 0."""
    return 0.0 if a == 0.0 or b == 0.0 else a * b


@inlined
def _policy_sum(part, positive, negative):
    """Σ over a sequence of a part of the policy term, which is linear in A on either side of 0.

    ``part`` holds that for A = 1 and that for A = −1 in two of its lanes, and 0 in the others. The one for A = 1 is not
    negative, the other not positive: the largest and the least lane pick them.
    """
    gains = _scalar_product(np.float64(lane_max(part)), positive)
    return gains + _scalar_product(np.float64(lane_min(part)), -negative)


@inlined_or_none
def _excess(trust_region, rho, a, logp):
    return excess(trust_region, rho, a, logp, logp)


@inlined
def _dropped(beyond, none):
    if beyond is None:
        return none
    return tally(none, beyond > 0.0)


@inlined
def _of_ratio(weighting, ratio, k):
    """Σ of the KL term, of that without the ρ of the sequence."""
    if has_ratio_of_sequence(weighting):
        return _scalar_product(ratio, k)
    return k


@inlined
def _beta(kl):
    return 0.0 if kl is None else kl.beta


@inlined
def _total_of(collected):
    """The sum of the records, written into the first; in this order, since some of it is rounded."""
    total = collected[0]
    for block in range(1, len(collected)):
        total.log_ratio += collected[block].log_ratio
        total.bounded += collected[block].bounded
        total.k += collected[block].k
        total.positive += collected[block].positive
        total.negative += collected[block].negative
        total.weighted_k += collected[block].weighted_k
        total.weighted_positive += collected[block].weighted_positive
        total.weighted_negative += collected[block].weighted_negative
        total.low += collected[block].low
        total.high += collected[block].high
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
    # A Band alone, which is of ρ, is a trust region at this level.
    beyond = _excess(terms.trust_region, rho, a, one)
    made_of = ratio_of_sequence(terms.surrogate, rho, a, total.bounded, tokens)
    term = surrogate_term(CAREFUL, terms.surrogate, where(a == 0.0, one, made_of), a, one)
    term = PolicyTerm(zero_beyond(beyond, term.value), zero_beyond(beyond, term.slope))

    none = bits(one - one)
    positive_count, negative_count = full_like(none, total.positive_count), full_like(none, total.negative_count)
    tokens_of_sign = where(a > 0.0, positive_count, where(a < 0.0, negative_count, none))
    clipped = count_clipped(CAREFUL, terms.surrogate, rho, a, Clipped(none, none, none, none))
    sums = Sums(
        surrogate=_policy_sum(term.value, total.positive, total.negative),
        kl=_of_ratio(terms.weighting, ratio, total.k),
        ratio=tokens * ratio,
        ratio_squared=tokens * ratio * ratio,
        log_ratio=total.log_ratio,
    )
    clipped_tokens = Clipped(
        np.int64(lane_sum(clipped.low * tokens_of_sign)) + total.low,
        np.int64(lane_sum(clipped.high * tokens_of_sign)) + total.high,
        np.int64(lane_sum(clipped.hard * tokens_of_sign)),
        np.int64(lane_sum(_dropped(beyond, none) * tokens_of_sign)),
    )
    accumulate(accumulators[task], Contribution(sums, clipped_tokens, total.suspect, ratio, ratio))

    numerator, slope = Numerator(sums.surrogate, sums.kl), _policy_sum(term.slope, total.positive, total.negative)
    if batch.loss_weights is not None:
        numerator = Numerator(
            _policy_sum(term.value, total.weighted_positive, total.weighted_negative),
            _of_ratio(terms.weighting, ratio, total.weighted_k),
        )
        slope = _policy_sum(term.slope, total.weighted_positive, total.weighted_negative)
    if terms.mean_within or batch.loss_weights is not None:
        accumulate_numerator(accumulators[task], numerator_within(terms, numerator, tokens))

    factor = weight_of_token(terms, tokens)
    through_ratio, kl_slope = 0.0, _beta(terms.kl)
    if has_ratio_of_sequence(terms.weighting):
        through_ratio = -_scalar_product(kl_slope, numerator.kl)
        kl_slope = _scalar_product(kl_slope, ratio)
    uncut = positive = negative = 0.0
    if terms.own_slopes:
        positive, negative = np.float64(lane_max(term.slope)), -np.float64(lane_min(term.slope))
    elif tokens_are_cut(terms.surrogate):
        uncut = slope
    else:
        through_ratio += slope
    return (
        -_scalar_product(factor, through_ratio / tokens),
        -_scalar_product(factor, uncut / tokens),
        _scalar_product(factor, kl_slope),
        -_scalar_product(factor, positive),
        -_scalar_product(factor, negative),
    )


# --- spread -----------------------------------------------------------------------------------------------------------
@subroutine(allocates=False)
def spread(grad, batch, terms, coefficients, sequence, start, stop, scratch):
    """Write the gradient of a sequence from ``start`` to ``stop``; with a KL term, ``grad`` holds its slope before."""
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
    if terms.own_slopes:
        positive, negative = full(like, coefficients.positive), full(like, coefficients.negative)
        for v in range(vectors):
            absent = absent_lanes(tokens.mask, v, constant)
            a = load_vector(tokens.advantages, v)
            weighted = weighted_in(CAREFUL, load_weights(tokens.weights, absent, v), a)
            weighted = weighted_in(CAREFUL, load_weights(tokens.loss_weights, absent, v), weighted)
            gradient = constant + times(where(a < 0.0, negative, positive), weighted)
            _store_with_kl(terms, tokens, v, absent, coefficients, gradient)
    elif tokens_are_cut(terms.surrogate):
        uncut, zero = full(like, coefficients.uncut), full(like, 0.0)
        for v in range(vectors):
            absent = absent_lanes(tokens.mask, v, constant)
            log_rho = load_log_ratio(load_vector(tokens.logps, v), tokens.old_logps, v)
            bounded = bounded_log_ratio(terms.surrogate, log_rho, load_vector(tokens.advantages, v))
            gradient = constant + where(log_rho == bounded, uncut, zero)
            _store_with_kl(terms, tokens, v, absent, coefficients, gradient)
    else:
        for v in range(vectors):
            _store_with_kl(terms, tokens, v, absent_lanes(tokens.mask, v, constant), coefficients, constant)


@inlined
def _store_with_kl(terms, tokens, v, absent, coefficients, gradient):
    """Write vector number ``v`` of the gradient, with the KL term's part, whose slope stands in its place."""
    if terms.kl is not None:
        slope = load_vector(tokens.grad, v)
        gradient = gradient + times(full_like(slope, coefficients.kl_slope), slope)
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
                    concluded = conclude(batch, terms, extent.tokens, collected, accumulators, task, scratch)
                    coefficients = GradientCoefficients(*concluded)
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
    loss_weights,
    grad,
    bounds,
    advantages_per_token,
    weights_per_token,
    loss_weights_per_token,
    surrogate,
    trust_region,
    kl,
    weighting,
    denominator,
    mean_within,
    own_slopes,
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
        loss_weights,
        grad,
        bounds,
        advantages_per_token,
        weights_per_token,
        loss_weights_per_token,
    )
    terms = LossTerms(surrogate, trust_region, kl, weighting, denominator, mean_within, own_slopes)
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

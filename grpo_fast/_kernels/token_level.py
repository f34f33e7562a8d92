"""The loss at token level, in one pass: each block of a sequence yields its sums and its gradient.

A run goes through one loop, in which a vector of tokens goes from memory to the sums and the gradient: for the loss,
short loops with a scratch array between them (as `samples` has for probabilities) took 1.5 to 2 times as long. In which
way a run is computed, `ways` says; the formulas are in `formulas` and `penalties`. One file, though a long one: what a
run leaves for the block, and when that is right, is agreed here alone.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from .blocks import BLOCK, RUN, overflowed
from .compiling import compiled, inlined, inlined_by_type, inlined_or_none, subroutine
from .elementary import exp_of_any
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .formulas import (
    count_clipped,
    excess,
    gradient_may_be_nan,
    keeps_all,
    near_holds,
    surrogate_term,
    unless_all_kept,
)
from .penalties import penalised_term, plus_penalty, plus_weighted_penalty
from .runs import (
    TAKEN_VECTORS,
    Scratch,
    absent_lanes,
    begin_block,
    end_block,
    larger_magnitude,
    load_distance,
    load_log_ratio,
    load_old,
    load_vector,
    load_weights,
    make_one_nan,
    mask_of,
    mask_or_ones,
    nan_where,
    plus_if_given,
    plus_if_not_negative,
    prefetch_vector,
    scratch_for,
    store_gradient,
    tokens_from,
    within_end,
    zero_beyond,
    zero_where,
)
from .simd import (
    align_stack,
    bits,
    every,
    full,
    full_like,
    is_finite,
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
from .ways import (
    CAREFUL,
    FAR,
    NEAR,
    Careful,
    exp_in,
    far_enough,
    minus_in,
    near_enough,
    plus_in,
    plus_square_in,
    times_in,
    weighted_in,
    zero_in,
)


# --- a run ------------------------------------------------------------------------------------------------------------
class _RunLanes(NamedTuple):
    """Of a run, in lanes: sums, extremes, counts."""

    policy: Any
    kl: Any
    numerator: Numerator  # with loss weights: in float64, of both terms with them; else 0
    ratio: Any
    ratio_squared: Any
    log_ratio: Any
    check: Any  # Σ of what no other sum might show to be infinite or NaN
    least: Any  # log ρ
    most: Any
    farthest: Any  # |l|
    clipped: Clipped


# Vectors of the scratch array, after those of `runs`: the policy terms of a run.
_POLICY = TAKEN_VECTORS
_MORE_VECTORS = RUN


@inlined
def _run(way, terms, tokens, vectors, factor, scratch):
    """The `_RunLanes` of so many vectors, in one of the `ways`; writes their gradient. ``factor`` is −c_i."""
    zero = full(scratch.vectors, 0.0)
    factor = full_like(zero, factor)
    log_ratio = ratio = squared = kl = zero_in(way, zero)
    policy = check = farthest = zero
    numerator = Numerator(wide(zero), wide(zero))
    least, most = full_like(zero, np.inf), full_like(zero, -np.inf)
    none = bits(zero)
    clipped = Clipped(none, none, none, none)
    v = 0
    while True:  # at least once: so nothing keeps LLVM from making constants before the loop over runs
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
        of_token = weighted_in(way, u, factor)

        edge = nan_where(absent, log_rho)
        least = where(edge < least, edge, least)
        most = where(edge > most, edge, most)
        farthest = larger_magnitude(l, farthest)
        check = _checked(way, terms.trust_region, check, a, l, w, u, of_token)
        log_ratio = plus_in(way, log_ratio, log_rho)

        rho = _ratio(way, log_rho, tokens.old_logps)
        present = zero_where(absent, rho)
        ratio = plus_in(way, ratio, present)
        squared = plus_square_in(way, squared, present)
        clipped = count_clipped(way, terms.surrogate, rho, a, clipped)
        penalised = penalised_term(terms.kl, way, terms.weighting, rho, l)
        kl = _plus_kl(penalised, way, terms.weighting, rho, kl)

        logp = zero_where(absent, logp)
        beyond = _excess(terms.trust_region, rho, a, logp, tokens.old_logps, absent, v)
        clipped = _count_dropped(beyond, clipped)
        term = surrogate_term(way, terms.surrogate, _ratio_that_matters(way, rho, a), a, logp)
        value = zero_beyond(beyond, weighted_in(way, w, term.value))
        policy += value
        numerator = _plus_weighted(u, way, value, penalised, numerator)
        if lanes(scratch.vectors) > 8:  # see `_policy_sum`
            store(scratch.vectors, (_POLICY + v) * lanes(scratch.vectors), value)
        gradient = times_in(way, of_token, zero_beyond(beyond, weighted_in(way, w, term.slope)))
        gradient = _less_penalty(way, terms.kl, of_token, gradient, penalised)
        store_gradient(tokens.grad, v, zero_where(absent, gradient))
        v += 1
        if v >= vectors:
            break
    return _RunLanes(policy, kl, numerator, ratio, squared, log_ratio, check, least, most, farthest, clipped)


@inlined_by_type
def _checked(way, trust_region, check, a, l, w, u, of_token):
    """``check`` with what no sum might show to be infinite or NaN: in the careful way, or because it is dropped.

    Of loss weights also whether one is negative, which a NaN says, or makes the gradient's factor infinite.
    """
    if way.instance_class is Careful:
        return lambda way, trust_region, check, a, l, w, u, of_token: plus_if_not_negative(
            plus_if_given(check + a + l, w), u
        )
    if u is not types.none:

        def checked(way, trust_region, check, a, l, w, u, of_token):
            return plus_if_not_negative(plus_if_given(check + a, w), u) + (of_token - of_token)

        return checked
    if trust_region is types.none:
        return lambda way, trust_region, check, a, l, w, u, of_token: check
    return lambda way, trust_region, check, a, l, w, u, of_token: plus_if_given(check + a, w)


@inlined
def _ratio(way, log_rho, old_logps):
    """ρ; 1 on-policy, whatever log ρ is."""
    if old_logps is None:
        return full_like(log_rho, 1.0)
    return exp_in(way, log_rho)


@inlined_by_type
def _ratio_that_matters(way, rho, a):
    """ρ where it makes a difference: where A is 0, the policy term is 0 whatever ρ is, but ∞·0 is not."""
    if way.instance_class is Careful:
        return lambda way, rho, a: where(a == 0.0, full_like(rho, 1.0), rho)
    return lambda way, rho, a: rho


@inlined_or_none
def _excess(trust_region, rho, a, logp, old_logps, absent, v):
    """`excess` of vector number ``v``; None without a trust region."""
    return excess(trust_region, rho, a, logp, zero_where(absent, load_old(logp, old_logps, v)))


@inlined
def _count_dropped(beyond, clipped):
    if beyond is None:
        return clipped
    return Clipped(clipped.low, clipped.high, clipped.hard, tally(clipped.dropped, beyond > 0.0))


@inlined
def _plus_kl(penalised, way, weighting, rho, total):
    """``total`` with the KL term as penalised, if there is one."""
    if penalised is None:
        return total
    return plus_penalty(way, weighting, rho, penalised.term, total)


@inlined
def _plus_weighted(u, way, value, penalised, numerator):
    """The numerator with both terms times u; as it was, without loss weights."""
    if u is None:
        return numerator
    surrogate = numerator.surrogate + wide(times_in(way, u, value))
    return Numerator(surrogate, plus_weighted_penalty(u, way, penalised, numerator.kl))


@inlined
def _less_penalty(way, kl, factor, gradient, penalised):
    """The gradient less ``factor``·β·(the derivative of the KL term)."""
    if kl is None:
        return gradient
    return minus_in(way, gradient, factor * kl.beta, penalised.slope)


# --- a block ----------------------------------------------------------------------------------------------------------
class _BlockLanes(NamedTuple):
    """Of a block, in lanes: sums in float64; those of what was checked; extremes; counts."""

    sums: Sums
    numerator: Numerator
    check: Any
    least: Any
    most: Any
    clipped: Clipped


@inlined
def _empty_block(zero):
    none = wide(zero)
    zeros = bits(zero)
    sums = Sums(none, none, none, none, none)
    infinity = full_like(zero, np.inf)
    return _BlockLanes(sums, Numerator(none, none), zero, infinity, -infinity, Clipped(zeros, zeros, zeros, zeros))


@inlined
def _plus_run(block, run, policy, weighted_policy, check):
    """The `_BlockLanes` with those of a run, but for three: Σ of the policy term, also weighted; what was checked."""
    sums = Sums(
        block.sums.surrogate + policy,
        block.sums.kl + wide(run.kl),
        block.sums.ratio + wide(run.ratio),
        block.sums.ratio_squared + wide(run.ratio_squared),
        block.sums.log_ratio + wide(run.log_ratio),
    )
    return _BlockLanes(
        sums,
        Numerator(block.numerator.surrogate + weighted_policy, block.numerator.kl + run.numerator.kl),
        block.check + check,
        where(run.least < block.least, run.least, block.least),
        where(run.most > block.most, run.most, block.most),
        Clipped(
            block.clipped.low + run.clipped.low,
            block.clipped.high + run.clipped.high,
            block.clipped.hard + run.clipped.hard,
            block.clipped.dropped + run.clipped.dropped,
        ),
    )


@inlined
def _policy_sum(policy, vectors, scratch):
    """Σ of the policy term of a run in float64 lanes, of that in the dtype's; or, if it overflowed, of each term."""
    in_float64 = wide(policy)
    if overflowed(scratch.vectors, in_float64):
        in_float64 = wide(full(scratch.vectors, 0.0))
        for v in range(vectors):
            in_float64 += wide(load(scratch.vectors, (_POLICY + v) * lanes(policy)))
    return in_float64


@inlined
def _without_rest(run, i, stop):
    """The `_RunLanes` of the ragged end of a block, from token number i on, without what stands beyond it."""
    if stop - i >= lanes(run.policy):
        return run
    return _RunLanes(
        run.policy,
        run.kl,
        run.numerator,
        within_end(run.ratio, i, stop, 0.0),
        within_end(run.ratio_squared, i, stop, 0.0),
        run.log_ratio,
        run.check,
        within_end(run.least, i, stop, np.inf),
        within_end(run.most, i, stop, -np.inf),
        run.farthest,
        run.clipped,
    )


@inlined
def _largest_log(run):
    """The largest |log ρ| or |l| of a run, in lanes."""
    size = where(run.most > run.farthest, run.most, run.farthest)
    return where(-run.least > size, -run.least, size)


@inlined
def _largest_factor(kl, factor):
    """The larger magnitude of ``factor`` and ``factor``·β, by which the slopes of both terms are multiplied."""
    if kl is None:
        return larger_magnitude(factor, full_like(factor, 0.0))
    return larger_magnitude(factor * kl.beta, larger_magnitude(factor, full_like(factor, 0.0)))


@inlined
def _is_sound(run, policy):
    """Whether nothing in a run is infinite or NaN: one of these sums would be, by a number read or by one computed."""
    weighted = run.numerator.surrogate + run.numerator.kl
    return is_finite(policy + wide(run.kl) + wide(run.log_ratio) + wide(run.check) + weighted)


@inlined
def _terms_if_all_are_kept(terms):
    """The terms for runs in which `keeps_all` holds."""
    region = unless_all_kept(terms.trust_region)
    return LossTerms(
        terms.surrogate,
        region,
        terms.kl,
        terms.weighting,
        terms.denominator,
        terms.mean_within,
        terms.own_slopes,
    )


@subroutine(allocates=False)
def token_block(batch, terms, factor, sequence, start, stop, scratch):
    """The contribution of the tokens of a sequence from ``start`` to ``stop``; writes their gradient on the way.

    Beside it, the `Numerator` of the objective, before it is divided by anything. ``factor`` is −c_i. A run is up to
    RUN whole vectors, or the ragged end. The first is tried in the near way, if that may hold at all, another in that
    of the one before; a near one without a trust region that surely drops nothing. Each is a loop of its own, so that
    LLVM makes their constants once a block (before each run, that took a sixth of the time).
    """
    align_stack()
    begin_block(batch, sequence, start, stop, scratch)
    step = lanes(scratch.vectors)
    block = _empty_block(full(scratch.vectors, 0.0))
    largest = _largest_factor(terms.kl, full(scratch.vectors, factor))
    is_finite_factor = is_finite(largest)
    may_be_nan = gradient_may_be_nan(terms.surrogate) or batch.loss_weights is not None or not every(largest <= 1.0)
    may_be_near = is_finite_factor and near_holds(terms.surrogate)
    near = may_be_near
    kept = keeps_all(terms.trust_region, block.least, block.most)  # of no tokens: whether it may ever hold
    without = _terms_if_all_are_kept(terms)
    i = start
    while i < stop:
        while near and kept and i < stop:
            vectors = max(min(RUN, (stop - i) // step), 1)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _without_rest(_run(NEAR, without, tokens, vectors, factor, scratch), i, stop)
            policy = _policy_sum(run.policy, vectors, scratch)
            near = near_enough(_largest_log(run)) and _is_sound(run, policy)
            kept = keeps_all(terms.trust_region, run.least, run.most)
            if near and kept:
                if may_be_nan:
                    make_one_nan(tokens.grad, vectors)
                block = _plus_run(block, run, policy, run.numerator.surrogate, run.check)
                i += vectors * step
        while near and not kept and i < stop:
            vectors = max(min(RUN, (stop - i) // step), 1)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _without_rest(_run(NEAR, terms, tokens, vectors, factor, scratch), i, stop)
            policy = _policy_sum(run.policy, vectors, scratch)
            near = near_enough(_largest_log(run)) and _is_sound(run, policy)
            kept = keeps_all(terms.trust_region, run.least, run.most)
            if near:
                if may_be_nan:
                    make_one_nan(tokens.grad, vectors)
                block = _plus_run(block, run, policy, run.numerator.surrogate, run.check)
                i += vectors * step
        while not near and i < stop:
            vectors = max(min(RUN, (stop - i) // step), 1)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _without_rest(_run(FAR, terms, tokens, vectors, factor, scratch), i, stop)
            policy = _policy_sum(run.policy, vectors, scratch)
            near = may_be_near and near_enough(_largest_log(run))
            kept = keeps_all(terms.trust_region, run.least, run.most)
            is_far = far_enough(_largest_log(run))
            if is_far and is_finite_factor and _is_sound(run, policy):
                block = _plus_run(block, run, policy, run.numerator.surrogate, run.check)
            else:
                masked = tokens_from(batch, mask_or_ones(batch.mask, i, stop, scratch), i, stop, scratch)
                careful = _run(CAREFUL, terms, masked, vectors, factor, scratch)
                policy = _policy_sum(careful.policy, vectors, scratch)
                if is_far:  # then the policy term alone may need it, on which no other sum may depend
                    block = _plus_run(block, run, policy, careful.numerator.surrogate, careful.check)
                else:
                    block = _plus_run(block, careful, policy, careful.numerator.surrogate, careful.check)
                may_be_nan = True
            if may_be_nan:
                make_one_nan(tokens.grad, vectors)
            i += vectors * step
    end_block(batch.grad, start, stop, scratch)
    # exp is known for vectors only; what else is in this one is of no interest.
    least, most = lane_min(block.least), lane_max(block.most)
    scratch.vectors[0], scratch.vectors[1] = least, most
    store(scratch.vectors, 0, exp_of_any(load(scratch.vectors, 0)))
    sums = Sums(
        surrogate=lane_sum(block.sums.surrogate),
        kl=lane_sum(block.sums.kl),
        ratio=lane_sum(block.sums.ratio),
        ratio_squared=lane_sum(block.sums.ratio_squared),
        log_ratio=lane_sum(block.sums.log_ratio),
    )
    numerator = Numerator(sums.surrogate, sums.kl)
    if batch.loss_weights is not None:
        numerator = Numerator(lane_sum(block.numerator.surrogate), lane_sum(block.numerator.kl))
    low, high, hard, dropped = block.clipped
    contribution = Contribution(
        sums,
        Clipped(
            np.int64(lane_sum(low)),
            np.int64(lane_sum(high)),
            np.int64(lane_sum(hard)),
            np.int64(lane_sum(dropped)),
        ),
        not np.isfinite(sums.log_ratio + lane_sum(block.check)),
        np.float64(scratch.vectors[0]),
        np.float64(scratch.vectors[1]),
    )
    return contribution, numerator


# --- all of it --------------------------------------------------------------------------------------------------------
class Spans(NamedTuple):
    """Parts of long sequences, cut between blocks: of which, from where to where, how many tokens that sequence has.

    In `token_level` four arrays, or None; for one of them, four numbers.
    """

    sequence: Any
    start: Any
    stop: Any
    tokens: Any


@inlined
def _begin_item(batch, spans, item, limit, accumulator):
    """What to work on: one of the spans; without them, a whole sequence, which `begin_sequence` begins.

    A sequence longer than ``limit`` has nothing to work on: its spans do.
    """
    if spans is None:
        first, last = batch.bounds[item], batch.bounds[item + 1]
        if last - first > limit:
            return Spans(item, first, first, 0)
        extent = begin_sequence(batch.mask, batch.grad, first, last, accumulator)
        return Spans(item, extent.start, extent.stop, extent.tokens)
    return Spans(spans.sequence[item], spans.start[item], spans.stop[item], spans.tokens[item])


@subroutine
def _task(task, batch, terms, spans, ranges, limit, accumulators):
    scratch = Scratch(*scratch_for(batch.logps, _MORE_VECTORS))
    accumulator = accumulators[task]
    host_mode = begin_ordinary_floats()
    for r in range(task, len(ranges), len(accumulators)):
        for item in range(ranges[r, 0], ranges[r, 1]):
            span = _begin_item(batch, spans, item, limit, accumulator)
            factor = -weight_of_token(terms, span.tokens)
            for start in range(span.start, span.stop, BLOCK):
                stop = min(start + BLOCK, span.stop)
                contribution, numerator = token_block(batch, terms, factor, span.sequence, start, stop, scratch)
                accumulate(accumulator, contribution)
                if terms.mean_within or batch.loss_weights is not None:
                    accumulate_numerator(accumulator, numerator_within(terms, numerator, span.tokens))
    end_ordinary_floats(host_mode)


@compiled
def token_level(
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
    spans,
    ranges,
    limit,
    accumulators,
    room,
):
    """An entry, see `tasks`: adds the ranges of each task to its accumulator, and writes their gradient.

    A row of ``ranges`` is a range of sequences, of which those longer than ``limit`` are left out; or of ``spans``.
    Tasks, of which each has an accumulator, take the ranges in turns.

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
    return run(_task, (batch, terms, spans, ranges, limit, accumulators), room)

"""The loss at token level, in one pass: each block of a sequence yields its sums and its gradient.

How a block is worked through, `blocks` says; the formulas are in `formulas`. One file, though a long one: which rows of
the scratch array hold what, and when, is agreed among the steps of a block alone.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from .blocks import (
    BLOCK,
    RUN,
    load_row,
    overflowed,
    prefetch_ahead,
    prefetch_if_given,
    run_sum,
    scratch_like,
    store_row,
    vectors_in_run,
)
from .compiling import compiled, inlined
from .elementary import exp, exp_of_any, layout
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .formulas import count_clipped, kl_term, surrogate_term, times
from .simd import (
    align_stack,
    bits,
    fma,
    from_bits,
    full,
    full_like,
    lane_max,
    lane_min,
    lane_sum,
    lanes,
    load,
    store,
    where,
    wide,
    wide_squares,
)
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

# Rows of the scratch array, each RUN vectors long: which lanes are absent; A; log ρ, then ρ, then the policy term; l,
# then the KL term's derivative.
_ABSENT, _ADVANTAGE, _RATIO, _KL, _ROWS = range(5)


# --- one block --------------------------------------------------------------------------------------------------------
# In the order of use: memory → scratch; log ρ → ρ; l → the KL term; diagnostics; the policy term and the gradient.
class _LogRange(NamedTuple):
    """In lanes: Σ log ρ of a run; of the block, the least and largest log ρ, the largest |l|, and Σ A + l, for NaN."""

    log_ratio: Any
    least: Any
    most: Any
    farthest: Any
    check: Any


@inlined
def _load_run(logs, batch, sequence, run_start, stop, scratch):
    """The ``logs`` with a run; puts into the scratch array which lanes are absent, and A, log ρ and l, 0 there."""
    zero = full(scratch, 0.0)
    least, most, farthest, check = logs.least, logs.most, logs.farthest, logs.check
    log_ratio = zero
    for v in range(vectors_in_run(scratch, run_start, stop)):
        i = run_start + v * lanes(scratch)
        whole = i + lanes(scratch) <= len(batch.logps)
        logp = load_tokens(batch.logps, i, whole)
        absent = absent_lanes(batch.mask, i, stop, whole, zero)
        store_row(scratch, _ABSENT, v, from_bits(absent))
        log_rho = zero_where(absent, load_log_ratio(logp, batch.old_logps, i, whole))
        log_ratio += log_rho
        edge = from_bits(bits(log_rho) | absent)  # NaN where absent: no comparison holds
        least = where(edge < least, edge, least)
        most = where(edge > most, edge, most)
        store_row(scratch, _RATIO, v, log_rho)
        a = load_values(batch.advantages, batch.advantages_per_token, sequence, i, whole, zero)
        a = zero_where(absent, a)
        store_row(scratch, _ADVANTAGE, v, a)
        check, farthest = _load_distance(batch.ref_logps, logp, absent, i, v, whole, scratch, check + a, farthest)
        prefetch_ahead(batch.logps, run_start, v)
    return _LogRange(log_ratio, least, most, farthest, check)


@inlined
def _load_distance(ref_logps, logp, absent, i, v, whole, scratch, check, farthest):
    """``check`` and the largest |l| with those of a vector, whose l is put into the scratch array; if there is one."""
    if ref_logps is None:
        return check, farthest
    l = load_distance(logp, ref_logps, absent, i, whole)
    store_row(scratch, _KL, v, l)
    return check + l, larger_magnitude(l, farthest)


@inlined
def _to_ratios(old_logps, run_start, stop, scratch, log_ratio, careful):
    """Turn log ρ into ρ; return the run's Σ log ρ in float64 lanes, which is ``log_ratio`` unless that overflowed."""
    in_float64 = wide(full(scratch, 0.0))
    for v in range(vectors_in_run(scratch, run_start, stop)):
        prefetch_if_given(old_logps, run_start, v)
        log_rho = load_row(scratch, _RATIO, v)
        if careful:
            in_float64 += wide(log_rho)
        store_row(scratch, _RATIO, v, _ratio(log_rho, old_logps, careful))
    return run_sum(log_ratio, in_float64, careful)


@inlined
def _ratio(log_rho, old_logps, careful):
    """ρ; 1 on-policy, whatever log ρ is."""
    if old_logps is None:
        return full_like(log_rho, 1.0)
    if careful:
        return exp_of_any(log_rho)
    return exp(log_rho)


@inlined
def _kl_sum(kl, batch, run_start, stop, scratch, careful):
    """Turn l into the KL term's derivative, if there is a gradient; return the run's Σ of the term in float64 lanes."""
    total = full(scratch, 0.0)
    in_float64 = wide(total)
    if kl is None:
        return in_float64
    for v in range(vectors_in_run(scratch, run_start, stop)):
        prefetch_ahead(batch.ref_logps, run_start, v)
        rho = load_row(scratch, _RATIO, v)
        term = kl_term(kl, load_row(scratch, _KL, v), careful)
        value, slope = term.value, term.slope
        if kl.importance_weighted:
            value, slope = _product(rho, value, careful), _product(rho, term.value_and_slope, careful)
        total += value
        if careful:
            in_float64 += wide(value)
        if batch.grad is not None:
            store_row(scratch, _KL, v, slope)
    return run_sum(total, in_float64, careful)


@inlined
def _product(a, b, careful):
    """a·b, with 0·∞ = 0 if ``careful``: else nothing is infinite."""
    if careful:
        return times(a, b)
    return a * b


class _RatioSums(NamedTuple):
    """Of a block, in lanes: Σ ρ and Σ ρ² (float64), and the counts of clipped tokens."""

    ratio: Any
    ratio_squared: Any
    clipped: Clipped


@inlined
def _add_ratios(sums, surrogate, run_start, stop, scratch, careful):
    """The ``sums`` with those of a run; if ``careful``, leaves 1 for ρ where A = 0: nobody needs it further on.

    For the policy term is 0 there whatever ρ is, but ∞·0 is not.
    """
    clipped = sums.clipped
    ratio = full(scratch, 0.0)
    squared = ratio
    wide_ratio = wide(ratio)
    wide_squared = sums.ratio_squared
    for v in range(vectors_in_run(scratch, run_start, stop)):
        rho = load_row(scratch, _RATIO, v)
        present = zero_where(bits(load_row(scratch, _ABSENT, v)), rho)
        ratio += present
        if careful:  # in float32 the square could overflow or vanish
            wide_ratio += wide(present)
            wide_squared += wide_squares(present)
        else:
            squared = fma(present, present, squared)
        a = load_row(scratch, _ADVANTAGE, v)
        clipped = count_clipped(surrogate, rho, a, clipped)
        if careful:
            store_row(scratch, _RATIO, v, where(a == 0.0, full_like(rho, 1.0), rho))
    return _RatioSums(sums.ratio + run_sum(ratio, wide_ratio, careful), wide_squared + wide(squared), clipped)


@inlined
def _policy_sum(batch, terms, factor, sequence, run_start, stop, scratch):
    """Turn ρ into the policy term, and write the gradient if there is a place for it.

    Returns the run's Σ of the policy term, in float64 lanes, and Σ of the rollout weights, in lanes.
    """
    total = full(scratch, 0.0)
    weights = total
    factor = full_like(total, factor)
    for v in range(vectors_in_run(scratch, run_start, stop)):
        i = run_start + v * lanes(scratch)
        absent = bits(load_row(scratch, _ABSENT, v))
        whole = i + lanes(scratch) <= len(batch.logps)
        logp = zero_where(absent, load_tokens(batch.logps, i, whole))
        term = surrogate_term(terms.surrogate, load_row(scratch, _RATIO, v), load_row(scratch, _ADVANTAGE, v), logp)
        w = load_weights(batch.weights, batch.weights_per_token, sequence, i, whole, absent)
        weights = plus_if_given(weights, w)
        value = times_if_given(w, term.value)
        store_row(scratch, _RATIO, v, value)
        total += value
        gradient = _less_kl(terms.kl, factor, factor * times_if_given(w, term.slope), scratch, v)
        store_gradient(batch.grad, i, stop, zero_where(absent, gradient))
    in_float64 = wide(total)
    if overflowed(scratch, in_float64):
        in_float64 = wide(full(scratch, 0.0))
        for v in range(vectors_in_run(scratch, run_start, stop)):
            in_float64 += wide(load_row(scratch, _RATIO, v))
    return in_float64, weights


@inlined
def _less_kl(kl, factor, gradient, scratch, v):
    """The gradient less ``factor``·β·(the derivative of the KL term)."""
    if kl is None:
        return gradient
    beta = factor * kl.beta  # which, being 0, switches off a slope of ∞, too
    return gradient - where(beta == 0.0, full_like(beta, 0.0), beta * load_row(scratch, _KL, v))


@compiled(allocates=False)
def token_block(batch, terms, factor, sequence, start, stop, scratch):
    """The contribution of the tokens of a sequence from ``start`` to ``stop``; writes their gradient on the way.

    ``factor`` is −c_i. In the fast way, and again in the careful way where the numbers left the range in which the fast
    one is right.
    """
    align_stack()
    zero = full(scratch, 0.0)
    none = bits(zero)
    limit = layout(zero).square_limit
    careful = False
    while True:  # at most twice; a loop, so that the code is there once
        log_ratio = wide(zero)
        logs = _LogRange(zero, full_like(zero, np.inf), full_like(zero, -np.inf), zero, zero)
        kl = wide(zero)
        policy = wide(zero)
        weights = zero
        ratios = _RatioSums(wide(zero), wide(zero), Clipped(none, none, none))
        for run_start in range(start, stop, RUN * lanes(scratch)):
            logs = _load_run(logs, batch, sequence, run_start, stop, scratch)
            if careful:  # outside of the loops, which keep their constants in registers only if nothing branches there
                log_ratio += _to_ratios(batch.old_logps, run_start, stop, scratch, logs.log_ratio, True)
                kl += _kl_sum(terms.kl, batch, run_start, stop, scratch, True)
                ratios = _add_ratios(ratios, terms.surrogate, run_start, stop, scratch, True)
            else:
                log_ratio += _to_ratios(batch.old_logps, run_start, stop, scratch, logs.log_ratio, False)
                kl += _kl_sum(terms.kl, batch, run_start, stop, scratch, False)
                ratios = _add_ratios(ratios, terms.surrogate, run_start, stop, scratch, False)
            policy_of_run, weights_of_run = _policy_sum(batch, terms, factor, sequence, run_start, stop, scratch)
            policy += policy_of_run
            weights += weights_of_run
        least, most = lane_min(logs.least), lane_max(logs.most)
        if careful or (least >= -limit and most <= limit and lane_max(logs.farthest) <= limit):
            break
        careful = True
    # exp is known for vectors only; what else is in this one is of no interest.
    scratch[0], scratch[1] = least, most
    store(scratch, 0, exp_of_any(load(scratch, 0)))
    sums = Sums(
        surrogate=lane_sum(policy),
        kl=lane_sum(kl),
        ratio=lane_sum(ratios.ratio),
        ratio_squared=lane_sum(ratios.ratio_squared),
        log_ratio=lane_sum(log_ratio),
    )
    clipped = ratios.clipped
    return Contribution(
        sums,
        Clipped(np.int64(lane_sum(clipped.low)), np.int64(lane_sum(clipped.high)), np.int64(lane_sum(clipped.hard))),
        not np.isfinite(sums.log_ratio + lane_sum(logs.check + weights)),
        np.float64(scratch[0]),
        np.float64(scratch[1]),
    )


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


@compiled
def token_level(batch, terms, spans, ranges, limit, accumulators, task):
    """Add the ranges that are a task's to its accumulator, and write their gradient; tasks take the ranges in turns.

    A row of ``ranges`` is a range of sequences, of which those longer than ``limit`` are left out; or of ``spans``.
    """
    scratch = scratch_like(batch.logps, _ROWS)
    accumulator = accumulators[task]
    host_mode = begin_ordinary_floats()
    for r in range(task, len(ranges), len(accumulators)):
        for item in range(ranges[r, 0], ranges[r, 1]):
            span = _begin_item(batch, spans, item, limit, accumulator)
            factor = -weight_of_token(terms, span.tokens)
            for start in range(span.start, span.stop, BLOCK):
                stop = min(start + BLOCK, span.stop)
                contribution = token_block(batch, terms, factor, span.sequence, start, stop, scratch)
                accumulate(accumulator, contribution)
                if terms.mean_within:
                    sums = contribution.sums
                    mean = Numerator(sums.surrogate / span.tokens, sums.kl / span.tokens)
                    accumulate_numerator(accumulator, mean)
    end_ordinary_floats(host_mode)


@compiled(parallel=True)
def token_level_parallel(batch, surrogate, kl, denominator, mean_within, spans, ranges, limit, accumulators):
    """`token_level` for all tasks, one for each accumulator, on threads; to the bit the same for any number.

    The members of `LossTerms` come one by one: into a prange goes no tuple of tuples.
    """
    for task in numba.prange(len(accumulators)):
        terms = LossTerms(surrogate, kl, denominator, mean_within)
        token_level(batch, terms, spans, ranges, limit, accumulators, task)

"""The loss at token level, in one pass: each block of a sequence yields its sums and its gradient.

How a block is worked through, `staging` says; the formulas are in `loss_terms`.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from .blocks import BLOCK, RUN, ask_ahead, get, put, scratch_like, settled
from .compiling import compiled, inlined
from .elementary import exp, exp_of_any, layout
from .formulas import Clipped, count_clipped, kl_term, surrogate_term, times
from .simd import (
    align_stack,
    bits,
    fma,
    from_bits,
    full,
    full_like,
    is_finite,
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
from .tokens import (
    LOG_RATIO,
    TOKENS,
    Found,
    Objective,
    Result,
    add,
    ask_ahead_for,
    clear,
    extent,
    plus,
    take,
    take_absent,
    take_for,
    take_log_ratio,
    take_weight,
    vectors,
    weighed,
    weight_of_token,
    without,
    write,
)

# Rows of the scratch array, each RUN vectors long.
_ABSENT, _ADVANTAGE, _RHO, _PENALTY, _ROWS = range(5)


# --- one block --------------------------------------------------------------------------------------------------------
# In the order of use: memory → scratch; log ρ → ρ; l → the KL term; diagnostics; the policy term and the gradient.
class _Taken(NamedTuple):
    """In lanes: Σ log ρ of a run; the least and largest log ρ and the largest |l|; Σ A and l, which must be finite."""

    log_ratio: Any
    least: Any
    most: Any
    farthest: Any
    check: Any


@inlined
def _take_run(found, batch, sequence, run, stop, scratch):
    """Which tokens of a run are absent; A, log ρ and l, which are 0 there → scratch."""
    zero = full(scratch, 0.0)
    _, least, most, farthest, check = found
    log_ratio = zero
    for v in range(vectors(scratch, run, stop)):
        i = run + v * lanes(scratch)
        whole = i + lanes(scratch) <= len(batch.logps)
        logp = take(batch.logps, i, whole)
        absent = take_absent(batch.mask, i, stop, whole, zero)
        put(scratch, _ABSENT, v, from_bits(absent))
        d = without(take_log_ratio(logp, batch.old, i, whole), absent)
        log_ratio += d
        edge = from_bits(bits(d) | absent)  # NaN where absent: no comparison holds
        least = where(edge < least, edge, least)
        most = where(edge > most, edge, most)
        put(scratch, _RHO, v, d)
        a = without(take_for(batch.advantages, batch.advantages_per_token, sequence, i, whole, zero), absent)
        put(scratch, _ADVANTAGE, v, a)
        check, farthest = _take_distance(batch.ref, logp, absent, i, v, whole, scratch, check + a, farthest)
        ask_ahead(batch.logps, run, v)
    return _Taken(log_ratio, least, most, farthest, check)


@inlined
def _take_distance(ref, logp, absent, i, v, whole, scratch, check, farthest):
    if ref is None:
        return check, farthest
    l = without(logp - take(ref, i, whole), absent)
    put(scratch, _PENALTY, v, l)
    size = where(l < 0.0, -l, l)
    return check + l, where(size > farthest, size, farthest)


@inlined
def _to_ratios(old, run, stop, scratch, log_ratio, careful):
    """Log ρ → ρ. Their sum ``log_ratio``, unless it overflowed."""
    in_float64 = wide(full(scratch, 0.0))
    for v in range(vectors(scratch, run, stop)):
        ask_ahead_for(old, run, v)
        d = get(scratch, _RHO, v)
        if careful:
            in_float64 += wide(d)
        put(scratch, _RHO, v, _ratio(d, old, careful))
    return settled(log_ratio, in_float64, careful)


@inlined
def _ratio(d, old, careful):
    if old is None:
        return full_like(d, 1.0)
    if careful:
        return exp_of_any(d)
    return exp(d)


@inlined
def _penalty(kl, ref, grad, run, stop, scratch, careful):
    """Σ of the KL term of a run; l → the term's derivative, in scratch."""
    total = full(scratch, 0.0)
    in_float64 = wide(total)
    if kl is None:
        return in_float64
    for v in range(vectors(scratch, run, stop)):
        ask_ahead(ref, run, v)
        rho = get(scratch, _RHO, v)
        term = kl_term(kl, get(scratch, _PENALTY, v), careful)
        value, slope = term.value, term.slope
        if kl.importance_weighted:
            value, slope = _product(rho, value, careful), _product(rho, term.value_and_slope, careful)
        total += value
        if careful:
            in_float64 += wide(value)
        if grad is not None:
            put(scratch, _PENALTY, v, slope)
    return settled(total, in_float64, careful)


@inlined
def _product(a, b, careful):
    if careful:
        return times(a, b)
    return a * b


class _Ratios(NamedTuple):
    """In lanes: Σ ρ, Σ ρ², and the counts of clipped tokens."""

    ratio: Any
    ratio_squared: Any
    clipped: Any


@inlined
def _add_ratios(found, surrogate, run, stop, scratch, careful):
    """How the ratios of a run lie."""
    clipped = found.clipped
    ratio = full(scratch, 0.0)
    squared = ratio
    wide_ratio = wide(ratio)
    wide_squared = found.ratio_squared
    for v in range(vectors(scratch, run, stop)):
        rho = get(scratch, _RHO, v)
        present = without(rho, bits(get(scratch, _ABSENT, v)))
        ratio += present
        if careful:  # in float32 the square could overflow or vanish
            wide_ratio += wide(present)
            wide_squared += wide_squares(present)
        else:
            squared = fma(present, present, squared)
        clipped = count_clipped(surrogate, rho, get(scratch, _ADVANTAGE, v), clipped)
    return _Ratios(found.ratio + settled(ratio, wide_ratio, careful), wide_squared + wide(squared), clipped)


@inlined
def _policy(batch, objective, grad, factor, sequence, run, stop, scratch):
    """Σ of the policy term of a run; Σ of the rollout weights; the gradient, if there is a place for it."""
    total = full(scratch, 0.0)
    weights = total
    factor = full_like(total, factor)
    for v in range(vectors(scratch, run, stop)):
        i = run + v * lanes(scratch)
        absent = bits(get(scratch, _ABSENT, v))
        whole = i + lanes(scratch) <= len(batch.logps)
        logp = without(take(batch.logps, i, whole), absent)
        term = surrogate_term(objective.surrogate, get(scratch, _RHO, v), get(scratch, _ADVANTAGE, v), logp)
        w = take_weight(batch.weights, batch.weights_per_token, sequence, i, whole, absent)
        weights = plus(weights, w)
        value = weighed(w, term.value)
        put(scratch, _RHO, v, value)
        total += value
        if grad is not None:
            gradient = _less_penalty(objective.kl, factor, factor * weighed(w, term.slope), scratch, v)
            write(grad, i, stop, without(gradient, absent))
    in_float64 = wide(total)
    if lanes(scratch) > 8 and not is_finite(in_float64):
        in_float64 = wide(full(scratch, 0.0))
        for v in range(vectors(scratch, run, stop)):
            in_float64 += wide(get(scratch, _RHO, v))
    return in_float64, weights


@inlined
def _less_penalty(kl, factor, gradient, scratch, v):
    if kl is None:
        return gradient
    beta = factor * kl.beta  # which, being 0, switches off a slope of ∞, too
    return gradient - where(beta == 0.0, full_like(beta, 0.0), beta * get(scratch, _PENALTY, v))


@compiled(allocates=False)
def token_block(batch, objective, grad, factor, sequence, start, stop, scratch):
    """What is found in one block; the gradient is written on the way.

    In the fast way, and again in the careful way where the numbers left the range in which the fast one is right.
    """
    align_stack()
    zero = full(scratch, 0.0)
    none = bits(zero)
    limit = layout(zero).squarable
    careful = False
    while True:  # at most twice; a loop, so that the code is there once
        log_ratio = wide(zero)
        taken = _Taken(zero, full_like(zero, np.inf), full_like(zero, -np.inf), zero, zero)
        kl = wide(zero)
        policy = wide(zero)
        weights = zero
        ratios = _Ratios(wide(zero), wide(zero), Clipped(none, none, none))
        for run in range(start, stop, RUN * lanes(scratch)):
            taken = _take_run(taken, batch, sequence, run, stop, scratch)
            if careful:  # outside of the loops, which keep their constants in registers only if nothing branches there
                log_ratio += _to_ratios(batch.old, run, stop, scratch, taken.log_ratio, True)
                kl += _penalty(objective.kl, batch.ref, grad, run, stop, scratch, True)
                ratios = _add_ratios(ratios, objective.surrogate, run, stop, scratch, True)
            else:
                log_ratio += _to_ratios(batch.old, run, stop, scratch, taken.log_ratio, False)
                kl += _penalty(objective.kl, batch.ref, grad, run, stop, scratch, False)
                ratios = _add_ratios(ratios, objective.surrogate, run, stop, scratch, False)
            policy_of_run, weights_of_run = _policy(batch, objective, grad, factor, sequence, run, stop, scratch)
            policy += policy_of_run
            weights += weights_of_run
        least, most = lane_min(taken.least), lane_max(taken.most)
        if careful or (least >= -limit and most <= limit and lane_max(taken.farthest) <= limit):
            break
        careful = True
    scratch[0], scratch[1] = least, most
    store(scratch, 0, exp_of_any(load(scratch, 0)))
    sums = (
        lane_sum(policy),
        lane_sum(kl),
        lane_sum(ratios.ratio),
        lane_sum(ratios.ratio_squared),
        lane_sum(log_ratio),
    )
    clipped = ratios.clipped
    check = lane_sum(taken.check + weights)
    doubtful = not np.isfinite(sums[LOG_RATIO] + check)
    return Found(
        sums,
        (
            np.int64(lane_sum(clipped.low)),
            np.int64(lane_sum(clipped.high)),
            np.int64(lane_sum(clipped.beyond)),
            np.int64(doubtful),
        ),
        np.float64(scratch[0]),
        np.float64(scratch[1]),
    )


# --- all of it --------------------------------------------------------------------------------------------------------
class Parts(NamedTuple):
    """Pieces of long sequences, cut between blocks: whose, from where to where, how many tokens the sequence has."""

    sequence: Any
    start: Any
    stop: Any
    tokens: Any


@inlined
def _item(parts, batch, grad, item, limit, result):
    """The sequence, start and stop of what to work on, and how many tokens the sequence has."""
    if parts is None:
        first, last = batch.bounds[item], batch.bounds[item + 1]
        if last - first > limit:
            return item, first, first, 0
        start, stop, tokens = extent(batch.mask, first, last)
        clear(grad, first, start)
        clear(grad, stop, last)
        result.counts[TOKENS] += tokens
        return item, start, stop, tokens
    return parts.sequence[item], parts.start[item], parts.stop[item], parts.tokens[item]


@compiled
def token_level(batch, objective, grad, parts, pieces, limit, task, tasks, result):
    """Add what is found in every ``tasks``-th of the pieces, from number ``task`` on, and write the gradient.

    A row of ``pieces`` is a range of sequences, of which those longer than ``limit`` are left out; or of ``parts``.
    """
    scratch = scratch_like(batch.logps, _ROWS)
    for piece in range(task, len(pieces), tasks):
        for item in range(pieces[piece, 0], pieces[piece, 1]):
            sequence, start, stop, tokens = _item(parts, batch, grad, item, limit, result)
            factor = -weight_of_token(objective, tokens)
            for block in range(start, stop, BLOCK):
                end = min(block + BLOCK, stop)
                found = token_block(batch, objective, grad, factor, sequence, block, end, scratch)
                add(result, objective, tokens, found)


@compiled(parallel=True)
def token_level_parallel(
    batch, surrogate, kl, denominator, mean_within, grad, parts, pieces, limit, rows, counts, extremes
):
    """`token_level` for all tasks, one for each of the ``rows``, on threads; to the bit the same for any number.

    The members of `Objective` and `Result` come one by one: into a prange goes no tuple of tuples.
    """
    tasks = len(rows)
    for t in numba.prange(tasks):
        objective = Objective(surrogate, kl, denominator, mean_within)
        token_level(batch, objective, grad, parts, pieces, limit, t, tasks, Result(rows[t], counts[t], extremes[t]))

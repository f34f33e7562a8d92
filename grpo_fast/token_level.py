"""The loss at token level, in one pass: each block of a sequence yields its sums and its gradient.

How a block is worked through, `staging` says; the formulas are in `loss_terms`. Numba's disk cache keeps these kernels
until this file changes; hence the digest, as in `objective_kernels`.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from .elementary import exp, exp_of_any, layout
from .loss_batch import (
    LOG_RATIO,
    TOKENS,
    Found,
    Result,
    add,
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
from .loss_terms import Clipped, count_clipped, kl_term, surrogate_term, times
from .simd import (
    align_stack,
    bits,
    compiled,
    from_bits,
    full,
    full_like,
    inlined,
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
from .staging import BLOCK, RUN, ask_ahead, get, put, scratch_like

INLINED = "f57eff13250c4034"

# Rows of the scratch array, each RUN vectors long.
_ABSENT, _RHO, _PENALTY, _ROWS = range(4)


# --- one block --------------------------------------------------------------------------------------------------------
class _Ratios(NamedTuple):
    """In lanes: Σ log ρ, and the least and the largest log ρ."""

    total: Any
    least: Any
    most: Any


@inlined
def _ratio(d, old, careful):
    if old is None:
        return full_like(d, 1.0)
    if careful:
        return exp_of_any(d)
    return exp(d)


@inlined
def _add_ratios(found, batch, run, stop, scratch, careful):
    """Which tokens of a run are absent, and ρ → scratch; where one is absent, log ρ is 0."""
    zero = full(scratch, 0.0)
    total, least, most = found
    for v in range(vectors(scratch, run, stop)):
        absent = take_absent(batch.mask, run + v * lanes(scratch), stop, zero)
        d = without(take_log_ratio(batch.logps, batch.old, run, v), absent)
        total += wide(d)
        edge = from_bits(bits(d) | absent)  # NaN where absent: no comparison holds
        least = where(edge < least, edge, least)
        most = where(edge > most, edge, most)
        put(scratch, _ABSENT, v, from_bits(absent))
        put(scratch, _RHO, v, _ratio(d, batch.old, careful))
    return _Ratios(total, least, most)


class _Penalty(NamedTuple):
    """In lanes: Σ of the KL term, Σ l (which finds what is not finite), the largest |l|."""

    total: Any
    check: Any
    farthest: Any


@inlined
def _add_penalty(found, ref, batch, objective, grad, run, stop, scratch, careful):
    """The KL term of a run; β times its derivative → scratch."""
    if ref is None:
        return found
    zero = full(scratch, 0.0)
    total, check, farthest = zero, found.check, found.farthest
    kl = objective.kl
    beta = full_like(zero, kl.beta)
    for v in range(vectors(scratch, run, stop)):
        i = run + v * lanes(scratch)
        ask_ahead(ref, run, v)
        rho = get(scratch, _RHO, v)
        l = without(take(batch.logps, i) - take(ref, i), bits(get(scratch, _ABSENT, v)))  # noqa: E741 - as in papers
        check += l
        size = where(l < 0.0, -l, l)
        farthest = where(size > farthest, size, farthest)
        term = kl_term(kl, l, careful)
        value, slope = term.value, term.slope
        if kl.importance_weighted:
            value, slope = _product(rho, value, careful), _product(rho, term.value_and_slope, careful)
        total += value
        if grad is not None:
            put(scratch, _PENALTY, v, _product(beta, slope, careful))
    return _Penalty(found.total + wide(total), check, farthest)


@inlined
def _product(a, b, careful):
    if careful:
        return times(a, b)
    return a * b


class _Policy(NamedTuple):
    """In lanes: Σ of the policy term; Σ of its inputs (which finds what is not finite); Σ ρ, Σ ρ²; counts."""

    total: Any
    check: Any
    ratio: Any
    ratio_squared: Any
    clipped: Any


@inlined
def _add_policy(found, batch, objective, grad, factor, sequence, run, stop, scratch):
    """The policy term of a run, and the gradient, if there is a place for it."""
    zero = full(scratch, 0.0)
    factor = full_like(zero, factor)
    total, check, ratio, ratio_squared, clipped = zero, found.check, found.ratio, found.ratio_squared, found.clipped
    for v in range(vectors(scratch, run, stop)):
        i = run + v * lanes(scratch)
        absent = bits(get(scratch, _ABSENT, v))
        rho = get(scratch, _RHO, v)
        present = without(rho, absent)
        ratio += wide(present)
        ratio_squared += wide_squares(present)
        a = without(take_for(batch.advantages, batch.advantages_per_token, sequence, i, zero), absent)
        w = take_weight(batch.weights, batch.weights_per_token, sequence, i, absent)
        check = plus(check + a, w)
        term = surrogate_term(objective.surrogate, rho, a, without(take(batch.logps, i), absent))
        total += weighed(w, term.value)
        clipped = count_clipped(objective.surrogate, rho, a, clipped)
        if grad is not None:
            slope = _less_penalty(batch.ref, weighed(w, term.slope), scratch, v)
            write(grad, i, stop, without(factor * slope, absent))
    return _Policy(found.total + wide(total), check, ratio, ratio_squared, clipped)


@inlined
def _less_penalty(ref, slope, scratch, v):
    if ref is None:
        return slope
    return slope - get(scratch, _PENALTY, v)


@compiled
def token_block(batch, objective, grad, factor, sequence, start, stop, scratch):
    """What is found in one block; the gradient is written on the way.

    In the fast way, and again in the careful way where the numbers left the range in which the fast one is right.
    """
    align_stack()
    zero = full(scratch, 0.0)
    none = bits(zero)
    limit = layout(zero).plain
    careful = False
    while True:  # at most twice; a loop, so that the code is there once
        ratios = _Ratios(wide(zero), full_like(zero, np.inf), full_like(zero, -np.inf))
        penalty = _Penalty(wide(zero), zero, zero)
        policy = _Policy(wide(zero), zero, wide(zero), wide(zero), Clipped(none, none, none))
        for run in range(start, stop, RUN * lanes(scratch)):
            ratios = _add_ratios(ratios, batch, run, stop, scratch, careful)
            penalty = _add_penalty(penalty, batch.ref, batch, objective, grad, run, stop, scratch, careful)
            policy = _add_policy(policy, batch, objective, grad, factor, sequence, run, stop, scratch)
        least, most = lane_min(ratios.least), lane_max(ratios.most)
        if careful or (least >= -limit and most <= limit and lane_max(penalty.farthest) <= limit):
            break
        careful = True
    scratch[0], scratch[1] = least, most
    store(scratch, 0, exp_of_any(load(scratch, 0)))
    sums = (
        lane_sum(policy.total),
        lane_sum(penalty.total),
        lane_sum(policy.ratio),
        lane_sum(policy.ratio_squared),
        lane_sum(ratios.total),
    )
    clipped = policy.clipped
    doubtful = not np.isfinite(sums[LOG_RATIO] + lane_sum(penalty.check) + lane_sum(policy.check))
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
def token_level(batch, objective, grad, parts, edges, limit, task, tasks, result):
    """Add what is found in every ``tasks``-th of the pieces between which ``edges`` lie, from number ``task`` on.

    The pieces are of sequences, but for those longer than ``limit``; or of ``parts`` of such. The gradient is written.
    """
    scratch = scratch_like(batch.logps, _ROWS)
    for piece in range(task, len(edges) - 1, tasks):
        for item in range(edges[piece], edges[piece + 1]):
            sequence, start, stop, tokens = _item(parts, batch, grad, item, limit, result)
            factor = -weight_of_token(objective, tokens)
            for block in range(start, stop, BLOCK):
                end = min(block + BLOCK, stop)
                found = token_block(batch, objective, grad, factor, sequence, block, end, scratch)
                add(result, objective, tokens, found)


@compiled(parallel=True)
def token_level_parallel(batch, objective, grad, parts, edges, limit, rows, counts, extremes):
    """`token_level` for all tasks, one for each of the ``rows``, on threads; to the bit the same for any number."""
    tasks = len(rows)
    for t in numba.prange(tasks):
        token_level(batch, objective, grad, parts, edges, limit, t, tasks, Result(rows[t], counts[t], extremes[t]))

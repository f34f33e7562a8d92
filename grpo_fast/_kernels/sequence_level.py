"""The loss at sequence level, where ρ is known only after all log-ratios of a sequence are summed.

For one ρ the policy term is linear in A on either side of 0. So one pass collects what does not depend on ρ, and leaves
∂k/∂l in the gradient's place (`collect`); `conclude` makes ρ, the sums and what the gradient consists of; `spread`
writes that, while the sequence is still in the cache.

The formulas are in `loss_terms`.
"""

from typing import NamedTuple

import numba
import numpy as np

from .blocks import BLOCK, RUN, ask_ahead, settled
from .compiling import compiled, inlined
from .elementary import exp_of_any, layout
from .formulas import Clipped, count_clipped, kl_term, passes_through_ratio, stake, surrogate_term, times
from .simd import align_stack, bits, full, full_like, lane_max, lane_min, lane_sum, lanes, load, tally, where, wide
from .tokens import (
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

# --- collect ----------------------------------------------------------------------------------------------------------
# What is collected from each block of a sequence.
_LOG_RATIO, _K, _FOR, _AGAINST, _MANY_FOR, _MANY_AGAINST, _DOUBTFUL, COLLECTED = range(8)


@inlined
def _take_kl(ref, objective, grad, logp, absent, i, stop, whole, careful):
    """k and l of one vector; ∂k/∂l → ``grad``."""
    if ref is None:
        return logp - logp, logp - logp
    l = without(logp - take(ref, i, whole), absent)
    term = kl_term(objective.kl, l, careful)
    if grad is not None:
        write(grad, i, stop, term.slope)
    return term.value, l


@compiled(allocates=False)
def collect_block(batch, objective, grad, sequence, start, stop, collected):
    """Fill one row of ``collected``, and leave ∂k/∂l in ``grad`` if there is a KL term.

    In the fast way, and again in the careful way where the numbers left the range in which the fast one is right.
    """
    align_stack()
    zero = full(batch.logps, 0.0)
    careful = False
    while True:  # at most twice; a loop, so that the code is there once
        log_ratio = wide(zero)
        k = wide(zero)
        stakes_for = wide(zero)
        stakes_against = wide(zero)
        many_for = bits(zero)
        many_against = bits(zero)
        check = zero
        farthest = zero
        for run in range(start, stop, RUN * lanes(zero)):
            k_of_run = zero
            for_of_run = zero
            against_of_run = zero
            wide_k = wide(zero)
            wide_for = wide_k
            wide_against = wide_k
            for v in range(vectors(batch.logps, run, stop)):
                i = run + v * lanes(zero)
                whole = i + lanes(zero) <= len(batch.logps)
                ask_ahead(batch.logps, run, v)
                ask_ahead_for(batch.old, run, v)
                ask_ahead_for(batch.ref, run, v)
                absent = take_absent(batch.mask, i, stop, whole, zero)
                logp = take(batch.logps, i, whole)
                log_ratio += wide(without(take_log_ratio(logp, batch.old, i, whole), absent))
                logp = without(logp, absent)
                a = without(take_for(batch.advantages, batch.advantages_per_token, sequence, i, whole, zero), absent)
                w = take_weight(batch.weights, batch.weights_per_token, sequence, i, whole, absent)
                staked = weighed(w, stake(objective.surrogate, a, logp))
                winning = where(a > 0.0, staked, zero)
                losing = where(a < 0.0, staked, zero)
                for_of_run += winning
                against_of_run += losing
                many_for = tally(many_for, a > 0.0)
                many_against = tally(many_against, a < 0.0)
                value, l = _take_kl(batch.ref, objective, grad, logp, absent, i, stop, whole, careful)
                k_of_run += value
                if careful:
                    wide_k += wide(value)
                    wide_for += wide(winning)
                    wide_against += wide(losing)
                size = where(l < 0.0, -l, l)
                farthest = where(size > farthest, size, farthest)
                check = plus(check + a + l, w)
            k += settled(k_of_run, wide_k, careful)
            stakes_for += settled(for_of_run, wide_for, careful)
            stakes_against += settled(against_of_run, wide_against, careful)
        collected[_LOG_RATIO] = lane_sum(log_ratio)
        collected[_K] = lane_sum(k)
        collected[_FOR] = lane_sum(stakes_for)
        collected[_AGAINST] = lane_sum(stakes_against)
        finite = np.isfinite(collected[_K] + collected[_FOR] + collected[_AGAINST])
        if careful or (lane_max(farthest) <= layout(zero).plain and finite):
            break
        careful = True
    collected[_MANY_FOR] = lane_sum(many_for)
    collected[_MANY_AGAINST] = lane_sum(many_against)
    collected[_DOUBTFUL] = not np.isfinite(collected[_LOG_RATIO] + lane_sum(check))


@compiled
def collect(batch, objective, grad, sequence, start, stop, collected):
    """Fill a row of ``collected`` for each of the blocks from ``start`` to ``stop``."""
    for row in range(len(collected)):
        block = start + row * BLOCK
        collect_block(batch, objective, grad, sequence, block, min(block + BLOCK, stop), collected[row])


# --- conclude ---------------------------------------------------------------------------------------------------------
class Gradient(NamedTuple):
    """The gradient of a sequence: common + tilt·∂k/∂l + direct·w·A."""

    common: float
    tilt: float
    direct: float


@inlined
def _scalar_product(a, b):
    """a·b with 0·∞ = 0."""
    return 0.0 if a == 0.0 or b == 0.0 else a * b


@inlined
def _of_stakes(part, total):
    """Σ over a sequence of a part of the policy term, of which ``part`` holds that for A = 1 and that for A = −1."""
    gains = _scalar_product(np.float64(lane_max(part)), total[_FOR])
    return gains + _scalar_product(np.float64(lane_min(part)), -total[_AGAINST])


@inlined
def _kl_of(kl, k, ratio):
    """Σ of the KL term over a sequence; β times its part that passes through ρ, and what multiplies ∂k/∂l."""
    if kl is None:
        return 0.0, 0.0, 0.0
    if kl.importance_weighted:
        value = _scalar_product(ratio, k)
        return value, _scalar_product(kl.beta, value), _scalar_product(kl.beta, ratio)
    return k, 0.0, kl.beta


@compiled
def conclude(batch, objective, tokens, collected, result):
    """Make ρ of what was collected of a sequence; add its sums; return what its gradient is made of."""
    align_stack()
    total = np.zeros(COLLECTED)
    for block in range(len(collected)):  # in this order, since these sums are rounded
        for column in range(COLLECTED):
            total[column] += collected[block, column]
    one = full(batch.logps, 1.0)
    rho = exp_of_any(full_like(one, total[_LOG_RATIO] / tokens))
    ratio = np.float64(lane_max(rho))
    signs = np.zeros(lanes(batch.logps), batch.logps.dtype)
    signs[0], signs[1] = 1.0, -1.0
    a = load(signs, 0)
    term = surrogate_term(objective.surrogate, rho, a, one)
    surrogate = _of_stakes(term.value, total)
    kl, beta_kl_through_ratio, beta_kl_slope = _kl_of(objective.kl, total[_K], ratio)

    none = bits(one - one)
    many = where(
        a > 0.0, full_like(none, total[_MANY_FOR]), where(a < 0.0, full_like(none, total[_MANY_AGAINST]), none)
    )
    clipped = count_clipped(objective.surrogate, rho, a, Clipped(none, none, none))
    counts = (
        np.int64(lane_sum(clipped.low * many)),
        np.int64(lane_sum(clipped.high * many)),
        np.int64(lane_sum(clipped.beyond * many)),
        np.int64(total[_DOUBTFUL]),
    )
    sums = (surrogate, kl, tokens * ratio, tokens * ratio * ratio, total[_LOG_RATIO])
    add(result, objective, tokens, Found(sums, counts, ratio, ratio))

    factor = weight_of_token(objective, tokens)
    through_ratio, direct = -beta_kl_through_ratio, 0.0
    if passes_through_ratio(objective.surrogate):
        through_ratio += _of_stakes(term.slope, total)
    else:
        direct = np.float64(lane_max(term.slope))
    return Gradient(-factor * (through_ratio / tokens), factor * beta_kl_slope, -factor * direct)


# --- spread -----------------------------------------------------------------------------------------------------------
@inlined
def _directed(surrogate, common, direct, a):
    if passes_through_ratio(surrogate):
        return common
    return common + times(direct, a)


@inlined
def _tilted(ref, common, tilt, grad, i, whole):
    if ref is None:
        return common
    return common + times(tilt, take(grad, i, whole))


@compiled(allocates=False)
def spread(batch, objective, grad, made_of, sequence, start, stop):
    """The gradient from ``start`` to ``stop`` of a sequence; with a KL term, ``grad`` holds ∂k/∂l before."""
    if grad is None:
        return
    zero = full(batch.logps, 0.0)
    common = full_like(zero, made_of.common)
    tilt = full_like(zero, made_of.tilt)
    direct = full_like(zero, made_of.direct)
    for i in range(start, stop, lanes(grad)):
        whole = i + lanes(grad) <= len(grad)
        absent = take_absent(batch.mask, i, stop, whole, zero)
        a = take_for(batch.advantages, batch.advantages_per_token, sequence, i, whole, zero)
        a = weighed(take_weight(batch.weights, batch.weights_per_token, sequence, i, whole, absent), a)
        gradient = _directed(objective.surrogate, _tilted(batch.ref, common, tilt, grad, i, whole), direct, a)
        write(grad, i, stop, without(gradient, absent))


# --- all of it --------------------------------------------------------------------------------------------------------
@compiled
def sequence_level(batch, objective, grad, pieces, limit, task, tasks, result):
    """Add what is found in every ``tasks``-th of the pieces, from number ``task`` on, and write the gradient.

    A row of ``pieces`` is a range of sequences, of which those longer than ``limit`` are left out.
    """
    for piece in range(task, len(pieces), tasks):
        for sequence in range(pieces[piece, 0], pieces[piece, 1]):
            first, last = batch.bounds[sequence], batch.bounds[sequence + 1]
            if last - first <= limit:
                start, stop, tokens = extent(batch.mask, first, last)
                clear(grad, first, start)
                clear(grad, stop, last)
                if tokens > 0:
                    result.counts[TOKENS] += tokens
                    collected = np.empty(((stop - start + BLOCK - 1) // BLOCK, COLLECTED))
                    collect(batch, objective, grad, sequence, start, stop, collected)
                    made_of = conclude(batch, objective, tokens, collected, result)
                    spread(batch, objective, grad, made_of, sequence, start, stop)


@compiled(parallel=True)
def sequence_level_parallel(
    batch, surrogate, kl, denominator, mean_within, grad, pieces, limit, rows, counts, extremes
):
    """`sequence_level` for all tasks, one for each of the ``rows``, on threads; to the bit the same for any number.

    The members of `Objective` and `Result` come one by one: into a prange goes no tuple of tuples.
    """
    tasks = len(rows)
    for t in numba.prange(tasks):
        objective = Objective(surrogate, kl, denominator, mean_within)
        sequence_level(batch, objective, grad, pieces, limit, t, tasks, Result(rows[t], counts[t], extremes[t]))


# --- one long sequence, on all threads --------------------------------------------------------------------------------
@inlined
def _share(start, stop, task, tasks):
    """What is one task's of the blocks between ``start`` and ``stop``."""
    blocks = (stop - start + BLOCK - 1) // BLOCK
    begin, end = start + task * blocks // tasks * BLOCK, start + (task + 1) * blocks // tasks * BLOCK
    return begin, min(end, stop)


@compiled(parallel=True)
def collect_parallel(batch, surrogate, kl, denominator, mean_within, grad, sequence, start, stop, collected, tasks):
    """As `collect`, to the bit."""
    for t in numba.prange(tasks):
        begin, end = _share(start, stop, t, tasks)
        rows = collected[(begin - start) // BLOCK : (end - start + BLOCK - 1) // BLOCK]
        objective = Objective(surrogate, kl, denominator, mean_within)
        collect(batch, objective, grad, sequence, begin, end, rows)


@compiled(parallel=True)
def spread_parallel(batch, surrogate, kl, denominator, mean_within, grad, made_of, sequence, start, stop, tasks):
    """As `spread`, to the bit."""
    for t in numba.prange(tasks):
        begin, end = _share(start, stop, t, tasks)
        objective = Objective(surrogate, kl, denominator, mean_within)
        spread(batch, objective, grad, made_of, sequence, begin, end)

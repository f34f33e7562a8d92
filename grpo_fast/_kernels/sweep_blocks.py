"""The kernels of `grpo_sweep`: the sums of `sample_blocks` for many pairs of bounds, from one pass over memory.

Each run is prepared once, and then summed for every pair: `_fold` leaves what makes that cheap.
"""

from typing import Any, NamedTuple

import numpy as np

from . import exact
from .blocks import (
    BLOCK,
    RUN,
    block_count,
    load_row,
    overflowed,
    prefetch_ahead,
    scratch_like,
    share,
    store_row,
    vectors_in_run,
)
from .compiling import compiled, inlined, subroutine
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .samples import (
    ADVANTAGE,
    RHO,
    ROWS,
    F,
    S,
    Samples,
    UnweightedSamples,
    begin_block,
    begin_run,
    end_block,
    fast_then_careful,
)
from .simd import (
    align_stack,
    bits,
    fma,
    from_bits,
    full,
    full_like,
    lane_sum,
    lanes,
    load,
    signed,
    store,
    tally,
    where,
    wide,
)
from .tasks import run

# Rows of the scratch array that are free once the KL is summed.
_FOLDED, _SIZE = F, S

#: One task's accumulators: for each pair of bounds, and for what the pairs share.
_PAIR = np.dtype([("surrogate", np.int64, exact.ROW), ("clipped_low", np.int64), ("clipped_high", np.int64)])
_SHARED = np.dtype([("kl", np.int64, exact.ROW), ("suspect", np.int64)])


def sweep_accumulators(tasks: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Empty accumulators: (tasks, pairs) and (tasks,)."""
    return np.zeros((tasks, pairs), _PAIR), np.zeros(tasks, _SHARED)


# --- one block --------------------------------------------------------------------------------------------------------
class _PairSums(NamedTuple):
    """Arrays of one row for each pair of bounds: in lanes, Σ surrogate (float64), and two counts of ±ρ (their bits).

    ±ρ, with the sign of A, is above the upper bound where a sample is clipped high; it is above minus the lower one for
    every plus sign, besides the samples clipped low.
    """

    surrogate: Any
    above_high: Any
    above_minus_low: Any


@inlined
def _fold(scratch, vectors, advantages, start):
    """Put ±ρ, with the sign of A, and |A| into free rows of the scratch array; return how many have the plus sign.

    Both bounds then become an upper one: A·clipped ρ = |A|·min(±ρ, bound), bound being high or −low. Where A = 0,
    1 stands, which no bound touches, or NaN for a ρ that is no number.
    """
    plus = bits(full(scratch, 0.0))
    for v in range(vectors):
        prefetch_ahead(advantages, start, v)
        rho = load_row(scratch, RHO, v)
        a = load_row(scratch, ADVANTAGE, v)
        folded = where(a < 0.0, -rho, where(a == 0.0, rho - rho + 1.0, rho))
        plus = tally(plus, folded > 0.0)
        store_row(scratch, _FOLDED, v, folded)
        store_row(scratch, _SIZE, v, where(a < 0.0, -a, a))
    return plus


@inlined
def _folded(scratch, v, low, high):
    """±ρ, and that as far as it counts."""
    folded = load_row(scratch, _FOLDED, v)
    bound = where(signed(folded), -low, high)
    return folded, where(folded > bound, bound, folded)


@inlined
def _add_bounded(scratch, vectors, low, high, pair, sums):
    """Add a run to the sums of a pair of bounds, from what `_fold` left; 7 operations a vector.

    Σ surrogate is that of `surrogate_sum`, to the bit.
    """
    total = full_like(low, 0.0)
    above_high = bits(load(sums.above_high[pair], 0))
    above_minus_low = bits(load(sums.above_minus_low[pair], 0))
    for v in range(vectors):
        folded, bounded = _folded(scratch, v, low, high)
        total = fma(bounded, load_row(scratch, _SIZE, v), total)
        above_high = tally(above_high, folded > high)
        above_minus_low = tally(above_minus_low, folded > -low)
    store(sums.above_high[pair], 0, from_bits(above_high))
    store(sums.above_minus_low[pair], 0, from_bits(above_minus_low))
    in_float64 = wide(total)
    if overflowed(scratch, in_float64):
        in_float64 = wide(full_like(low, 0.0))
        for v in range(vectors):
            folded, bounded = _folded(scratch, v, low, high)
            in_float64 += wide(bounded * load_row(scratch, _SIZE, v))
    store(sums.surrogate[pair], 0, load(sums.surrogate[pair], 0) + in_float64)


@inlined
def _attempt_sweep_block(samples, start, stop, lows, highs, sums, scratch, careful, known_kl):
    """Fill ``sums``; return ((Σ KL, how many A are not negative, whether all is legal), …) for `fast_then_careful`."""
    zero = full(samples.rhos, 0.0)
    sums.surrogate[:] = 0.0
    sums.above_high[:] = 0.0
    sums.above_minus_low[:] = 0.0
    plus = 0
    block = begin_block(samples, careful)
    for run_start in range(start, stop, RUN * lanes(zero)):
        block = begin_run(block, samples, run_start, stop, careful, None, scratch)
        vectors = vectors_in_run(samples.rhos, run_start, stop)
        plus += np.int64(lane_sum(_fold(scratch, vectors, samples.advantages, run_start)))
        for pair in range(len(lows)):
            _add_bounded(scratch, vectors, full_like(zero, lows[pair]), full_like(zero, highs[pair]), pair, sums)
    kl, fast_was_right = end_block(block, known_kl)
    return (kl, plus, block.legal), kl, fast_was_right, np.isfinite(sums.surrogate.sum())


@subroutine
def sweep_block(samples, start, stop, lows, highs, sums, scratch):
    """Fill ``sums`` with those of one block; return Σ KL, how many A are not negative, and whether all is legal."""
    align_stack()
    return fast_then_careful(_attempt_sweep_block, (samples, start, stop, lows, highs, sums, scratch))


# --- all blocks -------------------------------------------------------------------------------------------------------
@subroutine
def _accumulate_share(t, samples, lows, highs, pairs, shared):
    """Add the blocks that are task t's to its accumulators."""
    rhos = samples.rhos
    scratch = scratch_like(rhos, ROWS)
    width = lanes(rhos)
    sums = _PairSums(
        np.empty((len(lows), 8)), np.empty((len(lows), width), rhos.dtype), np.empty((len(lows), width), rhos.dtype)
    )
    first, last = share(block_count(len(rhos)), t, len(shared))
    host_mode = begin_ordinary_floats()
    for number in range(first, last):
        start = number * BLOCK
        stop = min(start + BLOCK, len(rhos))
        kl, plus, legal = sweep_block(samples, start, stop, lows, highs, sums, scratch)
        for i in range(len(lows)):
            exact.add(pairs[t, i].surrogate, lane_sum(load(sums.surrogate[i], 0)))
            pairs[t, i].clipped_low += np.int64(lane_sum(bits(load(sums.above_minus_low[i], 0)))) - plus
            pairs[t, i].clipped_high += np.int64(lane_sum(bits(load(sums.above_high[i], 0))))
        exact.add(shared[t].kl, kl)
        shared[t].suspect += not legal
    end_ordinary_floats(host_mode)


@compiled
def sweep(rhos, advantages, pi_old, pi_ref, unweighted, lows, highs, pairs, shared, room):
    """An entry, see `tasks`: adds all samples, for every pair of bounds, to the accumulators; each row is a task's."""
    if unweighted is None:
        samples = Samples(rhos, advantages, pi_old, pi_ref)
        return run(_accumulate_share, (samples, lows, highs, pairs, shared), room)
    samples = UnweightedSamples(rhos, advantages, pi_old, pi_ref)
    return run(_accumulate_share, (samples, lows, highs, pairs, shared), room)


@compiled
def merge_sweep(pairs, shared):
    """Add all accumulators to the first task's, and bring their limbs into the form that `Exact.of_limbs` reads."""
    for t in range(1, len(shared)):
        for i in range(pairs.shape[1]):
            exact.join(pairs[0, i].surrogate, pairs[t, i].surrogate)
            pairs[0, i].clipped_low += pairs[t, i].clipped_low
            pairs[0, i].clipped_high += pairs[t, i].clipped_high
        exact.join(shared[0].kl, shared[t].kl)
        shared[0].suspect += shared[t].suspect
    for i in range(pairs.shape[1]):
        exact.carry(pairs[0, i].surrogate)
    exact.carry(shared[0].kl)

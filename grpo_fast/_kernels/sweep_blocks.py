"""The kernels of `grpo_sweep`: the sums of `objective_kernels` for many pairs of bounds, from one pass over memory.

Each run is prepared once, and then summed for every pair: `_fold` leaves what makes that cheap.
"""

import numba
import numpy as np

from . import exact
from .blocks import BLOCK, RUN, ask_ahead, get, put, scratch_like
from .compiling import compiled, inlined
from .elementary import layout
from .samples import ADVANTAGE, RHO, ROWS, F, S, begin_run
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
    signed,
    store,
    tally,
    where,
    wide,
)

# Rows of the scratch array that are free once the KL is summed.
_FOLDED, _SIZE = F, S


# --- one block --------------------------------------------------------------------------------------------------------
@inlined
def _fold(scratch, vectors, advantage, start):
    """Put ±ρ, with the sign of A, and |A| into scratch rows that are free once the KL is summed.

    Both bounds then become an upper one: A·clipped ρ = |A|·min(±ρ, bound), bound being high or −low. Where A = 0,
    1 stands, which no bound touches, or NaN for a ρ that is no number. Returns how many have the plus sign.
    """
    plus = bits(full(scratch, 0.0))
    for v in range(vectors):
        ask_ahead(advantage, start, v)
        rho = get(scratch, RHO, v)
        a = get(scratch, ADVANTAGE, v)
        folded = where(a < 0.0, -rho, where(a == 0.0, rho - rho + 1.0, rho))
        plus = tally(plus, folded > 0.0)
        put(scratch, _FOLDED, v, folded)
        put(scratch, _SIZE, v, where(a < 0.0, -a, a))
    return plus


@inlined
def _folded(scratch, v, low, high):
    """±ρ, and that as far as it counts."""
    folded = get(scratch, _FOLDED, v)
    bound = where(signed(folded), -low, high)
    return folded, where(folded > bound, bound, folded)


@inlined
def _add_bounded(scratch, vectors, low, high, at, surrogates, tallies):
    """`surrogate_sum` (to the bit) and the clipped samples of one run, from what `_fold` left; 7 operations a vector.

    Added to 8 lanes of ``surrogates`` and to two vectors of ``tallies``: ±ρ > high, and ±ρ > −low, which holds for
    every plus sign besides the samples clipped low.
    """
    total = full_like(low, 0.0)
    step = lanes(scratch)
    above = bits(load(tallies, 2 * at * step))
    not_below = bits(load(tallies, (2 * at + 1) * step))
    for v in range(vectors):
        folded, bounded = _folded(scratch, v, low, high)
        total = fma(bounded, get(scratch, _SIZE, v), total)
        above = tally(above, folded > high)
        not_below = tally(not_below, folded > -low)
    store(tallies, 2 * at * step, from_bits(above))
    store(tallies, (2 * at + 1) * step, from_bits(not_below))
    in_float64 = wide(total)
    if lanes(scratch) > 8 and not is_finite(in_float64):
        in_float64 = wide(full_like(low, 0.0))
        for v in range(vectors):
            folded, bounded = _folded(scratch, v, low, high)
            in_float64 += wide(bounded * get(scratch, _SIZE, v))
    store(surrogates, 8 * at, load(surrogates, 8 * at) + in_float64)


@inlined
def _attempt_sweep_block(
    ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch, careful, known_kl
):
    """As `_attempt_block` for many pairs of bounds; what `_add_bounded` says goes into two of the arrays."""
    zero = full(ratio, 0.0)
    step = lanes(ratio)
    kl = wide(zero)
    least = full_like(zero, 1.0)
    most = least
    legal = True
    near = not careful  # until a run is not: for the rest of the block
    surrogates[:] = 0.0
    tallies[:] = 0.0
    plus = 0
    for run in range(start, stop, RUN * step):
        vectors, lower, upper, fine, kl_of_run, near = begin_run(
            ratio, advantage, old, ref, run, stop, careful, None, near, scratch
        )
        least = where(lower < least, lower, least)
        most = where(upper > most, upper, most)
        legal = legal and fine
        kl += kl_of_run
        plus += np.int64(lane_sum(_fold(scratch, vectors, advantage, run)))
        for e in range(len(lows)):
            low = full_like(zero, lows[e])
            high = full_like(zero, highs[e])
            _add_bounded(scratch, vectors, low, high, e, surrogates, tallies)
    form = layout(zero)
    kl_sum = lane_sum(kl) if np.isnan(known_kl) else known_kl
    usual = lane_min(least) > form.usual and lane_max(most) < 1.0 / form.usual and np.isfinite(kl_sum)
    return kl_sum, plus, legal, usual


@compiled
def sweep_block(ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch):
    """Σ KL of one block, how many A are not negative, and whether it is legal; the rest is left in the arrays."""
    align_stack()
    careful, known_kl = False, np.nan
    while True:  # as in `sum_block`
        kl, plus, legal, usual = _attempt_sweep_block(
            ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch, careful, known_kl
        )
        if careful or (usual and np.isfinite(surrogates.sum())):
            return kl, plus, legal
        careful, known_kl = True, kl if usual else np.nan


# --- all blocks -------------------------------------------------------------------------------------------------------
@compiled
def _add_sweep_blocks(ratio, advantage, old, ref, lows, highs, first, last, rows, counts):
    """Add the sums of blocks first … last − 1; the last row is for the KL and for the count of illegal blocks."""
    scratch = scratch_like(ratio, ROWS)
    surrogates = np.empty(len(lows) * 8)
    tallies = np.empty(len(lows) * 2 * lanes(ratio), ratio.dtype)
    for block in range(first, last):
        start = block * BLOCK
        stop = min(start + BLOCK, len(ratio))
        kl, plus, legal = sweep_block(
            ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch
        )
        for e in range(len(lows)):
            exact.add(rows[e], lane_sum(load(surrogates, 8 * e)))
            counts[e, 0] += np.int64(lane_sum(bits(load(tallies, (2 * e + 1) * lanes(ratio))))) - plus
            counts[e, 1] += np.int64(lane_sum(bits(load(tallies, 2 * e * lanes(ratio)))))
        exact.add(rows[-1], kl)
        counts[-1, 0] += not legal


@compiled
def sweep(ratio, advantage, old, ref, lows, highs, rows, counts):
    """Add the sums of all samples for every pair of bounds to the last two arrays; the first axis is for tasks.

    ``rows`` (tasks, E + 1, exact.ROW): Σ surrogate for each pair, then Σ kl; ``counts`` (tasks, E + 1, 2): clipped low
    and high for each pair, then blocks with an illegal sample.
    """
    tasks, blocks = len(rows), (len(ratio) + BLOCK - 1) // BLOCK
    for t in range(tasks):
        first, last = t * blocks // tasks, (t + 1) * blocks // tasks
        _add_sweep_blocks(ratio, advantage, old, ref, lows, highs, first, last, rows[t], counts[t])


@compiled(parallel=True)
def sweep_parallel(ratio, advantage, old, ref, lows, highs, rows, counts):
    """As `sweep`, to the bit."""
    tasks, blocks = len(rows), (len(ratio) + BLOCK - 1) // BLOCK
    for t in numba.prange(tasks):
        first, last = t * blocks // tasks, (t + 1) * blocks // tasks
        _add_sweep_blocks(ratio, advantage, old, ref, lows, highs, first, last, rows[t], counts[t])

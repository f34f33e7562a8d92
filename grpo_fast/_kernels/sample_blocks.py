"""The kernels of `objective`: probabilities in, sums out, in one pass over memory.

A block of `BLOCK` samples is summed into the lanes of a few vectors, always in the same order, and the sums of the
blocks are added exactly: the result depends neither on the number of threads nor on the CPU. What is done with each
run of a block, `objective_runs` says; here are

    sum_block                   block → float64 sums
    objective_block, totals …   blocks → exact sums, on one thread or on all; what `objective` calls
"""

from typing import NamedTuple

import numba
import numpy as np

from . import exact
from .blocks import BLOCK, RUN, get, scratch_like
from .compiling import compiled, inlined
from .elementary import LN2, layout, log
from .samples import PRESENT, RHO, ROWS, begin_run, count_clipped, moments, squares, surrogate_sum
from .simd import (
    align_stack,
    bits,
    from_bits,
    full,
    full_like,
    lane_max,
    lane_min,
    lane_sum,
    lanes,
    where,
    wide,
    wide_product,
)

# Rows of the exact sums.
SURROGATE, KL, RATIO, RATIO_SQUARED, LOG_RATIO, SUMS = range(6)


class BlockSums(NamedTuple):
    """The sums of one block over its samples."""

    surrogate: float
    kl: float
    ratio: float
    ratio_squared: float
    log_ratio: float
    clipped_low: int
    clipped_high: int
    ratio_min: float
    ratio_max: float
    legal: bool  # whether all samples are in the domain


# --- one block --------------------------------------------------------------------------------------------------------
@inlined
def _attempt_block(ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch, careful, known_kl):
    """The sums of a block, and whether that of the KL, if not known before, is right though nobody was careful."""
    zero = full(ratio, 0.0)
    form = layout(zero)
    low = full_like(zero, low)
    high = full_like(zero, high)
    surrogate = wide(zero)
    kl = wide(zero)
    ratios = wide(zero)
    ratios_squared = wide(zero)
    product = wide(zero) + 1.0
    exponents = bits(zero)
    clipped_low = bits(zero)
    clipped_high = bits(zero)
    ratio_min = full_like(zero, ratio[start])
    ratio_max = ratio_min
    least = full_like(zero, 1.0)
    most = least
    legal = True
    near = not careful  # until a run is not: for the rest of the block
    for run in range(start, stop, RUN * lanes(zero)):
        vectors, lower, upper, fine, kl_of_run, near = begin_run(
            ratio, advantage, old, ref, run, stop, careful, diagnostics, near, scratch
        )
        least = where(lower < least, lower, least)
        most = where(upper > most, upper, most)
        legal = legal and fine
        kl += kl_of_run
        surrogate += surrogate_sum(scratch, vectors, low, high, advantage, run)
        if diagnostics is not None:
            clipped_low, clipped_high = count_clipped(scratch, vectors, low, high, clipped_low, clipped_high)
            ratios_squared += squares(scratch, vectors)
            ratio_of_run = zero
            for v in range(vectors):
                rho = get(scratch, RHO, v)
                present = get(scratch, PRESENT, v)
                ratio_min = where(present < ratio_min, present, ratio_min)
                ratio_max = where(present > ratio_max, present, ratio_max)
                ratio_of_run += rho
                # Σ log ρ is the logarithm of a product: of the fractions, below 2⁵¹² in a block, and of powers of two.
                # Of a missing 0 the fraction is 1, and the exponent is 0 as it stands there.
                product *= wide_product(from_bits(bits(rho) & (form.half * 2 - 1) | form.one))
                exponents += bits(rho) >> form.mantissa
            ratios += wide(ratio_of_run)
    log_ratio = 0.0
    if diagnostics is not None:
        if careful or lane_max(ratio_max) >= 1.0 / form.usual:
            ratios, ratios_squared = moments(ratio, start, stop)
        log_ratio = lane_sum(log(product)) + (np.int64(lane_sum(exponents)) - (stop - start) * form.bias) * LN2
    sums = BlockSums(
        lane_sum(surrogate),
        lane_sum(kl) if np.isnan(known_kl) else known_kl,
        lane_sum(ratios),
        lane_sum(ratios_squared),
        log_ratio,
        np.int64(lane_sum(clipped_low)),
        np.int64(lane_sum(clipped_high)),
        np.float64(lane_min(ratio_min)),
        np.float64(lane_max(ratio_max)),
        legal,
    )
    return sums, lane_min(least) > form.usual and lane_max(most) < 1.0 / form.usual and np.isfinite(sums.kl)


@compiled
def sum_block(ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch):
    """The sums of one block: in the fast way, and once more in the careful way if something is not as usual.

    If that is only the surrogate, which is infinite or of illegal samples, the KL stays as it is: `grpo_stats`,
    `grpo_sweep` and `grpo_objective` are to find the same, and what overflows depends on ε.
    """
    align_stack()
    careful, known_kl = False, np.nan
    while True:  # at most twice; a loop, so that the code is there once
        sums, usual = _attempt_block(
            ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch, careful, known_kl
        )
        if careful or (usual and np.isfinite(sums.surrogate)):
            return sums
        careful, known_kl = True, sums.kl if usual else np.nan


# --- all blocks -------------------------------------------------------------------------------------------------------
@compiled
def objective_block(ratio, advantage, old, ref, low, high):
    """(Σ surrogate, Σ kl, whether all samples are legal) of at most BLOCK samples: the shortest way there is."""
    sums = sum_block(ratio, advantage, old, ref, 0, len(ratio), low, high, None, scratch_like(ratio, ROWS))
    return sums.surrogate, sums.kl, sums.legal


@compiled
def objective_blocks(ratio, advantage, old, ref, low, high, sums):
    """Put Σ surrogate and Σ kl of each block into ``sums`` (blocks, 2); whether all samples are legal.

    For so few samples that a call costs more than they do: no limbs to fill and carry.
    """
    scratch = scratch_like(ratio, ROWS)
    legal = True
    for block in range(len(sums)):
        start = block * BLOCK
        stop = min(start + BLOCK, len(ratio))
        block_sums = sum_block(ratio, advantage, old, ref, start, stop, low, high, None, scratch)
        sums[block, 0] = block_sums.surrogate
        sums[block, 1] = block_sums.kl
        legal = legal and block_sums.legal
    return legal


@compiled
def _add_blocks(ratio, advantage, old, ref, low, high, diagnostics, first, last, rows, counts, extremes):
    """Add the sums of blocks first … last − 1."""
    scratch = scratch_like(ratio, ROWS)
    for block in range(first, last):
        start = block * BLOCK
        stop = min(start + BLOCK, len(ratio))
        sums = sum_block(ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch)
        exact.add(rows[SURROGATE], sums.surrogate)
        exact.add(rows[KL], sums.kl)
        counts[2] += not sums.legal
        if diagnostics is not None:
            exact.add(rows[RATIO], sums.ratio)
            exact.add(rows[RATIO_SQUARED], sums.ratio_squared)
            exact.add(rows[LOG_RATIO], sums.log_ratio)
            counts[0] += sums.clipped_low
            counts[1] += sums.clipped_high
            extremes[0] = min(extremes[0], sums.ratio_min)
            extremes[1] = max(extremes[1], sums.ratio_max)


@compiled
def totals(ratio, advantage, old, ref, low, high, diagnostics, rows, counts, extremes):
    """Add the sums of all samples to the last three arrays; the first axis is for tasks that share the blocks.

    ``rows`` (tasks, SUMS, exact.ROW): the sums named above; ``counts`` (tasks, 3): clipped low, clipped high, blocks
    with an illegal sample; ``extremes`` (tasks, 2): least and largest ρ. Without ``diagnostics`` only the first two
    rows and the last count are touched. This is the serial driver, the next one runs the tasks on threads.
    """
    tasks, blocks = len(rows), (len(ratio) + BLOCK - 1) // BLOCK
    for t in range(tasks):
        first, last = t * blocks // tasks, (t + 1) * blocks // tasks
        _add_blocks(ratio, advantage, old, ref, low, high, diagnostics, first, last, rows[t], counts[t], extremes[t])


@compiled(parallel=True)
def totals_parallel(ratio, advantage, old, ref, low, high, diagnostics, rows, counts, extremes):
    """As `totals`, to the bit."""
    tasks, blocks = len(rows), (len(ratio) + BLOCK - 1) // BLOCK
    for t in numba.prange(tasks):
        first, last = t * blocks // tasks, (t + 1) * blocks // tasks
        _add_blocks(ratio, advantage, old, ref, low, high, diagnostics, first, last, rows[t], counts[t], extremes[t])

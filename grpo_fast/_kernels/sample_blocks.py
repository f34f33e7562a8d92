"""The kernels of `objective`: probabilities in, sums out, in one pass over memory.

A block of `BLOCK` samples is summed into the lanes of a few vectors, always in the same order, and the sums of the
blocks are added exactly: the result depends neither on the number of threads nor on the CPU. What is done with each
run of a block, `samples` says; here are

    sum_block                   block → float64 sums
    objective_block, totals …   blocks → exact sums, on one thread or on all; what `objective` calls
"""

import numpy as np

from .blocks import BLOCK, RUN, block_count, load_row, scratch_like, share, vectors_in_run
from .compiling import compiled, inlined, subroutine
from .elementary import LN2, layout, log
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .samples import (
    PRESENT,
    RHO,
    ROWS,
    Samples,
    UnweightedSamples,
    begin_block,
    begin_run,
    count_clipped,
    end_block,
    fast_then_careful,
    moments,
    squares,
    surrogate_sum,
)
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
from .sums import Clipped, Contribution, Sums, accumulate
from .tasks import run


# --- one block --------------------------------------------------------------------------------------------------------
@inlined
def _attempt_block(samples, start, stop, low, high, diagnostics, scratch, careful, known_kl):
    """The contribution of a block, in which diagnostics not asked for are 0; and what `fast_then_careful` needs."""
    rhos = samples.rhos
    zero = full(rhos, 0.0)
    form = layout(zero)
    low = full_like(zero, low)
    high = full_like(zero, high)
    surrogate = wide(zero)
    ratios = wide(zero)
    ratios_squared = wide(zero)
    product = wide(zero) + 1.0
    exponents = bits(zero)
    clipped_low = bits(zero)
    clipped_high = bits(zero)
    ratio_min = full_like(zero, rhos[start])
    ratio_max = ratio_min
    block = begin_block(samples, careful)
    for run_start in range(start, stop, RUN * lanes(zero)):
        block = begin_run(block, samples, run_start, stop, careful, diagnostics, scratch)
        vectors = vectors_in_run(rhos, run_start, stop)
        surrogate += surrogate_sum(scratch, vectors, low, high, samples.advantages, run_start)
        if diagnostics is not None:
            clipped_low, clipped_high = count_clipped(scratch, vectors, low, high, clipped_low, clipped_high)
            ratios_squared += squares(scratch, vectors)
            ratio_of_run = zero
            for v in range(vectors):
                rho = load_row(scratch, RHO, v)
                present = load_row(scratch, PRESENT, v)
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
        if careful or lane_max(ratio_max) >= 1.0 / form.safe_least:
            ratios, ratios_squared = moments(rhos, start, stop)
        log_ratio = lane_sum(log(product)) + (np.int64(lane_sum(exponents)) - (stop - start) * form.bias) * LN2
    kl, fast_was_right = end_block(block, known_kl)
    sums = Sums(
        surrogate=lane_sum(surrogate),
        kl=kl,
        ratio=lane_sum(ratios),
        ratio_squared=lane_sum(ratios_squared),
        log_ratio=log_ratio,
    )
    contribution = Contribution(
        sums,
        Clipped(np.int64(lane_sum(clipped_low)), np.int64(lane_sum(clipped_high)), 0, 0),
        not block.legal,
        np.float64(lane_min(ratio_min)),
        np.float64(lane_max(ratio_max)),
    )
    return contribution, kl, fast_was_right, np.isfinite(sums.surrogate)


@subroutine
def sum_block(samples, start, stop, low, high, diagnostics, scratch):
    """The contribution of the block of samples from ``start`` to ``stop``, for the bounds ``low`` and ``high`` of ρ."""
    align_stack()
    return fast_then_careful(_attempt_block, (samples, start, stop, low, high, diagnostics, scratch))


# --- all blocks -------------------------------------------------------------------------------------------------------
@inlined
def _sums_of_block(samples, low, high, scratch):
    host_mode = begin_ordinary_floats()
    contribution = sum_block(samples, 0, len(samples.rhos), low, high, None, scratch)
    end_ordinary_floats(host_mode)
    return contribution.sums.surrogate, contribution.sums.kl, contribution.suspect


@inlined
def _sums_of_blocks(samples, low, high, surrogates, kls, scratch):
    illegal = False
    host_mode = begin_ordinary_floats()
    for number in range(len(kls)):
        start = number * BLOCK
        stop = min(start + BLOCK, len(samples.rhos))
        contribution = sum_block(samples, start, stop, low, high, None, scratch)
        surrogates[number] = contribution.sums.surrogate
        kls[number] = contribution.sums.kl
        illegal = illegal or contribution.suspect
    end_ordinary_floats(host_mode)
    return illegal


# The arrays of `Samples` come from Python one by one: to look at a tuple of them takes Numba half a microsecond more.
# To look at ``unweighted`` (None or True) takes a fiftieth of the smallest call; so its kernel alone is there twice.
@compiled
def objective_block(rhos, advantages, pi_old, pi_ref, low, high):
    """(Σ surrogate, Σ kl, whether something is illegal) of at most BLOCK samples: the shortest way there is."""
    return _sums_of_block(Samples(rhos, advantages, pi_old, pi_ref), low, high, scratch_like(rhos, ROWS))


@compiled
def unweighted_block(rhos, advantages, pi_old, pi_ref, low, high):
    """As `objective_block`, of `UnweightedSamples`."""
    return _sums_of_block(UnweightedSamples(rhos, advantages, pi_old, pi_ref), low, high, scratch_like(rhos, ROWS))


@compiled
def objective_blocks(rhos, advantages, pi_old, pi_ref, unweighted, low, high, surrogates, kls):
    """Write Σ surrogate and Σ kl of each block into two arrays (blocks,); return whether something is illegal.

    For so few samples that a call costs more than they do: no limbs to fill and carry.
    """
    scratch = scratch_like(rhos, ROWS)
    if unweighted is None:
        return _sums_of_blocks(Samples(rhos, advantages, pi_old, pi_ref), low, high, surrogates, kls, scratch)
    return _sums_of_blocks(UnweightedSamples(rhos, advantages, pi_old, pi_ref), low, high, surrogates, kls, scratch)


@subroutine
def _accumulate_share(task, samples, low, high, diagnostics, accumulators):
    """Add the blocks that are a task's to its accumulator."""
    scratch = scratch_like(samples.rhos, ROWS)
    accumulator = accumulators[task]
    host_mode = begin_ordinary_floats()
    first, last = share(block_count(len(samples.rhos)), task, len(accumulators))
    for number in range(first, last):
        start = number * BLOCK
        stop = min(start + BLOCK, len(samples.rhos))
        accumulate(accumulator, sum_block(samples, start, stop, low, high, diagnostics, scratch))
        accumulator.tokens += stop - start
    end_ordinary_floats(host_mode)


@compiled
def totals(rhos, advantages, pi_old, pi_ref, unweighted, low, high, diagnostics, accumulators, room):
    """An entry, see `tasks`: adds all samples to the accumulators, of which each is a task's.

    Without ``diagnostics`` only surrogate and kl are right.
    """
    if unweighted is None:
        samples = Samples(rhos, advantages, pi_old, pi_ref)
        return run(_accumulate_share, (samples, low, high, diagnostics, accumulators), room)
    samples = UnweightedSamples(rhos, advantages, pi_old, pi_ref)
    return run(_accumulate_share, (samples, low, high, diagnostics, accumulators), room)

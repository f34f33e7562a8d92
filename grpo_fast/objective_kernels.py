"""The kernels of `objective`: probabilities in, sums out, in one pass over memory.

A block of `BLOCK` samples is summed into the lanes of a few vectors, always in the same order, and the sums of the
blocks are added exactly: the result depends neither on the number of threads nor on the CPU. How a block is worked
through, `staging` says. From the inside out:

    _load, _load_carefully      one vector of samples; wherever the first does not do, the second
    _prepare                    memory → ρ, A, and r = π_ref/π_θ reduced → scratch
    _kl_sum, _surrogate_sum …   scratch → what a run adds to the sums
    _begin_run                  the first two, in the near way if that will do
    sum_block, sweep_block      block → float64 sums
    totals, sweep, *_parallel   blocks → exact sums, on one thread or on all; what `objective` calls

Numba's disk cache keeps these kernels until this file changes, whatever happens to the code that they inline. Hence the
digest of those files; tests/test_cache.py fails when it is old, and says what to write.
"""

from typing import NamedTuple

import numba
import numpy as np

from . import exact
from .elementary import (
    LN2,
    NEAR,
    ReducedRatio,
    k3,
    k3_near,
    layout,
    log,
    reduce_near_ratio,
    reduce_ratio,
    split,
)
from .simd import (
    align_stack,
    bits,
    compiled,
    every,
    fma,
    from_bits,
    full,
    full_like,
    inlined,
    lane_max,
    lane_min,
    lane_sum,
    lanes,
    load,
    load_first,
    signed,
    store,
    tally,
    where,
    wide,
    wide_product,
    wide_squares,
)
from .staging import BLOCK, RUN, ask_ahead, get, put, scratch_like

INLINED = "d74039046e6de244"

# Rows of the scratch array, each RUN vectors long.
_RHO, _ADVANTAGE, _POWER, _F, _S, _PRESENT, _ROWS = range(7)
_FOLDED, _SIZE = _F, _S
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


# --- memory → scratch -------------------------------------------------------------------------------------------------
@inlined
def _load(ratio, advantage, old, ref, i):
    """One vector of samples: ρ, A, and ρ, π_old, π_ref, assumed to be far from the limits of the format."""
    rho = load(ratio, i)
    if old is None:
        one = full(ratio, 1.0)
        return rho, load(advantage, i), rho, one, one
    return rho, load(advantage, i), rho, load(old, i), load(ref, i)


@inlined
def _load_carefully(ratio, advantage, old, ref, i, stop):
    """One vector of which samples may be missing, or anywhere in the domain, or outside it.

    Returns ρ, A; three numbers near 1 with the same r as ρ, π_old and π_ref; and whether all samples are legal.
    A missing sample is ρ = 1, A = 0, r = 1, which adds nothing to any sum.
    """
    n = min(stop - i, lanes(ratio))
    rho = load_first(ratio, i, n, 1.0)
    a = load_first(advantage, i, n, 0.0)
    form = layout(rho)
    legal = (rho >= form.smallest_normal) & (rho <= form.largest) & (a >= -form.largest) & (a <= form.largest)
    one = full(ratio, 1.0)
    if old is None:
        return rho, a, one, one, one, every(legal)
    pi_old = load_first(old, i, n, 1.0)
    pi_ref = load_first(ref, i, n, 1.0)
    pi = rho * pi_old
    r = pi_ref / pi
    legal = legal & (pi_old > 0.0) & (pi_ref > 0.0) & (pi >= form.smallest_normal) & (pi <= form.largest)
    legal = legal & (r >= form.smallest_normal) & (r <= 0.125 * form.largest)
    rho_m, rho_e = split(where(legal, rho, one))
    old_m, old_e = split(where(legal, pi_old, one))
    ref_m, ref_e = split(where(legal, pi_ref, one))
    return rho, a, rho_m, old_m, from_bits(bits(ref_m) + ref_e - rho_e - old_e), every(legal)


@inlined
def _prepare(ratio, advantage, old, ref, start, stop, careful, diagnostics, near, scratch):
    """Fill the scratch array with up to RUN vectors of samples from ``start`` on, ``near`` ones or any.

    Returns the smallest and the largest of the numbers that must be far from the limits of the format for the result
    to be right, one in each lane, and whether the samples that were looked at one by one are legal. What overflows
    or is NaN need not be looked for: it shows in the sums.
    """
    least = full(ratio, 1.0)
    most = least
    legal = True
    step = lanes(ratio)
    for v in range(min(RUN, (stop - start + step - 1) // step)):
        i = start + v * step
        if careful or i + step > stop:
            rho, a, x, y, z, fine = _load_carefully(ratio, advantage, old, ref, i, stop)
            present = load_first(ratio, i, min(stop - i, step), ratio[i])
            legal = legal and fine
        else:
            rho, a, x, y, z = _load(ratio, advantage, old, ref, i)
            present = rho
            ask_ahead(ratio, start, v)
        put(scratch, _RHO, v, rho)
        put(scratch, _ADVANTAGE, v, a)
        if diagnostics is not None:
            put(scratch, _PRESENT, v, present)
        least = where(rho < least, rho, least)
        if old is not None and near:
            f, s = reduce_near_ratio(x, y, z)
            put(scratch, _F, v, f)
            put(scratch, _S, v, s)
            least = where(z < least, z, least)
            most = where(z > most, z, most)
        elif old is not None:
            r = reduce_ratio(x, y, z)
            put(scratch, _POWER, v, r.power)
            put(scratch, _F, v, r.f)
            put(scratch, _S, v, r.s)
            lower = where(z < x * y, z, x * y)
            lower = where(r.power < lower, r.power, lower)
            least = where(lower < least, lower, least)
            most = where(z > most, z, most)
        else:
            most = where(rho > most, rho, most)
    return least, most, legal


# --- scratch → sums ---------------------------------------------------------------------------------------------------
@inlined
def _surrogate_sum(scratch, vectors, low, high, advantage, start):
    """Σ min(ρA, clip(ρ, low, high)·A): the sign of A picks the one bound that matters. A NaN in ρ stays one."""
    total = full_like(low, 0.0)
    for v in range(vectors):
        ask_ahead(advantage, start, v)
        rho = get(scratch, _RHO, v)
        a = get(scratch, _ADVANTAGE, v)
        bounded = where(signed(a), where(rho < low, low, rho), where(rho > high, high, rho))
        total = fma(bounded, a, total)
    return total


@inlined
def _kl_sum(scratch, vectors, old, ref, start, near):
    """Σ ρ·(r − 1 − log r), and whether all r are near 1; they need to be if that is how they were reduced."""
    total = full(scratch, 0.0)
    farthest = total
    for v in range(vectors):
        ask_ahead(old, start, v)
        ask_ahead(ref, start, v)
        if near:
            k, z = k3_near(get(scratch, _F, v), get(scratch, _S, v))
            farthest = where(z > farthest, z, farthest)
        else:
            k = k3(ReducedRatio(get(scratch, _POWER, v), get(scratch, _F, v), get(scratch, _S, v)))
        total = fma(get(scratch, _RHO, v), k, total)
    return total, lane_max(farthest) <= NEAR


@inlined
def _begin_run(ratio, advantage, old, ref, run, stop, careful, diagnostics, near, scratch):
    """Prepare a run and sum its KL, in the near way if ``near`` and if that will do; returned last: whether it did.

    Near 1, where policies in training are, no power of two needs to be taken out of r: of 174 instructions for 8
    float64 samples that saves 58 (AVX2), and of the time of grpo_objective in cache three tenths. Where a few runs in
    each block are not near, it takes up to a twentieth longer.
    """
    vectors = min(RUN, (stop - run + lanes(ratio) - 1) // lanes(ratio))
    kl = full(ratio, 0.0)
    if near:
        least, most, legal = _prepare(ratio, advantage, old, ref, run, stop, careful, diagnostics, True, scratch)
        if old is not None:
            kl, near = _kl_sum(scratch, vectors, old, ref, run, True)
        if near:
            return vectors, least, most, legal, kl, True
    least, most, legal = _prepare(ratio, advantage, old, ref, run, stop, careful, diagnostics, False, scratch)
    if old is not None:
        kl, _ = _kl_sum(scratch, vectors, old, ref, run, False)
    return vectors, least, most, legal, kl, False


@inlined
def _count_clipped(scratch, vectors, low, high, clipped_low, clipped_high):
    """Add the samples with ρ < low and A < 0, and those with ρ > high and A > 0, to two vectors of counts."""
    for v in range(vectors):
        rho = get(scratch, _RHO, v)
        a = get(scratch, _ADVANTAGE, v)
        # Selected first and compared then: see `loss_terms.count_clipped`.
        clipped_low = tally(clipped_low, where(a < 0.0, rho, full_like(rho, 1.0)) < low)
        clipped_high = tally(clipped_high, where(a > 0.0, rho, full_like(rho, 1.0)) > high)
    return clipped_low, clipped_high


@inlined
def _squares(scratch, vectors, careful):
    """Σ ρ²."""
    total = full(scratch, 0.0)
    wide_total = wide(total)
    for v in range(vectors):
        rho = get(scratch, _RHO, v)
        if careful:  # in float32 the square could overflow or vanish
            wide_total += wide_squares(rho)
        else:
            total = fma(rho, rho, total)
    return wide_total + wide(total)


# --- one block --------------------------------------------------------------------------------------------------------
@inlined
def _attempt_block(ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch, careful):
    """The sums of a block, and whether they can be trusted although some samples were not looked at carefully."""
    zero = full(ratio, 0.0)
    form = layout(zero)
    low = full_like(zero, low)
    high = full_like(zero, high)
    step = lanes(ratio)
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
    for run in range(start, stop, RUN * step):
        vectors, lower, upper, fine, kl_of_run, near = _begin_run(
            ratio, advantage, old, ref, run, stop, careful, diagnostics, near, scratch
        )
        least = where(lower < least, lower, least)
        most = where(upper > most, upper, most)
        legal = legal and fine
        kl += wide(kl_of_run)
        surrogate += wide(_surrogate_sum(scratch, vectors, low, high, advantage, run))
        if diagnostics is not None:
            clipped_low, clipped_high = _count_clipped(scratch, vectors, low, high, clipped_low, clipped_high)
            ratio_of_run = zero
            if careful:
                ratios_squared += _squares(scratch, vectors, True)
            else:
                ratios_squared += _squares(scratch, vectors, False)
            for v in range(vectors):
                rho = get(scratch, _RHO, v)
                present = get(scratch, _PRESENT, v)
                ratio_min = where(present < ratio_min, present, ratio_min)
                ratio_max = where(present > ratio_max, present, ratio_max)
                ratio_of_run += rho
                # Σ log ρ is the logarithm of a product: of the fractions, below 2⁵¹² in a block, and of powers of two.
                product *= wide_product(from_bits(bits(rho) & (form.half * 2 - 1) | form.one))
                exponents += bits(rho) >> form.mantissa
            ratios += wide(ratio_of_run)
    padded = (stop - start + step - 1) // step * step
    missing = padded - (stop - start)  # as many ρ = 1 were added
    log_ratio = 0.0
    if diagnostics is not None:
        log_ratio = lane_sum(log(product)) + (np.int64(lane_sum(exponents)) - padded * form.bias) * LN2
    sums = BlockSums(
        lane_sum(surrogate),
        lane_sum(kl),
        lane_sum(ratios) - missing,
        lane_sum(ratios_squared) - missing,
        log_ratio,
        np.int64(lane_sum(clipped_low)),
        np.int64(lane_sum(clipped_high)),
        np.float64(lane_min(ratio_min)),
        np.float64(lane_max(ratio_max)),
        legal,
    )
    usual = lane_min(least) > form.usual and max(lane_max(most), sums.ratio_max) < 1.0 / form.usual
    return sums, careful or (usual and np.isfinite(sums.surrogate + sums.kl))


@compiled
def sum_block(ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch):
    """The sums of one block: in the fast way, and once more in the careful way if that may have gone wrong."""
    align_stack()
    careful = False
    while True:  # at most twice; a loop, so that the code is there once
        sums, trusted = _attempt_block(
            ratio, advantage, old, ref, start, stop, low, high, diagnostics, scratch, careful
        )
        if trusted:
            return sums
        careful = True


@inlined
def _fold(scratch, vectors, advantage, start):
    """Put ±ρ, with the sign of A, and |A| into scratch rows that are free once the KL is summed.

    Both bounds then become an upper one: A·clipped ρ = |A|·min(±ρ, bound), bound being high or −low. Where A = 0,
    ρ = 1 stands, which no bound touches. Returns how many have the plus sign.
    """
    plus = bits(full(scratch, 0.0))
    for v in range(vectors):
        ask_ahead(advantage, start, v)
        rho = get(scratch, _RHO, v)
        a = get(scratch, _ADVANTAGE, v)
        folded = where(a < 0.0, -rho, where(a == 0.0, full_like(rho, 1.0), rho))
        plus = tally(plus, folded > 0.0)
        put(scratch, _FOLDED, v, folded)
        put(scratch, _SIZE, v, where(a < 0.0, -a, a))
    return plus


@inlined
def _add_bounded(scratch, vectors, low, high, at, surrogates, tallies):
    """`_surrogate_sum` (to the bit) and the clipped samples of one run, from what `_fold` left; 7 operations a vector.

    Added to 8 lanes of ``surrogates`` and to two vectors of ``tallies``: ±ρ > high, and ±ρ > −low, which holds for
    every plus sign besides the samples clipped low.
    """
    total = full_like(low, 0.0)
    step = lanes(scratch)
    above = bits(load(tallies, 2 * at * step))
    not_below = bits(load(tallies, (2 * at + 1) * step))
    for v in range(vectors):
        folded = get(scratch, _FOLDED, v)
        bound = where(signed(folded), -low, high)
        total = fma(where(folded > bound, bound, folded), get(scratch, _SIZE, v), total)
        above = tally(above, folded > high)
        not_below = tally(not_below, folded > -low)
    store(tallies, 2 * at * step, from_bits(above))
    store(tallies, (2 * at + 1) * step, from_bits(not_below))
    store(surrogates, 8 * at, load(surrogates, 8 * at) + wide(total))


@inlined
def _attempt_sweep_block(ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch, careful):
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
        vectors, lower, upper, fine, kl_of_run, near = _begin_run(
            ratio, advantage, old, ref, run, stop, careful, None, near, scratch
        )
        least = where(lower < least, lower, least)
        most = where(upper > most, upper, most)
        legal = legal and fine
        kl += wide(kl_of_run)
        plus += np.int64(lane_sum(_fold(scratch, vectors, advantage, run)))
        for e in range(len(lows)):
            low = full_like(zero, lows[e])
            high = full_like(zero, highs[e])
            _add_bounded(scratch, vectors, low, high, e, surrogates, tallies)
    form = layout(zero)
    usual = lane_min(least) > form.usual and lane_max(most) < 1.0 / form.usual
    kl_sum = lane_sum(kl)
    return kl_sum, plus, legal, careful or (usual and np.isfinite(kl_sum + surrogates.sum()))


@compiled
def sweep_block(ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch):
    """Σ KL of one block, how many A are not negative, and whether it is legal; the rest is left in the arrays."""
    align_stack()
    careful = False
    while True:
        kl, plus, legal, trusted = _attempt_sweep_block(
            ratio, advantage, old, ref, start, stop, lows, highs, surrogates, tallies, scratch, careful
        )
        if trusted:
            return kl, plus, legal
        careful = True


# --- all blocks -------------------------------------------------------------------------------------------------------
@compiled
def objective_block(ratio, advantage, old, ref, low, high):
    """(Σ surrogate, Σ kl, whether all samples are legal) of at most BLOCK samples: the shortest way there is."""
    sums = sum_block(ratio, advantage, old, ref, 0, len(ratio), low, high, None, scratch_like(ratio, _ROWS))
    return sums.surrogate, sums.kl, sums.legal


@compiled
def objective_blocks(ratio, advantage, old, ref, low, high, sums):
    """Put Σ surrogate and Σ kl of each block into ``sums`` (blocks, 2); whether all samples are legal.

    For so few samples that a call costs more than they do: no limbs to fill and carry.
    """
    scratch = scratch_like(ratio, _ROWS)
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
    scratch = scratch_like(ratio, _ROWS)
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


@compiled
def _add_sweep_blocks(ratio, advantage, old, ref, lows, highs, first, last, rows, counts):
    """Add the sums of blocks first … last − 1; the last row is for the KL and for the count of illegal blocks."""
    scratch = scratch_like(ratio, _ROWS)
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

"""Samples of probabilities: how kernels read them, and what one run of them adds to the sums.

How a block is worked through, `blocks` says. From the inside out:

    _load, _load_carefully      one vector of samples; wherever the first does not do, the second
    _load_run                   memory → ρ, A, and r = π_ref/π_θ reduced → scratch
    _kl_sum, surrogate_sum …    scratch → what a run adds to the sums
    begin_run                   a block with one more run: loaded, and its KL summed, in the near way if that will do
    fast_then_careful           a block, in the fast way and in the careful way if need be

One file, though a long one: which rows of the scratch array hold what, and when, is agreed among these alone.
"""

from typing import Any, NamedTuple

import numpy as np

from .blocks import load_row, overflowed, prefetch_ahead, prefetch_if_given, store_row, vectors_in_run
from .compiling import inlined, inlined_by_type
from .elementary import (
    NEAR,
    ReducedRatio,
    k3,
    k3_near,
    layout,
    reduce_near_ratio,
    reduce_ratio,
    split,
)
from .simd import (
    bits,
    every,
    fma,
    from_bits,
    full,
    full_like,
    lane_max,
    lane_min,
    lane_sum,
    lanes,
    load,
    load_first,
    signed,
    tally,
    where,
    wide,
    wide_squares,
)

# Rows of the scratch array, each RUN vectors long. Where a vector is longer than its block, ρ and A are 0, and the
# smallest and the largest of what is present are those of all. F is f of r = 2ᵏ(1 + f), and then the KL term.
RHO, ADVANTAGE, _POWER, F, S, PRESENT, ROWS = range(7)


class Samples(NamedTuple):
    """The arrays of N samples, of one dtype; their KL term is ρ·k3, importance-weighted.

    Without probabilities (None) there is no KL term: another kernel.
    """

    rhos: Any
    advantages: Any
    pi_old: Any
    pi_ref: Any


class UnweightedSamples(Samples):
    """The same, with k3 alone as their KL term: another kernel, too."""

    __slots__ = ()


# --- memory → scratch -------------------------------------------------------------------------------------------------
class _Vector(NamedTuple):
    """One vector of samples: ρ; A; and three numbers near 1 with the same r as ρ, π_old and π_ref, or these."""

    rho: Any
    a: Any
    scaled_rho: Any
    scaled_old: Any
    scaled_ref: Any


@inlined
def _load(rhos, advantages, pi_old, pi_ref, i):
    """The vector of samples from number i on, which are assumed to be far from the limits of the format."""
    rho = load(rhos, i)
    a = load(advantages, i)
    if pi_old is None:
        one = full(rhos, 1.0)
        return _Vector(rho, a, rho, one, one)
    return _Vector(rho, a, rho, load(pi_old, i), load(pi_ref, i))


@inlined
def _load_carefully(rhos, advantages, pi_old, pi_ref, i, stop):
    """The vector of samples from number i on, and whether all of them are legal.

    Samples may be missing, from ``stop`` on, and anywhere in the domain, or outside. A missing one is ρ = 1, A = 0,
    r = 1.
    """
    n = min(stop - i, lanes(rhos))
    rho = load_first(rhos, i, n, 1.0)
    a = load_first(advantages, i, n, 0.0)
    form = layout(rho)
    legal = (rho >= form.smallest_normal) & (rho <= form.largest) & (a >= -form.largest) & (a <= form.largest)
    one = full(rhos, 1.0)
    if pi_old is None:
        return _Vector(rho, a, one, one, one), every(legal)
    old = load_first(pi_old, i, n, 1.0)
    ref = load_first(pi_ref, i, n, 1.0)
    pi = rho * old
    r = ref / pi
    legal = legal & (pi >= form.smallest_normal) & (pi <= form.largest)  # hence π_old > 0, and π_ref
    legal = legal & (r >= form.smallest_normal) & (r <= 0.125 * form.largest)
    rho_m, rho_e = split(where(legal, rho, one))
    old_m, old_e = split(where(legal, old, one))
    ref_m, ref_e = split(where(legal, ref, one))
    return _Vector(rho, a, rho_m, old_m, from_bits(bits(ref_m) + ref_e - rho_e - old_e)), every(legal)


@inlined
def _load_run(samples, run_start, stop, careful, diagnostics, near, scratch):
    """Fill the scratch array with up to RUN vectors of samples from ``run_start`` on, ``near`` ones or any.

    Returns the smallest and the largest of the numbers that must be far from the limits of the format for the result
    to be right, one in each lane, and whether the samples that were looked at one by one are legal. What overflows
    or is NaN need not be looked for: it shows in the sums.
    """
    least = full(samples.rhos, 1.0)
    most = least
    legal = True
    rhos, advantages, pi_old, pi_ref = samples
    step = lanes(rhos)
    for v in range(vectors_in_run(rhos, run_start, stop)):
        i = run_start + v * step
        if careful or i + step > stop:
            vector, in_domain = _load_carefully(rhos, advantages, pi_old, pi_ref, i, stop)
            counted = load_first(rhos, i, min(stop - i, step), 0.0)
            present = load_first(rhos, i, min(stop - i, step), rhos[i])
            legal = legal and in_domain
        else:
            vector = _load(rhos, advantages, pi_old, pi_ref, i)
            counted = vector.rho
            present = vector.rho
            prefetch_ahead(rhos, run_start, v)
        store_row(scratch, RHO, v, counted)
        store_row(scratch, ADVANTAGE, v, vector.a)
        if diagnostics is not None:
            store_row(scratch, PRESENT, v, present)
        least = where(vector.rho < least, vector.rho, least)
        ref = vector.scaled_ref
        if pi_old is not None and near:
            f, s = reduce_near_ratio(vector.scaled_rho, vector.scaled_old, ref)
            store_row(scratch, F, v, f)
            store_row(scratch, S, v, s)
            least = where(ref < least, ref, least)
            most = where(ref > most, ref, most)
        elif pi_old is not None:
            r = reduce_ratio(vector.scaled_rho, vector.scaled_old, ref)
            store_row(scratch, _POWER, v, r.power)
            store_row(scratch, F, v, r.f)
            store_row(scratch, S, v, r.s)
            pi = vector.scaled_rho * vector.scaled_old
            lower = where(ref < pi, ref, pi)
            lower = where(r.power < lower, r.power, lower)
            least = where(lower < least, lower, least)
            most = where(ref > most, ref, most)
        else:
            most = where(vector.rho > most, vector.rho, most)
    return least, most, legal


# --- scratch → sums ---------------------------------------------------------------------------------------------------
@inlined
def _bounded(scratch, v, low, high):
    """A, and ρ as far as it counts: the sign of A picks the one bound that matters. A NaN in ρ stays one."""
    rho = load_row(scratch, RHO, v)
    a = load_row(scratch, ADVANTAGE, v)
    return a, where(signed(a), where(rho < low, low, rho), where(rho > high, high, rho))


@inlined
def surrogate_sum(scratch, vectors, low, high, advantages, run_start):
    """Σ min(ρA, clip(ρ, low, high)·A) of a run, in float64 lanes."""
    total = full_like(low, 0.0)
    for v in range(vectors):
        prefetch_ahead(advantages, run_start, v)
        a, bounded = _bounded(scratch, v, low, high)
        total = fma(bounded, a, total)
    in_float64 = wide(total)
    if overflowed(scratch, in_float64):
        in_float64 = wide(full_like(low, 0.0))
        for v in range(vectors):
            a, bounded = _bounded(scratch, v, low, high)
            in_float64 += wide(bounded * a)
    return in_float64


@inlined_by_type
def _kl_weight(samples, scratch, v):
    """What k3 = r − 1 − log r is multiplied by: ρ, or 1; of a missing sample k3 is 0, too."""
    if samples.instance_class is UnweightedSamples:
        return lambda samples, scratch, v: full(scratch, 1.0)
    assert samples.instance_class is Samples
    return lambda samples, scratch, v: load_row(scratch, RHO, v)


@inlined
def _kl_sum(scratch, vectors, samples, run_start, near):
    """Σ of the KL terms of a run, in float64 lanes, and whether all r are near 1, as they must be if reduced so."""
    total = full(scratch, 0.0)
    farthest = total
    for v in range(vectors):
        prefetch_if_given(samples.pi_old, run_start, v)
        prefetch_if_given(samples.pi_ref, run_start, v)
        if near:
            k, s_squared = k3_near(load_row(scratch, F, v), load_row(scratch, S, v))
            farthest = where(s_squared > farthest, s_squared, farthest)
        else:
            k = k3(ReducedRatio(load_row(scratch, _POWER, v), load_row(scratch, F, v), load_row(scratch, S, v)))
            store_row(scratch, F, v, k)
        total = fma(_kl_weight(samples, scratch, v), k, total)
    in_float64 = wide(total)
    if not near and overflowed(scratch, in_float64):
        in_float64 = wide(full(scratch, 0.0))
        for v in range(vectors):
            in_float64 += wide(_kl_weight(samples, scratch, v) * load_row(scratch, F, v))
    return in_float64, lane_max(farthest) <= NEAR


@inlined
def count_clipped(scratch, vectors, low, high, clipped_low, clipped_high):
    """The two vectors of counts, with a run's samples of ρ < low and A < 0, and of ρ > high and A > 0, added."""
    for v in range(vectors):
        rho = load_row(scratch, RHO, v)
        a = load_row(scratch, ADVANTAGE, v)
        # Selected first and compared then: see `formulas.count_clipped`.
        clipped_low = tally(clipped_low, where(a < 0.0, rho, full_like(rho, 1.0)) < low)
        clipped_high = tally(clipped_high, where(a > 0.0, rho, full_like(rho, 1.0)) > high)
    return clipped_low, clipped_high


@inlined
def squares(scratch, vectors):
    """Σ ρ² of a run, in float64 lanes, unless that overflows."""
    total = full(scratch, 0.0)
    for v in range(vectors):
        rho = load_row(scratch, RHO, v)
        total = fma(rho, rho, total)
    return wide(total)


@inlined
def moments(rhos, start, stop):
    """Σ ρ and Σ ρ² of a block in float64 lanes, for any ρ."""
    total = wide(full(rhos, 0.0))
    squared = total
    for i in range(start, stop, lanes(rhos)):
        rho = load_first(rhos, i, stop - i, 0.0)
        total += wide(rho)
        squared += wide_squares(rho)
    return total, squared


# --- a block ----------------------------------------------------------------------------------------------------------
class Block(NamedTuple):
    """A block after some of its runs, as far as that does not depend on what is computed of it."""

    least: Any  # in lanes: the least and the largest of the numbers that must be far from the limits of the format
    most: Any
    legal: bool  # whether all samples that were looked at one by one are in the domain
    kl: Any  # Σ, in float64 lanes
    near: bool  # whether the next run is tried in the near way: until one is not near, for the rest of the block


@inlined
def begin_block(samples, careful):
    """The block before its first run."""
    one = full(samples.rhos, 1.0)
    return Block(one, one, True, wide(full(samples.rhos, 0.0)), not careful)


@inlined
def begin_run(block, samples, run_start, stop, careful, diagnostics, scratch):
    """The block with one more run, whose ρ and A are left in the scratch array.

    Near 1, where policies in training are, no power of two needs to be taken out of r: of 174 instructions for 8
    float64 samples that saves 58 (AVX2), and of the time of grpo_objective in cache three tenths. Where a few runs in
    each block are not near, it takes up to a twentieth longer.
    """
    vectors = vectors_in_run(samples.rhos, run_start, stop)
    kl = wide(full(samples.rhos, 0.0))
    near = block.near
    if near:
        least, most, legal = _load_run(samples, run_start, stop, careful, diagnostics, True, scratch)
        if samples.pi_old is not None:
            kl, near = _kl_sum(scratch, vectors, samples, run_start, True)
        if near:
            return _with_run(block, least, most, legal, kl, True)
    least, most, legal = _load_run(samples, run_start, stop, careful, diagnostics, False, scratch)
    if samples.pi_old is not None:
        kl, _ = _kl_sum(scratch, vectors, samples, run_start, False)
    return _with_run(block, least, most, legal, kl, False)


@inlined
def _with_run(block, least, most, legal, kl, near):
    return Block(
        where(least < block.least, least, block.least),
        where(most > block.most, most, block.most),
        block.legal and legal,
        block.kl + kl,
        near,
    )


@inlined
def end_block(block, known_kl):
    """Σ KL of a block, which is ``known_kl`` unless that is NaN; and whether the fast way was right for it."""
    kl = lane_sum(block.kl) if np.isnan(known_kl) else known_kl
    least = layout(block.least).safe_least
    return kl, lane_min(block.least) > least and lane_max(block.most) < 1.0 / least and np.isfinite(kl)


@inlined
def fast_then_careful(attempt, arguments):
    """What ``attempt`` makes of a block: in the fast way, and again in the careful way if something is not as usual.

    ``attempt(*arguments, careful, known_kl)`` returns its result, Σ KL, whether the fast way was right for that, and
    whether the other sums are finite. If only those are not (they overflow, or samples are illegal), the careful
    attempt takes the KL over: `grpo_stats`, `grpo_sweep` and `grpo_objective` are to find the same, and what overflows
    depends on ε. (The kernels of the loss, which have nothing to take over, loop themselves.)
    """
    careful, known_kl = False, np.nan
    while True:  # at most twice; a loop, so that the code is there once
        result, kl, fast_was_right, finite = attempt(*arguments, careful, known_kl)
        if careful or (fast_was_right and finite):
            return result
        careful, known_kl = True, kl if fast_was_right else np.nan

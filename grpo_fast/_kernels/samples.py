"""What the kernels of `objective` do with a run of samples: probabilities in, what a run adds to the sums out.

How a block is worked through, `staging` says. From the inside out:

    _load, _load_carefully      one vector of samples; wherever the first does not do, the second
    _prepare                    memory → ρ, A, and r = π_ref/π_θ reduced → scratch
    _kl_sum, surrogate_sum …    scratch → what a run adds to the sums
    begin_run                   the first two, in the near way if that will do
"""

from .blocks import RUN, ask_ahead, get, put
from .compiling import inlined
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
    is_finite,
    lane_max,
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
# smallest and the largest of what is present are those of all.
RHO, ADVANTAGE, _POWER, F, S, PRESENT, ROWS = range(7)


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
    A missing sample is ρ = 1, A = 0, r = 1.
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
    legal = legal & (pi >= form.smallest_normal) & (pi <= form.largest)  # hence π_old > 0, and π_ref
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
            counted = load_first(ratio, i, min(stop - i, step), 0.0)
            present = load_first(ratio, i, min(stop - i, step), ratio[i])
            legal = legal and fine
        else:
            rho, a, x, y, z = _load(ratio, advantage, old, ref, i)
            counted = rho
            present = rho
            ask_ahead(ratio, start, v)
        put(scratch, RHO, v, counted)
        put(scratch, ADVANTAGE, v, a)
        if diagnostics is not None:
            put(scratch, PRESENT, v, present)
        least = where(rho < least, rho, least)
        if old is not None and near:
            f, s = reduce_near_ratio(x, y, z)
            put(scratch, F, v, f)
            put(scratch, S, v, s)
            least = where(z < least, z, least)
            most = where(z > most, z, most)
        elif old is not None:
            r = reduce_ratio(x, y, z)
            put(scratch, _POWER, v, r.power)
            put(scratch, F, v, r.f)
            put(scratch, S, v, r.s)
            lower = where(z < x * y, z, x * y)
            lower = where(r.power < lower, r.power, lower)
            least = where(lower < least, lower, least)
            most = where(z > most, z, most)
        else:
            most = where(rho > most, rho, most)
    return least, most, legal


# --- scratch → sums ---------------------------------------------------------------------------------------------------
@inlined
def _bounded(scratch, v, low, high):
    """A, and ρ as far as it counts: the sign of A picks the one bound that matters. A NaN in ρ stays one."""
    rho = get(scratch, RHO, v)
    a = get(scratch, ADVANTAGE, v)
    return a, where(signed(a), where(rho < low, low, rho), where(rho > high, high, rho))


@inlined
def surrogate_sum(scratch, vectors, low, high, advantage, start):
    """Σ min(ρA, clip(ρ, low, high)·A)."""
    total = full_like(low, 0.0)
    for v in range(vectors):
        ask_ahead(advantage, start, v)
        a, bounded = _bounded(scratch, v, low, high)
        total = fma(bounded, a, total)
    in_float64 = wide(total)
    if lanes(scratch) > 8 and not is_finite(in_float64):  # sixteen float32 terms may overflow, whose sum does not
        in_float64 = wide(full_like(low, 0.0))
        for v in range(vectors):
            a, bounded = _bounded(scratch, v, low, high)
            in_float64 += wide(bounded * a)
    return in_float64


@inlined
def _kl_sum(scratch, vectors, old, ref, start, near):
    """Σ ρ·(r − 1 − log r), and whether all r are near 1; they need to be if that is how they were reduced."""
    total = full(scratch, 0.0)
    farthest = total
    for v in range(vectors):
        ask_ahead(old, start, v)
        ask_ahead(ref, start, v)
        if near:
            k, z = k3_near(get(scratch, F, v), get(scratch, S, v))
            farthest = where(z > farthest, z, farthest)
        else:
            k = k3(ReducedRatio(get(scratch, _POWER, v), get(scratch, F, v), get(scratch, S, v)))
            put(scratch, F, v, k)
        total = fma(get(scratch, RHO, v), k, total)
    in_float64 = wide(total)
    if lanes(scratch) > 8 and not near and not is_finite(in_float64):
        in_float64 = wide(full(scratch, 0.0))
        for v in range(vectors):
            in_float64 += wide(get(scratch, RHO, v) * get(scratch, F, v))
    return in_float64, lane_max(farthest) <= NEAR


@inlined
def begin_run(ratio, advantage, old, ref, run, stop, careful, diagnostics, near, scratch):
    """Prepare a run and sum its KL, in the near way if ``near`` and if that will do; returned last: whether it did.

    Near 1, where policies in training are, no power of two needs to be taken out of r: of 174 instructions for 8
    float64 samples that saves 58 (AVX2), and of the time of grpo_objective in cache three tenths. Where a few runs in
    each block are not near, it takes up to a twentieth longer.
    """
    vectors = min(RUN, (stop - run + lanes(ratio) - 1) // lanes(ratio))
    kl = wide(full(ratio, 0.0))
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
def count_clipped(scratch, vectors, low, high, clipped_low, clipped_high):
    """Add the samples with ρ < low and A < 0, and those with ρ > high and A > 0, to two vectors of counts."""
    for v in range(vectors):
        rho = get(scratch, RHO, v)
        a = get(scratch, ADVANTAGE, v)
        # Selected first and compared then: see `loss_terms.count_clipped`.
        clipped_low = tally(clipped_low, where(a < 0.0, rho, full_like(rho, 1.0)) < low)
        clipped_high = tally(clipped_high, where(a > 0.0, rho, full_like(rho, 1.0)) > high)
    return clipped_low, clipped_high


@inlined
def squares(scratch, vectors):
    """Σ ρ², unless that overflows."""
    total = full(scratch, 0.0)
    for v in range(vectors):
        rho = get(scratch, RHO, v)
        total = fma(rho, rho, total)
    return wide(total)


@inlined
def moments(ratio, start, stop):
    """Σ ρ and Σ ρ² of a block in float64, for any ρ."""
    total = wide(full(ratio, 0.0))
    squared = total
    for i in range(start, stop, lanes(ratio)):
        rho = load_first(ratio, i, stop - i, 0.0)
        total += wide(rho)
        squared += wide_squares(rho)
    return total, squared

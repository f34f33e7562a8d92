"""Right over the whole domain: as near to the exact value as roundings allow, and as the plain NumPy version says."""

import itertools
import math
import sys

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import DTYPES, LANES, LENGTHS, samples

from grpo_fast import BLOCK, grpo_objective, grpo_stats, grpo_sweep, reference
from grpo_fast._kernels.blocks import RUN

mpmath.mp.prec = 400  # r may differ from 1 by 2⁻¹⁰⁶, hence k3 from 0 by 2⁻²¹³


# --- how far off a correct result may be ------------------------------------------------------------------------------
def unit(dtype):
    """The largest relative error of one rounding."""
    return float(np.finfo(dtype).eps) / 2


def rounding_of_sums(n, dtype):
    """Relative to Σ|term|: RUN terms are added in the dtype, then all in float64, in a lane and across lanes."""
    run = RUN * unit(np.float32) if dtype is np.float32 else 0.0
    return run + (min(n, BLOCK) / LANES[dtype] + LANES[dtype] + 2) * unit(np.float64)


def tolerance(n, dtype, surrogate, kl):
    """How far mean(surrogate − kl) may be off, from the mean sizes of both.

    A surrogate is rounded twice, with its threshold; a KL term is right to 8 ulp, and one ulp is up to two units; each
    may fall among the subnormal numbers.
    """
    terms = 2 * unit(dtype) * surrogate + 16 * unit(dtype) * kl
    return terms + rounding_of_sums(n, dtype) * (surrogate + kl) + float(np.finfo(dtype).smallest_subnormal)


def terms_in_float64(rho, a, old, ref, epsilon, weighted=True):
    """Both terms of samples near r = 1, without cancellation: as good as exact for float32 samples."""
    pi = rho * old
    f = (ref - pi) / pi
    weight = rho if weighted else 1.0
    return np.minimum(rho * a, np.clip(rho, 1 - epsilon, 1 + epsilon) * a), weight * (f - np.log1p(f))


def exact_terms(rho, a, old, ref, epsilon, weighted=True):
    """Both terms of one sample to a hundred digits; the thresholds are the rounded ones."""
    low, high = (float(rho.dtype.type(1 + sign * epsilon)) for sign in (-1, 1))
    rho, a, old, ref = (mpmath.mpf(float(x)) for x in (rho, a, old, ref))
    r = ref / (rho * old)
    return min(rho * a, min(max(rho, low), high) * a), (rho if weighted else 1) * (r - mpmath.log(r) - 1)


either = pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])


# --- ordinary samples, every length -----------------------------------------------------------------------------------
@either
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length_in_float64(n, weighted):
    rho, _, old, ref = arrays = samples(n)
    surrogate, kl = (np.mean(abs(term)) for term in terms_in_float64(*arrays, 0.2, weighted))
    r = ref / (rho * old)
    # NumPy: r is off by two roundings, log r by one, each difference by another; sums are pairwise over 128 at a time.
    naive = 0.5 * np.mean((rho if weighted else 1) * (3 * r + 2 * abs(np.log(r)) + 3)) * unit(np.float64)
    naive += (128 / 8 + math.log2(n + 1) + 6) * unit(np.float64) * (surrogate + 0.5 * kl)
    expected = reference.grpo_objective(*arrays, epsilon=0.2, beta=0.5, importance_weighted=weighted)
    found = grpo_objective(*arrays, 0.2, 0.5, importance_weighted=weighted)
    assert abs(found - expected) <= tolerance(n, np.float64, surrogate, 0.5 * kl) + naive


@either
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length_in_float32(n, weighted):
    arrays = samples(n, np.float32)
    surrogate, kl = terms_in_float64(*(x.astype(float) for x in arrays), 0.2, weighted)
    limit = tolerance(n, np.float32, np.mean(abs(surrogate)), 0.5 * np.mean(kl))
    found = grpo_objective(*arrays, 0.2, 0.5, importance_weighted=weighted)
    assert abs(found - np.mean(surrogate - 0.5 * kl)) <= limit


# --- the whole domain -------------------------------------------------------------------------------------------------
def numbers(dtype, least, most):
    """Numbers with exponents from ``least`` to ``most``."""
    mantissas = st.floats(1, 2, exclude_max=True, width=np.finfo(dtype).bits)
    return st.builds(lambda m, e: dtype(math.ldexp(m, e)), mantissas, st.integers(least, most))


@st.composite
def anywhere(draw, dtype, weighted=True):
    """A legal sample with any exponents, of which the sums do not overflow."""
    form = np.finfo(dtype)
    least, most, subnormal = form.minexp, form.maxexp - 1, form.minexp - form.nmant
    top = most - 32  # Σ ρA and Σ ρ·k3, or Σ k3, stay finite
    rho = draw(numbers(dtype, least, top))
    e_rho = math.frexp(rho)[1] - 1
    old = draw(numbers(dtype, max(subnormal, least - e_rho), min(most, most - 2 - e_rho)))
    e_pi = e_rho + math.frexp(old)[1] - 1
    largest = min(most, most - 4 + e_pi, top + e_pi - (e_rho if weighted else 0))
    ref = draw(numbers(dtype, max(subnormal, least + 2 + e_pi), largest))
    a = draw(st.just(dtype(0)) | numbers(dtype, subnormal, top - max(e_rho, 1)))
    return rho, draw(st.sampled_from([a, -a])), old, ref


@st.composite
def near_one(draw, dtype):
    """A sample of which r is within some ulp of 1, and ρ anywhere."""
    form = np.finfo(dtype)
    rho = draw(numbers(dtype, form.minexp * 3 // 4, form.maxexp * 3 // 4))
    e_rho = math.frexp(rho)[1] - 1
    old = draw(numbers(dtype, -20 - e_rho, 20 - e_rho))
    a = draw(numbers(dtype, -20, 20))
    ulps = draw(st.integers(-64, 64))
    return rho, a, old, dtype(rho * old * (1 + ulps * form.eps / 2))


@either
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), n=st.sampled_from(LENGTHS), shift=st.integers(0, 100))
def test_the_whole_domain(dtype, weighted, data, n, shift):
    some = st.lists(anywhere(dtype, weighted) | near_one(dtype), min_size=1, max_size=8)
    pool = [np.array(x) for x in zip(*data.draw(some), strict=True)]  # repeated to length n
    which = (np.arange(n) + shift) % len(pool[0])
    counts = np.bincount(which, minlength=len(pool[0])).tolist()
    terms = [exact_terms(*sample, epsilon=0.2, weighted=weighted) for sample in zip(*pool, strict=True)]
    surrogate, kl, size, kl_size = (
        float(mpmath.fsum(c * t for c, t in zip(counts, part, strict=True)) / n)
        for part in ([s for s, _ in terms], [k for _, k in terms], [abs(s) for s, _ in terms], [k for _, k in terms])
    )
    arrays = [x[which] for x in pool]
    assert abs(grpo_objective(*arrays, epsilon=0.2, beta=0) - surrogate) <= tolerance(n, dtype, size, 0.0)
    stats = grpo_stats(*arrays, importance_weighted=weighted)
    assert abs(stats.surrogate - surrogate) <= tolerance(n, dtype, size, 0.0)
    assert stats.kl >= 0
    assert abs(stats.kl - kl) <= tolerance(n, dtype, 0.0, kl_size)
    ratios = [mpmath.mpf(float(rho)) for rho in pool[0]]
    mean, square = (mpmath.fsum(c * r**k for c, r in zip(counts, ratios, strict=True)) / n for k in (1, 2))
    assert abs(stats.ratio_mean - mean) <= rounding_of_sums(n, dtype) * mean
    if sys.float_info.min < square * n * sys.float_info.epsilon and square * n**2 < sys.float_info.max / 8:
        assert abs(stats.ess * square / mean**2 - 1) <= 4 * rounding_of_sums(n, dtype)


@either
@pytest.mark.parametrize("n", LENGTHS)
def test_sums_of_the_largest_float32(n, weighted):
    # Each term is a float32; the sum of sixteen of them is not.
    largest = np.finfo(np.float32).max
    rho, a, old, _ = samples(n, np.float32, drift=0.1)
    a = -abs(a) / abs(a).max() / 2  # of one sign, so that nothing cancels
    if weighted:
        rho = rho / rho.max() * largest
        old = old * np.float32(2**-120)
        ref = rho * old * np.float32(1.2)
    else:  # k3 itself is nearly as large as it can be
        old = old * np.float32(2**-100)
        ref = rho * old * (largest / np.float32(9))
    arrays, option = (rho, a, old, ref), {"importance_weighted": weighted}
    stats, wide = grpo_stats(*arrays, **option), grpo_stats(*(x.astype(float) for x in arrays), **option)
    assert weighted or 16 * wide.kl > float(largest)
    for name in ("surrogate", "kl", "objective", "ratio_mean", "ess", "approx_kl"):
        assert getattr(stats, name) == pytest.approx(getattr(wide, name), rel=1e-6), name


@either
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), n=st.sampled_from([3, BLOCK, BLOCK + 1]), at=st.integers(0, 99), large=st.booleans())
def test_whatever_one_sample_is_all_functions_find_the_same(dtype, weighted, data, n, at, large):
    # An odd one makes its block be computed in another way, for whichever ε it is odd.
    arrays = samples(n, dtype, drift=0.12)  # r is near 1 but for a few
    for x, value in zip(arrays, data.draw(anywhere(dtype, weighted) | near_one(dtype)), strict=True):
        x[at % n] = value
    if large:
        arrays[1][(at + 7) % n] = np.finfo(dtype).max
    beta = 2.0**20  # so that the last bits of the KL show
    option = {"importance_weighted": weighted}
    with_kl = grpo_sweep(*arrays, [0.1, 0.3, 0.1], [beta, 0], **option).objective
    for i, epsilon in enumerate([0.1, 0.3]):
        both = tuple(grpo_stats(*arrays, epsilon, b, **option).objective for b in (beta, 0))
        assert both == (grpo_objective(*arrays, epsilon, beta, **option), grpo_objective(*arrays, epsilon, 0))
        assert both == tuple(with_kl[i])
        assert both[1] == grpo_sweep(*arrays, [0.1, 0.3], 0).objective[i, 0]


@either
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=500)
def test_the_kl_term_of_one_sample_is_within_8_ulp(dtype, weighted, data):
    rho, _, old, ref = data.draw(near_one(dtype) | anywhere(dtype, weighted))
    _, kl = exact_terms(rho, dtype(0), old, ref, 0.2, weighted)
    one = np.array([rho, 0, old, ref], dtype)
    value = -grpo_objective(*one, beta=1, importance_weighted=weighted)  # A = 0 leaves only this
    assert value >= 0
    assert abs(value - kl) <= 8 * np.spacing(dtype(float(kl)))


# --- float32 ----------------------------------------------------------------------------------------------------------
@either
@pytest.mark.parametrize("drift", [1e-6, 1e-3, 0.3, 3])
@pytest.mark.parametrize("kl_only", [False, True])
def test_float32_is_at_most_twice_as_far_off_as_numpy(drift, kl_only, weighted):
    fast, naive = [], []
    for seed in range(20):
        rho, a, old, ref = samples(3000, np.float32, seed, drift)
        a = a * (not kl_only)
        surrogate, kl = terms_in_float64(*(x.astype(float) for x in (rho, a, old, ref)), 0.2, weighted)
        exact = np.mean(surrogate - kl)
        for errors, function in ((fast, grpo_objective), (naive, reference.grpo_objective)):
            errors.append(abs(function(rho, a, old, ref, beta=1, importance_weighted=weighted) - exact))
    assert max(fast) <= 2 * max(naive)


# --- what stands beside the objective ---------------------------------------------------------------------------------
@either
@pytest.mark.parametrize("n", [1, 3, 70, BLOCK + 9, 17 * BLOCK + 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_are_what_their_names_say(n, dtype, weighted):
    stats = grpo_stats(*samples(n, dtype, drift=0.5), epsilon=0.1, beta=0.5, importance_weighted=weighted)
    rho, a, old, ref = (x.astype(float) for x in samples(n, dtype, drift=0.5))
    low, high = float(dtype(0.9)), float(dtype(1.1))
    surrogate, kl = terms_in_float64(rho, a, old, ref, 0.1, weighted)
    assert (stats.tokens, stats.ratio_min, stats.ratio_max) == (n, rho.min(), rho.max())
    assert stats.clip_ratio_low == np.mean((rho < low) & (a < 0))
    assert stats.clip_ratio_high == np.mean((rho > high) & (a > 0))
    assert stats.clip_ratio_region == np.mean((rho < low) & (a < 0) | (rho > high) & (a > 0))
    assert math.isnan(stats.sequences)

    sums = rounding_of_sums(n, dtype) + 25 * unit(np.float64)  # and NumPy's
    terms = tolerance(n, dtype, np.mean(abs(surrogate)), 0.0), tolerance(n, dtype, 0.0, np.mean(kl))
    assert abs(stats.surrogate - surrogate.mean()) <= terms[0] + sums * np.mean(abs(surrogate))
    # In float64 the oracle's r is off by two roundings, which move f − log(1 + f) by f/(1 + f) times as much.
    oracle = 4 * unit(np.float64) * np.mean((rho if weighted else 1) * (abs(1 - rho * old / ref) + 1))
    assert abs(stats.kl - kl.mean()) <= terms[1] + sums * kl.mean() + oracle
    assert stats.objective == stats.surrogate - 0.5 * stats.kl == -stats.loss
    # ρ − 1 and its square are rounded once or twice, and summed.
    drift, square = np.mean(abs(rho - 1)), np.mean((rho - 1) ** 2)
    errors = (sums + unit(dtype)) * drift, (sums + 3 * unit(dtype)) * square
    assert abs(stats.ratio_mean - rho.mean()) <= errors[0] + 25 * unit(np.float64)
    denominator = np.mean(rho**2)
    ess = rho.mean() ** 2 / denominator
    relative = 2 * errors[0] / rho.mean() + (2 * errors[0] + errors[1]) / denominator + 60 * unit(np.float64)
    assert abs(stats.ess - ess) <= relative * ess
    # "Good to 2⁻⁵² absolute"; and NumPy's logarithms and sum.
    assert abs(stats.approx_kl + np.log(rho).mean()) <= 2**-52 + 25 * unit(np.float64) * np.mean(abs(np.log(rho)))


def test_as_dict_has_trls_keys():
    stats = grpo_stats(*samples(100))
    table = stats.as_dict()
    for key, name in [("clip_ratio/low_mean", "clip_ratio_low"), ("clip_ratio/high_mean", "clip_ratio_high")]:
        assert table[key] == getattr(stats, name)
    for name in ("objective", "loss", "surrogate", "kl", "ess", "approx_kl", "tokens"):
        assert table[name] == getattr(stats, name)
    assert f"{stats.ess:.9g}" in str(stats)


@either
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    n=st.sampled_from(LENGTHS), seed=st.integers(0, 99), epsilons=st.lists(st.floats(0, 0.99), min_size=1, max_size=5)
)
@example(n=17 * BLOCK, seed=0, epsilons=[0.1, 0.1, 0.2])
@settings(max_examples=30)
def test_stats_and_sweep_agree_with_the_objective_to_the_bit(dtype, weighted, n, seed, epsilons):
    arrays = samples(n, dtype, seed)
    betas, option = [0.04, 0, 1e-9], {"importance_weighted": weighted}
    sweep = grpo_sweep(*arrays, epsilons, betas, **option)
    assert sweep.epsilons.tolist() == epsilons
    assert sweep.betas.tolist() == betas
    assert sweep.tokens == n
    for e, epsilon in enumerate(epsilons):
        for b, beta in enumerate(betas):
            assert sweep.objective[e, b] == grpo_objective(*arrays, epsilon, beta, **(option if beta else {}))
        stats = grpo_stats(*arrays, epsilon, 0.04, **option)
        assert stats.objective == sweep.objective[e, 0]
        assert (sweep.clip_ratio_low[e], sweep.clip_ratio_high[e]) == (stats.clip_ratio_low, stats.clip_ratio_high)
        assert sweep.kl == stats.kl


@pytest.mark.parametrize("rho", [1e-300, 1e-150, 1e-20, 1e20, 1e150, 1e200, 1e300])
def test_every_diagnostic_survives_any_legal_ratio(rho):
    stats = grpo_stats([rho, 1.0], [1.0, -1.0], [1 / rho, 1.0], [1.0, 1.0])
    assert stats.ratio_mean == pytest.approx((1 + rho) / 2, rel=8 * 2**-53)
    assert 0 < stats.ess <= 1 or (rho > 1e150 and math.isnan(stats.ess))  # ρ² overflows
    assert stats.approx_kl == pytest.approx(-math.log(rho) / 2, rel=8 * 2**-53)
    assert f"ess                      {stats.ess:.9g}\n" in str(stats)


def test_ess_is_right_or_nan_where_squares_leave_the_normal_numbers():
    for exponent in range(-180, 180, 1):
        rho = [10.0**exponent, 3 * 10.0**exponent]
        ess = grpo_stats(rho, [1.0, -1.0], None, None, beta=0).ess
        assert ess == pytest.approx(16 / (2 * 10), rel=8 * 2**-53) or (math.isnan(ess) and abs(exponent) > 145)


def test_ess_of_equal_ratios_is_at_most_one():
    for n, rho in itertools.product(range(1, 30), np.linspace(0.1, 3, 30)):
        assert 1 - 8 * 2**-53 <= grpo_stats([rho] * n, [1.0] * n, None, None, beta=0).ess <= 1

"""log and exp are within 1 ulp, k3 of a composed ratio within 8 and of a log-ratio within 4, and never negative."""

import math

import mpmath
import numba
import numpy as np
import pytest
from conftest import DTYPES

from grpo_fast.elementary import (
    NEAR,
    exp,
    exp_of_any,
    k3,
    k3_near,
    k3_of_any_log,
    k3_of_log,
    log,
    reduce_near_ratio,
    reduce_ratio,
)
from grpo_fast.simd import lanes, load, store

mpmath.mp.prec = 400  # as in test_against_reference.py

# Where a reduction r = 2ᵏ(1 + f) may pass from one k to the next, and where k3 is 0.
BREAKS = [1, 2 / 3, 3 / 4, 4 / 3, 3 / 2, 0.5**0.5, 2**0.5, 1 / 3, 3, 0.5, 2, 2**-1.5, 2**1.5, 2**-20, 2**20]


@numba.njit(error_model="numpy")
def logs(x, out):
    for i in range(0, len(x), lanes(x)):
        store(out, i, log(load(x, i)))


@numba.njit(error_model="numpy")
def k3s(rho, old, ref, out):
    for i in range(0, len(rho), lanes(rho)):
        store(out, i, k3(reduce_ratio(load(rho, i), load(old, i), load(ref, i))))


@numba.njit(error_model="numpy")
def near_k3s(rho, old, ref, far, out):
    for i in range(0, len(rho), lanes(rho)):
        f, s = reduce_near_ratio(load(rho, i), load(old, i), load(ref, i))
        k, z = k3_near(f, s)
        store(far, i, z)
        store(out, i, k)


def near_ones(rho, old, ref):
    """k3 in the near way, and which of them it is good for."""
    far = np.empty_like(rho)
    return apply(near_k3s, rho, old, ref, far), far <= NEAR


def apply(kernel, *arrays):
    out = np.empty_like(arrays[0])
    assert len(out) % 16 == 0
    kernel(*arrays, out)
    return out


def around(points, width, count, dtype, seed=0):
    """``count`` numbers around each point: neighbours, and at distances spread over all orders up to ``width``."""
    rng = np.random.default_rng(seed)
    eps = float(np.finfo(dtype).eps)
    steps = [np.arange(-8, 8) * eps / 2, *(sign * eps ** rng.random(count // 2 - 8) * width for sign in (-1, 1))]
    return np.concatenate([point * (1 + np.concatenate(steps)) for point in points]).astype(dtype)


def exact_k3(rho, old, ref):
    r = mpmath.mpf(float(ref)) / (mpmath.mpf(float(rho)) * mpmath.mpf(float(old)))
    return r - 1 - mpmath.log(r)


def ulps(values, exact):
    """The largest distance of float values from exact ones, in ulp of the latter."""
    errors = [
        float(abs(mpmath.mpf(float(v)) - x)) / float(np.spacing(abs(v.dtype.type(float(x)))))
        for v, x in zip(values, exact, strict=True)
    ]
    return max(errors)


def normal_numbers(dtype, count):
    """Positive normal numbers, every exponent as likely."""
    form = np.finfo(dtype)
    rng = np.random.default_rng(1)
    exponents = rng.integers(form.minexp, form.maxexp, count)
    return np.ldexp(rng.uniform(1, 2, count).astype(dtype), exponents).clip(form.tiny, form.max).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log(dtype):
    x = np.concatenate([around(BREAKS, 0.5, 160, dtype), normal_numbers(dtype, 1600)])
    assert ulps(apply(logs, x), map(mpmath.log, map(float, x))) <= 1
    assert apply(logs, np.ones(16, dtype)).tolist() == [0.0] * 16


def test_log_of_every_float32_between_a_half_and_two():
    x = np.arange(0x3F000000, 0x40000000, dtype=np.uint32).view(np.float32)
    exact = np.log(x.astype(float))  # good to 2⁻²⁹ of a float32's ulp
    assert (abs(apply(logs, x) - exact) <= (1 + 2**-28) * np.spacing(abs(exact.astype(np.float32)))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_k3_of_plain_ratios(dtype):
    form = np.finfo(dtype)
    wide = normal_numbers(dtype, 1600)
    r = np.concatenate([around(BREAKS, 0.5, 320, dtype), np.minimum(wide, form.max / 8)])
    one = np.ones_like(r)
    values = apply(k3s, one, one, r)
    assert (values >= 0).all()
    assert (values[r == 1] == 0).all()
    assert ulps(values, (exact_k3(1, 1, x) for x in r)) <= 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_k3_of_composed_ratios(dtype):
    rng = np.random.default_rng(2)
    r = np.concatenate([around(BREAKS, 0.5, 320, float, seed=3), around([1], 2**-10, 1600, float, seed=4)])
    rho, old = (rng.lognormal(0, 1, len(r)).astype(dtype) for _ in "12")
    ref = (rho.astype(float) * old * r).astype(dtype)
    values = apply(k3s, rho, old, ref)
    exact = np.array([exact_k3(*x) for x in zip(rho, old, ref, strict=True)])
    assert (values >= 0).all()
    assert ulps(values, exact) <= 8
    values, near = near_ones(rho, old, ref)
    assert near[abs(np.log(r)) < 0.4].all()
    assert not near[abs(np.log(r)) > 0.41].any()
    assert (values[near] >= 0).all()
    assert ulps(values[near], exact[near]) <= 8


def test_k3_of_every_float32_between_a_half_and_two():
    r = np.arange(0x3F000000, 0x40000000, dtype=np.uint32).view(np.float32)
    one = np.ones_like(r)
    f = r.astype(float) - 1
    small = f * f * (1 / 2 - f * (1 / 3 - f * (1 / 4 - f * (1 / 5 - f / 6))))  # for |f| < 2⁻¹⁰ better than …
    exact = np.where(abs(f) < 2**-10, small, f - np.log1p(f))  # … this, which is good to 2⁻⁴¹ for others
    ulp = np.spacing(exact.astype(np.float32))
    values = apply(k3s, one, one, r)
    assert (values >= 0).all()
    assert (abs(values - exact) <= (8 + 2**-10) * ulp).all()
    values, near = near_ones(one, one, r)
    assert (values[near] >= 0).all()
    assert (abs(values - exact) <= (8 + 2**-10) * ulp)[near].all()


# --- of logarithms ----------------------------------------------------------------------------------------------------
PLAIN = {np.float64: 700, np.float32: 80}  # up to which the fast versions must be right
EVERYWHERE = {np.float64: 760, np.float32: 110}  # beyond, exp is 0 or inf


@numba.njit(error_model="numpy")
def exps(d, out):
    for i in range(0, len(d), lanes(d)):
        store(out, i, exp(load(d, i)))


@numba.njit(error_model="numpy")
def exps_of_any(d, out):
    for i in range(0, len(d), lanes(d)):
        store(out, i, exp_of_any(load(d, i)))


@numba.njit(error_model="numpy")
def k3s_of_log(d, out, expm1):
    for i in range(0, len(d), lanes(d)):
        found = k3_of_log(load(d, i))
        store(out, i, found.k3)
        store(expm1, i, found.expm1)


@numba.njit(error_model="numpy")
def k3s_of_any_log(d, out, expm1):
    for i in range(0, len(d), lanes(d)):
        found = k3_of_any_log(load(d, i))
        store(out, i, found.k3)
        store(expm1, i, found.expm1)


def exponents(dtype, largest):
    """Numbers up to ±largest: all orders of magnitude, and where k passes from one whole number to the next."""
    rng = np.random.default_rng(7)
    steps = (np.arange(-6, 6) + 0.5) * np.log(2)
    scattered = [10 ** rng.uniform(-12, 0, 800), -(10 ** rng.uniform(-12, 0, 800)), rng.uniform(-3, 3, 800)]
    return np.concatenate([around(steps, 0.02, 80, dtype), *scattered, rng.uniform(-largest, largest, 800)]).astype(
        dtype
    )


def exact_k3_of_log(d):
    return mpmath.exp(float(d)) - 1 - mpmath.mpf(float(d))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp(dtype):
    d = exponents(dtype, PLAIN[dtype])
    assert ulps(apply(exps, d), map(mpmath.exp, map(float, d))) <= 1
    assert apply(exps, np.zeros(16, dtype)).tolist() == [1.0] * 16
    assert np.array_equal(apply(exps_of_any, d), apply(exps, d))  # the same bits in the careful way


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_of_anything(dtype):
    d = exponents(dtype, EVERYWHERE[dtype])
    values, form = apply(exps_of_any, d), np.finfo(dtype)
    exact = [mpmath.exp(float(x)) for x in d]
    finite = np.array([x < float(form.max) for x in exact])
    assert np.isinf(values[~finite]).all()
    assert ulps(values[finite], [x for x, here in zip(exact, finite, strict=True) if here]) <= 1  # subnormals, too
    special = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30] + [0.0] * 11, dtype)
    assert str(apply(exps_of_any, special)[:5].tolist()) == "[inf, 0.0, nan, inf, 0.0]"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "limits"), [(k3s_of_log, PLAIN), (k3s_of_any_log, EVERYWHERE)])
def test_k3_of_logs(kernel, limits, dtype):
    d = exponents(dtype, limits[dtype])
    values, expm1 = np.empty_like(d), np.empty_like(d)
    kernel(d, values, expm1)
    exact = list(map(exact_k3_of_log, d))
    finite = np.array([x < float(np.finfo(dtype).max) for x in exact])
    assert np.isinf(values[~finite]).all()
    assert (values >= 0).all()
    assert ulps(values[finite], [x for x, here in zip(exact, finite, strict=True) if here]) <= 4
    assert ulps(expm1[finite], [mpmath.expm1(float(x)) for x in d[finite]]) <= 4
    zero = np.zeros(16, dtype)
    kernel(zero, values, expm1)
    assert values[:16].tolist() == expm1[:16].tolist() == zero.tolist()


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_float32_up_to_one(step):
    for sign in (1, -1):
        d = sign * np.arange(0x33000000, 0x3F800010, step, dtype=np.uint32).view(np.float32)  # from 3e-8
        d = d[: len(d) // 16 * 16]
        x = d.astype(float)
        series = sum(1 / math.factorial(n) * x ** (n - 2) for n in range(2, 9)) * x * x
        exact = np.where(abs(x) < 2**-4, series, np.expm1(x) - x)  # good to 2⁻⁴³ and to 2⁻⁴⁴
        values, expm1 = np.empty_like(d), np.empty_like(d)
        k3s_of_log(d, values, expm1)
        assert (values >= 0).all()
        assert (abs(values - exact) <= (4 + 2**-10) * np.spacing(exact.astype(np.float32))).all()
        exact = np.exp(x)
        assert (abs(apply(exps, d) - exact) <= (1 + 2**-20) * np.spacing(exact.astype(np.float32))).all()

"""log is within 1 ulp, and k3 = r − 1 − log r of the composed r within 8 ulp and never negative, in both formats."""

import mpmath
import numba
import numpy as np
import pytest
from conftest import DTYPES

from grpo_fast.elementary import k3, log, reduce_ratio
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
    assert (values >= 0).all()
    assert ulps(values, map(exact_k3, rho, old, ref)) <= 8


def test_k3_of_every_float32_between_a_half_and_two():
    r = np.arange(0x3F000000, 0x40000000, dtype=np.uint32).view(np.float32)
    one = np.ones_like(r)
    f = r.astype(float) - 1
    small = f * f * (1 / 2 - f * (1 / 3 - f * (1 / 4 - f * (1 / 5 - f / 6))))  # for |f| < 2⁻¹⁰ better than …
    exact = np.where(abs(f) < 2**-10, small, f - np.log1p(f))  # … this, which is good to 2⁻⁴¹ for others
    values = apply(k3s, one, one, r)
    assert (values >= 0).all()
    assert (abs(values - exact) <= (8 + 2**-10) * np.spacing(exact.astype(np.float32))).all()

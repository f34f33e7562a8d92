"""log and exp are within 1 ulp, k3 of a composed ratio within 8 and of a log-ratio within 4, and never negative."""

import inspect
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import accuracy
import mpmath
import numba
import numpy as np
import pytest
from accuracy import EACH_KERNEL, FUNCTIONS, SLACK, Kernel, errors, every_float, exact_error, hard_floats, worst
from samples import DTYPES

from grpo_fast._kernels import elementary, samples
from grpo_fast._kernels.elementary import (
    NEAR,
    NEAR_LOG,
    NEAR_RATIO,
    exp,
    exp_near,
    k3_near,
    k3_of_log,
    k3_of_near_log,
    reduce_near_ratio,
)
from grpo_fast._kernels.simd import lanes, load, store

LOG, EXP, K3_OF_LOG, EXPM1, K3_OF_RATIO, K3_COMPOSED = FUNCTIONS

every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
every_kernel = pytest.mark.parametrize("kernel", EACH_KERNEL, ids=lambda kernel: kernel.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
float64_too = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than double here")
where_there_is_a_wider = pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=float64_too)])


def some(dtype, every, chunks):
    """Of the float32 one in so many; of the float64 so many chunks a stream."""
    return partial(every_float, step=every) if dtype is np.float32 else partial(hard_floats, chunks=chunks)


def stated(kernel, dtype):
    """The largest error, and its argument, that a docstring of elementary.py states."""
    lines = rf"Largest error of {re.escape(kernel.name)}:\n(?: .*\n)? +{dtype.__name__}: (\S+) ulp at (.*), of [\d,]+\n"
    ((error, at),) = re.findall(lines, inspect.getsource(elementary))
    return error, [dtype(float.fromhex(x)) for x in at.split(", ")]


# --- errors -----------------------------------------------------------------------------------------------------------
@every_kernel
@where_there_is_a_wider
def test_errors(kernel, dtype):
    found, (largest, _) = worst(kernel, dtype, some(dtype, 4999, 4)), stated(kernel, dtype)
    assert 0.5 < found.error < float(largest) + 5e-5 < kernel.promised - SLACK, found


@every_kernel
@every_dtype
def test_the_stated_error_is_that_of_the_stated_argument(kernel, dtype):
    largest, at = stated(kernel, dtype)
    x = at[0] if len(at) == 1 else at[2] / (at[0] * at[1])
    arguments = at if len(at) == 3 else kernel.arguments(np.array(at), None)
    assert f"{exact_error(kernel, x, [np.ravel(a)[0] for a in arguments]):.4f}" == largest


@pytest.mark.exhaustive
@every_function
@where_there_is_a_wider
def test_errors_everywhere(function, dtype):
    with ProcessPoolExecutor() as executor:
        found = worst(function, dtype, some(dtype, 1, 2500), executor.map)
    assert found.error < function.promised - SLACK, found
    if dtype is np.float32 and function in (EXP, K3_OF_LOG, EXPM1):
        assert found.tried >= 2**32 - 2**24  # all but infinities and NaN
    if dtype is np.float64:
        assert found.tried > 2e8


@every_function
@where_there_is_a_wider
def test_the_wider_format_tells_the_truth(function, dtype):
    form, wide, _ = accuracy.DTYPES[dtype]
    x = next(some(dtype, 4_999_999, 1)(function, dtype, 0))
    x = np.random.default_rng(0).choice(x, 1000)
    arguments = function.arguments(x, np.random.default_rng(0))
    with np.errstate(all="ignore"):
        told = function.wider(*(a.astype(wide) for a in arguments))
    for value, *numbers in zip(told, *arguments, strict=True):
        exact = function.exact(*map(float, numbers))
        if 0 < abs(exact) < form.largest:
            fraction, power = np.frexp(value)  # of a long double, which is the sum of two floats
            high = float(fraction)
            value = mpmath.ldexp(mpmath.mpf(high) + float(fraction - high), int(power))
            exponent = max(mpmath.frexp(exact)[1] - 1, 1 - form.one // 2**form.mantissa)
            assert abs(value - exact) <= SLACK * mpmath.mpf(2) ** (exponent - form.mantissa), (numbers, value, exact)


@every_dtype
def test_an_error_is_seen(dtype):
    # By none, by 3 ulp, across a power of two, to zero, to infinity, to the other sign, to NaN.
    form = np.finfo(dtype)
    exact = np.array([1, 1, 1 - form.epsneg, 2 * form.tiny, form.tiny, form.max, form.max, 1] * 2, dtype)
    moved = np.array([1, 1 + 3 * form.eps, 1, 2 * form.tiny, 0, np.inf, -np.inf, np.nan] * 2, dtype)
    expected = np.array([0, 3, 1, 0, 2.0**form.nmant, 1, np.inf, np.inf] * 2)
    good = Kernel("good", lambda x: exact, lambda form: (0, np.inf))
    bad = Kernel("bad", lambda x: moved, lambda form: (0, np.inf))
    for kernels in ([bad], [good, bad], [bad, good]):
        function = EXP._replace(kernels=kernels, wider=lambda x: x)
        assert errors(function, exact, (exact,)).tolist() == expected.tolist()
    elsewhere = EXP._replace(kernels=[good, bad._replace(domain=lambda form: (-2, -1))], wider=lambda x: x)
    assert not errors(elsewhere, exact, (exact,)).any()


# --- certain values ---------------------------------------------------------------------------------------------------
@every_function
@every_dtype
def test_where_the_result_is_known(function, dtype):
    x = np.full(16, function.center, dtype)
    arguments = [x] * len(function.arguments(x, np.random.default_rng(0)))
    for kernel in function.kernels:
        assert kernel.compute(*arguments).tolist() == [float(function is EXP)] * 16


@every_dtype
def test_what_is_no_number(dtype):
    special = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30] + [0.0] * 11, dtype)
    assert str(EXP.kernels[0].compute(special)[:5].tolist()) == "[nan, inf, 0.0, inf, 0.0]"
    assert str(K3_OF_LOG.kernels[0].compute(special)[:3].tolist()) == "[nan, inf, inf]"


@pytest.mark.parametrize("function", [K3_OF_LOG, K3_OF_RATIO, K3_COMPOSED], ids=lambda function: function.name)
@every_dtype
def test_never_negative(function, dtype):
    # `errors` sees a wrong sign only where the exact value is not 0.
    for x in some(dtype, 99_991, 1)(function, dtype, 0):
        arguments = function.arguments(x, np.random.default_rng(0))
        for kernel in function.kernels:
            low, high = kernel.domain(accuracy.DTYPES[dtype][0])
            assert (kernel.compute(*arguments)[(low <= x) & (x <= high)] >= 0).all()


@every_dtype
def test_the_fast_exp_has_the_bits_of_the_careful_one(dtype):
    careful, fast = EXP.kernels
    low, high = fast.domain(accuracy.DTYPES[dtype][0])
    for x in some(dtype, 49_999, 4)(EXP, dtype, 0):
        x = x.clip(low, high)
        assert np.array_equal(fast.compute(x), careful.compute(x))


@numba.njit(error_model="numpy")
def near_and_far(x, out):
    for i in range(0, len(x), lanes(x)):
        d = load(x, i)
        near, far = k3_of_near_log(d), k3_of_log(d)
        store(out[0], i, exp_near(d))
        store(out[1], i, near.k3)
        store(out[2], i, near.expm1)
        store(out[3], i, exp(d))
        store(out[4], i, far.k3)
        store(out[5], i, far.expm1)


@every_dtype
def test_near_0_no_power_of_two_has_to_be_taken_out(dtype):
    for x in some(dtype, 4999, 4)(EXP, dtype, 0):
        x = np.append(x[np.abs(x) <= NEAR_LOG], np.repeat(np.array([NEAR_LOG, -NEAR_LOG, 0.0, -0.0], dtype), 16))
        x = x[len(x) % 16 :]
        out = np.empty((6, len(x)), dtype)
        near_and_far(x, out)
        assert np.array_equal(out[:3], out[3:])
        assert out[0].max() <= NEAR_RATIO


# --- where the near way of k3 may be taken ----------------------------------------------------------------------------
@numba.njit(error_model="numpy")
def distances(rho, pi_old, pi_ref, out):
    for i in range(0, len(rho), lanes(rho)):
        store(out, i, k3_near(*reduce_near_ratio(load(rho, i), load(pi_old, i), load(pi_ref, i)))[1])


@every_dtype
def test_near_is_told_from_far(dtype):
    for r in some(dtype, 49_999, 4)(K3_OF_RATIO, dtype, 0):
        far, one = np.empty_like(r), np.ones_like(r)
        distances(one, one, r, far)
        near = far <= NEAR
        assert near[(r > 0.6667) & (r < 1.4999)].all()
        assert not near[(r < 0.6666) | (r > 1.5001)].any()


# --- what is refused --------------------------------------------------------------------------------------------------
@numba.njit(error_model="numpy", nogil=True)
def legal(ratio, advantage, pi_old, pi_ref, out):
    for i in range(len(ratio)):
        out[i] = samples._load_carefully(ratio, advantage, pi_old, pi_ref, i, i + 1)[1]


@pytest.mark.parametrize("every", [49_999, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_of_every_float32_is_known_whether_it_is_a_ratio(every):
    form = np.finfo(np.float32)
    for start in range(0, 1 << 32, every << 20):
        x = np.arange(start, min(start + (every << 20), 1 << 32), every).astype(np.uint32).view(np.float32)
        one, zero, found = np.ones_like(x), np.zeros_like(x), np.empty(x.size, bool)
        legal(one, zero, one, x, found)
        assert np.array_equal(found, (x >= form.tiny) & (x <= form.max / 8))  # r = π_ref
        legal(x, zero, one, x, found)
        assert np.array_equal(found, (x >= form.tiny) & (x <= form.max))  # ρ; r is 1
        legal(one, x, one, one, found)
        assert np.array_equal(found, np.isfinite(x))  # A

"""What is outside the domain is refused: with the argument's name, what is allowed, what came, and the first index."""

import re
from functools import partial, update_wrapper

import numpy as np
import pytest
from samples import DTYPES, samples

from grpo_fast import BLOCK, grpo_objective, grpo_stats, grpo_sweep
from grpo_fast._checks import same_shape
from grpo_fast._kernels import sample_blocks, sweep_blocks
from grpo_fast._kernels.threads import WORTH_SHARING

NAMES = ["rhos", "A", "pi_theta_old", "pi_theta_ref"]


def sweep(*arrays, epsilon=0.2, beta=0.01, **option):
    return grpo_sweep(*arrays, [0.1, epsilon], [0, beta], **option)


FUNCTIONS = [grpo_objective, grpo_stats, sweep]
FUNCTIONS += [update_wrapper(partial(function, importance_weighted=False), function) for function in FUNCTIONS]


def refuses(message, function=grpo_objective, *args, error=ValueError, **options):
    """Check that the call fails with a message that begins like this."""
    with pytest.raises(error, match="^" + re.escape(message)):
        function(*args, **options)


# --- values -----------------------------------------------------------------------------------------------------------
INF, NAN = float("inf"), float("nan")
VALUES = [
    *(
        (name, bad, "positive and finite")
        for name in (NAMES[0], *NAMES[2:])
        for bad in (0.0, -0.0, -1.5, NAN, INF, -INF)
    ),
    *(("A", bad, "finite") for bad in (NAN, INF, -INF)),
]


@pytest.mark.parametrize(("name", "bad", "allowed"), VALUES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_value_is_named_with_its_index(function, dtype, name, bad, allowed):
    arrays = [x.reshape(2, 5, 10) for x in samples(100, dtype)]
    arrays[1][1, 2, 3:] = 1  # a sign of A for which the bad ratio is clipped
    arrays[NAMES.index(name)][1, 2, 3] = bad
    arrays[NAMES.index(name)][1, 3, 0] = bad  # not the first
    refuses(f"{name} must be {allowed}, got {name}[1, 2, 3] = {bad}", function, *arrays)


@pytest.mark.parametrize(("name", "bad", "allowed"), [case for case in VALUES if case[0] in NAMES[:2]])
@pytest.mark.parametrize("advantage", [-1, 0, 1])
def test_without_beta_too(name, bad, allowed, advantage):
    for n, at in [(1, 0), (100, 10), (100, 99), (BLOCK + 20, BLOCK + 3)]:
        arrays = samples(n)[:2]
        arrays[1][at] = advantage
        arrays[NAMES.index(name)][at] = bad
        message = f"{name} must be {allowed}, got {name}[{at}] = {bad}"
        refuses(message, grpo_objective, *arrays, None, None, beta=0)
        refuses(message, grpo_stats, *arrays, None, None, beta=0)
        refuses(message, grpo_sweep, *arrays, None, None, [0.1, 0.2], 0)


@pytest.mark.parametrize("n", [1, 7, 8, 70, BLOCK, BLOCK + 1, WORTH_SHARING + BLOCK // 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wherever_it_stands(n, dtype):
    for at in {0, n // 2, n - 1}:
        for name in NAMES:
            arrays = samples(n, dtype)
            arrays[NAMES.index(name)][at] = NAN
            refuses(f"{name} must be", grpo_objective, *arrays)
            refuses(f"{name} must be", grpo_stats, *arrays)


def test_index_of_a_single_number():
    with pytest.raises(ValueError, match=r"^pi_theta_ref must be positive and finite, got .* = -1\.0"):
        grpo_objective(1, 1, 1, -1)


def limits(dtype):
    """Samples (ρ, π_old, π_ref) just outside the domain with what is said of them, and their neighbours inside it."""
    form = np.finfo(dtype)
    below = np.nextafter(form.tiny, dtype(0))
    tiny, large, eighth, one = form.tiny, form.max, form.max / dtype(8), dtype(1)
    return [
        ("rhos must be", (below, one, one), (tiny, one, tiny)),
        ("rhos·pi_theta_old must be", (one, below, one), (one, tiny, tiny)),
        ("rhos·pi_theta_old must be", (tiny, dtype(0.5), one), (dtype(2) * tiny, dtype(0.5), tiny)),
        ("rhos·pi_theta_old must be", (dtype(2), large, one), (one, large / dtype(2), dtype(4))),
        ("pi_theta_ref/(rhos·pi_theta_old) must be", (one, one, below), (one, one, tiny)),
        ("pi_theta_ref/(rhos·pi_theta_old) must be", (one, one, np.nextafter(eighth, large)), (one, one, eighth)),
        ("pi_theta_ref/(rhos·pi_theta_old) must be", (dtype(0.5), tiny * 4, one), (dtype(0.5), tiny * 8, one)),
    ]


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_domain_ends_where_it_says(function, dtype, case):
    message, outside, inside = limits(dtype)[case]
    for n, at in [(1, 0), (40, 3), (BLOCK + 40, BLOCK + 3)]:
        rho, a, old, ref = arrays = samples(n, dtype)
        a[at] = 0
        rho[at], old[at], ref[at] = inside
        function(*arrays)
        rho[at], old[at], ref[at] = outside
        with pytest.raises(ValueError, match="^" + re.escape(message)) as refusal:
            function(*arrays)
        assert re.search(rf"\b{at}\b", str(refusal.value))
        assert "use grpo_loss" in str(refusal.value)
        assert ("float64, or" in str(refusal.value)) == (dtype is np.float32)
        assert str(np.dtype(dtype)) in str(refusal.value)


# --- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon must be a number in [0, inf], got -0.1"),
        ({"epsilon": NAN}, ValueError, "epsilon must be a number in [0, inf], got nan"),
        ({"epsilon": "0.2"}, TypeError, "epsilon must be a number in [0, inf], got '0.2'"),
        ({"epsilon": None}, TypeError, "epsilon must be a number in [0, inf], got None"),
        ({"beta": -0.1}, ValueError, "beta must be a number in [0, inf), got -0.1"),
        ({"beta": INF}, ValueError, "beta must be a number in [0, inf), got inf"),
        ({"beta": "0.2"}, TypeError, "beta must be a number in [0, inf), got '0.2'"),
        ({"beta": True}, TypeError, "beta must be a number in [0, inf), got True"),
    ],
)
def test_options(option, error, message):
    for function in (grpo_objective, grpo_stats):
        refuses(message, function, *samples(3), error=error, **option)


@pytest.mark.parametrize("bad", [0, 1, 1.0, None, "no", [True], np.array([True])], ids=repr)
@pytest.mark.parametrize("beta", [0, 0.1])
def test_what_is_no_boolean(bad, beta):
    message = f"importance_weighted must be True or False, got {bad!r}"
    for function in (grpo_objective, grpo_stats, sweep):
        refuses(message, function, *samples(3), error=TypeError, beta=beta, importance_weighted=bad)


def test_booleans_of_numpy():
    for function in (grpo_objective, grpo_stats, lambda *arrays, **option: sweep(*arrays, **option).kl):
        found = [function(*samples(3), importance_weighted=value) for value in (True, False, np.True_, np.False_)]
        assert found[:2] == found[2:]
        assert found[0] != found[1]


@pytest.mark.parametrize("bad", [[], [[0.1]], "0.1", None, ["a"], [0.1, [0.2]], [True]], ids=repr)
def test_lists_of_options(bad):
    for name, args in (("epsilons", (bad, 0.1)), ("betas", (0.1, bad))):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be a number or a one-dimensional array"):
            grpo_sweep(*samples(3), *args)


def test_values_in_lists_of_options():
    refuses("epsilon must be a number in [0, inf], got -1.0", grpo_sweep, *samples(3), [0.1, -1.0], 0.1)
    refuses("beta must be a number in [0, inf), got nan", grpo_sweep, *samples(3), 0.1, [0.1, NAN])


# --- types and shapes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ma.masked_array([1.0, 2.0], [0, 1]), "must be a plain array: take a masked array's .compressed()"),
        ([1.0, 2j], "must hold real numbers of at most 64 bits, got dtype complex128"),
        (["1", "2"], "must hold real numbers of at most 64 bits, got dtype <U1"),
        ([None, 1.0], "must hold real numbers of at most 64 bits, got dtype object"),
        (None, "must hold real numbers of at most 64 bits, got dtype object"),
        (np.array(["2020", "2021"], "M8[Y]"), "must hold real numbers of at most 64 bits, got dtype datetime64[Y]"),
        ([[1.0], [1.0, 2.0]], "must be an array of real numbers, got a ragged or mixed sequence"),
    ],
    ids=str,
)
def test_what_is_no_array_of_real_numbers(name, bad, message):
    arrays = dict(zip(NAMES, samples(2), strict=True)) | {name: bad}
    for function in FUNCTIONS:
        refuses(f"{name} {message}", function, *arrays.values(), error=TypeError)


def test_long_double_is_not_cut_short():
    if np.dtype(np.longdouble).itemsize > 8:
        refuses("A must hold real numbers of at most 64 bits", grpo_stats, 1, np.longdouble(1), 1, 1, error=TypeError)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("shape", [(5,), (6, 1), (2, 3), ()])
def test_shapes_differ(k, shape):
    arrays = [np.ones(6)] * 4
    arrays[k] = np.ones(shape)
    got = ", ".join(str(x.shape) for x in arrays)
    for function in FUNCTIONS:
        refuses(f"{', '.join(NAMES)} must have the same shape, got {got}", function, *arrays)
    if k < 2:
        refuses("rhos, A must have the same shape", grpo_objective, *arrays, beta=0)


@pytest.mark.parametrize("empty", [[], np.ones((2, 0)), np.ones(0, np.float32)], ids=repr)
def test_nothing_in_them(empty):
    for function in FUNCTIONS:
        message = f"{', '.join(NAMES)} must hold at least one sample, got shape {np.shape(empty)}"
        refuses(message, function, *[empty] * 4)


# --- and nothing else happens -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_written(dtype):
    arrays = samples(BLOCK + 9, dtype)
    before = [x.copy() for x in arrays]
    for function in FUNCTIONS:
        function(*arrays)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, before, strict=True))


@pytest.mark.parametrize("n", [9, BLOCK + 9, WORTH_SHARING])
def test_read_only_arrays_are_read_by_the_same_machine_code(n):
    arrays = samples(n)
    dispatchers = [
        sample_blocks.objective_block,
        sample_blocks.totals,
        sweep_blocks.sweep,
    ]
    expected = [grpo_objective(*arrays), grpo_stats(*arrays), sweep(*arrays).objective.tolist()]
    compiled = [len(d.signatures) for d in dispatchers]
    for x in arrays:
        x.flags.writeable = False
    assert [grpo_objective(*arrays), grpo_stats(*arrays), sweep(*arrays).objective.tolist()] == expected
    assert [len(d.signatures) for d in dispatchers] == compiled
    assert not any(x.flags.writeable for x in arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_arrays_are_not_copied(dtype, tmp_path):
    for x in samples(12, dtype):
        readonly = x.copy()
        readonly.flags.writeable = False
        x.tofile(tmp_path / "x")
        mapped = np.memmap(tmp_path / "x", dtype, "r")
        for given in (x, x.reshape(3, 4), x[2:], readonly, readonly.reshape(2, 6), mapped, mapped[1:].reshape(11, 1)):
            (seen,), shape = same_shape(["x"], (given,))
            assert np.shares_memory(seen, given)
            assert (type(seen), seen.dtype, seen.ndim, shape) == (np.ndarray, dtype, 1, given.shape)


def test_nothing_is_said_of_floating_point():
    with np.errstate(all="raise"):  # the package's own limits, whatever the caller's are
        for function in FUNCTIONS:
            function(*samples(100))
            function([1e-300, 1e300], [1, 0], [1e-5, 1e-300], [1e-310, 1e-5])
            refuses("rhos·pi_theta_old must be", function, [1, 1], [1, 1], [1e-320, NAN], [1, 1])

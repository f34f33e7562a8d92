"""Any array-like will do: the result is that of float64 or float32 arrays converted by hand."""

from array import array

import numpy as np
import pytest
from samples import DTYPES, samples

from grpo_fast import BLOCK, grpo_objective, grpo_stats, grpo_sweep
from grpo_fast._checks import flat, same_shape

N = 360


def same_as(expected, *given):
    """Whether arrays that were given and arrays converted by hand lead to the same results."""
    return (
        grpo_stats(*given) == grpo_stats(*expected)
        and grpo_objective(*given) == grpo_objective(*expected)
        and np.array_equal(
            grpo_sweep(*given, [0.1, 0.2], 0.1).objective, grpo_sweep(*expected, [0.1, 0.2], 0.1).objective
        )
    )


LAYOUTS = {
    "list": np.ndarray.tolist,
    "tuple": lambda x: tuple(x.tolist()),
    "list of arrays": lambda x: list(x.reshape(6, -1)),
    "buffer": lambda x: array("d", x.tolist()),
    "2-d": lambda x: x.reshape(40, 9),
    "4-d": lambda x: x.reshape(2, 3, 4, 15),
    "Fortran order": lambda x: np.asfortranarray(x.reshape(40, 9)),
    "transposed": lambda x: np.ascontiguousarray(x.reshape(40, 9).T).T,
    "negative strides": lambda x: x[::-1].copy()[::-1],
    "every other": lambda x: np.repeat(x, 2)[::2],
    "column": lambda x: np.column_stack([x, x])[:, 1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "unaligned": lambda x: np.frombuffer(b"!" + x.tobytes(), x.dtype, offset=1),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype),
    "subclass": lambda x: x.view(np.recarray),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    arrays = samples(N, dtype)
    given = [LAYOUTS[layout](x) for x in arrays]
    expected = [x.astype(np.asarray(y).dtype.newbyteorder("=")) for x, y in zip(arrays, given, strict=True)]
    assert same_as(expected, *given)
    assert same_as(expected, given[0], *(x.reshape(np.shape(given[0])) for x in expected[1:]))  # only one of them


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_can_be_read_in_place_is_not_copied(dtype):
    arrays = samples(N, dtype)
    assert same_shape("abcd", arrays)[0] is arrays  # nor looked at any closer
    for layout in ("2-d", "4-d", "read-only", "subclass"):
        given = tuple(LAYOUTS[layout](x) for x in arrays)
        for found, x in zip(same_shape("abcd", given)[0], given, strict=True):
            assert type(found) is np.ndarray
            assert found.ndim == 1
            assert found.flags.carray
            assert np.shares_memory(found, x)
    assert np.shares_memory(flat(arrays[0], arrays[0].dtype), arrays[0])


def test_read_only_file(tmp_path):
    arrays = samples(BLOCK + 5)
    for k, x in enumerate(arrays):
        np.save(tmp_path / f"{k}.npy", x)
    assert same_as(arrays, *(np.load(tmp_path / f"{k}.npy", mmap_mode="r") for k in range(4)))


KINDS = [
    ("f8", "f8 f8 f8 f8"),
    ("f4", "f4 f4 f4 f4"),
    ("f8", "f4 f8 f4 f4"),
    ("f8", "f4 f4 f4 f8"),
    ("f4", "f2 f2 f2 f2"),
    ("f4", "f4 f2 f4 f2"),
    ("f4", "f4 i1 f4 f4"),
    ("f4", "f2 u1 f2 f2"),
    ("f8", "f4 i8 f4 f4"),
    ("f8", "i1 i1 i1 i1"),
    ("f8", "i8 i8 u8 u2"),
    ("f8", "f8 ? f8 f8"),
    ("f4", ">f4 >f4 >f4 >f4"),
    ("f8", ">f4 <f8 >i2 <f2"),
]


@pytest.mark.parametrize(("computed", "kinds"), KINDS)
def test_dtypes_are_promoted_as_numpy_does(computed, kinds):
    kinds = kinds.split()
    given = [np.clip(10 * x, 1, 50).astype(kind) for x, kind in zip(samples(N), kinds, strict=True)]
    assert same_as([x.astype(computed) for x in given], *given)
    wide = grpo_stats(*(x.astype("f8") for x in given)).sums.kl
    narrow = grpo_stats(*(x.astype("f4") for x in given)).sums.kl
    assert wide != narrow  # so that the dtype of the computation shows


def test_without_beta_only_what_is_read_counts():
    rho, a, *_ = samples(N, np.float32)
    expected = grpo_objective(rho, a, None, None, beta=0)
    assert grpo_objective(rho, a, *samples(N)[2:], beta=0) == expected
    assert grpo_objective(rho.astype(float), a, None, None, beta=0) != expected


@pytest.mark.parametrize("scalar", [float, np.float64, np.float32, np.array, lambda x: np.full((1, 1, 1), x)])
def test_single_numbers(scalar):
    numbers = [scalar(x) for x in (1.25, 2.0, 0.5, 0.75)]
    assert grpo_objective(*numbers, beta=0.5) == grpo_objective(*([x] for x in numbers), beta=0.5)
    assert grpo_stats(*numbers).tokens == 1


def test_whole_numbers():
    assert grpo_objective([1, 1], [3, 5], [1, 1], [1, 1]) == 4.0
    assert grpo_objective(1, 3, 1, 1) == 3.0
    assert type(grpo_objective(1, 3, 1, 1)) is float


def test_options_of_any_real_type():
    arrays = samples(N)
    assert grpo_objective(*arrays, np.float32(0.25), np.int8(1)) == grpo_objective(*arrays, 0.25, 1.0)
    lists = grpo_sweep(*arrays, [0, 0.25], (1, 2))
    assert np.array_equal(lists.objective, grpo_sweep(*arrays, np.float32([0, 0.25]), np.array([1, 2])).objective)
    assert grpo_sweep(*arrays, 0.25, 1).objective.shape == (1, 1)

"""A vector does in every lane what NumPy does in every element, reads nothing beyond an end, and is packed SIMD."""

import os
import platform
import re
from fractions import Fraction

import numba
import numpy as np
import pytest
from interpreter import python
from numba.core import types
from samples import DTYPES, LANES

from grpo_fast import BLOCK
from grpo_fast._kernels import sample_blocks, simd
from grpo_fast._kernels.samples import Samples
from grpo_fast._kernels.simd import (
    abs_of,
    beyond,
    bits,
    constant,
    count_flags,
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
    load_zeros,
    signed,
    store,
    store_first,
    tally,
    where,
    wide,
    wide_product,
)


# --- each operation ---------------------------------------------------------------------------------------------------
@numba.njit(error_model="numpy")
def in_every_lane(x, y, z, out):
    """The rows of `EXPECTED`, in their order."""
    a, b, c = load(x, 0), load(y, 0), load(z, 0)
    i, j = bits(a), bits(b)
    one, zero = full(x, 1.0), full_like(a, 0)
    step = lanes(x)
    store(out, 0 * step, a + b)
    store(out, 1 * step, a - b)
    store(out, 2 * step, a * b)
    store(out, 3 * step, a / b)
    store(out, 4 * step, -a)
    store(out, 5 * step, where(a < b, a, c))
    store(out, 6 * step, where(a <= b, one, zero))
    store(out, 7 * step, where(a > b, one, zero))
    store(out, 8 * step, where(a >= b, one, zero))
    store(out, 9 * step, where(a == b, one, zero))
    store(out, 10 * step, where(a != b, one, zero))
    store(out, 11 * step, where((a < b) & (b < c), one, zero))
    store(out, 12 * step, where((a < b) | (b < c), one, zero))
    store(out, 13 * step, where((a < b) ^ (b < c), one, zero))
    store(out, 14 * step, where(~(a < b), one, zero))
    store(out, 15 * step, where(signed(a), one, zero))
    store(out, 16 * step, from_bits(i + j))
    store(out, 17 * step, from_bits(i - j))
    store(out, 18 * step, from_bits(i & j))
    store(out, 19 * step, from_bits(i | j))
    store(out, 20 * step, from_bits(i ^ j))
    store(out, 21 * step, from_bits(~i))
    store(out, 22 * step, from_bits(i << 3))
    store(out, 23 * step, from_bits(i >> 3))
    store(out, 24 * step, where(i < j, one, zero))
    store(out, 25 * step, from_bits(tally(i, a < b)))
    store(out, 26 * step, constant(a, 0.1))
    store(out, 27 * step, 2 * a + 1.5)
    store(out, 28 * step, load_first(x, 0, 3, 7.0))
    sum_in_place = a
    sum_in_place += b
    sum_in_place -= c
    sum_in_place *= b
    sum_in_place /= c
    store(out, 29 * step, sum_in_place)
    store(out, 30 * step, abs_of(a))
    store(out, 31 * step, from_bits(beyond(a, 3)))
    store(out, 32 * step, b)
    store_first(out, 32 * step, 5, a)
    store(out, 33 * step, fma(a, b, c))  # in a test of its own


def as_floats(integers):
    return integers.view(f"f{integers.itemsize}")


def u(floats):
    return floats.view(f"u{floats.itemsize}")


EXPECTED = {
    "a + b": lambda a, b, c: a + b,
    "a - b": lambda a, b, c: a - b,
    "a * b": lambda a, b, c: a * b,
    "a / b": lambda a, b, c: a / b,
    "-a": lambda a, b, c: -a,
    "where": lambda a, b, c: np.where(a < b, a, c),
    "a <= b": lambda a, b, c: a <= b,
    "a > b": lambda a, b, c: a > b,
    "a >= b": lambda a, b, c: a >= b,
    "a == b": lambda a, b, c: a == b,
    "a != b": lambda a, b, c: a != b,
    "mask & mask": lambda a, b, c: (a < b) & (b < c),
    "mask | mask": lambda a, b, c: (a < b) | (b < c),
    "mask ^ mask": lambda a, b, c: (a < b) ^ (b < c),
    "~mask": lambda a, b, c: ~(a < b),
    "signed": lambda a, b, c: np.signbit(a),
    "bits +": lambda a, b, c: as_floats(u(a) + u(b)),
    "bits -": lambda a, b, c: as_floats(u(a) - u(b)),
    "bits &": lambda a, b, c: as_floats(u(a) & u(b)),
    "bits |": lambda a, b, c: as_floats(u(a) | u(b)),
    "bits ^": lambda a, b, c: as_floats(u(a) ^ u(b)),
    "~bits": lambda a, b, c: as_floats(~u(a)),
    "bits << 3": lambda a, b, c: as_floats(u(a) << 3),
    "bits >> 3": lambda a, b, c: as_floats(u(a) >> 3),
    "bits <": lambda a, b, c: u(a) < u(b),
    "tally": lambda a, b, c: as_floats(u(a) + (a < b).astype(u(a).dtype)),
    "constant": lambda a, b, c: np.full_like(a, 0.1),
    "scalars": lambda a, b, c: 2 * a + a.dtype.type(1.5),
    "load_first": lambda a, b, c: np.where(np.arange(len(a)) < 3, a, 7),
    "in place": lambda a, b, c: (a + b - c) * b / c,
    "abs_of": lambda a, b, c: np.abs(a),
    "beyond": lambda a, b, c: as_floats(-(np.arange(len(a)) >= 3).astype(u(a).dtype)),
    "store_first": lambda a, b, c: np.where(np.arange(len(a)) < 5, a, b),
}


def triples(dtype):
    """Three vectors at a time: ordinary numbers, then pairs of all that is special."""
    rng = np.random.default_rng(0)
    form = np.finfo(dtype)
    yield from rng.normal(size=(20, 3, LANES[dtype])).astype(dtype)
    special = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, form.tiny, -form.smallest_subnormal, form.max], dtype)
    yield from rng.choice(special, size=(40, 3, LANES[dtype]))


@pytest.fixture(scope="module", params=DTYPES, ids=["float64", "float32"])
def outcomes(request):
    """Operands, and what the vectors made of them."""
    results = []
    for a, b, c in triples(request.param):
        out = np.empty((len(EXPECTED) + 1) * len(a), a.dtype)
        in_every_lane(a, b, c, out)
        results.append(((a, b, c), out.reshape(-1, len(a))))
    return results


@pytest.mark.parametrize("operation", EXPECTED)
def test_lane_by_lane(outcomes, operation):
    for operands, out in outcomes:
        with np.errstate(all="ignore"):
            expected = EXPECTED[operation](*operands).astype(out.dtype)
        np.testing.assert_array_equal(out[list(EXPECTED).index(operation)], expected, strict=True)


def test_fma_rounds_once(outcomes):
    for operands, out in outcomes:
        for a, b, c, d in zip(*operands, out[-1], strict=True):
            if np.isfinite([a, b, c, d]).all() and abs(d) < np.finfo(d.dtype).max:
                exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
                assert abs(Fraction(float(d)) - exact) <= Fraction(float(np.spacing(abs(d)))) / 2


# --- across the lanes -------------------------------------------------------------------------------------------------
@numba.njit(error_model="numpy")
def across_lanes(x, out):
    a = load(x, 0)
    store(out, 0, wide(a))
    store(out, 8, wide_product(a))
    out[16] = lane_sum(a)
    out[17] = lane_min(a)
    out[18] = lane_max(a)
    out[19] = every(a > 0.0)
    out[20] = lane_sum(bits(a) >> 16)
    out[21] = lanes(x)


def folded(a):
    """The sum of the lanes: halves are added until one is left."""
    while len(a) > 1:
        a = a[: len(a) // 2] + a[len(a) // 2 :]
    return a[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-1, 0.1])
def test_across_lanes(dtype, low):
    a = np.random.default_rng(5).uniform(low, 1, LANES[dtype]).astype(dtype)
    out = np.empty(22)
    across_lanes(a, out)
    halves = a.astype(float).reshape(-1, 8)
    assert out[:8].tolist() == halves.sum(axis=0).tolist()
    assert out[8:16].tolist() == halves.prod(axis=0).tolist()
    assert out[16:20].tolist() == [folded(a), a.min(), a.max(), (a > 0).all()]
    assert out[20:].tolist() == [(u(a) >> 16).sum(dtype=u(a).dtype), len(a)]


# --- memory -----------------------------------------------------------------------------------------------------------
@numba.njit(error_model="numpy")
def flags(mask, start, count, x, out):
    a = load(x, 0)
    store(out, 0, from_bits(load_zeros(mask, start, a)))
    store(out, lanes(x), from_bits(beyond(a, count)))
    return count_flags(mask, start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flags(dtype):
    lane = np.arange(LANES[dtype])
    rng = np.random.default_rng(6)
    mask = np.where(rng.random(200) < 0.5, 0, rng.integers(1, 256, 200)).astype(np.uint8)
    for start in (0, 1, 63, 136):
        for count in (0, 1, 5, len(lane), 99, 1 << 40):
            x, out = np.zeros(len(lane), dtype), np.empty(2 * len(lane), dtype)
            assert flags(mask, start, count, x, out) == np.count_nonzero(mask[start : start + 64])
            zero, rest = mask[start : start + len(lane)] == 0, lane >= count
            ones = u(out).max()
            assert ones == np.iinfo(ones.dtype).max
            assert (u(out) == ones * np.concatenate([zero, rest])).all()


GUARD = """
import numba, numpy as np
from grpo_fast import K3, grpo_loss, grpo_objective
from grpo_fast._kernels.simd import lanes, load_first, store
from guarded import guarded

@numba.njit
def first(x, count, out):
    store(out, 0, load_first(x, 0, count, 7.0))
    return lanes(x)

for dtype in np.float64, np.float32:
    for n in range(1, 71):
        values = np.linspace(0.5, 1.5, n).astype(dtype)
        arrays = [guarded(values) for _ in "1234"]
        assert grpo_objective(*arrays, beta=0.5) == grpo_objective(*[values] * 4, beta=0.5)
        assert grpo_objective(*arrays, beta=0) == grpo_objective(*[values] * 4, beta=0)
        mask = np.arange(n) % 3 > 0
        there = guarded(mask)
        place = guarded(values)
        result = grpo_loss(*arrays, mask=there, kl=K3(0.1), grad=place)
        expected = grpo_loss(*[values] * 4, mask=mask, kl=K3(0.1), grad=True)
        assert result.loss == expected.loss and place.tolist() == expected.grad.tolist()
        out = np.empty(16, dtype)
        if n <= first(arrays[0], 1, out):
            first(arrays[0], n, out)
            assert out[:n].tolist() == values.tolist()
print("read")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs mprotect")
def test_nothing_beyond_an_end_is_touched():
    assert python(GUARD) == "read\n"


# --- machine code -----------------------------------------------------------------------------------------------------
def assembly(dtype):
    """The machine code of `sum_block` as compiled for this CPU (Numba shows none for what came out of its cache)."""
    kernel = numba.njit(nogil=True, error_model="numpy")(sample_blocks.sum_block.py_func)
    array = types.Array(numba.from_dtype(np.dtype(dtype)), 1, "C")
    samples = types.NamedTuple([array] * 4, Samples)
    kernel.compile((samples, *[types.intp] * 2, *[types.float64] * 2, types.none, array))
    return next(iter(kernel.inspect_asm().values()))


def loops(asm):
    """The instructions of each innermost loop: from a label to a jump back to it, no other and no return inside."""
    lines = asm.split(".Lfunc_end0:")[0].splitlines()  # what follows are wrappers for Python
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if re.match(r"\.?L\w+:", line)}
    jumps = {at: (j[1], labels.get(j[2], at)) for at, x in enumerate(lines) if (j := re.match(r"\t(j\w+)\s+(\S+)$", x))}
    spans = [(to, at) for at, (_, to) in jumps.items() if to < at and leads(to, at, jumps)]
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    found = [[line.split()[0] for line in lines[a : b + 1] if re.match(r"\t[a-z]", line)] for a, b in inner]
    return [loop for loop in found if "retq" not in loop]


def leads(first, last, jumps):
    """Whether the lines from the first on lead to the last one; if not, it jumps back from what is done once."""
    seen, ahead = set(), [first]
    while ahead:
        at = ahead.pop()
        if at not in seen and first <= at <= last:
            seen.add(at)
            how, to = jumps.get(at, ("", at))
            ahead += [to] if how == "jmp" else [to, at + 1]
    return last in seen


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
@pytest.mark.skipif("+fma" not in numba.core.codegen.get_host_cpu_features(), reason="without FMA this is a call")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inner_loops_are_packed(dtype):
    packed, scalar = ("pd", "sd") if dtype is np.float64 else ("ps", "ss")
    hot = loops(assembly(dtype))
    instructions = [i for loop in hot for i in loop]
    assert sum(i == f"vdiv{packed}" for i in instructions) >= 1  # in the loop that reduces r
    assert sum(bool(re.fullmatch(rf"vfn?m(add|sub)\d+{packed}", i)) for i in instructions) >= 5  # and in that of k3
    arithmetic = rf"v?(div|mul|add|sub|fn?m(add|sub)\d+|min|max){scalar}|call.*"
    assert [i for i in instructions if re.fullmatch(arithmetic, i)] == []


def test_a_vector_has_the_same_width_everywhere():
    assert simd.WIDTH == 64
    assert {dtype: BLOCK % n for dtype, n in LANES.items()} == dict.fromkeys(LANES, 0)

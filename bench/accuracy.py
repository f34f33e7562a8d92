"""How far the elementary functions of the kernels are from the exact values: all float32, float64 where it is hardest.

``python bench/accuracy.py`` (ten minutes) tries every float32 and 200 million float64, and writes the table of
tests/README.md; ``--worst`` (as long) tries as many for each kernel alone, and prints the lines that stand in the
docstrings of elementary.py: the largest error and its argument. With ``--quick`` (a minute) both try few numbers, and
print. tests/test_elementary.py holds the errors to what is promised, and to these lines.

Most values are compared with those of the reference or NumPy in a wider format: float64 for float32, long double (of 64
bits) for float64. The largest error found is then measured by mpmath. Errors are in ulp of the exact value, with their
fractions. Below: the functions; the numbers; the errors; the tables.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import mpmath
import numba
import numpy as np
from numpy.typing import NDArray
from pages import TESTS, table, write_between

from grpo_fast import reference
from grpo_fast._kernels import elementary
from grpo_fast._kernels.compiling import inlined
from grpo_fast._kernels.elementary import FLOAT32, FLOAT64, LN2, Layout
from grpo_fast._kernels.simd import lanes, load, store

Array = NDArray[Any]
Interval = tuple[float, float]  # ends included
Numbers = Callable[[Any, Any], Callable[..., Iterator[Array]]]  # of a function and a dtype: what it is tried with

mpmath.mp.prec = 400  # bits; near 1, k3 has twice as many as the float64 it is of
DTYPES = {np.float32: (FLOAT32, np.float64, np.uint32), np.float64: (FLOAT64, np.longdouble, np.uint64)}
CHUNK = 5 << 10  # little enough to stay in a cache, and below what malloc fetches from the system and gives back
STREAMS = 16  # numbers are tried in so many streams, whatever the number of threads
#: What the wider format may be wrong by, in ulp: it has 11 bits and more to spare, of which functions take some.
SLACK = 2.0**-7


# --- the functions ----------------------------------------------------------------------------------------------------
class Kernel(NamedTuple):
    """One of the ways in which a function is computed, and for which numbers that must be right."""

    name: str  # how it is called
    compute: Any  # on arrays
    domain: Callable[[Layout], Interval]


class Function(NamedTuple):
    """A function: its name, what is promised of it, its values in a wider format and exactly, and its kernels."""

    name: str
    promised: float  # ulp
    wider: Callable[..., Array]  # of arrays in a wider format
    exact: Callable[..., Any]  # of numbers, by mpmath
    kernels: list[Kernel]  # the first has the widest domain
    center: float  # where the result is 0 or 1, and all depends on the last bits
    breaks: Callable[[Layout], list[float]]  # where it is computed in another way from
    arguments: Callable[[Array, np.random.Generator], tuple[Array, ...]] = lambda x, _: (x,)

    def domain(self, form: Layout) -> Interval:
        """For which x it must be right."""
        return self.kernels[0].domain(form)


def of_one(function: Any) -> Any:
    """A function of one vector, over arrays whose length is a multiple of 16."""

    @numba.njit(nogil=True, error_model="numpy")
    def kernel(x, out):
        for i in range(0, len(x), lanes(x)):
            store(out, i, function(load(x, i)))

    return partial(_into, kernel)


def of_three(function: Any) -> Any:
    """A function of three, likewise."""

    @numba.njit(nogil=True, error_model="numpy")
    def kernel(x, y, z, out):
        for i in range(0, len(x), lanes(x)):
            store(out, i, function(load(x, i), load(y, i), load(z, i)))

    return partial(_into, kernel)


def _into(kernel: Any, *arrays: Array) -> Array:
    out = np.empty_like(arrays[0])
    kernel(*arrays, out)
    return out


def wider_k3_of_ratio(rho: Array, pi_old: Array, pi_ref: Array) -> Array:
    """r − 1 − log r for r = π_ref/(ρ·π_old), of numbers with half the digits of their dtype."""
    # Near 1 all depends on r − 1. The two halves of such a number's digits have exact products, of which near 1 the
    # differences are exact, too.
    factor = 2.0 ** ((np.finfo(rho.dtype).nmant + 2) // 2) + 1
    rho_high, old_high = (x * factor - (x * factor - x) for x in (rho, pi_old))
    rho_low, old_low = rho - rho_high, pi_old - old_high
    difference = pi_ref - rho_high * old_high - rho_high * old_low - rho_low * old_high - rho_low * old_low
    f, r = difference / (rho * pi_old), pi_ref / (rho * pi_old)
    near = np.abs(f) < 0.5
    return np.where(near, reference.k3(-np.log1p(np.where(near, f, 0))), r - 1 - np.log(r))


def exact_k3_of_ratio(rho: float, pi_old: float, pi_ref: float) -> Any:
    """The same by mpmath."""
    r = mpmath.mpf(pi_ref) / (mpmath.mpf(rho) * mpmath.mpf(pi_old))
    return r - 1 - mpmath.log(r)


def exact_k3_of_log(d: float) -> Any:
    """e^d − 1 − d by mpmath."""
    return mpmath.expm1(d) - mpmath.mpf(d)


def _up_to_limit(form: Layout) -> Interval:
    return -form.exp_limit, form.exp_limit


def _all_finite(form: Layout) -> Interval:
    return -form.largest, form.largest


def _positive_normal(form: Layout) -> Interval:
    return form.smallest_normal, form.largest


def _ratios(form: Layout) -> Interval:
    return form.smallest_normal, form.largest / 8


def _of_ratios(form: Layout) -> list[float]:
    simple = [2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 3, math.sqrt(2), 1 / 3]
    return [x * 2.0**k for x in simple for k in (-40, -20, -2, -1, 0, 1, 2, 20, 40)]


def _of_exponents(form: Layout) -> list[float]:
    halves = range(2 * int(form.vanishing / LN2) - 2, 2 * int(form.overflowing / LN2) + 4)
    edges = [form.exp_limit, form.vanishing, form.overflowing, 60.0]
    edges += [math.log(form.largest), math.log(form.smallest_normal)]
    return [k * LN2 / 2 for k in halves] + [x * sign for x in edges for sign in (1, -1)]


def _alone(r: Array, _: np.random.Generator) -> tuple[Array, ...]:
    """ρ = 1, π_old = 1, π_ref = r."""
    one = np.ones_like(r)
    return one, one, r


def _composed(r: Array, rng: np.random.Generator) -> tuple[Array, ...]:
    """ρ, π_old and π_ref whose ratio is r but for rounding."""
    rho, old = (rng.lognormal(0, 1, r.size).astype(r.dtype) for _ in "12")
    return rho, old, (rho.astype(DTYPES[r.dtype.type][1]) * old * r).astype(r.dtype)


def _k3_kernels(
    arguments: str, domain: Callable[[Layout], Interval], near: Callable[[Layout], Interval]
) -> list[Kernel]:
    return [
        Kernel(f"k3(reduce_ratio({arguments}))", k3_of_ratio, domain),
        Kernel(f"k3_near(reduce_near_ratio({arguments}))", near_k3_of_ratio, near),
    ]


k3_of_ratio = of_three(inlined(lambda *x: elementary.k3(elementary.reduce_ratio(*x))))
near_k3_of_ratio = of_three(inlined(lambda *x: elementary.k3_near(*elementary.reduce_near_ratio(*x))[0]))
k3_of_any_log = of_one(inlined(lambda d: elementary.k3_of_any_log(d).k3))
k3_of_log = of_one(inlined(lambda d: elementary.k3_of_log(d).k3))
expm1_of_any_log = of_one(inlined(lambda d: elementary.k3_of_any_log(d).expm1))
expm1_of_log = of_one(inlined(lambda d: elementary.k3_of_log(d).expm1))
_exponents = {"center": 0.0, "breaks": _of_exponents}
_ratio = {
    "promised": 8,
    "wider": wider_k3_of_ratio,
    "exact": exact_k3_of_ratio,
    "center": 1.0,
    "breaks": _of_ratios,
}

FUNCTIONS = [
    Function(
        name="log x",
        promised=1,
        wider=np.log,
        exact=mpmath.log,
        kernels=[Kernel("log(x)", of_one(elementary.log), _positive_normal)],
        center=1.0,
        breaks=_of_ratios,
    ),
    Function(
        name="e^d",
        promised=1,
        wider=np.exp,
        exact=mpmath.exp,
        kernels=[
            Kernel("exp_of_any(d)", of_one(elementary.exp_of_any), _all_finite),
            Kernel("exp(d)", of_one(elementary.exp), _up_to_limit),
        ],
        **_exponents,
    ),
    Function(
        name="e^d − 1 − d",
        promised=4,
        wider=lambda d: reference.k3(-d),
        exact=exact_k3_of_log,
        kernels=[
            Kernel("k3_of_any_log(d).k3", k3_of_any_log, _all_finite),
            Kernel("k3_of_log(d).k3", k3_of_log, _up_to_limit),
        ],
        **_exponents,
    ),
    Function(
        name="e^d − 1, with it",
        promised=4,
        wider=np.expm1,
        exact=mpmath.expm1,
        kernels=[
            Kernel("k3_of_any_log(d).expm1", expm1_of_any_log, _all_finite),
            Kernel("k3_of_log(d).expm1", expm1_of_log, _up_to_limit),
        ],
        **_exponents,
    ),
    Function(
        name="r − 1 − log r",
        kernels=_k3_kernels("1, 1, r", _ratios, lambda form: (2 / 3, 3 / 2)),
        arguments=_alone,
        **_ratio,
    ),
    Function(
        name="r − 1 − log r, r = π_ref/(ρ·π_old)",
        kernels=_k3_kernels("ρ, π_old, π_ref", lambda form: (2.0**-60, 2.0**60), lambda form: (0.67, 1.49)),
        arguments=_composed,
        **_ratio,
    ),
]


def each_kernel_of(function: Function) -> list[Function]:
    """The kernels of a function as functions of their own, each with its own domain."""
    return [function._replace(name=kernel.name, kernels=[kernel]) for kernel in function.kernels]


EACH_KERNEL = [kernel for function in FUNCTIONS for kernel in each_kernel_of(function)]
BY_NAME = {function.name: function for function in FUNCTIONS + EACH_KERNEL}


# --- the numbers ------------------------------------------------------------------------------------------------------
def every_float(function: Function, dtype: Any, stream: int, step: int) -> Iterator[Array]:
    """A stream's share of all floats of the domain, or of one in ``step``, in chunks."""
    form, _, pattern = DTYPES[dtype]
    low, high = map(dtype, function.domain(form))
    edges = [(dtype(max(low, dtype(0))), high)] + [(dtype(-0.0), low)] * bool(low < 0)
    for first, last in edges:
        first, last = (int(x.view(pattern)) for x in (first, last))
        for start in range(first + stream * CHUNK * step, last + 1, STREAMS * CHUNK * step):
            patterns = np.arange(start, min(start + CHUNK * step, last + 1), step, dtype=np.uint64)
            yield np.resize(patterns, -(-patterns.size // 16) * 16).astype(pattern).view(dtype)


def hard_floats(function: Function, dtype: Any, stream: int, chunks: int) -> Iterator[Array]:
    """Chunks of floats of five kinds, the last of which lie near those sent back as the worst until now."""
    form, _, pattern = DTYPES[dtype]
    rng, part = np.random.default_rng(stream), CHUNK // 5
    low, high = function.domain(form)
    low, high = max(low, form.vanishing - 2), min(high, form.overflowing + 2 if low < 0 else high)
    breaks = np.array([*function.breaks(form), low, high], dtype)
    worst = breaks[:1]

    def moved(x: Array, most: int) -> Array:
        """Away by up to 2^most ulp, all orders of magnitude as likely."""
        steps = 2 ** rng.uniform(0, most, x.size) * rng.choice([-1, 1], x.size)
        return (x.view(pattern) + steps.astype(np.int64).astype(pattern)).view(dtype)

    def signs() -> Array:
        return rng.choice([-1.0, 1.0], part)

    smallest, largest = -form.mantissa - 8 if function.center else -2 * form.mantissa, math.log2(high)
    for _ in range(chunks):
        exponents = rng.uniform(math.log2(low) if low > 0 else smallest, largest, part)
        powers = np.exp2([exponents, np.floor(exponents)]) * (1 if low > 0 else signs())
        near_center = function.center + signs() * np.exp2(rng.uniform(smallest, min(largest, 6), part))
        near = [moved(rng.choice(breaks, part), 30), moved(powers[1].astype(dtype), 8)]
        near.append(moved(rng.choice(worst, part), form.mantissa - 4))
        x = np.concatenate([powers[0].astype(dtype), near_center.astype(dtype), *near])
        sent = yield np.where(np.isnan(x), breaks[0], x).clip(low, high)  # moved beyond infinity
        worst = worst if sent is None else sent


# --- the errors -------------------------------------------------------------------------------------------------------
class Worst(NamedTuple):
    """The largest error, in ulp; of which x, and with which arguments; and of how many."""

    error: float
    x: Any
    arguments: tuple[Any, ...]
    tried: int


def errors(function: Function, x: Array, arguments: tuple[Array, ...]) -> Array:
    """The errors for each x, the larger where two kernels must be right; infinite where the sign is wrong."""
    form, wide, _ = DTYPES[x.dtype.type]
    with np.errstate(all="ignore"):
        exact = function.wider(*(a.astype(wide) for a in arguments))
        # Infinity counts as what would be the next number after the largest: a power of two.
        beyond = np.ldexp(wide(1), round(math.log2(form.largest)))
        exact = np.where(np.abs(exact) > form.largest, np.copysign(beyond, exact), exact)
        exponents = np.maximum(np.frexp(exact)[1] - 1, round(math.log2(form.smallest_normal)))
        ulp = np.ldexp(wide(1), exponents - form.mantissa)
        worst = np.zeros(x.size)
        for kernel in function.kernels:
            values = kernel.compute(*arguments).astype(wide)
            values = np.where(np.isinf(values), np.copysign(beyond, values), values)
            found = np.where(values * exact < 0, np.inf, np.abs(values - exact) / ulp)
            low, high = kernel.domain(form)
            here = (x >= low) & (x <= high)
            worst = np.where(here & ~(found <= worst), np.where(np.isnan(found), np.inf, found), worst)
    return worst.astype(np.float64)


def exact_error(function: Function, x: Any, arguments: tuple[Any, ...]) -> float:
    """The same for one x, by mpmath."""
    form, worst = DTYPES[type(x)][0], 0.0
    exact = function.exact(*map(float, arguments))
    if not abs(exact) <= form.largest:
        return float(errors(function, np.full(16, x), tuple(np.full(16, a) for a in arguments))[0])
    exponent = max(mpmath.frexp(exact)[1] - 1, round(math.log2(form.smallest_normal)))
    for kernel in function.kernels:
        low, high = kernel.domain(form)
        value = float(kernel.compute(*(np.full(16, a) for a in arguments))[0])
        if low <= x <= high:
            error = abs(mpmath.mpf(value) - exact) * mpmath.mpf(2) ** (form.mantissa - exponent)
            worst = max(worst, float(error))
    return worst


def _worst_of_stream(name: str, dtype: Any, numbers: Callable[..., Iterator[Array]], stream: int) -> Any:
    function = BY_NAME[name]
    chunks, rng = numbers(function, dtype, stream), np.random.default_rng([1, stream])
    bad: list[tuple[float, Any]] = []  # the largest errors, and of which x
    found, tried = (-1.0, dtype(0), ()), 0
    while (x := _next(chunks, bad, dtype)) is not None:
        arguments = function.arguments(x, rng)
        error = errors(function, x, arguments)
        tried += x.size
        largest = np.argpartition(error, -8)[-8:]
        i = largest[error[largest].argmax()]
        found = max(found, (float(error[i]), x[i], tuple(a[i] for a in arguments)), key=lambda pair: pair[0])
        bad = sorted([*bad, *((float(error[i]), x[i]) for i in largest)], key=lambda pair: -pair[0])[:32]
    return found, tried


def _next(chunks: Any, bad: list[tuple[float, Any]], dtype: Any) -> Array | None:
    """The next chunk, telling a generator that asks what was the worst until now."""
    try:
        return chunks.send(np.array([x for _, x in bad], dtype) if bad else None)
    except StopIteration:
        return None


def worst(function: Function, dtype: Any, numbers: Callable[..., Iterator[Array]], each: Any = map) -> Worst:
    """The largest error of a function among numbers; the streams, if an executor's ``map`` is given, side by side."""
    streams = list(each(partial(_worst_of_stream, function.name, dtype, numbers), range(STREAMS)))
    _, x, arguments = max((found for found, _ in streams), key=lambda found: found[0])
    return Worst(exact_error(function, x, arguments), x, arguments, sum(n for _, n in streams))


# --- the tables -------------------------------------------------------------------------------------------------------
def tries(step: int, millions: float) -> Numbers:
    """What is tried of a function and a dtype: of one float32 one in ``step``, of the others so many millions."""
    hard = partial(hard_floats, chunks=max(1, round(millions * 1e6 / CHUNK / STREAMS)))

    def numbers(function: Function, dtype: Any) -> Any:
        # Three float32 are too many to try all.
        every = dtype is np.float32 and function.arguments is not _composed
        return partial(every_float, step=step) if every else hard

    return numbers


def rows(numbers: Numbers, each: Any) -> Iterator[list[str]]:
    """One for each function, for the page; printed as they come."""
    for function in FUNCTIONS:
        cells = [function.name, f"{function.promised} ulp"]
        for dtype in DTYPES:
            found = worst(function, dtype, numbers(function, dtype), each)
            cells += [f"{found.error:.3f}", f"{found.tried / 1e6:,.0f} M"]
            at = ", ".join(f"{x:.9g}" for x in found.arguments)
            print(f"{function.name}, {dtype.__name__}: {found.error:.4f} ulp of {found.tried:,} at {at}", flush=True)
        yield cells


def print_worst(numbers: Numbers, each: Any) -> None:
    """Print the lines of elementary.py's docstrings, and the arguments in decimal."""
    for function in FUNCTIONS:
        kernels, found = each_kernel_of(function), {}
        for dtype in DTYPES:
            found[dtype] = [worst(kernel, dtype, numbers(kernel, dtype), each) for kernel in kernels]
        for i, kernel in enumerate(kernels):
            print(f"Largest error of {kernel.name}:")
            for dtype, each_found in found.items():
                # What is hard for one kernel may be harder than what was found for another.
                error, arguments = max((exact_error(kernel, x, a), a) for _, x, a, _ in each_found)
                at = [float(x) for x in (arguments[-1:] if function.arguments is _alone else arguments)]
                stated = f"{error:.4f} ulp at {', '.join(map(short_hex, at))}, of {each_found[i].tried:,}"
                print(f"{dtype.__name__}: {stated}  # {', '.join(map(repr, at))}", flush=True)


def short_hex(x: float) -> str:
    """``float.hex`` without trailing zeros."""
    fraction, power = x.hex().split("p")
    return (fraction.rstrip("0").rstrip(".") if "." in fraction else fraction) + "p" + power


def main() -> None:
    """Measure; write, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worst", action="store_true", help="each kernel alone: print its largest error, and where")
    parser.add_argument("--quick", action="store_true", help="some numbers only, and print instead of writing")
    parser.add_argument("--millions", type=float, default=200, help="of float64 for each function or kernel")
    arguments = parser.parse_args()
    numbers = tries(1009, 1) if arguments.quick else tries(1, arguments.millions)
    with ProcessPoolExecutor() as executor:  # threads would wait for each other, in Python
        if arguments.worst:
            print_worst(numbers, executor.map)
            return
        lines = list(table(["", "promised", "float32", "tried", "float64", "tried"], rows(numbers, executor.map)))
    if arguments.quick:
        print("\n".join(lines))
    else:
        write_between(TESTS, "accuracy", lines)


if __name__ == "__main__":
    main()

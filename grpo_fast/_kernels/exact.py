"""Sums of float64 numbers without any rounding, in any order: added as integers in units of 2⁻¹⁰⁷⁴.

In a kernel the integer is spread over 64-bit limbs that overlap by half (as in Radford Neal's xsum, "Fast exact
summation using small and large superaccumulators", 2015), so that adding a number touches three limbs and carries
wait until the end. In Python it is one `int`.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .compiling import inlined
from .simd import bits, from_bits

#: Limbs of 32 bits in use: 2098 bits for the largest float64 in units of the least one, 64 for carries and sign; then
#: one for what no integer can hold.
LIMBS = 68
_SPECIAL = LIMBS
ROW = LIMBS + 1
_UNIT = 1 << 1074


@inlined
def add(row: Any, x: float) -> None:
    """Add x to the limbs ``row``, an int64 array of length `ROW`; safe for 2³⁰ numbers before `carry`."""
    pattern = np.int64(bits(x))
    exponent = (pattern >> 52) & 0x7FF
    if exponent == 0x7FF:  # 1, 2 and 4 stand for +inf, −inf and NaN
        row[_SPECIAL] |= 4 if x != x else (1 if x > 0.0 else 2)
        return
    fraction = pattern & 0xFFFFFFFFFFFFF
    if exponent > 0:
        fraction |= 1 << 52
        exponent -= 1
    limb = exponent >> 5
    shift = exponent & 31
    low = (fraction & 0xFFFFFFFF) << shift
    high = (fraction >> 32) << shift
    sign = -1 if pattern < 0 else 1
    row[limb] += sign * (low & 0xFFFFFFFF)
    row[limb + 1] += sign * ((low >> 32) + (high & 0xFFFFFFFF))
    row[limb + 2] += sign * (high >> 32)


@inlined
def join(row: Any, other: Any) -> None:
    """Add the limbs ``other`` to those of ``row``."""
    for limb in range(LIMBS):
        row[limb] += other[limb]
    row[_SPECIAL] |= other[_SPECIAL]


@inlined
def carry(row: Any) -> None:
    """Bring the limbs of ``row`` into 0 … 2³² − 1, two's complement, for `Exact.of_limbs`."""
    above = np.int64(0)
    for limb in range(LIMBS):
        above += row[limb]
        row[limb] = above & 0xFFFFFFFF
        above >>= 32


@inlined
def rounded(row: Any) -> Any:
    """The sum in the limbs of ``row``, after `carry`, rounded once, to the nearest float64: what `Exact` would say."""
    if row[_SPECIAL]:
        return np.inf if row[_SPECIAL] == 1 else (-np.inf if row[_SPECIAL] == 2 else np.nan)
    lowest = 0
    while lowest < LIMBS and row[lowest] == 0:
        lowest += 1
    negative = row[LIMBS - 1] >> 31 != 0
    highest = LIMBS - 1
    while highest > 0 and _digit(row, highest, lowest, negative) == 0:
        highest -= 1
    top = _digit(row, highest, lowest, negative)
    length = 0  # of top, in bits
    while top >> length:
        length += 1
    last = 32 * highest + length - 1  # the place of the leading bit, in units of 2⁻¹⁰⁷⁴
    below = _digit(row, highest - 1, lowest, negative)
    if last <= 52:  # exact, be it a subnormal number or not
        pattern = top << 32 | below if highest == 1 else top
    else:
        # The leading 64 bits, of which 53 stay.
        third = _digit(row, highest - 2, lowest, negative)
        leading = np.uint64(top << 32 | below) << np.uint64(32 - length) | np.uint64(third >> length)
        rest = np.int64(leading & np.uint64(0x7FF))
        pattern = np.int64(leading >> np.uint64(11))
        is_exact = third & ((1 << length) - 1) == 0 and lowest >= highest - 2
        if rest > 0x400 or (rest == 0x400 and not (is_exact and pattern & 1 == 0)):
            pattern += 1
        pattern += (last - 52) << 52  # the leading bit, at 2⁵², adds the 1 that the biased exponent lacks
        if last > 2097 or pattern >= 0x7FF << 52:
            return -np.inf if negative else np.inf
    return from_bits(np.uint64(pattern | (np.int64(negative) << 63)))


@inlined
def _digit(row: Any, limb: Any, lowest: Any, negative: Any) -> Any:
    """A limb of |the sum|, whose lowest that is not 0 is that number ``lowest``."""
    if limb < lowest:
        return np.int64(0)
    if negative:
        return (1 << 32) - row[limb] if limb == lowest else 0xFFFFFFFF - row[limb]
    return row[limb]


def rounded_sum(values: list[float]) -> float:
    """The sum of a few numbers, rounded once: what `Exact` would say."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # on the way to a finite sum, or ∞ − ∞
        return float(sum(map(Exact.of_float, values), Exact()))


class Exact(NamedTuple):
    """A sum of float64 numbers, exact: ``units``·2⁻¹⁰⁷⁴, and which infinities and NaN were among them."""

    units: int = 0
    special: int = 0

    def __repr__(self) -> str:  # rounded: it has hundreds of digits
        return f"Exact({float(self)!r})"

    @classmethod
    def of_limbs(cls, rows: np.ndarray) -> "list[Exact]":
        """The sums in rows of limbs, (sums, ROW), after `carry`."""
        digits = rows[:, :LIMBS].astype("<u4").tobytes()
        units = (digits[start : start + 4 * LIMBS] for start in range(0, len(digits), 4 * LIMBS))
        specials = rows[:, _SPECIAL].tolist()
        return [cls(int.from_bytes(u, "little", signed=True), s) for u, s in zip(units, specials, strict=True)]

    @classmethod
    def of_float(cls, x: float) -> "Exact":
        """The sum of the one number x."""
        if x - x != 0.0:
            return cls(0, 4 if x != x else (1 if x > 0.0 else 2))
        numerator, denominator = x.as_integer_ratio()
        return cls(numerator * (_UNIT // denominator), 0)

    def __add__(self, other: "Exact") -> "Exact":  # type: ignore[override]  # a tuple's joins
        return Exact(self.units + other.units, self.special | other.special)

    def __float__(self) -> float:
        """The sum rounded once, to the nearest float64."""
        if self.special:
            return {1: float("inf"), 2: float("-inf")}.get(self.special, float("nan"))
        try:
            return self.units / _UNIT
        except OverflowError:
            return float("inf") if self.units > 0 else float("-inf")

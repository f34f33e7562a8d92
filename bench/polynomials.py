"""Where the coefficients in grpo_fast/_kernels/elementary.py come from, and how good they are.

``python bench/polynomials.py`` (seconds) makes them again and prints them beside those that stand there: they are the
same to the last digit, but for the ½ before R, which is written as such. tests/test_polynomials.py holds them to that,
and to the errors stated there.

They interpolate the function at the Chebyshev nodes of an interval, which is nearly minimax:
Remez's exchange algorithm, also here, finds polynomials of the same degree whose largest errors are 2 to 4 % smaller.
That is less than what rounding the coefficients to float64 or float32 adds, and not worth results with other bits.

Fitted are P(z), and p/g² = (e^g − 1 − g)/g² = ½ + g·R(g) with its first coefficient, which rounds to ½ in both formats.
The ends of the intervals were not written down when the coefficients were first made. They were found again from the
coefficients, which determine them to 14 digits.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, reduce
from itertools import groupby
from typing import Any, NamedTuple

import mpmath
import numpy as np
from pages import table

from grpo_fast._kernels import elementary
from grpo_fast._kernels.elementary import LN2

BITS = 200  # of precision
POINTS = 2000  # the largest of an error is taken over so many and one


class Fit(NamedTuple):
    """A polynomial of elementary.py: what it approximates, where, and its coefficients from the lowest power on."""

    name: str
    function: Callable[[Any], Any]
    interval: tuple[float, float]
    coefficients: tuple[float, ...]
    dtype: type

    def rounded(self) -> tuple[float, ...]:
        """The coefficients in the format of the kernel."""
        return tuple(float(self.dtype(c)) for c in self.coefficients)


def artanh_tail(z: Any) -> Any:
    """P(z) = (2·artanh(s) − 2s)/s³ = 2/3 + 2z/5 + 2z²/7 + …, with z = s²."""
    return mpmath.hyp2f1(1, 1.5, 2.5, z) * 2 / 3


def exp_tail(g: Any) -> Any:
    """(e^g − 1 − g)/g² = 1/2! + g/3! + g²/4! + …."""
    return mpmath.hyp1f1(1, 3, g) / 2


#: s² for 2/3 ≤ 1 + f ≤ 3/2, and 0.4 % more of s; |g| ≤ ln 2/2, and 0.01 % more.
OF_RATIOS = 0.0, (1.004 * 0.2) ** 2
OF_EXPONENTS = -1.0001 * LN2 / 2, 1.0001 * LN2 / 2

FITS = [
    Fit("TAIL64", artanh_tail, OF_RATIOS, elementary.TAIL64, np.float64),
    Fit("TAIL32", artanh_tail, OF_RATIOS, elementary.TAIL32, np.float32),
    Fit("REST_OF_EXP64", exp_tail, OF_EXPONENTS, (0.5, *elementary.REST_OF_EXP64), np.float64),
    Fit("REST_OF_EXP32", exp_tail, OF_EXPONENTS, (0.5, *elementary.REST_OF_EXP32), np.float32),
]


# --- how they are made ------------------------------------------------------------------------------------------------
@mpmath.workprec(BITS)
def interpolation(fit: Fit) -> list[Any]:
    """The coefficients of the polynomial that is right at the Chebyshev nodes."""
    low, high = map(mpmath.mpf, fit.interval)
    count = len(fit.coefficients)
    nodes = [(low + high - (high - low) * mpmath.cos(mpmath.pi * (k + 0.5) / count)) / 2 for k in range(count)]
    powers = mpmath.matrix([[x**power for power in range(count)] for x in nodes])
    return list(mpmath.lu_solve(powers, mpmath.matrix([fit.function(x) for x in nodes])))


@mpmath.workprec(BITS)
def minimax(fit: Fit) -> tuple[list[Any], float]:
    """The coefficients of the polynomial whose largest error is least, and that error, by Remez's algorithm."""
    x, values = samples(fit.function, fit.interval)
    count = len(fit.coefficients)
    nodes = [round(i * POINTS / count) for i in range(count + 1)]
    while True:
        # The polynomial whose errors at the nodes have the same size, the level, and alternating signs.
        rows = [[*(x[i] ** power for power in range(count)), (-1) ** j] for j, i in enumerate(nodes)]
        *coefficients, level = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([values[i] for i in nodes]))
        found = errors(fit, coefficients)
        # No polynomial has smaller errors at all nodes (de la Vallée Poussin): if this one has none larger, it is best.
        if max(map(abs, found)) <= abs(level) * (1 + mpmath.mpf(2) ** -50):
            return coefficients, float(abs(level))
        nodes = _extrema(found, count + 1)


def _extrema(found: list[Any], count: int) -> list[int]:
    """Where the error is largest between two changes of its sign; ``count`` such places."""
    runs = [list(run) for _, run in groupby(range(len(found)), key=lambda i: found[i] > 0)]
    largest = [max(run, key=lambda i: abs(found[i])) for run in runs]
    while len(largest) > count:
        largest.pop(0 if abs(found[largest[0]]) < abs(found[largest[-1]]) else -1)
    return largest


# --- how good they are ------------------------------------------------------------------------------------------------
@cache
@mpmath.workprec(BITS)
def samples(function: Callable[[Any], Any], interval: tuple[float, float]) -> tuple[list[Any], list[Any]]:
    """Points of an interval, its ends included and denser there, and the values of a function."""
    low, high = map(mpmath.mpf, interval)
    x = [(low + high - (high - low) * mpmath.cos(mpmath.pi * i / POINTS)) / 2 for i in range(POINTS + 1)]
    return x, [function(z) for z in x]


@mpmath.workprec(BITS)
def errors(fit: Fit, coefficients: Sequence[Any]) -> list[Any]:
    """The errors of the polynomial with these coefficients, in exact arithmetic."""
    descending = list(map(mpmath.mpf, coefficients))[::-1]
    x, values = samples(fit.function, fit.interval)

    def polynomial(z: Any) -> Any:
        return reduce(lambda total, coefficient: total * z + coefficient, descending)

    return [polynomial(z) - value for z, value in zip(x, values, strict=True)]


def largest_error(fit: Fit, coefficients: Sequence[Any]) -> float:
    """The largest of them, without its sign."""
    return float(max(map(abs, errors(fit, coefficients))))


# --- the tables -------------------------------------------------------------------------------------------------------
def main() -> None:
    """Make and print them."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    summary = []
    for fit in FITS:
        best, least = minimax(fit)
        made = interpolation(fit)
        rows = zip(*[map(repr, map(float, column)) for column in (best, made, fit.coefficients)], strict=True)
        print(f"{fit.name}, {fit.interval[0]:.7g} to {fit.interval[1]:.7g}\n")
        head = ["power", "minimax", "Chebyshev nodes", "elementary.py"]
        print("\n".join(table(head, ([str(power), *row] for power, row in enumerate(rows)))))
        found = [largest_error(fit, coefficients) for coefficients in (made, fit.coefficients, fit.rounded())]
        above = f"{100 * (found[0] / least - 1):.1f} %"
        summary.append([fit.name, *(f"{error:.3e}" for error in [least, *found]), above])
    print("The largest errors\n")
    head = ["", "minimax", "Chebyshev nodes", "elementary.py", "rounded to the format", "nodes above minimax"]
    print("\n".join(table(head, summary)))


if __name__ == "__main__":
    main()

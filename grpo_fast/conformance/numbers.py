"""Numbers as they were meant: what a measurement with a known error rounds to; and where a function changes."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def tidy(x: float, error: float) -> float:
    """The number of the fewest digits that is within the relative error of ``x``; ``x`` itself if there is none.

    One of five digits or fewer may be off by the rounding of float32, whatever the error: it was meant so.
    """
    if x == 0 or not np.isfinite(x):
        return x
    for digits in range(1, 16):
        rounded = float(f"{x:.{digits}g}")
        if abs(rounded - x) <= error * abs(x):
            return rounded
        if digits <= 5 and abs(rounded - x) <= 1.2e-7 * abs(x):  # it was meant so, and computed in float32
            return rounded
    return x


def long_numbers(options: Mapping[str, Any]) -> bool:
    """Whether one of the numbers is of more than six digits, so that it is known within its error only."""
    numbers = [x for option in options.values() for x in (option if isinstance(option, tuple) else [option])]
    floats = [float(x) for x in numbers if isinstance(x, (int, float))]
    return any(np.isfinite(x) and float(f"{x:.6g}") != x for x in floats)


def is_round(x: float, error: float) -> bool:
    """Whether ``x`` is within the error of a multiple of ½."""
    return abs(2 * x - round(2 * x)) <= 2 * error * max(1.0, abs(x))


def bisect(changed: Callable[[float], bool], at: float, beyond: float) -> float:
    """Where, between a place where ``changed`` is False and one where it is True, it becomes True."""
    for _ in range(60):
        middle = (at + beyond) / 2
        if middle in (at, beyond):
            break
        if changed(middle):
            beyond = middle
        else:
            at = middle
    return (at + beyond) / 2

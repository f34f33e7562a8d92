"""What shards add up to: dataclasses that add field by field, exactly, or say why they cannot; what is made of sums."""

import math
import sys
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, Self

from .terms.option import Option

#: Below it, squares have lost digits, being subnormal.
_LEAST_SQUARES = sys.float_info.min / sys.float_info.epsilon


def added_by(how: Callable[[Any, Any], Any], **options: Any) -> Any:
    """A field of which two values are added by that function; ``options`` are those of any field."""
    return field(metadata={"added_by": how}, **options)


class Additive:
    """Dataclasses that add field by field: with +, unless a field says how, or says that it must be the same."""

    def __add__(self, other: object) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        total = {}
        for f in fields(self):  # type: ignore[arg-type]  # those that inherit it are dataclasses
            a, b = getattr(self, f.name), getattr(other, f.name)
            how = f.metadata.get("added_by")
            if how is same and a != b:
                name, a, b = _difference(f.name, a, b)
                raise ValueError(f"{type(self).__name__} of different {name} cannot be added: {a} and {b}")
            total[f.name] = how(a, b) if how else a + b
        return type(self)(**total)

    def __radd__(self, other: object) -> Self:  # sum() begins with 0
        return self if other == 0 else NotImplemented


def _difference(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The name and the values of a field; of options, of the first one that differs."""
    if isinstance(a, Option):
        fields: tuple[str, ...] = a._fields  # type: ignore[attr-defined]  # all of them are named tuples
        return next((x, y, z) for x, y, z in zip(fields, a, b, strict=True) if y != z)
    return name, a, b


def same(a: Any, _: Any) -> Any:
    """The value that both must have: others cannot be added."""
    return a


def if_known(a: int | None, b: int | None) -> int | None:
    """The sum, unless one is None."""
    return None if a is None or b is None else a + b


def both_or_neither(a: Any, b: Any) -> Any:
    """The sum; None if both are None, else the ValueError."""
    if (a is None) != (b is None):
        raise ValueError("Stats with and without rollout_correction cannot be added")
    return None if a is None else a + b


def each(a: Any, b: Any) -> Any:
    """The sums of two tuples, field by field."""
    total = (x + y for x, y in zip(a, b, strict=True))
    return a._make(total) if hasattr(a, "_make") else tuple(total)


def effective_fraction(total: float, squares: float, count: int) -> float:
    """The effective sample size of ``count`` weights as a fraction of them, of their sum and the sum of their squares.

    NaN where these are not normal numbers of float64, as where all weights are 0.
    """
    squares *= count
    # Of equal weights, rounding makes more than 1.
    return min(total * total / squares, 1.0) if _LEAST_SQUARES < squares < math.inf else math.nan

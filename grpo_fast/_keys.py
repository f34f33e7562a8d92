"""The column by which results are told apart, ``by="step"``: what its values may be, and the rows of each value."""

import re
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from ._arrow import column_names, column_of, pa, types, without_string_views
from ._checks import did_you_mean

#: A value of such a column; None where it is null.
Value: TypeAlias = int | str | None


class Kind(Enum):
    """What such a column holds."""

    INT = "int"
    TEXT = "string"
    NULL = "null"


def kind_of(name: str, column: str, column_type: Any) -> Kind:
    """The kind of a column of the file of that name; a ValueError if it is one by which nothing is told apart."""
    kind = _kind(column_type)
    if kind is None:
        raise ValueError(f"{name}: by must be a column of ints or strings, got column {column!r} of {column_type}")
    return kind


def may_tell_apart(column_type: Any) -> bool:
    """Whether a column of that type is one of a `Kind`."""
    return _kind(column_type) is not None


def _kind(column_type: Any) -> Kind | None:
    inner = column_type.value_type if types.is_dictionary(column_type) else column_type
    if types.is_integer(inner):
        return Kind.INT
    if types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner):
        return Kind.TEXT
    return Kind.NULL if types.is_null(inner) else None


def missing_column(name: str, column: str, schema: Any, partitions: Sequence[str], argument: str) -> ValueError:
    """The error for a file that has no such column, nor such a hive partition in its path, for the argument."""
    names = [*column_names(schema), *partitions]
    return ValueError(
        f"{name}: column {column!r} (for {argument}) is missing; it has {', '.join(names)}{did_you_mean(column, names)}"
    )


def typed_partition(values: Sequence[str]) -> Callable[[str], Value]:
    """What makes a value of the text in a path: an int if all of them are ints, else the text."""
    return int if all(re.fullmatch(r"[+-]?[0-9]+", value) for value in values) else str


def by_value(records: Any, column: str) -> tuple[Any, list[tuple[Value, int, int]]]:
    """The rows so that those of a value lie together, in order; and each value, with its first row and its last + 1."""
    records = without_string_views(records)
    keys = column_of(records, column)
    if types.is_dictionary(keys.type):
        keys = keys.dictionary_decode()
    kind_of("the rows", column, keys.type)  # of JSON it is known only now
    encoded = keys.dictionary_encode(null_encoding="encode")
    values, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    starts = np.append(0, np.flatnonzero(np.diff(codes)) + 1)
    if len(starts) > len(values):  # those of a value do not lie together
        order = np.argsort(codes, kind="stable")
        records, codes = records.take(pa.array(order)), codes[order]
        starts = np.append(0, np.flatnonzero(np.diff(codes)) + 1)
    ends = zip(starts.tolist(), [*starts[1:].tolist(), len(codes)], strict=True)
    return records, [(values[codes[start]], start, stop) for start, stop in ends]


class ByValue(dict[Value, Any]):
    """Results by the value of a column; they add value by value."""

    def __iadd__(self, other: "ByValue") -> "ByValue":
        for value, result in other.items():
            self[value] = self[value] + result if value in self else result
        return self

    def in_order(self) -> dict[Value, Any]:
        """The results, ints and strings in order, what belongs to null last."""
        values: list[Any] = [value for value in self if value is not None]
        if len({isinstance(value, str) for value in values}) > 1:  # of JSON Lines it is known only now
            raise ValueError("by must be of one type in all files, got ints and strings")
        values.sort()
        return {value: self[value] for value in [*values, *([None] if None in self else [])]}

"""Rollout files, Parquet or Arrow IPC, as batches of arrays; and errors that name file, row group, row and column.

First which files and which of their columns, then their batches one after the other, last the arrays of a batch.
"""

import glob
import os
from collections.abc import Generator, Iterable, Mapping
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._checks import Array
from ._formats import UNREADABLE, File, is_list, opened, types

Paths: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

PROBABILITIES = ("rhos", "A", "pi_theta_old", "pi_theta_ref")
LOG_PROBABILITIES = ("logps", "old_logps", "advantages", "ref_logps", "mask", "rollout_is_weights")
#: Read where a file has them; the others must be there.
_OPTIONAL = ("mask", "rollout_is_weights")
#: One number for each sequence, unless they are lists.
_PER_SEQUENCE = ("advantages", "rollout_is_weights")


# --- which files, which columns ---------------------------------------------------------------------------------------
def find(paths: Paths) -> list[str]:
    """The files that paths and globs name, in order.

    Raises
    ------
    FileNotFoundError, ValueError
        A path or glob names no file, or two name the same one, which would count twice.
    """
    found: dict[str, str] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        name = os.fspath(path)
        names = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not names:
            raise FileNotFoundError(f"no such file: {name}")
        for one in names:
            if os.path.isdir(one):
                raise ValueError(f"{one} is a directory; name its files, for example {os.path.join(one, '*.parquet')}")
            if os.path.realpath(one) in found:
                raise ValueError(f"{one} is named twice and would be counted twice")
            found[os.path.realpath(one)] = one
    if not found:
        raise ValueError("paths must name at least one file, got none")
    return list(found.values())


class Rollouts(NamedTuple):
    """What is read from each file."""

    columns: dict[str, str]  # argument: column
    sequences: bool  # whether a row is a sequence, and its per-token columns lists

    @property
    def renamed(self) -> str:
        """For error messages: which arguments are called otherwise in the file."""
        names = [f"{argument} is column {column!r}" for argument, column in self.columns.items() if argument != column]
        return f" ({', '.join(names)})" if names else ""


class Part(NamedTuple):
    """A row group of a Parquet file, or a record batch of an Arrow file: what one worker takes on at a time."""

    path: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"


def kind_of(path: str, columns: Mapping[str, str | None] | None) -> tuple[str, ...]:
    """PROBABILITIES or LOG_PROBABILITIES: which arguments ``columns`` names, or else which columns the file has."""
    if columns is not None and not isinstance(columns, Mapping):
        raise TypeError(f"columns must map arguments to names of columns, got {columns!r}")
    for argument, column in (columns or {}).items():
        if argument not in PROBABILITIES + LOG_PROBABILITIES:
            raise ValueError(
                f"columns must name arguments among {', '.join(PROBABILITIES + LOG_PROBABILITIES)}; got {argument!r}"
            )
        if not isinstance(column, str) and (column is not None or argument in ("rhos", "A", "logps", "advantages")):
            raise TypeError(f"columns[{argument!r}] must be the name of a column, got {column!r}")
    names = list(columns or opened(path).schema.names)
    kinds = [kind for kind in (PROBABILITIES, LOG_PROBABILITIES) if set(names) & set(kind)]
    if not columns:  # then the ratio or the log-probability decides: others may happen to be called A or mask
        kinds = [kind for kind in kinds if kind[0] in names]
    if len(kinds) != 1:
        found = "both" if kinds else "neither"
        wanted = "name the columns of one of them" if columns else "choose with columns={'logps': 'logps'}, for example"
        raise ValueError(
            f"{'columns' if columns else path} must have either rhos, A, … (probabilities) or logps, advantages, … "
            f"(log-probabilities), got {found} in {', '.join(names) or 'nothing'}: {wanted}"
        )
    return kinds[0]


def plan(
    files: list[str], kind: tuple[str, ...], unread: set[str], columns: Mapping[str, str | None] | None
) -> tuple[Rollouts, list[Part], int]:
    """What to read, the parts to read it from, and how many rows there are; every file's columns are checked."""
    named = {argument: argument for argument in kind} | dict(columns or {})
    wanted = {argument: column for argument, column in named.items() if column is not None and argument not in unread}
    parts, rows, first = [], 0, None
    for path in files:
        file = opened(path)
        rollouts = _checked(path, file.schema, wanted, set(columns or {}))
        first = first or rollouts
        if rollouts != first:
            raise ValueError(f"{path} differs from {files[0]} in its columns: {_told(rollouts)} beside {_told(first)}")
        parts += [Part(path, file.unit, i) for i in range(file.units)]
        rows += file.rows
    if first is None or not rows:
        raise ValueError(f"{', '.join(files)}: no rows")
    return first, parts, rows


def _checked(path: str, schema: Any, wanted: Mapping[str, str], explicit: set[str]) -> Rollouts:
    """The columns that one file has of those wanted, or a ValueError."""
    columns = {}
    for argument, column in wanted.items():
        places = schema.get_all_field_indices(column)
        if not places and argument in _OPTIONAL and argument not in explicit:
            continue
        if len(places) != 1:
            what = "missing" if not places else "there more than once"
            called = "" if column == argument else f" (for {argument})"
            unused = f"; if there is none, columns={{{argument!r}: None}}" if argument == "old_logps" else ""
            raise ValueError(f"{path}: column {column!r}{called} is {what}; it has {', '.join(schema.names)}{unused}")
        columns[argument] = column
    lists = {}
    for argument, column in columns.items():
        of = schema.field(column).type
        lists[argument] = is_list(of)
        value = of.value_type if lists[argument] else of
        number = types.is_floating(value) or types.is_integer(value)
        if not number and not (argument == "mask" and types.is_boolean(value)):
            allowed = "bools or 0/1" if argument == "mask" else "real numbers"
            raise ValueError(f"{path}: column {column!r} must hold {allowed}, or lists of them, got {of}")
    ruling = next(iter(columns))
    for argument, listed in lists.items():
        if listed != lists[ruling] and not (lists[ruling] and argument in _PER_SEQUENCE):
            shape = ("numbers", "lists")
            raise ValueError(
                f"{path}: column {columns[argument]!r} holds {shape[listed]}, but column {columns[ruling]!r} "
                f"{shape[lists[ruling]]}: either all hold one number a row, or all a list"
            )
    return Rollouts(columns, lists[ruling])


def _told(rollouts: Rollouts) -> str:
    return f"{'lists' if rollouts.sequences else 'numbers'} in {', '.join(rollouts.columns.values())}"


# --- batches ----------------------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    """Some rows of a part."""

    part: Part
    first_row: int
    batch: Any  # pyarrow.RecordBatch


def pieces(parts: Iterable[Part], rollouts: Rollouts, batch_size: int | None, threads: bool) -> Generator[Piece]:
    """The parts' rows, batch by batch; ``threads`` is whether pyarrow may decode columns on several."""
    columns = list(rollouts.columns.values())
    for path, group in groupby(parts, key=lambda part: part.path):
        file = opened(path)
        _checked(path, file.schema, rollouts.columns, set(rollouts.columns))  # on a worker, or meanwhile, it may differ
        for part in group:
            first_row = 0
            try:
                for batch in file.batches(part.number, columns, batch_size, threads):
                    yield Piece(part, first_row, batch)
                    first_row += batch.num_rows
            except UNREADABLE as error:
                column = _culprit(file, part.number, columns)
                raise ValueError(f"{part}{column}: cannot be read: {error}") from error


def _culprit(file: File, index: int, columns: list[str]) -> str:
    """Which column cannot be read, found by reading one after the other."""
    for column in columns:
        try:
            for _ in file.batches(index, [column], None, False):
                pass
        except UNREADABLE:
            return f", column {column!r}"
    return ""


# --- the arrays of a batch --------------------------------------------------------------------------------------------
def arrays(batch: Any, rollouts: Rollouts) -> dict[str, Array]:
    """The batch as arguments: flat arrays, on pyarrow's memory but for masks of bools; ``cu_seqlens`` of lists.

    Raises
    ------
    ValueError
        There is a null, or lists in one row differ in length.
    """
    result: dict[str, Array] = {}
    bounds, ruling = None, ""
    for argument, column in rollouts.columns.items():
        values = batch.column(column)
        if values.null_count:
            raise ValueError(f"column {column!r} has a null")
        listed = is_list(values.type)
        if listed:
            values, own = _values_and_bounds(values)
            if values.null_count:
                raise ValueError(f"column {column!r} has a null in a list")
            if bounds is None:
                bounds, ruling = own, column
            elif not np.array_equal(own, bounds):
                row = int((np.diff(own) != np.diff(bounds)).argmax())
                lengths = [int(b[row + 1] - b[row]) for b in (own, bounds)]
                raise ValueError(
                    f"lists must be of one length, got {lengths[0]} in column {column!r}, {lengths[1]} in {ruling!r}"
                )
        numbers = values.to_numpy(zero_copy_only=not types.is_boolean(values.type))
        if not listed and bounds is not None and bounds[-1] == len(batch):
            # As many tokens as sequences: grpo_loss would take these for one per token.
            numbers = np.repeat(numbers, np.diff(bounds))
        result[argument] = numbers
    if bounds is not None:
        result["cu_seqlens"] = bounds
    return result


def _values_and_bounds(lists: Any) -> tuple[Any, Array]:
    """The numbers in an array of lists, and where each list of them begins and ends, from 0."""
    if types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        first, bounds = lists.offset * size, np.arange(len(lists) + 1) * size
    else:
        offsets = lists.offsets.to_numpy()
        first, bounds = int(offsets[0]), offsets.astype(np.int64) - offsets[0]
    return lists.values.slice(first, int(bounds[-1])), bounds

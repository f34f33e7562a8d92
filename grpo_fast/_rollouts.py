"""Rollout files, and tables in memory, as batches of arrays; errors name file, row group and, if possible, column.

What is read, `_plan` has found out: here are the row groups batch by batch, and then the arrays of a batch.
"""

from collections.abc import Generator, Iterable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ._arrow import UNREADABLE, column_of, is_list, is_list_view, types
from ._checks import Array, counts_of, refuse_unless_mask
from ._columns import MAY_BE_NULL, PER_SEQUENCE
from ._formats import OpenFile, opened
from ._layouts import ColumnLayout, layout_of
from ._plan import RowGroup


# --- row groups, batch by batch ---------------------------------------------------------------------------------------
class RowBatch(NamedTuple):
    """Some rows of a row group, which are read and computed together."""

    row_group: RowGroup
    first_row: int  # within the row group
    records: Any  # the rows: a pyarrow.RecordBatch

    def part(self, start: int, count: int) -> "RowBatch":
        """So many of the rows from ``start`` on."""
        return self._replace(first_row=self.first_row + start, records=self.records.slice(start, count))

    def arrays(self) -> dict[str, Array]:
        """The arguments that these rows hold."""
        return arrays_of(self.records, self.row_group.layout)

    def where(self, row: int) -> str:
        """Where one of the rows is, for messages: within its row group, if its file has such."""
        first = self.first_row if self.row_group.noun else self.row_group.first_row + self.first_row
        return f"{self.row_group}, row {first + row}"


def row_batches(row_groups: Iterable[RowGroup], batch_size: int | None, use_threads: bool) -> Generator[RowBatch]:
    """Read the row groups, and yield their rows in order, in batches of about ``batch_size``.

    With ``use_threads`` pyarrow may decode columns on several threads. Raises the ValueErrors of `plan`, and one that
    names row group and, if possible, column, where the file cannot be read.
    """
    for (source, layout), of_one_file in groupby(row_groups, key=lambda x: (x.source, x.layout)):
        columns = layout.names
        wanted: dict[str, tuple[str, ...]] = {argument: (column,) for argument, column in layout.columns.items()}
        if layout.more_masks:
            wanted["mask"] += layout.more_masks
        file = opened(source)
        # It was checked by `plan`, but may have changed since, or be another one on a worker's machine.
        layout_of(str(source), file.schema, wanted, set())
        for row_group in of_one_file:
            first_row = 0
            try:
                for records in file.batches(row_group.number, columns, batch_size, use_threads):
                    yield RowBatch(row_group, first_row, records)
                    first_row += records.num_rows
            except UNREADABLE as error:
                column = _unreadable_column(file, row_group.number, columns)
                where = f"{row_group}, column {column!r}" if column is not None else str(row_group)
                raise ValueError(f"{where}: cannot be read: {error}") from error


def _unreadable_column(file: OpenFile, number: int, columns: list[str]) -> str | None:
    """The first column of row group ``number`` that cannot be read by itself; None if all can. Reads them to see."""
    for column in columns:
        try:
            for _ in file.batches(number, [column], None, False):
                pass
        except UNREADABLE:
            return column
    return None


# --- the arrays of a batch --------------------------------------------------------------------------------------------
def arrays_of(records: Any, layout: ColumnLayout) -> dict[str, Array]:
    """The arguments by name: the numbers of each column as a flat array; of lists, ``cu_seqlens``, too.

    The arrays are on pyarrow's memory, but for list views, masks of bools and numbers of which some are null. A null
    is NaN where it is masked, or of a sequence without tokens, or stands for a number that is missing.

    Raises
    ------
    ValueError
        There is another null, lists in one row differ in length, or one of several masks holds other than 0 and 1.
    """
    arguments: dict[str, Array] = {}
    in_lists: dict[str, bool] = {}
    nulls: dict[str, Array] = {}  # where they are, for arguments that have some
    first, reference_column = next(iter(layout.columns.items()))  # which has one number for each token
    bounds = None
    for argument, column in [*layout.columns.items(), *(("mask", column) for column in layout.more_masks)]:
        values = column_of(records, column)
        in_lists[argument] = is_list(values.type)
        _refuse_unless_as_planned(argument, column, values.type, layout)
        if bounds is not None and argument in MAY_BE_NULL and values.null_count:
            arguments[argument] = _with_missing_lists(values, column, bounds, reference_column)
            continue
        if in_lists[argument]:
            if values.null_count:
                raise ValueError(f"column {column!r} has a null")
            values, own_bounds = _values_and_bounds(values)
            if bounds is None:
                bounds = own_bounds
            elif not np.array_equal(own_bounds, bounds):
                raise _unequal_lengths(column, own_bounds, reference_column, bounds)
        if values.null_count:
            if argument == "mask":
                raise ValueError(f"column {column!r} has a null{' in a list' if in_lists[argument] else ''}")
            if argument not in MAY_BE_NULL:
                nulls[argument] = values.is_null().to_numpy(zero_copy_only=False)
        copied = values.null_count or types.is_boolean(values.type) or types.is_null(values.type)
        array = values.to_numpy(zero_copy_only=not copied)
        if array.dtype == object:  # of pyarrow's type null: there are none, or all are masked
            array = np.full(array.shape, np.nan)
        if argument == "mask" and layout.more_masks:  # their product is one of bools
            refuse_unless_mask(array, array.shape, f" in column {column!r}")
            array = array.astype(np.bool_) & arguments.get("mask", np.True_)
        arguments[argument] = array
    for argument, is_null in nulls.items():
        keep = arguments["mask"] != 0 if "mask" in arguments else np.ones(arguments[first].size, np.bool_)
        if bounds is not None and not in_lists[argument]:  # one for each sequence, of which some have no tokens
            keep = counts_of(keep, bounds) > 0
        if (is_null & keep).any():
            within = " in a list" if in_lists[argument] else ""
            masked = ", which is not masked" if "mask" in arguments else ""
            raise ValueError(f"column {layout.columns[argument]!r} has a null{within}{masked}")
    if bounds is not None:
        arguments["cu_seqlens"] = bounds
        for argument in arguments.keys() & PER_SEQUENCE:  # in shapes of which grpo_loss knows what they are
            arguments[argument] = arguments[argument].reshape((1, -1) if in_lists[argument] else (-1, 1))
    return arguments


def rows_of(arrays: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
    """Those of the rows from ``start`` to before ``stop``, of what `arrays_of` has made."""
    bounds = arrays.get("cu_seqlens")
    if bounds is None:
        return {name: x[start:stop] for name, x in arrays.items()}
    first, last = int(bounds[start]), int(bounds[stop])
    part = {name: x[first:last] for name, x in arrays.items() if x.ndim == 1}
    for name, x in arrays.items():
        if x.ndim == 2:  # per token, (1, N), or per sequence, (S, 1)
            part[name] = x[start:stop] if len(x) == len(bounds) - 1 and x.shape[1] == 1 else x[:, first:last]
    return part | {"cu_seqlens": bounds[start : stop + 1] - first}


def _refuse_unless_as_planned(argument: str, column: str, kind: Any, layout: ColumnLayout) -> None:
    """Raise the ValueError for a column of JSON Lines that was null at first, and turns out not to fit."""
    listed = is_list(kind)
    misplaced = listed != layout.rows_are_sequences and argument not in PER_SEQUENCE and not types.is_null(kind)
    if misplaced or types.is_string(kind) or (listed and not layout.rows_are_sequences):
        what = "lists of real numbers" if layout.rows_are_sequences else "real numbers"
        raise ValueError(f"column {column!r} must hold {what}, got {kind}")


def _with_missing_lists(lists: Any, column: str, bounds: Array, reference_column: str) -> Array:
    """The numbers in an array of lists, a null among which is as many NaNs as its row has tokens."""
    lengths = np.diff(bounds)
    if types.is_null(lists.type):
        return np.full(bounds[-1], np.nan)
    there = lists.is_valid().to_numpy(zero_copy_only=False)
    _, of_others = _values_and_bounds(lists.drop_null())
    own = lengths.copy()
    own[there] = np.diff(of_others)
    if not np.array_equal(own, lengths):
        raise _unequal_lengths(column, np.append(0, np.cumsum(own)), reference_column, bounds)
    numbers = lists.flatten().to_numpy(zero_copy_only=False)  # without those of nulls
    found = np.full(bounds[-1], np.nan, numbers.dtype if numbers.dtype.kind == "f" else np.float64)
    found[np.repeat(there, lengths)] = numbers
    return found


def _unequal_lengths(column: str, bounds: Array, reference_column: str, reference_bounds: Array) -> ValueError:
    """The error that names the lengths of the first two lists in one row that differ in them."""
    row = int((np.diff(bounds) != np.diff(reference_bounds)).argmax())
    length, reference_length = (int(b[row + 1] - b[row]) for b in (bounds, reference_bounds))
    return ValueError(
        f"lists must be of one length, got {length} in column {column!r}, {reference_length} in {reference_column!r}"
    )


def _values_and_bounds(lists: Any) -> tuple[Any, Array]:
    """The numbers in an array of lists, and where each list of them begins and ends, from 0."""
    if is_list_view(lists.type):
        return lists.flatten(), np.append(0, np.cumsum(lists.sizes.to_numpy(), dtype=np.int64))
    if types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        first, bounds = lists.offset * size, np.arange(len(lists) + 1, dtype=np.int64) * size
    else:
        offsets = lists.offsets.to_numpy()
        first, bounds = int(offsets[0]), offsets.astype(np.int64) - offsets[0]
    return lists.values.slice(first, int(bounds[-1])), bounds

"""Where rollouts are: files of this machine or of a file system of pyarrow, and tables in memory.

A table is whatever has Arrow's C stream, ``__arrow_c_stream__``: of pandas, polars, pyarrow, duckdb …
"""

import os
import re
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote


def printable(path: str) -> str:
    """The path as messages have it: bytes in it that are not UTF-8, which nobody could print, as backslashes."""
    return os.fsencode(path).decode(errors="backslashreplace")


class File(NamedTuple):
    """A file by its path, on this machine or on a file system of pyarrow."""

    path: str
    filesystem: Any = None  # None: this machine's

    def __str__(self) -> str:
        return printable(self.path)

    def opened(self) -> Any:
        """The file as pyarrow reads it."""
        if self.filesystem is not None:
            return self.filesystem.open_input_file(self.path)
        import pyarrow

        return pyarrow.OSFile(os.fsencode(self.path))  # from a str it would make UTF-8, which names need not be

    def beginning(self, size: int) -> bytes:
        """The first bytes of the file; raises the OSError if it cannot be opened."""
        if self.filesystem is None:
            with open(self.path, "rb") as file:
                return file.read(size)
        with self.opened() as file:
            found: bytes = file.read(size)
            return found

    def partitions(self) -> dict[str, str | None]:
        """The keys and values of hive partitions, ``key=value`` among the folders on the way; null is None."""
        pairs = (part.split("=", 1) for part in re.split(r"[/\\]", self.path)[:-1] if re.match(r"[^=]+=", part))
        values = {key: unquote(value) for key, value in pairs}
        return {key: None if value == "__HIVE_DEFAULT_PARTITION__" else value for key, value in values.items()}


class Table:
    """A table in memory, or on its way there: read once, in the batches in which it comes.

    It stands where an open file does, as `_formats.ParquetFile`, whose attributes it has.
    """

    row_group_name = ""  # in error messages: there is only one
    row_group_count = 1

    def __init__(self, name: str, reader: Any, rows: int | None, stream: Any = None) -> None:
        self._name, self._reader, self.rows = name, reader, rows
        self._stream = stream  # if it can be read once, and was given to us
        self.schema = reader.schema

    def __str__(self) -> str:
        return self._name

    def first_rows(self) -> list[int]:
        return [0]

    def partitions(self) -> dict[str, str | None]:
        return {}

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` of the table as pyarrow.RecordBatches, of ``batch_size`` rows at most."""
        from ._arrow import in_parts, select  # which needs pyarrow

        for records in self._read():
            yield from in_parts(select(records, columns), columns, batch_size)

    def pieces(self) -> Iterator["Table"]:
        """The table batch by batch: what can be handed to another process."""
        for records in self._read():
            yield _table_of_batches(self._name, records.schema, [records])

    def _read(self) -> Any:
        if self._stream is not None:
            _READ.add(self._stream)
        return self._reader

    def __reduce__(self) -> Any:
        return _table_of_batches, (self._name, self.schema, list(self._read()))


def _table_of_batches(name: str, schema: Any, records: list[Any]) -> Table:
    import pyarrow

    reader = pyarrow.RecordBatchReader.from_batches(schema, records)
    return Table(name, reader, sum(x.num_rows for x in records))


#: What rollouts come from.
Source: TypeAlias = File | Table


#: The streams that were read: they have no rows any more, and do not say so.
_READ: weakref.WeakSet[Any] = weakref.WeakSet()


def table_of(value: Any) -> Table | None:
    """The table that ``value`` is, or None if it is none; a TypeError if it has the protocol but no columns.

    A ValueError if it is a stream that was read already.
    """
    package, kind = type(value).__module__.partition(".")[0], type(value).__name__
    if package == "datasets" and hasattr(value, "with_format") and hasattr(value, "__len__"):
        value = value.with_format("arrow")[:]  # which has no C stream itself (5.2), but is a table of pyarrow's within
    if not hasattr(value, "__arrow_c_stream__"):
        return None
    import pyarrow

    if isinstance(value, pyarrow.RecordBatch):
        value = pyarrow.Table.from_batches([value])
    name = f"the {kind} of {package}"
    stream = value if isinstance(value, pyarrow.RecordBatchReader) else None
    if stream is not None and stream in _READ:
        raise ValueError(
            f"{name} was read already, and a stream gives its rows once: make it anew, or hand over a table"
        )
    try:
        reader = pyarrow.RecordBatchReader.from_stream(value)
    except (pyarrow.ArrowException, TypeError) as error:
        raise TypeError(f"paths must be files or tables, got {name}, which has no columns: {error}") from error
    rows = len(value) if hasattr(value, "__len__") else None
    return Table(name, reader, rows, stream)

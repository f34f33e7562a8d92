"""The two formats of rollout files, Parquet and Arrow IPC: their columns, and their rows in batches.

Everything here, in `_plan` and in `_rollouts` needs pyarrow. A *row group* is Parquet's unit of rows that can be read
by themselves; here a record batch of an Arrow file counts as one, too.
"""

import os
from collections.abc import Iterator
from typing import Any, TypeAlias

from ._advice import AdvisedError
from ._kernels.blocks import BLOCK
from ._other_formats import encrypted_as_plain, refusal
from ._paths import printable

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as error:
    raise ImportError("reading rollouts needs pyarrow: pip install 'grpo_fast[data]'") from error

_BATCH_BYTES = 16 << 20  # of numbers in a batch, unless batch_size is given; three batches are alive at a time
_LEAST_BYTES = 2 << 20  # of lists, whose batches are joined until a call on them costs little beside the numbers
_BUFFER = 1 << 20  # bytes of a column that pyarrow reads at once; without it, a row group's columns as a whole
types: Any = pa.types
_FEW_ROWS = 64  # with lists in them: reading fewer at a time takes longer, and more of them take no less time
#: The exceptions that pyarrow raises about bad data.
UNREADABLE = (pa.ArrowException, OSError)


def _source(path: str) -> Any:
    """The file as pyarrow reads it: from a str it would make UTF-8, which the names of files need not be."""
    return pa.OSFile(os.fsencode(path))


def is_list(column_type: Any) -> bool:
    """Whether ``column_type``, of pyarrow, is one of its types of lists."""
    in_order = types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type)
    return bool(in_order or is_list_view(column_type))


def is_list_view(column_type: Any) -> bool:
    """Whether ``column_type``, of pyarrow, is one of lists that may lie in any order, or overlap."""
    return bool(types.is_list_view(column_type) or types.is_large_list_view(column_type))


def _joined(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the rows of ``batches`` in batches that have at least `_LEAST_BYTES`, but for the last."""
    waiting: list[Any] = []
    size = 0
    for records in batches:
        waiting.append(records)
        size += records.nbytes
        if size >= _LEAST_BYTES:
            yield _one_of(waiting)
            waiting, size = [], 0
    if waiting:
        yield _one_of(waiting)


def _one_of(batches: list[Any]) -> Any:
    """The batches as one."""
    return batches[0] if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


class _ParquetFile:
    """An open Parquet file: its ``schema``, how many row groups and rows it has, and the rows themselves."""

    row_group_name = "row group"  # in error messages

    def __init__(self, path: str) -> None:
        source = _source(path)
        # Where the writer left the checksums out, looking for them costs nothing.
        self._file = parquet.ParquetFile(source, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.row_group_count = metadata.num_row_groups
        self.rows = metadata.num_rows
        # No checksum covers the footer, and pyarrow reads as many rows of each row group as it says.
        in_row_groups = sum(metadata.row_group(i).num_rows for i in range(self.row_group_count))
        if in_row_groups != self.rows:
            raise pa.ArrowInvalid(f"{in_row_groups} rows in all row groups where the footer says {self.rows}")

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` of row group ``number`` as pyarrow.RecordBatches of about ``batch_size`` rows.

        Of flat columns, ``batch_size`` is rounded to a multiple of `BLOCK`; without it, batches have at most
        about `_BATCH_BYTES`, however long the lists in them are. Raises one of `UNREADABLE` where the file is corrupt.
        """
        column_types = [self.schema.field(column).type for column in columns]
        if not any(map(is_list, column_types)):
            size = batch_size or _BATCH_BYTES // max(sum(column_type.bit_width // 8 for column_type in column_types), 1)
            size = max(1, round(size / BLOCK)) * BLOCK  # so that the blocks are those of the row group
            batches = self._read(number, columns, size, use_threads)
        elif batch_size:
            batches = self._read(number, columns, batch_size, use_threads)
        else:
            batches = _joined(self._few_rows(number, columns, use_threads))
        rows = 0
        for records in batches:
            rows += records.num_rows
            yield records
        footer_rows = self._file.metadata.row_group(number).num_rows
        if rows != footer_rows:
            raise pa.ArrowInvalid(f"{rows} rows where the footer says {footer_rows}")

    def _few_rows(self, number: int, columns: list[str], use_threads: bool) -> Iterator[Any]:
        """Yield a row group in batches of a few rows, fewer where the lists in them are long.

        How long they are is known only when they are read. (The metadata count encoded bytes, which for few different
        numbers are tiny, and asking a corrupt one about a column ends the process, pyarrow 26.) Where a batch turns out
        too large, the row group is read anew in smaller ones, and what was yielded before is passed over.
        """
        yielded, size = 0, _FEW_ROWS
        while True:
            rows = 0
            for records in self._read(number, columns, size, use_threads):
                rows += records.num_rows
                if rows > yielded:
                    yield records
                    yielded = rows
                    if size > 1 and records.nbytes > _BATCH_BYTES:
                        size //= 8  # of which what was yielded is a multiple, unless it is the end
                        break
            else:
                return

    def _read(self, number: int, columns: list[str], batch_size: int, use_threads: bool) -> Any:
        return self._file.iter_batches(batch_size, row_groups=[number], columns=columns, use_threads=use_threads)


class _ArrowFile:
    """An Arrow IPC file, with the attributes of `_ParquetFile`; it is opened again for each record batch."""

    row_group_name = "record batch"  # in error messages

    def __init__(self, path: str) -> None:
        self._path = path
        with _source(path) as source:
            file = pa.ipc.open_file(source)
            self.schema = file.schema
            self.row_group_count = file.num_record_batches
            self.rows = file.count_rows()

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` of record batch ``number``, whole: Arrow IPC cannot be read in smaller pieces.

        Raises one of `UNREADABLE` where the file is corrupt.
        """
        fields = [self.schema.get_field_index(column) for column in columns]
        # Not mapped into memory: of a file that shrinks meanwhile that would be a bus error.
        with _source(self._path) as source:
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=use_threads)
            records = pa.ipc.open_file(source, options=options).get_batch(number)
        records.validate(full=True)  # list offsets are followed without a look otherwise
        yield records


File: TypeAlias = _ParquetFile | _ArrowFile


def opened(path: str) -> File:
    """The file at ``path``, opened as the format that its first bytes are of.

    Raises
    ------
    ValueError
        It is of neither format, or corrupt.
    FileNotFoundError, PermissionError
        As `open` raises them.
    """
    with open(path, "rb") as file:
        magic = file.read(6)
    file_format = _ParquetFile if magic[:4] == b"PAR1" else _ArrowFile if magic == b"ARROW1" else None
    if file_format is None:
        raise refusal(path, magic)
    try:
        return file_format(path)
    except UNREADABLE as error:
        name, reason = printable(path), str(error)
        if "ncrypt" in reason or "decrypt" in reason:  # of columns, under a footer in plain
            values = {"name": name, "reason": reason, "plain": encrypted_as_plain(name)}
            message = "{name}: cannot be read: {reason}. To write it in plain: {plain}"
            raise AdvisedError(message, values) from error
        raise ValueError(f"{name}: cannot be read: {reason}") from error

"""The formats of rollout files, Parquet, Arrow IPC and JSON Lines: their columns, and their rows in batches.

A *row group* is Parquet's unit of rows that can be read by themselves; here a record batch of an Arrow file, and the
whole of a file of JSON Lines, counts as one, too.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, TypeAlias

from ._advice import AdvisedError
from ._arrow import BATCH_BYTES, UNREADABLE, column_type, is_list, one_of, pa, top_level, whole_blocks
from ._json_lines import JsonLinesFile
from ._other_formats import encrypted_as_plain, refusal
from ._sources import File, Source, Table

from pyarrow import parquet  # isort: skip - behind what says that it is missing

_LEAST_BYTES = 2 << 20  # of lists, whose batches are joined until a call on them costs little beside the numbers
_BUFFER = 1 << 20  # bytes of a column that pyarrow reads at once; without it, a row group's columns as a whole
_FEW_ROWS = 64  # with lists in them: reading fewer at a time takes longer, and more of them take no less time


def _joined(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the rows of ``batches`` in batches that have at least `_LEAST_BYTES`, but for the last."""
    waiting: list[Any] = []
    size = 0
    for records in batches:
        waiting.append(records)
        size += records.nbytes
        if size >= _LEAST_BYTES:
            yield one_of(waiting)
            waiting, size = [], 0
    if waiting:
        yield one_of(waiting)


class ParquetFile:
    """An open Parquet file: its ``schema``, how many row groups and rows it has, and the rows themselves."""

    row_group_name = "row group"  # in error messages

    def __init__(self, file: File) -> None:
        # Where the writer left the checksums out, looking for them costs nothing.
        options = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": _BUFFER}
        self._file = parquet.ParquetFile(file.opened(), **options)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.row_group_count = metadata.num_row_groups
        self.rows = metadata.num_rows
        # No checksum covers the footer, and pyarrow reads as many rows of each row group as it says.
        in_row_groups = sum(metadata.row_group(i).num_rows for i in range(self.row_group_count))
        if in_row_groups != self.rows:
            raise pa.ArrowInvalid(f"{in_row_groups} rows in all row groups where the footer says {self.rows}")

    def first_rows(self) -> list[int]:
        """How many rows of the file are before each row group."""
        metadata = self._file.metadata
        return _before(metadata.row_group(i).num_rows for i in range(self.row_group_count))

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` of row group ``number`` as pyarrow.RecordBatches of about ``batch_size`` rows.

        Of flat columns, ``batch_size`` is rounded to a multiple of `BLOCK`; without it, batches have at most
        about `BATCH_BYTES`, however long the lists in them are. Raises one of `UNREADABLE` where the file is corrupt.
        """
        column_types = [column_type(self.schema, column) for column in columns]
        if not any(map(is_list, column_types)):
            size = batch_size or BATCH_BYTES // max(sum(map(_bytes_of, column_types)), 1)
            batches = self._read(number, columns, whole_blocks(size), use_threads)
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
                    if size > 1 and records.nbytes > BATCH_BYTES:
                        size //= 8  # of which what was yielded is a multiple, unless it is the end
                        break
            else:
                return

    def _read(self, number: int, columns: list[str], batch_size: int, use_threads: bool) -> Any:
        return self._file.iter_batches(batch_size, row_groups=[number], columns=columns, use_threads=use_threads)


class ArrowFile:
    """An Arrow IPC file, with the attributes of `ParquetFile`; it is opened again for each record batch."""

    row_group_name = "record batch"  # in error messages

    def __init__(self, file: File) -> None:
        self._source = file
        with file.opened() as source:
            reader = pa.ipc.open_file(source)
            self.schema = reader.schema
            self.row_group_count = reader.num_record_batches
            self.rows = reader.count_rows()

    def first_rows(self) -> list[int]:
        """How many rows of the file are before each record batch. Reads them to see."""
        with self._source.opened() as source:
            file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[0]))
            return _before(file.get_batch(i).num_rows for i in range(self.row_group_count))

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` of record batch ``number``, which is read whole: Arrow IPC has no smaller pieces.

        Raises one of `UNREADABLE` where the file is corrupt.
        """
        fields = [self.schema.get_field_index(top_level(self.schema, column)) for column in columns]
        # Not mapped into memory: of a file that shrinks meanwhile that would be a bus error.
        with self._source.opened() as source:
            options = pa.ipc.IpcReadOptions(included_fields=sorted(set(fields)), use_threads=use_threads)
            records = pa.ipc.open_file(source, options=options).get_batch(number)
        records.validate(full=True)  # list offsets are followed without a look otherwise
        yield records


def _before(counts: Iterator[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]


def _bytes_of(flat_type: Any) -> int:
    try:
        return max(1, int(flat_type.bit_width) // 8)
    except ValueError:  # of strings
        return 16


OpenFile: TypeAlias = ParquetFile | ArrowFile | JsonLinesFile | Table


def opened(source: Source) -> OpenFile:
    """The file, opened as the format that its first bytes are of; a table as it is.

    Raises
    ------
    ValueError
        It is of none of the formats, or corrupt.
    FileNotFoundError, PermissionError
        As `open` raises them.
    """
    if isinstance(source, Table):
        return source
    magic = source.beginning(8)
    try:
        if magic[:4] == b"PAR1":
            return ParquetFile(source)
        if magic[:6] == b"ARROW1":
            return ArrowFile(source)
        if lines := JsonLinesFile.if_it_is_one(source, magic):
            return lines
    except UNREADABLE as error:
        name, reason = str(source), str(error)
        if "ncrypt" in reason or "decrypt" in reason:  # of columns, under a footer in plain
            values = {"name": name, "reason": reason, "plain": encrypted_as_plain(name)}
            message = "{name}: cannot be read: {reason}. To write it in plain: {plain}"
            raise AdvisedError(message, values) from error
        raise ValueError(f"{name}: cannot be read: {reason}") from error
    raise refusal(source.path, magic[:6])

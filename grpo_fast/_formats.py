"""The two formats of rollout files, Parquet and Arrow IPC: their columns, and their rows in batches.

Everything here and in `_rollouts` needs pyarrow. A *row group* is Parquet's unit of rows that can be read by
themselves; here a record batch of an Arrow file counts as one, too.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

from ._kernels.blocks import BLOCK

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as error:
    raise ImportError("reading rollouts needs pyarrow: pip install 'grpo_fast[data]'") from error

_BATCH_BYTES = 16 << 20  # of numbers in a batch, unless batch_size is given; three batches are alive at a time
_BUFFER = 1 << 20  # bytes of a column that pyarrow reads at once; without it, a row group's columns as a whole
types: Any = pa.types
_PROBE = 64  # rows read to see how many fit into a batch
#: The exceptions that pyarrow raises about bad data.
UNREADABLE = (pa.ArrowException, OSError)


def is_list(column_type: Any) -> bool:
    """Whether ``column_type``, of pyarrow, is one of its three types of lists."""
    return bool(types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type))


class _ParquetFile:
    """An open Parquet file: its ``schema``, how many row groups and rows it has, and the rows themselves."""

    row_group_name = "row group"  # in error messages

    def __init__(self, path: str) -> None:
        # Where the writer left the checksums out, looking for them costs nothing.
        self._file = parquet.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.row_group_count = metadata.num_row_groups
        self.rows = metadata.num_rows
        # No checksum covers the footer, and pyarrow reads as many rows of each row group as it says.
        in_row_groups = sum(metadata.row_group(i).num_rows for i in range(self.row_group_count))
        if in_row_groups != self.rows:
            raise pa.ArrowInvalid(f"{in_row_groups} rows in all row groups where the footer says {self.rows}")
        self._rows_of_a_batch: int | None = None

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` of row group ``number`` as pyarrow.RecordBatches of about ``batch_size`` rows.

        Of flat columns, ``batch_size`` is rounded to a multiple of `BLOCK`. Raises one of `UNREADABLE` where the file
        is corrupt.
        """
        footer_rows = self._file.metadata.row_group(number).num_rows
        size = batch_size or self._default_batch_size(number, columns)
        if not any(is_list(self.schema.field(column).type) for column in columns):
            size = max(1, round(size / BLOCK)) * BLOCK  # so that the blocks are those of the row group
        rows = 0
        for records in self._read(number, columns, min(size, max(footer_rows, 1)), use_threads):
            rows += records.num_rows
            yield records
        if rows != footer_rows:
            raise pa.ArrowInvalid(f"{rows} rows where the footer says {footer_rows}")

    def _default_batch_size(self, number: int, columns: list[str]) -> int:
        """As many rows as make about `_BATCH_BYTES`, judged by the first rows of the first row group asked for.

        Those are read for it. The metadata would have sizes, too, but encoded ones, which for few different numbers are
        tiny; and if they are corrupt, asking them about a column ends the process (pyarrow 26).
        """
        if self._rows_of_a_batch is None:
            probe: Any = next(iter(self._read(number, columns, _PROBE, False)), None)
            self._rows_of_a_batch = max(1, _BATCH_BYTES * probe.num_rows // max(probe.nbytes, 1)) if probe else 1
        return self._rows_of_a_batch

    def _read(self, number: int, columns: list[str], batch_size: int, use_threads: bool) -> Any:
        return self._file.iter_batches(batch_size, row_groups=[number], columns=columns, use_threads=use_threads)


class _ArrowFile:
    """An Arrow IPC file, with the attributes of `_ParquetFile`; it is opened again for each record batch."""

    row_group_name = "record batch"  # in error messages

    def __init__(self, path: str) -> None:
        self._path = path
        with pa.OSFile(path) as source:
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
        with pa.OSFile(self._path) as source:
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
    if file_format is not None:
        try:
            return file_format(path)
        except UNREADABLE as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
    raise ValueError(
        f"{path}: neither a Parquet nor an Arrow IPC file: it begins with {magic!r}. (A stream of Arrow IPC is refused "
        f"since one that was cut off looks complete: write it with pyarrow.ipc.new_file.)"
    )

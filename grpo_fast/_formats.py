"""The two kinds of rollout file, Parquet and Arrow IPC: their columns, and their rows as batches. All needs pyarrow."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from ._kernels.blocks import BLOCK

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as error:
    raise ImportError("reading rollouts needs pyarrow: pip install 'grpo_fast[data]'") from error

_BATCH_BYTES = 16 << 20  # of numbers in a batch, when batch_size is left to us; three batches are alive at a time
_BUFFER = 1 << 20  # bytes of a column that pyarrow reads at once; without it, a row group's columns as a whole
types: Any = pa.types
_PROBE = 64  # rows read to see how many fit into a batch
#: What pyarrow raises about bad data.
UNREADABLE = (pa.ArrowException, OSError)


def is_list(of: Any) -> bool:
    """Whether a column's type is one of the kinds of list."""
    return bool(types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of))


class _Parquet:
    unit = "row group"

    def __init__(self, path: str) -> None:
        # Where the writer left the checksums out, looking for them costs nothing.
        self._file = parquet.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.units = metadata.num_row_groups
        self.rows = metadata.num_rows
        told = sum(metadata.row_group(i).num_rows for i in range(self.units))
        if told != self.rows:  # no checksum covers the footer, and pyarrow reads as many rows as it says
            raise pa.ArrowInvalid(f"{told} rows in all row groups where the footer says {self.rows}")
        self._fits: int | None = None

    def batches(self, index: int, columns: list[str], batch_size: int | None, threads: bool) -> Iterator[Any]:
        told = self._file.metadata.row_group(index).num_rows
        size = batch_size or self._fitting(index, columns)
        if not any(is_list(self.schema.field(column).type) for column in columns):
            size = max(1, round(size / BLOCK)) * BLOCK  # so that the blocks are those of the row group
        rows = 0
        for batch in self._read(index, columns, min(size, max(told, 1)), threads):
            rows += batch.num_rows
            yield batch
        if rows != told:
            raise pa.ArrowInvalid(f"{rows} rows where the footer says {told}")

    def _fitting(self, index: int, columns: list[str]) -> int:
        """As many rows as make about _BATCH_BYTES, judged by some that are read for it.

        Metadata know encoded sizes, which for few different numbers are tiny; and a corrupt one, asked about a column,
        ends the process (pyarrow 26).
        """
        if self._fits is None:
            probe: Any = next(iter(self._read(index, columns, _PROBE, False)), None)
            self._fits = max(1, _BATCH_BYTES * probe.num_rows // max(probe.nbytes, 1)) if probe else 1
        return self._fits

    def _read(self, index: int, columns: list[str], size: int, threads: bool) -> Any:
        return self._file.iter_batches(size, row_groups=[index], columns=columns, use_threads=threads)


class _Arrow:
    unit = "record batch"

    def __init__(self, path: str) -> None:
        self._path = path
        with pa.OSFile(path) as source:
            file = pa.ipc.open_file(source)
            self.schema = file.schema
            self.units = file.num_record_batches
            self.rows = file.count_rows()

    def batches(self, index: int, columns: list[str], batch_size: int | None, threads: bool) -> Iterator[Any]:
        fields = [self.schema.get_field_index(column) for column in columns]
        # Not mapped into memory: of a file that shrinks meanwhile that would be a bus error.
        with pa.OSFile(self._path) as source:
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=threads)
            batch = pa.ipc.open_file(source, options=options).get_batch(index)
        batch.validate(full=True)  # list offsets are followed without a look otherwise
        yield batch


File: TypeAlias = _Parquet | _Arrow


def opened(path: str) -> File:
    """The file, told by how it begins; ValueError, FileNotFoundError or PermissionError if it cannot be."""
    with open(path, "rb") as file:
        magic = file.read(6)
    kind = _Parquet if magic[:4] == b"PAR1" else _Arrow if magic == b"ARROW1" else None
    if kind is not None:
        try:
            return kind(path)
        except UNREADABLE as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
    raise ValueError(
        f"{path}: neither a Parquet nor an Arrow IPC file: it begins with {magic!r}. (A stream of Arrow IPC is refused "
        f"since one that was cut off looks complete: write it with pyarrow.ipc.new_file.)"
    )

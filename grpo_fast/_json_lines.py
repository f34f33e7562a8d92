"""JSON Lines, packed or not, in bounded memory: pieces of whole lines, of which pyarrow parses what is asked for."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Self

from ._arrow import column_type, in_parts, is_list, pa, top_level, types
from ._sources import File

from pyarrow import json  # isort: skip - behind what says that it is missing

#: How packed files begin, and what pyarrow calls that.
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_BOM = b"\xef\xbb\xbf"
_FIRST_PIECE = 1 << 20  # bytes, of which the types of columns are taken
_LINES = 100  # of which they are taken where those of some column differ
_PIECE = 16 << 20  # bytes of text: about half as many of numbers
#: The types that were found, by a digest of the text: a file is opened some times, and finding them takes 20 ms.
_SCHEMAS: dict[bytes, Any] = {}
_SCHEMAS_KEPT = 64
_AT_ONCE = 1 << 20  # bytes that one thread parses; a longer line is parsed alone


class JsonLinesFile:
    """A file of JSON Lines, with the attributes of `_formats.ParquetFile`; it has one row group.

    The types of its columns are those of its first megabyte. Numbers in lists are float64, others int64 until one is
    not.
    """

    row_group_name = ""  # in error messages: there is only one
    row_group_count = 1

    def __init__(self, file: File, packed: str | None) -> None:
        self._source, self._packed = file, packed
        first = next((piece for piece in self._pieces(_FIRST_PIECE) if not _blank(piece)), memoryview(b""))
        self.rows = None if len(first) else 0  # unknown until it is read
        self.schema = _widened(_schema_of(first))

    @classmethod
    def if_it_is_one(cls, file: File, magic: bytes) -> Self | None:
        """The file, if it begins as JSON Lines do; ``magic`` are its first bytes."""
        packed = next((kind for prefix, kind in _PACKED.items() if magic.startswith(prefix)), None)
        if packed:
            try:
                with _unpacked(file, packed) as stream:
                    magic = stream.read(64)
            except OSError:
                if ".json" in file.path or ".ndjson" in file.path:
                    raise
                return None
        return cls(file, packed) if magic.removeprefix(_BOM).lstrip().startswith(b"{") else None

    def first_rows(self) -> list[int]:
        """How many rows are before the one row group."""
        return [0]

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` as pyarrow.RecordBatches of ``batch_size`` rows at most.

        Raises one of `UNREADABLE` where the file is corrupt, or a column changes its type.
        """
        tops = list(dict.fromkeys(top_level(self.schema, column) for column in columns))
        wanted = pa.schema([_only(self.schema.field(top), columns) for top in tops])
        flat = not any(is_list(column_type(self.schema, column)) for column in columns)
        for piece in self._pieces(_PIECE):
            try:
                table = _parsed(piece, wanted, use_threads)
            except pa.ArrowInvalid:
                # An int may be followed by a fraction; what is wrong otherwise is so again.
                wanted = pa.schema([_fitting(field, piece) for field in wanted])
                table = _parsed(piece, wanted, use_threads)
            records = table.combine_chunks().to_batches(max_chunksize=None)
            for part in records:
                yield from in_parts(part, batch_size) if batch_size or flat else [part]

    def _pieces(self, size: int) -> Iterator[memoryview]:
        """Yield the text in pieces of whole lines, of about so many bytes unless a line is longer."""
        with _unpacked(self._source, self._packed) as stream:
            rest = stream.read(len(_BOM)).removeprefix(_BOM)
            while True:
                text = bytearray(len(rest) + size)
                text[: len(rest)] = rest
                stop = len(rest) + stream.readinto(memoryview(text)[len(rest) :])
                if stop == len(rest):
                    break
                end = text.rfind(b"\n", len(rest), stop) + 1
                if end:
                    yield memoryview(text)[:end]
                rest = text[end:stop]
            if rest:
                yield memoryview(rest)


def _unpacked(file: File, packed: str | None) -> Any:
    stream = file.opened()
    return pa.CompressedInputStream(stream, packed) if packed else stream


def _blank(text: memoryview) -> bool:
    return re.search(rb"\S", text) is None


def _parsed(text: memoryview, schema: Any, use_threads: bool = True) -> Any:
    """The rows of whole lines as a table, of the columns of ``schema`` alone, or of all."""
    behavior = "infer" if schema is None else "ignore"
    options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behavior)
    if _blank(text):  # pyarrow takes no empty file
        return (schema or pa.schema([])).empty_table()
    for block_size in (_AT_ONCE, len(text) + 1):
        reading = json.ReadOptions(use_threads=use_threads, block_size=block_size)
        try:
            return json.read_json(pa.BufferReader(pa.py_buffer(text)), reading, options)
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or block_size > len(text):
                raise
    raise AssertionError("unreachable")


def _schema_of(text: memoryview) -> Any:
    """The types of the columns of these lines; of a column that has several, the first that a line has."""
    key = hashlib.blake2b(text).digest()
    if key not in _SCHEMAS:
        while len(_SCHEMAS) >= _SCHEMAS_KEPT:
            _SCHEMAS.pop(next(iter(_SCHEMAS)), None)
        _SCHEMAS[key] = _found_schema(text)
    return _SCHEMAS[key]


def _found_schema(text: memoryview) -> Any:
    try:
        return _parsed(text, None).schema
    except pa.ArrowInvalid:
        found: dict[str, Any] = {}
        for line in bytes(text).splitlines()[:_LINES]:
            for field in _parsed(memoryview(line), None).schema:
                if field.name not in found or types.is_null(found[field.name].type):
                    found[field.name] = field
        return pa.schema(list(found.values()))


def _widened(schema: Any, ints: bool = False) -> Any:
    """The schema with numbers in lists, or lists of nothing, as float64; with ``ints`` numbers outside of them, too."""

    def wide(kind: Any) -> Any:
        if types.is_list(kind):
            inner = kind.value_type
            number = types.is_integer(inner) or types.is_null(inner)
            return pa.list_(pa.float64() if number else wide(inner))
        if types.is_struct(kind):
            return pa.struct([field.with_type(wide(field.type)) for field in kind])
        return pa.float64() if ints and types.is_integer(kind) else kind

    return pa.schema([field.with_type(wide(field.type)) for field in schema])


#: What a column may turn out to hold that was null so far.
_BEHIND_NULL = (pa.list_(pa.float64()), pa.int64(), pa.float64(), pa.string())


def _fitting(field: Any, text: memoryview) -> Any:
    """The field, with float64 in place of int64, or any type in place of null, where these lines need that."""
    for kind in (field.type, *(_with_nulls_as(field.type, kind) for kind in _BEHIND_NULL)):
        try:
            _parsed(text, pa.schema([field.with_type(kind)]))
        except pa.ArrowInvalid:
            continue
        return field.with_type(kind)
    return _widened(pa.schema([field]), ints=True).field(0)


def _with_nulls_as(kind: Any, other: Any) -> Any:
    """The type, or that of a struct with its fields, with another in place of null."""
    if types.is_struct(kind):
        return pa.struct([field.with_type(_with_nulls_as(field.type, other)) for field in kind])
    return other if types.is_null(kind) else kind


def _only(field: Any, columns: list[str]) -> Any:
    """The field; of a struct, with those of its fields alone that are asked for."""
    if not types.is_struct(field.type) or field.name in columns:
        return field
    rest = [column.removeprefix(f"{field.name}.") for column in columns if column.startswith(f"{field.name}.")]
    inner = pa.schema(list(field.type))
    names = list(dict.fromkeys(top_level(inner, name) for name in rest))
    return field.with_type(pa.struct([_only(inner.field(name), rest) for name in names]))

"""JSON Lines, packed or not, in bounded memory: pieces of whole lines, of which pyarrow parses what is asked for."""

import hashlib
import re
from collections.abc import Iterator
from functools import reduce
from json import loads
from typing import Any, Self

from ._arrow import in_parts, pa, top_level, types
from ._sources import File

from pyarrow import json  # isort: skip - behind what says that it is missing

#: How packed files begin, and what pyarrow calls that.
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_NAMED, _NAMED_PACKED = r"\.(jsonl|ndjson)$", r"\.(jsonl|ndjson)\.\w+$"
_BOM = b"\xef\xbb\xbf"
_FIRST_PIECE = 1 << 20  # bytes, of which the types of columns are taken
_PIECE = 16 << 20  # bytes of text: about half as many of numbers
#: The types that were found, by a digest of the text: a file is opened some times, and finding them takes 20 ms.
_SCHEMAS: dict[bytes, Any] = {}
_SCHEMAS_KEPT = 64
_AT_ONCE = 1 << 20  # bytes that one thread parses; a longer line is parsed alone


class JsonLinesFile:
    """A file of JSON Lines, with the attributes of `_formats.ParquetFile`; it has one row group.

    The types of its columns are those of its first megabyte. Numbers in lists are float64, others int64 until one is
    not, and a column of nulls is of the type of what follows. A string is a string, whatever it looks like.
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
        """The file, if it begins as JSON Lines do, or is named as they are and blank; ``magic`` are its first bytes."""
        packed = next((kind for prefix, kind in _PACKED.items() if magic.startswith(prefix)), None)
        if packed:
            try:
                with _unpacked(file, packed) as stream:
                    magic = stream.read(64)
            except OSError:
                if ".json" in file.path or ".ndjson" in file.path:
                    raise
                return None
        start = magic.removeprefix(_BOM).lstrip()
        named_so = re.search(_NAMED_PACKED if packed else _NAMED, file.path, re.IGNORECASE)
        return cls(file, packed) if start.startswith(b"{") or (named_so and not start) else None

    def first_rows(self) -> list[int]:
        """How many rows are before the one row group."""
        return [0]

    def batches(self, number: int, columns: list[str], batch_size: int | None, use_threads: bool) -> Iterator[Any]:
        """Yield the ``columns`` as pyarrow.RecordBatches of ``batch_size`` rows at most.

        Raises one of `UNREADABLE` where the file is corrupt, or a column changes its type.
        """
        tops = list(dict.fromkeys(top_level(self.schema, column) for column in columns))
        wanted = pa.schema([_only(self.schema.field(top), columns) for top in tops])
        rows = 0
        for piece in self._pieces(_PIECE):
            try:
                table = _parsed(piece, wanted, use_threads)
            except pa.ArrowInvalid:
                # An int may be followed by a fraction, a null by anything; what is wrong otherwise is so again.
                wanted = pa.schema([_fitting(field, piece) for field in wanted])
                table = _parsed(piece, wanted, use_threads, first_row=rows)
            rows += table.num_rows
            for records in table.combine_chunks().to_batches():
                yield from in_parts(records, columns, batch_size)

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


# --- rows -------------------------------------------------------------------------------------------------------------
def _parsed(text: memoryview, schema: Any, use_threads: bool = True, first_row: int | None = None) -> Any:
    """The rows of whole lines as a table, of the columns of ``schema`` alone, or of all.

    With ``first_row``, which is the number of the first one, errors have that of the row that is wrong, if any has it.
    """
    behavior = "infer" if schema is None else "ignore"
    options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behavior)
    if _blank(text):  # pyarrow takes no empty file
        return (schema or pa.schema([])).empty_table()
    for block_size in (_AT_ONCE, len(text) + 1):
        reading = json.ReadOptions(use_threads=use_threads, block_size=block_size)
        try:
            return json.read_json(pa.BufferReader(pa.py_buffer(text)), reading, options)
        except pa.ArrowInvalid as error:
            if block_size > len(text) and first_row is not None:  # pyarrow counts from the beginning of a block
                reason = re.sub(r"(?<= in row )[0-9]+", lambda row: str(int(row[0]) + first_row), str(error))
                raise pa.ArrowInvalid(reason) from error
            if block_size > len(text) or (first_row is None and "straddling" not in str(error)):
                raise
    raise AssertionError("unreachable")


# --- types ------------------------------------------------------------------------------------------------------------
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
    except pa.ArrowInvalid:  # of pyarrow, a column nobody asks for may have one type only, down to its last field
        found = _type_of_lines(text)
        if not found.num_fields:
            raise
        return pa.schema(list(found))


def _type_of_lines(text: memoryview) -> Any:
    """The struct that these lines are, those left out that are no JSON: what is wrong with them, reading says."""
    kinds: dict[Any, None] = {}  # as a set, but in order
    for line in bytes(text).splitlines():
        try:
            row = loads(line)
            if isinstance(row, dict):
                kinds[_type_of(row)] = None
        except (ValueError, RecursionError):
            continue
    return reduce(_merged, kinds, pa.struct([]))


def _type_of(value: Any) -> Any:
    """The type of a value of JSON."""
    if isinstance(value, dict):
        return pa.struct([pa.field(name, _type_of(x)) for name, x in value.items()])
    if isinstance(value, list):
        flat = {type(x): x for x in value if not isinstance(x, (dict, list))}
        nested = [x for x in value if isinstance(x, (dict, list))]
        return pa.list_(reduce(_merged, map(_type_of, [*flat.values(), *nested]), pa.null()))
    scalars = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    return scalars.get(type(value), pa.null())


def _merged(first: Any, second: Any) -> Any:
    """The type of columns that hold values of both; the first where there is none."""
    if types.is_null(first) or {first, second} == {pa.int64(), pa.float64()}:
        return second if types.is_null(first) else pa.float64()
    if types.is_list(first) and types.is_list(second):
        return pa.list_(_merged(first.value_type, second.value_type))
    if types.is_struct(first) and types.is_struct(second):
        fields = {field.name: field.type for field in first}
        for field in second:
            fields[field.name] = _merged(fields.get(field.name, pa.null()), field.type)
        return pa.struct(list(fields.items()))
    return first


def _filled(kind: Any, found: Any) -> Any:
    """The type, with what is ``found`` in place of nulls."""
    if types.is_null(kind):
        return found
    if not (types.is_struct(kind) and types.is_struct(found)):
        return kind
    there = {field.name: field.type for field in found}
    return pa.struct([field.with_type(_filled(field.type, there.get(field.name, field.type))) for field in kind])


def _lacks_a_type(kind: Any) -> bool:
    """Whether there are only nulls, or in a field of it."""
    return types.is_null(kind) or (types.is_struct(kind) and any(_lacks_a_type(field.type) for field in kind))


def _widened(schema: Any, ints: bool = False) -> Any:
    """The schema with numbers in lists, or lists of nothing, as float64; with ``ints`` numbers outside of them, too.

    What pyarrow takes for a time is the string that it is.
    """

    def wide(kind: Any) -> Any:
        if types.is_list(kind):
            inner = kind.value_type
            number = types.is_integer(inner) or types.is_null(inner)
            return pa.list_(pa.float64() if number else wide(inner))
        if types.is_struct(kind):
            return pa.struct([field.with_type(wide(field.type)) for field in kind])
        if types.is_timestamp(kind):
            return pa.string()
        return pa.float64() if ints and types.is_integer(kind) else kind

    return pa.schema([field.with_type(wide(field.type)) for field in schema])


def _fitting(field: Any, text: memoryview) -> Any:
    """The field as these lines need it: of a type where it was null, float64 in place of int64."""
    fields = pa.schema([field])
    try:
        _parsed(text, fields)
    except pa.ArrowInvalid:
        if _lacks_a_type(field.type):
            fields = _widened(pa.schema(list(_filled(pa.struct([field]), _type_of_lines(text)))))
            try:
                _parsed(text, fields)
                return fields.field(0)
            except pa.ArrowInvalid:
                pass
        return _widened(fields, ints=True).field(0)
    return field


def _only(field: Any, columns: list[str]) -> Any:
    """The field; of a struct, with those of its fields alone that are asked for."""
    if not types.is_struct(field.type) or field.name in columns:
        return field
    rest = [column.removeprefix(f"{field.name}.") for column in columns if column.startswith(f"{field.name}.")]
    inner = pa.schema(list(field.type))
    names = list(dict.fromkeys(top_level(inner, name) for name in rest))
    return field.with_type(pa.struct([_only(inner.field(name), rest) for name in names]))

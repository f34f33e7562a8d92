"""Arrow's tables as rollouts need them: lists or numbers, fields of structs by names with dots, rows in parts.

Everything here, in `_formats`, `_json_lines`, `_plan` and `_rollouts` needs pyarrow.
"""

from collections.abc import Iterator
from typing import Any

from ._kernels.blocks import BLOCK

try:
    import pyarrow as pa
except ImportError as error:
    raise ImportError("reading rollouts needs pyarrow: pip install 'grpo_fast[data]'") from error

__all__ = ["pa", "types"]  # for those that need pyarrow, and get it here, with what says that it is missing
types: Any = pa.types
#: The exceptions that pyarrow raises about bad data.
UNREADABLE = (pa.ArrowException, OSError)
BATCH_BYTES = 16 << 20  # of numbers in a batch, unless batch_size is given; three batches are alive at a time


# --- types ------------------------------------------------------------------------------------------------------------
def is_list(column_type: Any) -> bool:
    """Whether ``column_type``, of pyarrow, is one of its types of lists."""
    in_order = types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type)
    return bool(in_order or is_list_view(column_type))


def is_list_view(column_type: Any) -> bool:
    """Whether ``column_type``, of pyarrow, is one of lists that may lie in any order, or overlap."""
    return bool(types.is_list_view(column_type) or types.is_large_list_view(column_type))


# --- columns by their names -------------------------------------------------------------------------------------------
def column_names(schema: Any) -> list[str]:
    """The names of all columns, and of the fields of those that are structs, with dots between."""
    names: list[str] = []

    def add(prefix: str, fields: Any) -> None:
        for field in fields:
            names.append(prefix + field.name)
            if types.is_struct(field.type):
                add(f"{prefix}{field.name}.", field.type)

    add("", schema)
    return names


def column_type(schema: Any, name: str) -> Any:
    """The type of the column, or of the struct's field, of that name; None if there is none or more than one."""
    count = len(schema.get_all_field_indices(name))
    if count:
        return schema.field(name).type if count == 1 else None
    for top in schema:
        if name.startswith(f"{top.name}.") and types.is_struct(top.type):
            return column_type(pa.schema(list(top.type)), name[len(top.name) + 1 :])
    return None


def top_level(schema: Any, name: str) -> str:
    """The column that is, or holds, the one of that name."""
    if schema.get_field_index(name) >= 0:
        return name
    found: str = next(top.name for top in schema if name.startswith(f"{top.name}.") and types.is_struct(top.type))
    return found


def column_of(records: Any, name: str) -> Any:
    """The array of the column, or of the struct's field, of that name; null where the struct is."""
    if records.schema.get_field_index(name) >= 0:
        return records.column(name)
    top = top_level(records.schema, name)
    array, rest = records.column(top), name[len(top) + 1 :]
    inner = pa.RecordBatch.from_arrays(array.flatten(), schema=pa.schema(list(array.type)))
    return column_of(inner, rest)


def select(records: Any, columns: list[str]) -> Any:
    """The rows with these columns alone, each as a whole that has a field among them."""
    return records.select(list(dict.fromkeys(top_level(records.schema, name) for name in columns)))


def without_string_views(records: Any) -> Any:
    """The rows with large strings in place of string views, as polars has them, which pyarrow (26) cannot take from."""

    def plain(kind: Any) -> Any:
        if types.is_string_view(kind):
            return pa.large_string()
        if types.is_dictionary(kind):
            return pa.dictionary(kind.index_type, plain(kind.value_type), kind.ordered)
        return pa.struct([field.with_type(plain(field.type)) for field in kind]) if types.is_struct(kind) else kind

    schema = pa.schema([field.with_type(plain(field.type)) for field in records.schema])
    if schema.equals(records.schema):
        return records
    columns = [x.cast(kind) for x, kind in zip(records.columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


# --- rows in parts ----------------------------------------------------------------------------------------------------
def in_parts(records: Any, columns: list[str], batch_size: int | None) -> Iterator[Any]:
    """Yield the rows in parts of ``batch_size``, or of about `BATCH_BYTES`; of flat ``columns`` in `BLOCK`s."""
    size = batch_size or max(1, records.num_rows * BATCH_BYTES // max(records.nbytes, BATCH_BYTES))
    if not any(is_list(column_type(records.schema, column)) for column in columns):
        size = whole_blocks(size)
    for first in range(0, records.num_rows, size):
        yield records.slice(first, size)


def whole_blocks(rows: int) -> int:
    """About so many rows of flat columns: a multiple of `BLOCK`, so that the blocks are those of the row group."""
    return max(1, round(rows / BLOCK)) * BLOCK


def one_of(batches: list[Any]) -> Any:
    """The batches as one."""
    return batches[0] if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()[0]

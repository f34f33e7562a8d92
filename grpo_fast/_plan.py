"""What rollout files hold, and which of their columns and row groups will be read: a `Plan`.

Only footers are read here, and the first megabyte of JSON Lines.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ._advice import AdvisedError, Keywords
from ._arrow import column_type
from ._columns import OPTIONAL, Columns, Form, check_mapping, no_mask
from ._formats import opened
from ._keys import Kind, kind_of, may_tell_apart, missing_column, typed_partition
from ._layouts import ColumnLayout, holds_nothing, layout_of, refuse_unused_masks
from ._sources import File, Source
from ._writer import MARK


# --- what files hold --------------------------------------------------------------------------------------------------
def form_of(files: Sequence[Source], columns: Columns | None) -> Form:
    """The form of the arguments that ``columns`` names; without it, the form of the first file that has rows.

    Raises
    ------
    TypeError, ValueError
        ``columns`` is not a mapping of arguments to names of columns, or both or neither of the forms are named or
        there, or a mask is named beside probabilities; or a file cannot be read, or none has rows.
    FileNotFoundError, PermissionError
        As `open` raises them.
    """
    check_mapping(columns)
    columns = columns or {}
    named = [argument for argument in columns if argument != "mask"]  # which probabilities may have to ignore
    where = "columns"
    if named:
        names = named
        forms = [form for form in Form if not set(names).isdisjoint(form.arguments)]
    else:
        where, names = _columns_of_first_rows(files)
        # Only the ratio or the log-probability decides: other columns may happen to be called A or mask.
        forms = [form for form in Form if form.arguments[0] in names]
        if len(forms) > 1 and columns:
            forms = [Form.LOG_PROBABILITIES]
    if len(forms) != 1:
        # Of a column by another name, most of all by its name: people have them.
        example = Keywords({"columns": {"logps": "logps" if "logps" in names else "name_of_the_column"}})
        raise AdvisedError(
            "{where} must have either rhos, A, … (probabilities) or logps, advantages, … "
            "(log-probabilities), got {which} in {names}: {advice}{example}",
            {
                "where": where,
                "which": "both" if forms else "neither",
                "names": ", ".join(names) or "nothing",
                "advice": "name the columns of one of them" if named else "choose with, for example, ",
                "example": "" if named else example,
            },
        )
    if forms == [Form.PROBABILITIES] and columns.get("mask") is not None:
        raise no_mask(f"{columns['mask']!r} is named as the mask")
    return forms[0]


def _columns_of_first_rows(files: Sequence[Source]) -> tuple[str, list[str]]:
    """The first file that has rows, for messages, and the names of its columns; those of others may be anything."""
    for path in files:
        file = opened(path)
        if file.rows != 0:
            return str(path), file.schema.names
    raise _no_rows(files)


def _no_rows(files: Sequence[Source]) -> ValueError:
    return ValueError(f"{', '.join(map(str, files))}: no rows")


# --- which columns and row groups are read ----------------------------------------------------------------------------
class RowGroup(NamedTuple):
    """Where a row group of a Parquet file, or a record batch of an Arrow file, is: what a worker is given at a time."""

    source: Source
    noun: str  # what its format calls it: "row group", "record batch", or nothing where it is the whole
    number: int  # from 0, within its file
    layout: ColumnLayout  # of that file
    partitions: tuple[tuple[str, int | str | None], ...] = ()  # columns that are the same in all rows, by their names
    first_row: int = 0  # within its file, if that was asked for

    def __str__(self) -> str:
        return f"{self.source}, {self.noun} {self.number}" if self.noun else str(self.source)

    def portable(self) -> "Iterator[RowGroup]":
        """What another process can be handed: of a table, each batch by itself."""
        if isinstance(self.source, File):
            yield self
            return
        first_row = 0
        for piece in self.source.pieces():
            yield self._replace(source=piece, first_row=first_row)
            first_row += piece.rows or 0


class Plan(NamedTuple):
    """What will be read."""

    rows_are_sequences: bool  # as in `ColumnLayout`
    row_groups: list[RowGroup]  # of all files
    rows: int | None  # of all files, if all say how many they have


class Beside(NamedTuple):
    """What is read beside the arguments."""

    key: str | None = None  # the column, or hive partition, by which results are told apart
    shown: tuple[str, ...] = ()  # columns to show, where a file has them
    must_show: bool = False  # or it is an error
    row_numbers: bool = False  # whether it matters which row of a file one is
    sequences_alone: bool = False  # whether flat columns are an error
    optional: tuple[str, ...] = ()  # arguments that a file may lack, beside those that any may
    needs: tuple[tuple[str, Keywords], ...] = ()  # arguments that must be there, and by what they are needed


_NOTHING = Beside()


def plan(
    files: Sequence[Source], form: Form, unread: set[str], columns: Columns | None, beside: Beside = _NOTHING
) -> Plan:
    """The columns to read, less the arguments in ``unread``, and the row groups of all ``files``, which are opened.

    Raises
    ------
    ValueError
        A file cannot be read, lacks a column, has one that does not fit, or differs from the first in its layout; or
        there are no rows in any. Those of empty lists without a type may lack what the others have.
    FileNotFoundError, PermissionError
        As `open` raises them.
    """
    named = {argument: argument for argument in form.arguments} | dict(columns or {})
    needs = dict(beside.needs)
    _refuse_to_go_without(columns or {}, unread | set(beside.optional), needs)
    wanted = {
        argument: (column,) if isinstance(column, str) else tuple(column)
        for argument, column in named.items()
        if column is not None and argument not in unread
    }
    shards: list[_Shard] = []
    others = tuple(filter(None, (beside.key, *beside.shown)))
    for source in files:
        file = opened(source)
        if file.rows == 0:  # its columns may be of any type, or null
            continue
        name, schema = str(source), file.schema
        nothing = holds_nothing(schema, *wanted[form.arguments[0]])
        marked = MARK in (schema.metadata or {})  # without a mask where nothing is masked
        explicit = set() if nothing else {*(columns or {}), *needs} - ({"mask"} if marked else set())
        layout = layout_of(name, schema, wanted, {*OPTIONAL, *beside.optional} - explicit, others, needs)
        if isinstance(named.get("mask", ""), str):  # neither None nor a list, which say that there are no others
            refuse_unused_masks(name, schema, form, layout)
        in_path = source.partitions()
        shown = tuple((column, in_path[column]) for column in beside.shown if column in {*in_path} - {*layout.beside})
        for column in beside.shown if beside.must_show else ():
            if column not in layout.beside and column not in in_path:
                raise missing_column(name, column, schema, list(in_path), "show")
        key = _key_of(source, schema, layout, beside.key, nothing)
        if key.kind is None:
            layout = _without_key(layout, beside.key)
        first_rows = file.first_rows() if beside.row_numbers else [0] * file.row_group_count
        groups = [
            RowGroup(source, file.row_group_name, number, layout, key.partition + shown, first_rows[number])
            for number in range(file.row_group_count)
        ]
        shards.append(_Shard(name, nothing, marked, layout, key.kind, groups, file.rows))
    if not shards:
        raise _no_rows(files)
    first = min(shards, key=lambda shard: shard.holds_nothing)  # of those that hold something, if any do
    for shard in shards:
        same_rows = shard.layout.rows_are_sequences == first.layout.rows_are_sequences
        if not shard.reads_as(first) and not (shard.holds_nothing and same_rows):
            raise ValueError(
                f"{shard.name} differs from {first.name} in its columns: {shard.layout} beside {first.layout}"
            )
    if beside.sequences_alone and not first.layout.rows_are_sequences:
        raise ValueError(
            f"{first.name}: the columns are flat, which does not say where sequences begin: store each as a list"
        )
    if beside.key is not None:
        telling = [shard for shard in shards if not shard.holds_nothing] or shards
        _refuse_keys_of_two_kinds(telling, beside.key)
        shards = [_with_key_as_in(telling, shard, beside.key) for shard in shards]
    row_groups = [row_group for shard in shards for row_group in _with_typed_partitions(shards, shard.row_groups)]
    rows = [shard.rows for shard in shards]
    return Plan(first.layout.rows_are_sequences, row_groups, None if None in rows else sum(filter(None, rows)))


def _refuse_to_go_without(columns: Columns, unread: set[str], needs: Mapping[str, Keywords]) -> None:
    """Raise the ValueError for an argument that is mapped to None although a KL term, or another thing, needs it."""
    for argument, by in needs.items():
        if columns.get(argument, "") is None:
            left_out = Keywords({"columns": {argument: None}})
            values = {"left_out": left_out, "by": by}
            raise AdvisedError("{left_out} leaves out what {by} needs: name the column", values)
    for argument in ("pi_theta_old", "pi_theta_ref", "ref_logps"):
        if columns.get(argument, "") is None and argument not in unread:
            left_out = Keywords({"columns": {argument: None}})
            raise AdvisedError(
                "{left_out} leaves out what the KL term needs: name the column, or compute without a KL term",
                {"left_out": left_out},
            )


class _Shard(NamedTuple):
    """A file that has rows."""

    name: str  # of the file, for messages
    holds_nothing: bool  # but lists without a type, as writers make them where all are empty
    marked: bool  # written by `RolloutWriter`
    layout: ColumnLayout
    key_kind: Kind | None  # of the column that is the key; None if there is none, or it is a partition
    row_groups: list[RowGroup]
    rows: int | None

    def reads_as(self, other: "_Shard") -> bool:
        """Whether its columns mean what those of the other one do."""
        mine, others = (shard.layout._replace(beside=()) for shard in (self, other))
        if self.marked and other.marked:
            mine, others = (
                layout._replace(columns={name: x for name, x in layout.columns.items() if name != "mask"})
                for layout in (mine, others)
            )
        return mine == others


# --- the key ----------------------------------------------------------------------------------------------------------
class _Key(NamedTuple):
    """Where the values of the key are: in a column of a kind, or in the path."""

    kind: Kind | None = None
    partition: tuple[tuple[str, int | str | None], ...] = ()


def _key_of(source: Source, schema: Any, layout: ColumnLayout, key: str | None, nothing: bool) -> _Key:
    """The key of a file; the ValueError if it has none, or of floats, unless the file holds nothing."""
    if key is None:
        return _Key()
    if key in layout.beside:
        if nothing and not may_tell_apart(column_type(schema, key)):  # as of pandas, a column that is empty
            return _Key(partition=((key, None),))
        return _Key(kind=kind_of(str(source), key, column_type(schema, key)))
    partitions = source.partitions()
    if key not in partitions and not nothing:
        raise missing_column(str(source), key, schema, list(partitions), "by")
    return _Key(partition=((key, partitions.get(key)),))


def _refuse_keys_of_two_kinds(shards: Sequence[_Shard], key: str | None) -> None:
    """Raise the ValueError if the key is, for example, an int in one file and a string in another."""
    of_kinds = {shard.key_kind: shard for shard in shards if shard.key_kind not in (None, Kind.NULL)}
    in_paths = [shard for shard in shards if shard.row_groups and key in dict(shard.row_groups[0].partitions)]
    if of_kinds and in_paths:
        shard = next(iter(of_kinds.values()))
        raise ValueError(
            f"by={key!r} must be a column in every file, or a partition of every path: {shard.name} has a column, "
            f"{in_paths[0].name} has none"
        )
    if len(of_kinds) > 1:
        where = ", ".join(f"{kind.value} in {shard.name}" for kind, shard in of_kinds.items() if kind)
        raise ValueError(f"by={key!r} must be of one type in all files: {where}")


def _without_key(layout: ColumnLayout, key: str | None) -> ColumnLayout:
    return layout._replace(beside=tuple(column for column in layout.beside if column != key))


def _with_key_as_in(telling: Sequence[_Shard], shard: _Shard, key: str) -> _Shard:
    """The shard; if it holds nothing, and its key is not where that of the others is, or of their kind, without one.

    Its sequences then are among those whose key is null, so that the sum over the keys is the whole still.
    """
    kinds = {other.key_kind for other in telling}
    if not shard.holds_nothing or shard.key_kind in kinds or shard.key_kind is Kind.NULL:
        return shard
    layout = _without_key(shard.layout, key)
    groups = [x._replace(layout=layout, partitions=((key, None),)) for x in shard.row_groups]
    return shard._replace(key_kind=None, layout=layout, row_groups=groups)


def _with_typed_partitions(shards: Sequence[_Shard], row_groups: Sequence[RowGroup]) -> Iterator[RowGroup]:
    """The row groups, the values of whose partitions are ints if those of all are, of that name."""
    every = {pair for shard in shards for row_group in shard.row_groups[:1] for pair in row_group.partitions}
    typed = {
        name: typed_partition([x for other, x in every if other == name and isinstance(x, str)]) for name, _ in every
    }
    for row_group in row_groups:
        partitions = tuple((name, typed[name](x) if isinstance(x, str) else x) for name, x in row_group.partitions)
        yield row_group._replace(partitions=partitions)

"""What rollout files hold, and which of their columns and row groups will be read: a `Plan`.

Only footers are read here. One file, though a long one: each rule about columns is one function, most of it messages.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ._advice import AdvisedError, Keywords
from ._checks import closest
from ._columns import ARGUMENTS, OPTIONAL, PER_SEQUENCE, Columns, Form, check_mapping, no_mask
from ._formats import is_list, opened, types
from ._paths import printable


# --- what files hold --------------------------------------------------------------------------------------------------
def form_of(files: list[str], columns: Columns | None) -> Form:
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


def _columns_of_first_rows(files: list[str]) -> tuple[str, list[str]]:
    """The first file that has rows, for messages, and the names of its columns; those of others may be anything."""
    for path in files:
        file = opened(path)
        if file.rows:
            return printable(path), file.schema.names
    raise _no_rows(files)


def _no_rows(files: list[str]) -> ValueError:
    return ValueError(f"{', '.join(map(printable, files))}: no rows")


# --- which columns and row groups are read ----------------------------------------------------------------------------
class ColumnLayout(NamedTuple):
    """Which columns of a file are read, and how they hold their numbers."""

    columns: dict[str, str]  # by the argument that each is
    more_masks: tuple[str, ...]  # columns with which that of the mask is multiplied
    rows_are_sequences: bool  # then the per-token columns hold lists; otherwise a row is a token or sample

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        return [*self.columns.values(), *self.more_masks]

    @property
    def renamed(self) -> str:
        """For the end of error messages: which arguments have another name as columns; empty if none have."""
        columns = {argument: column for argument, column in self.columns.items() if argument != column}
        if self.more_masks:  # an error of one of them names its column
            columns.pop("mask", None)
        names = [f"{argument} is column {column!r}" for argument, column in columns.items()]
        return f" ({', '.join(names)})" if names else ""

    def __str__(self) -> str:
        return f"{'lists' if self.rows_are_sequences else 'numbers'} in {', '.join(self.names)}"


class RowGroup(NamedTuple):
    """Where a row group of a Parquet file, or a record batch of an Arrow file, is: what a worker is given at a time."""

    path: str
    noun: str  # what its format calls it: "row group" or "record batch"
    number: int  # from 0, within its file
    layout: ColumnLayout  # of that file

    def __str__(self) -> str:
        return f"{printable(self.path)}, {self.noun} {self.number}"


class Plan(NamedTuple):
    """What will be read."""

    rows_are_sequences: bool  # as in `ColumnLayout`
    row_groups: list[RowGroup]  # of all files
    rows: int  # of all files


def plan(files: list[str], form: Form, unread: set[str], columns: Columns | None) -> Plan:
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
    _refuse_to_go_without(columns or {}, unread)
    wanted = {
        argument: (column,) if isinstance(column, str) else tuple(column)
        for argument, column in named.items()
        if column is not None and argument not in unread
    }
    shards: list[_Shard] = []
    for path in files:
        file = opened(path)
        if not file.rows:  # its columns may be of any type, or null
            continue
        nothing = _holds_nothing(file.schema, *wanted[form.arguments[0]])
        name = printable(path)
        layout = layout_of(name, file.schema, wanted, set() if nothing else set(columns or {}))
        if isinstance(named.get("mask", ""), str):  # neither None nor a list, which say that there are no others
            _refuse_unused_masks(name, file.schema, form, layout)
        groups = [RowGroup(path, file.row_group_name, number, layout) for number in range(file.row_group_count)]
        shards.append(_Shard(name, nothing, layout, groups, file.rows))
    if not shards:
        raise _no_rows(files)
    first = min(shards, key=lambda shard: shard.holds_nothing)  # of those that hold something, if any do
    for shard in shards:
        same_rows = shard.layout.rows_are_sequences == first.layout.rows_are_sequences
        if shard.layout != first.layout and not (shard.holds_nothing and same_rows):
            raise ValueError(
                f"{shard.name} differs from {first.name} in its columns: {shard.layout} beside {first.layout}"
            )
    row_groups = [row_group for shard in shards for row_group in shard.row_groups]
    return Plan(first.layout.rows_are_sequences, row_groups, sum(shard.rows for shard in shards))


def _refuse_to_go_without(columns: Columns, unread: set[str]) -> None:
    """Raise the ValueError for an argument that is mapped to None although a KL term needs it, if any."""
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
    layout: ColumnLayout
    row_groups: list[RowGroup]
    rows: int


def layout_of(name: str, schema: Any, wanted: Mapping[str, tuple[str, ...]], explicit: set[str]) -> ColumnLayout:
    """The layout of the file of that name, given its ``schema``; a ValueError if a column is missing or does not fit.

    ``wanted`` are the columns by argument, of which only the mask may have several. Those of `OPTIONAL` arguments may
    be missing unless in ``explicit``.
    """
    may_be_missing = set(OPTIONAL) - explicit
    used = {column for several in wanted.values() for column in several}
    pairs = [
        (argument, column)
        for argument, several in wanted.items()
        for column in several
        if _has_column(name, schema, argument, column, used, may_be_missing=argument in may_be_missing)
    ]
    # All others must hold lists if the first one does, and numbers if not.
    reference_column, rows_are_sequences = pairs[0][1], _holds_lists(name, schema, *pairs[0])
    for argument, column in pairs:
        per_sequence = rows_are_sequences and argument in PER_SEQUENCE
        if per_sequence and types.is_null(schema.field(column).type):  # refused where there are tokens
            continue
        listed = _holds_lists(name, schema, argument, column)
        if listed != rows_are_sequences and not per_sequence:
            held = ("numbers", "lists")
            raise ValueError(
                f"{name}: column {column!r} holds {held[listed]}, but column {reference_column!r} "
                f"{held[rows_are_sequences]}: either all hold one number a row, or all a list"
            )
    columns = {argument: column for argument, column in reversed(pairs)}  # of several, the first
    masks = [column for argument, column in pairs if argument == "mask"]
    return ColumnLayout({argument: columns[argument] for argument, _ in pairs}, tuple(masks[1:]), rows_are_sequences)


def _holds_nothing(schema: Any, column: str) -> bool:
    """Whether the column is there and of lists without a type: of them, all are empty, or hold nulls."""
    index = schema.get_field_index(column)  # -1 if there is not one
    column_type = schema.field(index).type if index >= 0 else None
    return column_type is not None and is_list(column_type) and bool(types.is_null(column_type.value_type))


def _refuse_unused_masks(name: str, schema: Any, form: Form, layout: ColumnLayout) -> None:
    """Raise the ValueError for columns that must be masks, by their names and types, but are not read, if any."""
    unused = [
        column
        for column in schema.names
        if column not in layout.names
        and column.lower().endswith(("mask", "masks"))
        and _may_be_mask(schema.field(column).type, layout.rows_are_sequences)
    ]
    if not unused:
        return
    which = f"{name}: column {unused[0]!r} looks like a mask"
    if form is Form.PROBABILITIES:
        raise no_mask(which)
    used = [layout.columns["mask"]] if "mask" in layout.columns else []
    every = used + unused
    raise AdvisedError(
        "{which} and is not used: {use} uses {how_many} (several are multiplied), {ignore} ignores {ignored}",
        {
            "which": which,
            "use": Keywords({"columns": {"mask": every if len(every) > 1 else every[0]}}),
            "how_many": {1: "it", 2: "both"}.get(len(every), "all"),
            "ignore": Keywords({"columns": {"mask": used or None}}),
            "ignored": "it" if len(unused) == 1 else ", ".join(map(repr, unused)),
        },
    )


def _may_be_mask(column_type: Any, listed: bool) -> bool:
    """Whether a column of that type holds numbers or bools, in lists or not."""
    value_type = column_type.value_type if is_list(column_type) else column_type
    may_be = types.is_boolean(value_type) or types.is_integer(value_type) or types.is_floating(value_type)
    return bool(may_be and is_list(column_type) == listed)


def _has_column(name: str, schema: Any, argument: str, column: str, used: set[str], *, may_be_missing: bool) -> bool:
    """Whether there is such a column; a ValueError if it is missing and may not be, or is there more than once.

    The columns ``used``, and those that have the name of another argument, cannot be meant instead.
    """
    count = len(schema.get_all_field_indices(column))
    if count == 1:
        return True
    if not count and may_be_missing:
        return False
    where = f"{name}: column {column!r}{'' if column == argument else f' (for {argument})'}"
    names = ", ".join(schema.names)
    if count:
        raise ValueError(f"{where} is there more than once; it has {names}")
    free = [other for other in schema.names if other not in used and (other == argument or other not in ARGUMENTS)]
    like = {argument: next(iter(closest(column, free)), None)}
    struct = next((repr(field.name) for field in schema if types.is_struct(field.type)), None)
    clauses = {
        "{where} is missing; it has {names}": True,
        "if it is this one, {like}": like[argument],
        "if there is none, {none}": argument == "old_logps",
        "{struct} is a struct: table.flatten() makes columns of its fields": struct,
    }
    values = {"like": Keywords({"columns": like}), "none": Keywords({"columns": {argument: None}})}
    template = "; ".join(clause for clause, holds in clauses.items() if holds)
    raise AdvisedError(template, {"where": where, "names": names, "struct": struct, **values})


def _holds_lists(name: str, schema: Any, argument: str, column: str) -> bool:
    """Whether the column holds lists rather than numbers; a ValueError if it holds neither, or not of real numbers."""
    column_type = schema.field(column).type
    listed = is_list(column_type)
    value_type = column_type.value_type if listed else column_type
    real = types.is_floating(value_type) or types.is_integer(value_type)
    real = real or (listed and types.is_null(value_type))  # of lists that are all empty
    if not real and not (argument == "mask" and types.is_boolean(value_type)):
        allowed = "bools or 0/1" if argument == "mask" else "real numbers"
        raise ValueError(f"{name}: column {column!r} must hold {allowed}, or lists of them, got {column_type}")
    return listed

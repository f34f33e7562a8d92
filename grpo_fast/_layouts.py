"""Which columns of a file are read, and how they hold their numbers: a `ColumnLayout`, or the error about one.

One file, though a long one: each rule about columns is one function, most of it messages.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ._advice import AdvisedError, Keywords
from ._arrow import column_names, column_type, is_list, top_level, types
from ._checks import closest
from ._columns import ARGUMENTS, MAY_BE_NULL, PER_SEQUENCE, Form, no_mask


class ColumnLayout(NamedTuple):
    """Which columns of a file are read, and how they hold their numbers."""

    columns: dict[str, str]  # by the argument that each is
    more_masks: tuple[str, ...]  # columns with which that of the mask is multiplied
    rows_are_sequences: bool  # then the per-token columns hold lists; otherwise a row is a token or sample
    beside: tuple[str, ...] = ()  # columns that are no arguments: what results are told apart by

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        return list(dict.fromkeys([*self.columns.values(), *self.more_masks, *self.beside]))

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


def layout_of(
    name: str,
    schema: Any,
    wanted: Mapping[str, tuple[str, ...]],
    may_be_missing: set[str],
    beside: tuple[str, ...] = (),
    needs: Mapping[str, Keywords] = MappingProxyType({}),
) -> ColumnLayout:
    """The layout of the file of that name, given its ``schema``; a ValueError if a column is missing or does not fit.

    ``wanted`` are the columns by argument, of which only the mask may have several. Those of the arguments that
    ``may_be_missing``, and of the columns ``beside``, are left out where they are. ``needs`` says what needs an
    argument, where that is not plain.
    """
    used = {column for several in wanted.values() for column in several}
    pairs = [
        (argument, column)
        for argument, several in wanted.items()
        for column in several
        if _has_column(
            name, schema, argument, column, used, may_be_missing=argument in may_be_missing, by=needs.get(argument)
        )
    ]
    # All others must hold lists if the first one does, and numbers if not.
    reference_column, rows_are_sequences = pairs[0][1], _holds_lists(name, schema, *pairs[0])
    for argument, column in pairs:
        per_sequence = rows_are_sequences and argument in PER_SEQUENCE
        may_be_null = per_sequence or argument in MAY_BE_NULL  # of the former it is refused where there are tokens
        if may_be_null and types.is_null(column_type(schema, column)):
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
    in_order = {argument: columns[argument] for argument, _ in pairs}
    there = tuple(column for column in beside if column_type(schema, column) is not None)
    return ColumnLayout(in_order, tuple(masks[1:]), rows_are_sequences, there)


def holds_nothing(schema: Any, column: str) -> bool:
    """Whether the column is there and of lists without a type: of them, all are empty, or hold nulls."""
    kind = column_type(schema, column)
    return kind is not None and is_list(kind) and bool(types.is_null(kind.value_type))


def refuse_unused_masks(name: str, schema: Any, form: Form, layout: ColumnLayout) -> None:
    """Raise the ValueError for columns that must be masks, by their names and types, but are not read, if any."""
    structs = {top_level(schema, column) for column in layout.columns.values()} - set(layout.columns.values())
    unused = [
        column
        for column in column_names(schema)
        if column not in layout.names
        and column.lower().endswith(("mask", "masks"))
        and top_level(schema, column) in {column} | structs  # a struct of which nothing is read is about other things
        and _may_be_mask(column_type(schema, column), layout.rows_are_sequences)
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


def _may_be_mask(kind: Any, listed: bool) -> bool:
    """Whether a column of that type holds numbers or bools, in lists or not."""
    if kind is None:  # there are several of that name
        return False
    value_type = kind.value_type if is_list(kind) else kind
    may_be = types.is_boolean(value_type) or types.is_integer(value_type) or types.is_floating(value_type)
    return bool(may_be and is_list(kind) == listed)


def _has_column(
    name: str,
    schema: Any,
    argument: str,
    column: str,
    used: set[str],
    *,
    may_be_missing: bool,
    by: Keywords | None = None,
) -> bool:
    """Whether there is such a column; a ValueError if it is missing and may not be, or is there more than once.

    The columns ``used``, and those that have the name of another argument, cannot be meant instead. ``by`` says what
    needs it.
    """
    if column_type(schema, column) is not None:
        return True
    count = column_names(schema).count(column)
    if not count and may_be_missing:
        return False
    where = f"{name}: column {column!r}{'' if column == argument else f' (for {argument})'}"
    names = ", ".join(column_names(schema))
    if count:
        raise ValueError(f"{where} is there more than once; it has {names}")
    free = [
        other for other in column_names(schema) if other not in used and (other == argument or other not in ARGUMENTS)
    ]
    like = {argument: next(iter(closest(column, free)), None)}
    clauses = {
        "{where} is missing; it has {names}": by is None,
        "{where} is missing, which {by} needs; it has {names}": by is not None,
        "if it is this one, {like}": like[argument],
        "if there is none, {none}": argument == "old_logps",
    }
    values = {"like": Keywords({"columns": like}), "none": Keywords({"columns": {argument: None}})}
    template = "; ".join(clause for clause, holds in clauses.items() if holds)
    raise AdvisedError(template, {"where": where, "names": names, "by": by, **values})


def _holds_lists(name: str, schema: Any, argument: str, column: str) -> bool:
    """Whether the column holds lists rather than numbers; a ValueError if it holds neither, or not of real numbers."""
    kind = column_type(schema, column)
    listed = is_list(kind)
    value_type = kind.value_type if listed else kind
    real = types.is_floating(value_type) or types.is_integer(value_type)
    real = real or (listed and types.is_null(value_type))  # of lists that are all empty
    if not real and not (argument == "mask" and types.is_boolean(value_type)):
        allowed = "bools or 0/1" if argument == "mask" else "real numbers"
        raise ValueError(f"{name}: column {column!r} must hold {allowed}, or lists of them, got {kind}")
    return listed

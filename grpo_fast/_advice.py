"""Errors that say what to write instead, in Python or, where the command raises them, as it is written in a shell."""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple


class Keywords(NamedTuple):
    """Keyword arguments of `evaluate` and `sweep`, which are options of the command."""

    values: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.values.items())

    def in_shell(self) -> str:
        """The same as options of the command."""
        return " ".join(
            f"--columns {','.join(_columns_in_shell(value))}" if name == "columns" else f"{flag_of(name)} {value}"
            for name, value in self.values.items()
        )


class Code(NamedTuple):
    """Python that can stand alone."""

    text: str
    imports: str

    def __str__(self) -> str:
        return self.text

    def in_shell(self) -> str:
        """The same as a command."""
        return f"python -c {shlex.quote(f'import {self.imports}; {self.text}')}"


class AdvisedError(ValueError):
    """An error whose message has ``values`` in the places of ``template`` that have their names."""

    def __init__(self, template: str, values: Mapping[str, object]) -> None:
        super().__init__(template, values)  # of which a process pool makes it anew

    def __str__(self) -> str:
        template, values = self.args
        return str(template.format_map(values))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def in_shell(self) -> str:
        """The message for who sits at a shell."""
        template, values = self.args
        shown = {name: x.in_shell() if isinstance(x, (Keywords, Code)) else x for name, x in values.items()}
        return str(template.format_map(shown))


def flag_of(name: str) -> str:
    """The option of the command that is the keyword of that name."""
    return "--" + name.replace("_", "-")


def _columns_in_shell(columns: Mapping[str, Any]) -> list[str]:
    """What `--columns` takes for these: the only one of several is followed by none."""
    pairs = []
    for argument, column in columns.items():
        several = [column] if column is None or isinstance(column, str) else [*column, *[None] * (len(column) == 1)]
        names = ["" if name is None else shlex.quote(name.replace(",", "\\,")) for name in several]
        pairs += [f"{argument}={name}" for name in names]
    return pairs

"""Which files are named, by paths, globs and directories; and what to do with what is neither a path nor a table."""

import glob
import io
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias

from ._checks import closest
from ._directories import files_below
from ._filesystems import is_uri, of_uri, remote_files
from ._sources import File, Source, Table, printable, table_of


class ArrowStream(Protocol):
    """A table of any library: of pandas, polars, pyarrow."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...


Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Paths: TypeAlias = Path | ArrowStream | Iterable[Path | ArrowStream]


def find(paths: Paths, filesystem: Any = None) -> list[Source]:
    """The files that ``paths``, which may be globs and directories, name, in order; and the tables among them.

    Raises
    ------
    TypeError
        There is something else than paths and tables.
    FileNotFoundError, ValueError
        A path or glob names no file, or two name the same one, which would count twice.
    """
    sources: dict[object, Source] = {}  # by what tells them apart
    several: Iterable[Any]
    if isinstance(paths, (str, bytes, os.PathLike)):
        several = [paths]
    elif _is_array_of_paths(paths):
        several = paths  # type: ignore[assignment]
    elif table := table_of(paths):
        several = [table]
    elif (instead := _instead_of_paths(paths)) or not isinstance(paths, Iterable):
        raise TypeError(f"paths must be a path or an iterable of them, got {instead or repr(paths)}")
    else:
        several = paths
    for path in several:
        for source in _found(path, filesystem):
            same = _identity(source, sources)
            if same in sources:
                raise ValueError(f"{source} is named twice and would be counted twice")
            sources[same] = source
    if not sources:
        raise ValueError("paths must name at least one file, got none")
    return list(sources.values())


def _identity(source: Source, others: Mapping[object, Source]) -> object:
    """What is the same of two names of the same file, as which one of the others may be there."""
    if not isinstance(source, File):
        return id(source)
    if source.filesystem is None:
        return os.path.realpath(source.path)
    for number in itertools.count():  # file systems can be compared, but not hashed
        other = others.get((source.path, number))
        if other is None or other == source:
            return source.path, number
    raise AssertionError("unreachable")


def _found(path: Any, filesystem: Any) -> list[Source]:
    """The files that one of the paths names, or the table that it is."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        table = path if isinstance(path, Table) else table_of(path)
        if table is None:
            what = _instead_of_paths(path) or repr(path)
            raise TypeError(f"paths must be a path or an iterable of them, got {what} among them")
        return [table]
    pattern = os.fsdecode(path)
    if filesystem is None and is_uri(pattern):
        filesystem, pattern = of_uri(pattern)
    if filesystem is not None:
        return list(remote_files(filesystem, pattern))
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise FileNotFoundError(f"no such file: {printable(pattern)}{_like(pattern)}")
    names: list[str] = []
    for name in matches:
        names += files_below(name) if os.path.isdir(name) else [name]
    return [File(name) for name in dict.fromkeys(names)]  # a glob may match a directory and what is in it


def _like(path: str) -> str:
    """The end of a message about a file that is not there: one beside it that has nearly that name, if any."""
    folder, name = os.path.split(path)
    try:
        others = {os.path.splitext(other)[0]: other for other in os.listdir(folder or ".")}
    except OSError:
        return ""
    like = closest(os.path.splitext(name)[0], others)  # without what most names end in
    return f": did you mean {printable(others[like[0]])!r}?" if like else ""


def free_name(path: str) -> str:
    """A name that no file has: ``path`` or, if there is one, the same with the first number from 2 that is free."""
    stem, suffix = os.path.splitext(path)
    names = (f"{stem}-{number}{suffix}" for number in itertools.count(2))
    while os.path.lexists(path):
        path = next(names)
    return path


def _is_array_of_paths(value: Any) -> bool:
    """Whether it is an array or a series, of one dimension, whose first element is a path."""
    if not hasattr(value, "__array__") or len(getattr(value, "shape", ())) != 1:
        return False
    return isinstance(next(iter(value), None), (str, bytes, os.PathLike))


#: How to write what is no path into a file, by the package and the class of it.
_WRITTEN_BY = {
    "pandas": ".to_parquet({!r})",
    "polars": ".write_parquet({!r})",
    "datasets": ".to_parquet({!r})",
    "LazyFrame": ".sink_parquet({!r})",
}


def _instead_of_paths(value: Any) -> str | None:
    """What a value is that holds rollouts, or leads to them, but is no path, and what to do with it; or None."""
    package, kind = type(value).__module__.partition(".")[0], type(value).__name__
    what = f"{'an' if kind[0] in 'AEIOU' or kind == 'ndarray' else 'a'} {kind}"
    target = free_name("rollouts.parquet")
    if package in ("pandas", "polars", "datasets") and kind not in ("Series", "Index"):  # which are as arrays
        written = (_WRITTEN_BY.get(kind) or _WRITTEN_BY[package]).format(target)
        return f"{what} of {package}: write it into a file, x{written}, and name that"
    if package == "pyarrow" and hasattr(value, "schema"):
        written = f"pyarrow.parquet.write_table(x, {target!r})"
        return f"{what} of pyarrow: write it into a file, {written}, and name that"
    if isinstance(value, Mapping) or hasattr(value, "__array__"):
        return f"{what}: arrays in memory are for grpo_loss(**arrays).stats, or grpo_stats(**arrays)"
    if isinstance(value, io.BytesIO):
        written = f"pathlib.Path({target!r}).write_bytes(x.getvalue())"
        return f"{what}: write it into a file, {written}, and name that"
    if hasattr(value, "read"):
        name = getattr(value, "name", None)
        return f"{what}: name the file instead, {name!r}" if isinstance(name, str) else f"{what}: name a file instead"
    return None

"""Which files are named, by paths and globs; and what to do with what is no path."""

import glob
import io
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from ._checks import closest

Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Paths: TypeAlias = Path | Iterable[Path]


def printable(path: str) -> str:
    """The path as messages have it: bytes in it that are not UTF-8, which nobody could print, as backslashes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find(paths: Paths) -> list[str]:
    """The files that ``paths``, which may be globs, name, in order.

    Raises
    ------
    TypeError
        There is something else than paths.
    FileNotFoundError, ValueError
        A path or glob names no file, or two name the same one, which would count twice.
    """
    files: dict[str, str] = {}  # by their real paths
    if isinstance(paths, (str, bytes, os.PathLike)):
        paths = [paths]
    elif not _is_array_of_paths(paths) and ((instead := _instead_of_paths(paths)) or not isinstance(paths, Iterable)):
        raise TypeError(f"paths must be a path or an iterable of them, got {instead or repr(paths)}")
    for path in paths:
        if not isinstance(path, (str, bytes, os.PathLike)):
            what = _instead_of_paths(path) or repr(path)
            raise TypeError(f"paths must be a path or an iterable of them, got {what} among them")
        pattern = os.fsdecode(path)
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise FileNotFoundError(f"no such file: {printable(pattern)}{_like(pattern)}")
        for name in matches:
            if os.path.isdir(name):
                raise ValueError(f"{printable(name)} is a directory; name its files, for example {_files_in(name)}")
            if os.path.realpath(name) in files:
                raise ValueError(f"{printable(name)} is named twice and would be counted twice")
            files[os.path.realpath(name)] = name
    if not files:
        raise ValueError("paths must name at least one file, got none")
    return list(files.values())


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


def _files_in(directory: str) -> str:
    """A glob for the files of rollouts in a directory, or below it."""
    for suffix in ("parquet", "arrow"):
        for pattern in (f"*.{suffix}", f"**/*.{suffix}"):
            if next(glob.iglob(os.path.join(glob.escape(directory), pattern), recursive=True), None):
                return printable(os.path.join(directory, pattern))
    return printable(os.path.join(directory, "*.parquet"))

"""Files on file systems of pyarrow: URIs such as ``s3://bucket/run/``, directories and globs there."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from ._directories import rollouts_among
from ._sources import File


def is_uri(path: str) -> bool:
    """Whether it is one, rather than the path of a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def of_uri(uri: str) -> tuple[Any, str]:
    """The file system of pyarrow that a URI names, None for this machine's, and the path on it."""
    try:
        import pyarrow
        from pyarrow import fs
    except ImportError as error:
        raise ImportError("reading rollouts needs pyarrow: pip install 'grpo_fast[data]'") from error
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{uri}: pyarrow knows no such file system: {error}") from error
    return (None if isinstance(filesystem, fs.LocalFileSystem) else filesystem), path


def remote_files(filesystem: Any, path: str) -> list[File]:
    """The files that a path, glob or directory names on a file system of pyarrow, sorted.

    Raises
    ------
    TypeError
        It is no file system of pyarrow.
    FileNotFoundError, ValueError
        There is no such file, or a directory without rollouts.
    """
    from pyarrow import fs

    if not isinstance(filesystem, fs.FileSystem):
        raise TypeError(f"filesystem must be one of pyarrow.fs, got {filesystem!r}")
    path = path.rstrip("/")
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound and re.search(r"[*?[]", path):
        parts = path.split("/")
        fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?[]", part))
        names = _names_below(filesystem, "/".join(parts[:fixed]))
        found = sorted(name for name in names if _matches(name.split("/"), parts))
    elif info.type == fs.FileType.NotFound:
        found = []
    elif info.type == fs.FileType.Directory:
        found = rollouts_among(_names_below(filesystem, path), path)
    else:
        found = [path]
    if not found:
        raise FileNotFoundError(f"no such file: {path} on {filesystem.type_name}")
    return [File(name, filesystem) for name in found]


def _names_below(filesystem: Any, directory: str) -> list[str]:
    """The paths of all files in a directory, and below it, that are not about other files."""
    from pyarrow import fs

    below = filesystem.get_file_info(fs.FileSelector(directory, recursive=True, allow_not_found=True))
    depth = len(directory.split("/")) if directory else 0
    files = [info.path for info in below if info.type == fs.FileType.File]
    return [path for path in files if not any(x.startswith((".", "_")) for x in path.split("/")[depth:])]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob, both split at slashes; ``**`` is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])

"""Compiled kernels on disk: Numba's cache, made safe for what happens to a library on other people's machines.

Numba keys its files by less than went into the machine code (not by the files that are inlined, nor by flags), keeps
an index that processes starting at once overwrite (one's code can end under the other's types), and ends the call when
a file is damaged or the disk is full. Here an entry is one file that is written once, under a name that is a digest of
all that decides what it does; what cannot be read is compiled again, and what cannot be written is warned about.
"""

import hashlib
import os
import pickle
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

_CHECKSUM_BYTES = hashlib.sha256().digest_size


def use_disk_cache(dispatcher: Any) -> None:
    """Make a dispatcher of Numba's save on disk what it compiles, and look there before it compiles."""
    try:
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    except (RuntimeError, OSError) as error:  # "no locator available", as nowhere can be written; no source files
        dispatcher._cache = _Uncached(error)


class _KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Numba's cache of one function, on our files; where one cannot be written, saving warns."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _Entries(Path(self.cache_path), function)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(error)


class _Uncached(NullCache):  # type: ignore[misc]
    """The cache where there is no place for one: it is empty, and saving warns."""

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def save_overload(self, sig: Any, data: Any) -> None:
        _warn(self._reason)


def _warn(reason: Exception) -> None:
    warnings.warn(
        f"grpo_fast compiles its kernels again in every process, since there is no place to keep them: {reason}. "
        "NUMBA_CACHE_DIR can name one",
        RuntimeWarning,
        stacklevel=1,
    )


class _Entries:
    """The files of one function's machine code: one for each combination of types, CPU, versions and source."""

    def __init__(self, folder: Path, function: Any) -> None:
        module = function.__module__.rpartition(".")[2]
        self._folder = folder
        self._name = f"{module}.{function.__qualname__}"
        # Now, not when something is compiled: by then the files may be those of another version.
        self._source = source()

    def load(self, key: Any) -> Any:
        """What was saved under ``key``; None if nothing was, or if it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        data = content[_CHECKSUM_BYTES:]
        return pickle.loads(data) if hashlib.sha256(data).digest() == content[:_CHECKSUM_BYTES] else None

    def save(self, key: Any, data: Any) -> None:
        """Write ``data`` to the file of ``key``, whole or not at all; remove files that are made from other source."""
        path = self._path(key)
        self._remove(but=f"{self._name}.{self._source}.")
        content = dumps(data)
        # Nobody sees half a file. If this process is killed in between, its own temporary file is all that remains.
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove all files."""
        self._remove()

    def _path(self, key: Any) -> Path:
        # Numba's key is the types, the CPU and its features; it leaves out its one setting that changes what code does.
        versions = numba.__version__, llvmlite.__version__, sys.implementation.cache_tag
        digest = _digest(repr((key, versions, numba.config.BOUNDSCHECK)).encode())
        return self._folder / f"{self._name}.{self._source}.{digest}.nbc"

    def _remove(self, but: str | None = None) -> None:
        """Remove this function's files, all or those whose names do not begin with ``but``."""
        for path in self._folder.glob(f"{self._name}.*.nbc"):
            if but is None or not path.name.startswith(but):
                with suppress(OSError):  # another process was faster, or still uses it
                    path.unlink()


@cache
def source() -> str:
    """A digest of the texts that decide what machine code does: all kernels, comments included, and their options."""
    texts = [*files(__package__).iterdir(), files(__package__.rpartition(".")[0]) / "terms.py"]
    named = sorted((text.name, text.read_bytes()) for text in texts if text.name.endswith(".py"))
    return _digest(repr(named).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]

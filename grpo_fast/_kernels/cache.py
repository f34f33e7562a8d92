"""Compiled kernels on disk: Numba's cache, made safe for what happens to a library on other people's machines.

Numba keeps its files beside each copy of the sources, keys them by less than went into the machine code (not by the
files that are inlined, nor by flags), has an index that processes starting at once overwrite (one's code can end under
the other's types), and ends the call when a file is damaged or the disk is full. Here an entry is one file in a folder
of the user's (`cache_folder`), written once, under a name that is a digest of all that decides what it does. What
cannot be read is compiled again; that nothing can be written is told once.
"""

import hashlib
import pickle
import pkgutil
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from types import CodeType
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from .cache_folder import Folder, kernel_folder
from .notices import kernel_name, warn_once

_CHECKSUM_BYTES = hashlib.sha256().digest_size

#: Settings of Numba's that change what code does, or how fast: what is compiled to find a fault is not for others.
_SETTINGS = "BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "ENABLE_PROFILING"


def use_disk_cache(dispatcher: Any) -> None:
    """Make a dispatcher of Numba's save on disk what it compiles, and look there before it compiles.

    It must be that of a function at the top of a module in this folder: closures, for one, are in no entry's name.
    """
    function = dispatcher.py_func
    name = kernel_name(function)
    try:
        # Now, not when something is compiled: by then the sources may be those of another version.
        dispatcher._cache = _KernelCache(Entries(kernel_folder(), f"{name}.{source()}"))
    except (RuntimeError, OSError) as error:
        dispatcher._cache = _Uncached(error)


class _KernelCache(NullCache):  # type: ignore[misc]  # numba has no types
    """What Numba asks for the machine code of one function, and gives it to."""

    def __init__(self, entries: "Entries") -> None:
        self._entries = entries

    @property
    def cache_path(self) -> str:
        return str(self._entries.folder.path)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()  # it may never have compiled yet
        data = self._entries.load((sig, target_context.codegen().magic_tuple()))
        return None if data is None else CompileResult._rebuild(target_context, *data)

    def save_overload(self, sig: Any, data: Any) -> None:
        if data.library.has_dynamic_globals:  # addresses that are right in this process alone
            return
        try:
            self._entries.save((sig, data.codegen.magic_tuple()), data._reduce())
        except OSError as error:
            _warn(
                f"they cannot be kept in {self.cache_path}: {error}. Mend or remove that folder, which is made again, "
                "or name another one in NUMBA_CACHE_DIR"
            )


class _Uncached(NullCache):  # type: ignore[misc]  # numba has no types
    """The cache where there can be none: it is empty, and saving warns."""

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def save_overload(self, sig: Any, data: Any) -> None:
        _warn(str(self._reason))


def _warn(reason: str) -> None:
    warn_once("cache", f"grpo_fast compiles its kernels again in every process, since {reason}")


class Entries:
    """The machine code of one function: an entry for each combination of types, CPU and versions."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder = folder
        self._name = name

    def load(self, key: Any) -> Any:
        """What was saved under ``key``; None if nothing was, or if it is damaged."""
        data = self._verified(self._entry(key))
        return None if data is None else pickle.loads(data)

    def save(self, key: Any, data: Any) -> None:
        """Keep ``data`` under ``key``; an OSError that says why, if that is not possible."""
        entry, data = self._entry(key), dumps(data)
        try:
            self.folder.write(entry, _checksum(entry, data) + data)
        except PermissionError:
            # On Windows, files that another process has just open cannot be replaced; what they hold is as good.
            if self._verified(entry) is None:
                raise

    def _verified(self, entry: str) -> bytes | None:
        """The pickle in an entry, if it is what was written, and written under this name."""
        content = self.folder.read(entry)
        if content is None:
            return None
        checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        return data if checksum == _checksum(entry, data) else None

    def _entry(self, key: Any) -> str:
        """The name for a key of Numba's: types, the CPU and its features.

        That leaves out settings of Numba's that change code, and what else reads a pickle and runs machine code: Numba,
        LLVM, NumPy, and Python, whose binary interface extension modules name.
        """
        versions = numba.__version__, llvmlite.__version__, np.__version__, EXTENSION_SUFFIXES[0]
        settings = {name: getattr(numba.config, name, None) for name in _SETTINGS}
        return f"{self._name}.{_digest(repr((key, versions, settings)).encode())}"


def _checksum(entry: str, data: bytes) -> bytes:
    return hashlib.sha256(entry.encode() + data).digest()


@cache
def source() -> str:
    """A digest of the texts that decide what machine code does: all kernels, comments included, and their options.

    Where they have no text, as in a frozen program, it is of their code. Raises a RuntimeError where neither is known.
    """
    options = f"{__package__.rpartition('.')[0]}.terms"
    try:
        texts = [(name, _text(name)) for name in sorted([*_modules(__package__), *_modules(options)])]
    except (AttributeError, ImportError, ValueError) as error:
        raise RuntimeError(
            f"neither text nor code of its sources can be read, to tell versions apart ({error}); install them as files"
        ) from error
    return _digest(repr(texts).encode())


def _modules(package: str) -> list[str]:
    """The names of a package that was imported, and of the modules in it."""
    names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(sys.modules[package].__path__)]
    if not names:
        raise ImportError(f"{package} does not list its modules")
    return [package, *names]


def _text(module: str) -> Any:
    loader: Any = getattr(find_spec(module), "loader", None)
    return loader.get_source(module) or _meaning(loader.get_code(module))


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """What a code object does, without where its text was."""
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    constants = [_meaning(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return *arguments, *names, code.co_code, code.co_exceptiontable, constants


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]

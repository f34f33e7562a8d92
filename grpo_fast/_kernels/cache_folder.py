"""The folder of compiled kernels: where it is, whose it must be, and how much it may hold.

What is read here is unpickled, and a pickle can run anything. So nothing is read from a folder that someone else could
have written to, nor from such a file in it; symbolic links are not followed; and what is judged is the folder and the
file that are open, not names that may mean something else a moment later.

Only a folder that the user names in NUMBA_CACHE_DIR is used as it is, as Numba itself would: whoever may write to it
may run code as everybody who reads from it.
"""

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numba

#: Bytes that the entries may take: more than a thousand of them.
LIMIT = 256 << 20
#: Seconds after which nobody will finish a temporary file any more.
_STALE = 24 * 3600

# The names of files that are ours, also in a folder with others.
_PREFIX, _ENTRY, _TEMPORARY = "grpo_fast.", ".nbc", ".tmp"

# Windows has no owners, modes and descriptors of folders; what lies in a user's profile is this user's alone there.
_HAS_OWNERS = hasattr(os, "geteuid")
_FOLLOW_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_DO_NOT_WAIT = getattr(os, "O_NONBLOCK", 0)  # for who would write to it, where an entry is a named pipe


def kernel_folder() -> "Folder":
    """The folder that NUMBA_CACHE_DIR names, or else ``grpo_fast`` among the user's caches; it may not be there yet.

    Raises a RuntimeError if no home directory is known.
    """
    if numba.config.CACHE_DIR:
        return Folder(Path(numba.config.CACHE_DIR), as_given=True)
    try:
        return Folder(_user_caches() / "grpo_fast")
    except RuntimeError as error:
        raise RuntimeError("there is no home directory to keep them in: NUMBA_CACHE_DIR can name a folder") from error


def _user_caches() -> Path:
    """Where the programs of this user keep what they can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"


class Folder:
    """Entries by name: bytes that are written once, whole, and by this user alone.

    With ``as_given``, neither owners, modes nor links are looked at, and files are made as the umask has it.
    """

    def __init__(self, path: Path, *, as_given: bool = False) -> None:
        self.path = path.absolute()
        self._as_given = as_given

    def read(self, name: str) -> bytes | None:
        """The content of an entry, which is marked as used; None if there is none that is surely this user's."""
        name = f"{_PREFIX}{name}{_ENTRY}"
        try:
            with self._open() as folder, folder.open(name, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return None
                if not self._as_given:
                    _refuse_others(status)
                folder.mark(name)
                return file.read()
        except OSError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Make an entry, whole or not at all, in place of what has its name; make the folder first, and room then.

        Raises an OSError that says why, if it cannot.
        """
        name, temporary = f"{_PREFIX}{name}{_ENTRY}", f"{_PREFIX}{os.urandom(8).hex()}{_TEMPORARY}"
        self._make()
        with self._open() as folder:
            # Nobody sees half a file. If this process is killed in between, its own temporary file is all that remains.
            try:
                with folder.open(temporary, "xb", 0o666 if self._as_given else 0o600) as file:
                    file.write(content)
                folder.rename(temporary, name)
            finally:
                folder.remove(temporary)
            _make_room(folder, name)

    def _make(self) -> None:
        if self._as_given:
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self.path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):  # whatever it is, opening it will tell
                self.path.mkdir(0o700)

    @contextmanager
    def _open(self) -> Iterator["_OpenFolder"]:
        """The folder as it is now; a PermissionError, if others may write to it.

        It does not stay open: a host may close all files, and its own then get the number of this one.
        """
        if self._as_given or not _HAS_OWNERS:
            yield _OpenFolder(self.path)
            return
        if self.path.is_symlink():  # one that comes later is not followed either, but the error is less clear
            raise PermissionError("it is a symbolic link")
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | _FOLLOW_NO_LINK)
        try:
            _refuse_others(os.fstat(descriptor))
            yield _OpenFolder(self.path, descriptor)
        finally:
            os.close(descriptor)


def _refuse_others(status: os.stat_result) -> None:
    """Raise a PermissionError unless a file or folder belongs to this user and nobody else may write to it."""
    if not _HAS_OWNERS:
        return
    if status.st_uid != os.geteuid():
        raise PermissionError(f"it belongs to user {status.st_uid}, and this process to user {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to it: its mode is {stat.S_IMODE(status.st_mode):o}, not 700")


def _make_room(folder: "_OpenFolder", written: str) -> None:
    """Remove stale temporary files and, until the rest fits, the entries used least recently, but not that ``written``.

    Other processes may be doing the same.
    """
    entries = []
    for name, status in folder.files():
        if name.endswith(_ENTRY):
            entries.append((status.st_mtime, status.st_size, name))
        elif name.endswith(_TEMPORARY) and status.st_mtime < time.time() - _STALE:
            folder.remove(name)
    surplus = sum(size for _, size, _ in entries) - LIMIT
    for _, size, name in sorted(entries):
        if surplus > 0 and name != written:
            folder.remove(name)
            surplus -= size


class _OpenFolder:
    """A folder by its descriptor, or where that is None by its path."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self._path = path
        self._descriptor = descriptor

    def _at(self, name: str) -> str:
        """What names a file together with ``dir_fd=self._descriptor``."""
        return name if self._descriptor is not None else str(self._path / name)

    def open(self, name: str, mode: str, permissions: int = 0) -> IO[bytes]:
        flags = _DO_NOT_WAIT if self._descriptor is None else _DO_NOT_WAIT | _FOLLOW_NO_LINK

        def opener(path: str, usual: int) -> int:
            return os.open(path, usual | flags, permissions, dir_fd=self._descriptor)

        return open(self._at(name), mode, opener=opener)

    def mark(self, name: str) -> None:
        """Note that an entry was used now, if that can be noted."""
        with suppress(OSError):
            os.utime(self._at(name), dir_fd=self._descriptor)

    def rename(self, name: str, new: str) -> None:
        os.replace(self._at(name), self._at(new), src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, unless another process was faster, or still uses it."""
        with suppress(OSError):
            os.unlink(self._at(name), dir_fd=self._descriptor)

    def files(self) -> list[tuple[str, os.stat_result]]:
        """Names and states of all files that are ours by their names; fewer, if it cannot be known."""
        ours = []
        with suppress(OSError), os.scandir(self._path if self._descriptor is None else self._descriptor) as found:
            for file in found:
                with suppress(OSError):  # another process has just removed it
                    if file.name.startswith(_PREFIX):
                        ours.append((file.name, file.stat(follow_symlinks=False)))
        return ours

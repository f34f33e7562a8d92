"""What others could have written is never unpickled; the folder is the user's, on any system, and does not grow."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numba
import pytest

from grpo_fast._kernels import cache_folder
from grpo_fast._kernels.cache import Entries
from grpo_fast._kernels.cache_folder import LIMIT, Folder, kernel_folder

needs_posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and named pipes of POSIX")
needs_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")
SOMEONE = 12345


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that is empty, and no folder named for the cache."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.fixture
def folder(home):
    return Folder(home / ".cache" / "grpo_fast")


class Bomb:
    """What runs code when it is unpickled: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def files(folder):
    return sorted(path.name for path in folder.path.iterdir())


def mode(path):
    return path.lstat().st_mode & 0o777


def at_once(function, argument):
    """The result in a list; nothing, if it waits, as for who writes to a named pipe."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(argument)), daemon=True)
    thread.start()
    thread.join(60)
    return results


def replaced_by_a_pipe(path):
    path.rename(path.with_name("elsewhere"))
    os.mkfifo(path, 0o600)


# --- where ------------------------------------------------------------------------------------------------------------
PLACES = {
    ("linux", ""): "home/.cache",
    ("linux", "XDG_CACHE_HOME=xdg"): "xdg",
    ("linux", "XDG_CACHE_HOME=./xdg"): "home/.cache",  # only absolute ones count
    ("freebsd14", "XDG_CACHE_HOME=xdg"): "xdg",
    ("darwin", "XDG_CACHE_HOME=xdg"): "home/Library/Caches",
    ("win32", "LOCALAPPDATA=local"): "local",
    ("win32", ""): "home/AppData/Local",
}


@pytest.mark.parametrize(("system", "variable"), PLACES)
def test_where_the_caches_of_the_user_are(system, variable, home, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home / "home"))
    if variable:
        name, value = variable.split("=")
        monkeypatch.setenv(name, value if value.startswith(".") else str(home / value))
    monkeypatch.setattr(sys, "platform", system)
    assert kernel_folder().path == home / PLACES[system, variable] / "grpo_fast"


def test_where_there_is_no_home(home, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(RuntimeError, match="no home directory to keep them in: NUMBA_CACHE_DIR can name a folder"):
        kernel_folder()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(home))
    assert kernel_folder().path == home


@needs_posix
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_folder_and_entries_are_for_the_user_alone(umask, home):
    folder, usual = Folder(home / "deep" / "caches" / "grpo_fast"), os.umask(umask)
    try:
        folder.write("entry", b"machine code")
    finally:
        os.umask(usual)
    assert mode(home / "deep") == 0o777 & ~umask
    assert mode(folder.path.parent) == mode(folder.path) == 0o700
    assert mode(folder.path / "grpo_fast.entry.nbc") == 0o600
    assert folder.read("entry") == b"machine code"
    assert files(folder) == ["grpo_fast.entry.nbc"]


def test_what_is_in_the_way_is_an_error_that_names_it(folder):
    folder.path.parent.write_text("a file where the caches would be")
    assert folder.read("entry") is None
    with pytest.raises(OSError, match=r"\.cache"):
        folder.write("entry", b"")


# --- a folder that is not the user's alone ----------------------------------------------------------------------------
def moved_behind_a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replaced_by_a_file(path):
    path.rename(path.with_name("elsewhere"))
    path.write_bytes(b"")


BAD_FOLDERS = {
    "its group may write": (lambda path: path.chmod(0o720), "others may write to it: its mode is 720, not 700"),
    "all may write": (lambda path: path.chmod(0o1702), "others may write to it: its mode is 1702, not 700"),
    "a symbolic link": (moved_behind_a_link, "it is a symbolic link"),
    "a file": (replaced_by_a_file, "Not a directory"),
    "a named pipe": (replaced_by_a_pipe, "Not a directory"),
    "gone to someone": (lambda path: os.chown(path, SOMEONE, -1), f"it belongs to user {SOMEONE}, and this process to"),
}


@needs_posix
@pytest.mark.parametrize("what", [*list(BAD_FOLDERS)[:-1], pytest.param("gone to someone", marks=needs_root)])
def test_a_bad_folder_is_neither_read_nor_written(what, folder):
    attack, reason = BAD_FOLDERS[what]
    entries, exploded = Entries(folder, "kernel"), folder.path.parent / "exploded"
    entries.save("key", Bomb(exploded))
    attack(folder.path)
    assert at_once(entries.load, "key") == [None]
    with pytest.raises(OSError, match=reason):
        entries.save("another key", "machine code")
    assert not exploded.exists()
    assert len(list(folder.path.parent.rglob("grpo_fast.kernel.*.nbc"))) == 1


@needs_posix
def test_a_folder_of_someone_else_is_neither_read_nor_written(folder, monkeypatch):
    folder.write("entry", b"")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert folder.read("entry") is None
    with pytest.raises(PermissionError, match=f"it belongs to user {user}, and this process to user {user + 1}"):
        folder.write("entry", b"")


@needs_posix
def test_a_link_that_comes_after_the_first_look_is_not_followed(folder, monkeypatch):
    folder.write("entry", b"")
    moved_behind_a_link(folder.path)
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    assert folder.read("entry") is None
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        folder.write("entry", b"")


@needs_posix
@pytest.mark.parametrize("readable", [0o755, 0o500])
def test_who_may_only_read_does_no_harm(readable, folder):
    folder.write("entry", b"machine code")
    folder.path.chmod(readable)
    (folder.path / "grpo_fast.entry.nbc").chmod(0o444)
    assert folder.read("entry") == b"machine code"
    folder.path.chmod(0o700)


# --- entries that are not the user's ----------------------------------------------------------------------------------
def behind_a_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


BAD_ENTRIES = {
    "its group may write": lambda path: path.chmod(0o620),
    "all may write": lambda path: path.chmod(0o602),
    "a symbolic link": behind_a_link,
    "a named pipe": replaced_by_a_pipe,
    "gone to someone": lambda path: os.chown(path, SOMEONE, -1),
}


@needs_posix
@pytest.mark.parametrize("what", [*list(BAD_ENTRIES)[:-1], pytest.param("gone to someone", marks=needs_root)])
def test_a_bad_entry_is_not_read_but_replaced(what, folder):
    entries, exploded = Entries(folder, "kernel"), folder.path.parent / "exploded"
    entries.save("key", Bomb(exploded))
    (path,) = folder.path.iterdir()
    BAD_ENTRIES[what](path)
    assert at_once(entries.load, "key") == [None]
    assert not exploded.exists()
    entries.save("key", "machine code")
    assert entries.load("key") == "machine code"
    assert (mode(path), path.is_symlink(), path.is_file()) == (0o600, False, True)


def test_a_folder_in_place_of_an_entry_is_told(folder):
    folder.write("entry", b"")
    (folder.path / "grpo_fast.entry.nbc").unlink()
    (folder.path / "grpo_fast.entry.nbc").mkdir()
    assert folder.read("entry") is None
    with pytest.raises(OSError, match=r"grpo_fast\.entry\.nbc"):
        folder.write("entry", b"")
    assert files(folder) == ["grpo_fast.entry.nbc"]  # no temporary file


# --- a folder that the user names -------------------------------------------------------------------------------------
@needs_posix
def test_a_named_folder_is_used_as_given(home, monkeypatch):
    shared, umask = home / "shared", os.umask(0o022)
    try:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(shared / "deep"))
        kernel_folder().write("entry", b"machine code")
    finally:
        os.umask(umask)
    assert (mode(shared / "deep"), mode(shared / "deep" / "grpo_fast.entry.nbc")) == (0o755, 0o644)
    (shared / "deep").chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: SOMEONE)
    moved_behind_a_link(shared / "deep")
    behind_a_link(shared / "deep" / "grpo_fast.entry.nbc")
    assert kernel_folder().read("entry") == b"machine code"
    kernel_folder().write("another", b"machine code, too")
    assert kernel_folder().read("another") == b"machine code, too"


def test_a_relative_name_means_what_it_meant_at_first(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "named")
    folder = kernel_folder()
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    folder.write("entry", b"")
    assert files(folder) == [path.name for path in (home / "named").iterdir()] == ["grpo_fast.entry.nbc"]


@needs_posix
def test_a_pipe_in_a_named_folder_is_not_waited_for(home):
    folder = Folder(home, as_given=True)
    folder.write("entry", b"")
    replaced_by_a_pipe(home / "grpo_fast.entry.nbc")
    assert at_once(folder.read, "entry") == [None]


# --- how much ---------------------------------------------------------------------------------------------------------
def with_entry(folder, name, size, age=0.0):
    """Make an entry as large as it says, of which nothing lies on the disk, used so many seconds ago."""
    folder.write(name, b"")
    path = folder.path / f"grpo_fast.{name}.nbc"
    os.truncate(path, size)
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture(params=["the user's", "a named one", "without owners"])
def any_folder(request, folder, home, monkeypatch):
    """A folder of each kind: by its descriptor, by its path, and by its path as on Windows."""
    if request.param == "without owners":
        for name, value in {"_HAS_OWNERS": False, "_FOLLOW_NO_LINK": 0, "_DO_NOT_WAIT": 0}.items():
            monkeypatch.setattr(cache_folder, name, value)
    return Folder(home, as_given=True) if request.param == "a named one" else folder


def test_at_most_256_mib_stay_those_used_last(any_folder, monkeypatch):
    assert LIMIT == 256 << 20
    monkeypatch.setattr(cache_folder, "LIMIT", 1 << 40)  # until all are there
    for number in range(300):
        with_entry(any_folder, f"k{number}", 1 << 20, age=1000 - number)
    for other in ("kernel-3.py311.1.nbc", "kernel-3.py311.nbi", "grpo_fast.txt"):
        (any_folder.path / other).write_bytes(b"of someone else")
        os.utime(any_folder.path / other, (0, 0))
    assert len(any_folder.read("k7")) == 1 << 20  # which was long ago
    monkeypatch.setattr(cache_folder, "LIMIT", LIMIT)
    any_folder.write("new", bytes(1 << 20))
    entries = {f"grpo_fast.k{number}.nbc" for number in [7, *range(46, 300)]} | {"grpo_fast.new.nbc"}
    assert len(entries) == 256
    assert set(files(any_folder)) == entries | {"kernel-3.py311.1.nbc", "kernel-3.py311.nbi", "grpo_fast.txt"}


def test_a_full_folder_is_not_emptied_before_it_has_to(folder, monkeypatch):
    monkeypatch.setattr(cache_folder, "LIMIT", 30)
    for age, name in enumerate("cba"):
        with_entry(folder, name, 10, age)
    assert files(folder) == ["grpo_fast.a.nbc", "grpo_fast.b.nbc", "grpo_fast.c.nbc"]
    folder.write("d", b"1")
    assert files(folder) == ["grpo_fast.b.nbc", "grpo_fast.c.nbc", "grpo_fast.d.nbc"]


@needs_posix
def test_a_link_takes_no_more_room_than_a_link(folder, monkeypatch):
    monkeypatch.setattr(cache_folder, "LIMIT", 2000)
    with_entry(folder, "entry", 1000, age=10)
    (folder.path.parent / "large").write_bytes(bytes(5000))
    (folder.path / "grpo_fast.link.nbc").symlink_to(folder.path.parent / "large")
    folder.write("new", b"")
    assert files(folder) == ["grpo_fast.entry.nbc", "grpo_fast.link.nbc", "grpo_fast.new.nbc"]


def test_what_was_just_written_stays(folder, monkeypatch):
    monkeypatch.setattr(cache_folder, "LIMIT", 5)
    with_entry(folder, "of a clock that is ahead", 3, age=-1000)
    folder.write("large", b"0123456789")
    assert files(folder) == ["grpo_fast.large.nbc"]


def test_temporary_files_go_after_a_day(folder):
    folder.write("entry", b"")
    day = 86400
    for name, age in {"grpo_fast.1.tmp": day + 60, "grpo_fast.2.tmp": day - 60, "mine.tmp": day + 60}.items():
        (folder.path / name).write_bytes(b"half")
        os.utime(folder.path / name, (time.time() - age,) * 2)
    folder.write("another", b"")
    assert files(folder) == ["grpo_fast.2.tmp", "grpo_fast.another.nbc", "grpo_fast.entry.nbc", "mine.tmp"]


def test_many_that_make_room_at_once_do_not_fail(any_folder, monkeypatch):
    monkeypatch.setattr(cache_folder, "LIMIT", 200)

    def work(worker):
        for number in range(100):
            any_folder.write(f"{worker}-{number}", b"0123456789")
            assert any_folder.read(f"{worker - 1}-{number}") in (None, b"0123456789")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    any_folder.write("last", b"0123456789")
    assert "grpo_fast.last.nbc" in files(any_folder)
    assert len(files(any_folder)) <= 20


def test_no_file_stays_open(any_folder):
    def lowest_free():
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    free = lowest_free()
    any_folder.write("entry", b"machine code")
    (any_folder.path / "grpo_fast.folder.nbc").mkdir()
    with pytest.raises(OSError, match=r"grpo_fast\.folder\.nbc"):
        any_folder.write("folder", b"")
    assert [any_folder.read(name) for name in ("entry", "folder", "nothing")] == [b"machine code", None, None]
    assert lowest_free() == free


def test_what_another_process_removes_meanwhile_does_not_stop_it(folder, monkeypatch):
    scandir = os.scandir

    def racing(path):
        with scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        os.unlink(folder.path / entries[0].name)
        return nullcontext(entries)

    for age, name in enumerate("cba"):
        with_entry(folder, name, 10, age)
    monkeypatch.setattr(cache_folder, "LIMIT", 20)
    monkeypatch.setattr(os, "scandir", racing)
    folder.write("d", b"0123456789")  # while a goes
    assert files(folder) == ["grpo_fast.c.nbc", "grpo_fast.d.nbc"]


def test_use_that_cannot_be_noted_is_use(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("a disk that can only be read")

    folder.write("entry", b"machine code")
    monkeypatch.setattr(os, "utime", refuse)
    assert folder.read("entry") == b"machine code"


# --- Windows ----------------------------------------------------------------------------------------------------------
def test_a_file_that_is_open_elsewhere_is_as_good(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("[WinError 5] Access is denied")

    entries = Entries(folder, "kernel")
    entries.save("key", "machine code")
    monkeypatch.setattr(os, "replace", refuse)
    entries.save("key", "the same again")
    assert entries.load("key") == "machine code"
    with pytest.raises(PermissionError, match="Access is denied"):
        entries.save("another", "machine code")
    (path,) = folder.path.iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(PermissionError, match="Access is denied"):
        entries.save("key", "machine code")

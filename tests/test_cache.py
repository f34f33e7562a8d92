"""What is compiled is kept, found again, and never taken for something else, whatever happens to files and disk."""

import ast
import compileall
import errno
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import recorded
from interpreter import python

import grpo_fast
from grpo_fast._kernels import cache, cache_folder, notices
from grpo_fast._kernels.blocks import RUN, scratch_like
from grpo_fast._kernels.cache_folder import Folder
from grpo_fast._kernels.compiling import compiled

PACKAGE = Path(grpo_fast.__file__).parent
KERNELS, OPTIONS = (sorted((PACKAGE / folder).glob("*.py")) for folder in ("_kernels", "terms"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_nothing_from_above_but_the_options(path):
    assert {"token_level", "sample_blocks", "simd"} <= {path.stem for path in KERNELS}
    nodes = ast.walk(ast.parse(path.read_bytes()))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        if isinstance(node, ast.Import):
            assert not [name for name in node.names if name.name.startswith("grpo_fast")]
        elif node.level == 2:
            assert node.module == "terms"
        else:
            assert node.level < 2
            assert not (node.module or "").startswith("grpo_fast")


@pytest.fixture
def clone(tmp_path):
    """A folder with a copy of the package, to be changed."""
    shutil.copytree(PACKAGE, tmp_path / "clone" / "grpo_fast", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "clone"


DECIDES = """
import sys
sys.path.insert(0, {clone!r})
from pathlib import Path
from grpo_fast._kernels.cache import source
digest, package = source.__wrapped__, Path({clone!r}) / "grpo_fast"
before = digest()
for path in package.rglob("*.py"):
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\\n", encoding="utf-8")
    if digest() != before:
        print(path.relative_to(package).as_posix())
    path.write_text(text, encoding="utf-8")
"""


def test_machine_code_is_named_after_all_kernels_and_the_options(clone):
    decides = python(DECIDES.format(clone=str(clone))).split()
    assert sorted(decides) == sorted(f"{path.parent.name}/{path.name}" for path in [*KERNELS, *OPTIONS])


# --- one small kernel, of which there is a new dispatcher in every process --------------------------------------------
@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def call(dtype=np.float64):
    """What a new process would do with a kernel: whether it was found, and what it gives."""
    kernel = compiled(scratch_like.py_func)
    found = kernel(np.ones(3, dtype), 2)
    assert found.dtype == dtype
    assert found.size == 2 * RUN * 64 // np.dtype(dtype).itemsize
    return sum(kernel.stats.cache_hits.values()) == 1


def entries(folder):
    return sorted(folder.rglob("*.nbc"))


def test_what_was_compiled_is_found_again(folder):
    assert [call(), call(), call(np.float32), call(np.float32), call()] == [False, True, False, True, True]
    assert len(entries(folder)) == 2
    assert not list(folder.rglob("*.tmp"))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "a bit flipped": flipped,
    "something else": lambda path: path.write_text("\N{PILE OF POO}" * 1000, encoding="utf-8"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(damage, folder):
    call()
    DAMAGES[damage](*entries(folder))
    assert [call(), call()] == [False, True]  # and is whole then


def test_a_single_bit_is_noticed_wherever_it_is(folder):
    kept = cache.Entries(Folder(folder), "kernel")
    kept.save("key", "machine code")
    (path,) = entries(folder)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert kept.load("key") is None
    path.write_bytes(content)
    assert kept.load("key") == "machine code"


def test_an_entry_under_the_name_of_another_is_not_taken_for_it(folder):
    kept = cache.Entries(Folder(folder), "kernel")
    kept.save("key", "machine code")
    (path,) = entries(folder)
    kept.save("another", "machine code for other types")
    (another,) = set(entries(folder)) - {path}
    shutil.copy(path, another)
    assert kept.load("key") == "machine code"
    assert kept.load("another") is None


def without_a_home(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", unknown)


def open_to_all(monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(cache_folder.sys, "platform", "linux")
    (home / "grpo_fast").mkdir()
    (home / "grpo_fast").chmod(0o777)


def on_a_full_disk(monkeypatch, folder):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    monkeypatch.setattr(cache_folder.os, "replace", full)


AGAIN = "grpo_fast compiles its kernels again in every process, since "
MEND = r"\. Mend or remove that folder, which is made again, or name another one in NUMBA_CACHE_DIR$"
HINDRANCES = {
    "no home": (
        lambda monkeypatch, _: without_a_home(monkeypatch),
        "there is no home directory to keep them in: NUMBA_CACHE_DIR can name a folder$",
    ),
    "others may write": (
        open_to_all,
        "they cannot be kept in {place}.grpo_fast: others may write to it: its mode is 777, not 700" + MEND,
    ),
    "a full disk": (on_a_full_disk, r"they cannot be kept in {place}: \[Errno 28\] No space left on device" + MEND),
}


@pytest.mark.skipif(os.name != "posix", reason="modes and messages of POSIX")
@pytest.mark.parametrize("what", HINDRANCES)
def test_what_hinders_is_told_once_and_how_to_mend_it(what, tmp_path, monkeypatch):
    hinder, reason = HINDRANCES[what]
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    hinder(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning, match=AGAIN + reason.format(place=re.escape(str(tmp_path)))) as told:
        assert [call(), call(np.float32)] == [False, False]
    assert len(told) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_code_that_holds_addresses_is_not_kept(folder):
    table = np.arange(200_000.0)  # so large that Numba does not copy it into the code

    def look_up(i):
        return table[i]

    kernel = compiled(look_up)
    assert kernel(5) == 5
    assert not entries(folder)


def test_two_at_once_do_not_take_the_same_place(folder, monkeypatch):
    # In Numba's own cache both would number their file 1, and the second would overwrite the first.
    dumps = cache.dumps

    def another_first(data):
        monkeypatch.setattr(cache, "dumps", dumps)
        assert not call(np.float32)
        return dumps(data)

    monkeypatch.setattr(cache, "dumps", another_first)
    assert not call(np.float64)
    assert call(np.float32)
    assert call(np.float64)


@pytest.mark.parametrize("what", ["numba", "llvmlite", "NumPy", "Python", "flag", "CPU"])
def test_another_version_or_another_flag_is_another_entry(what, folder, monkeypatch):
    call()
    with monkeypatch.context() as patch:
        if what == "CPU":
            from numba.core.registry import cpu_target

            codegen = cpu_target.target_context.codegen()
            patch.setattr(codegen, "magic_tuple", lambda: ("another",))
        elif what == "flag":
            patch.setattr(numba.config, "BOUNDSCHECK", 1)
        elif what == "Python":
            patch.setattr(cache, "EXTENSION_SUFFIXES", [".cpython-313t-x86_64-linux-gnu.so"])
        else:
            patch.setattr({"numba": numba, "llvmlite": cache.llvmlite, "NumPy": np}[what], "__version__", "2.0.0")
        assert not call()
    assert call()
    assert len(entries(folder)) == 2


def test_two_versions_in_turn_both_stay(folder, monkeypatch):
    found = []
    for version in ("one", "another", "one", "another"):
        with monkeypatch.context() as patch:
            patch.setattr(cache, "source", lambda version=version: version)
            found.append(call())
    assert found == [False, False, True, True]
    assert len(entries(folder)) == 2


# --- processes --------------------------------------------------------------------------------------------------------
ONE_CALL = """
import sys
sys.path.insert(0, {package!r})
import grpo_fast
assert grpo_fast.__file__.startswith({package!r})
print(grpo_fast.grpo_objective([1.2, 0.8, 1.1], [1.0, -1.0, 1.0], [0.9, 1.1, 1.0], [1.0, 0.5, 1.5], beta={beta}).hex())
"""
UPGRADES = {
    "an elementary function": ("0.22222223072008154", "0.22322223072008154", 1),
    # Numba's own index is read before its stamp is compared, and names classes that are there no more.
    "the name of a class": ("Contribution", "ContributionOfBlock", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", UPGRADES)
def test_an_upgrade_runs_the_new_code_and_the_old_one_is_kept(what, tmp_path, clone):
    old, new, beta = UPGRADES[what]
    script, cache = ONE_CALL.format(package=str(clone), beta=beta), str(tmp_path / "cache")
    before, kept = python(script, NUMBA_CACHE_DIR=cache), entries(tmp_path)
    texts = {path: path.read_text("utf-8") for path in (clone / "grpo_fast" / "_kernels").glob("*.py")}
    assert any(old in text for text in texts.values())
    for path, text in texts.items():
        path.write_text(text.replace(old, new), "utf-8")
    assert (python(script, NUMBA_CACHE_DIR=cache) != before) == (what == "an elementary function")
    both = entries(tmp_path)
    assert len(both) == 2 * len(kept)
    assert set(both) > set(kept)
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    assert python(script, NUMBA_CACHE_DIR=cache) == before
    assert entries(tmp_path) == both


# --- installed in other ways ------------------------------------------------------------------------------------------
INSTALLED = """
import sys
sys.path.insert(0, {place!r})
{before}
import numpy as np
import grpo_fast
from grpo_fast._kernels.blocks import scratch_like
assert {place!r} in repr(grpo_fast)
scratch_like(np.ones(3), 2)
print(*scratch_like.stats.cache_hits.values())
"""
#: As programs that hold Python's code in themselves import it: no files, no texts.
FROZEN = """
import importlib.abc, importlib.util, pkgutil

class Frozen(importlib.abc.InspectLoader):
    def __init__(self, path):
        self.path = path
    def is_package(self, name):
        return self.path.name == "__init__.py"
    def get_source(self, name):
        return None
    def get_code(self, name):
        return compile(self.path.read_bytes(), "/build/" + self.path.name, "exec")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        file = Path({clone!r}).joinpath(*name.split("."))
        for path in (file / "__init__.py", file.with_suffix(".py")):
            if name.startswith("grpo_fast") and path.is_file():
                spec = importlib.util.spec_from_loader(name, Frozen(path), origin=str(path))
                if path.name == "__init__.py":
                    spec.submodule_search_locations = [str(file)]
                return spec

from pathlib import Path
sys.meta_path.insert(0, Finder())
pkgutil.iter_modules = lambda path: [
    pkgutil.ModuleInfo(None, file.stem, False)
    for file in Path(path[0]).glob("*.py") if file.stem != "__init__"
]
"""


def as_files(clone):
    return clone


def without_sources(clone):
    compileall.compile_dir(clone, quiet=1, legacy=True)
    for path in clone.rglob("*.py"):
        path.unlink()
    return clone


def in_an_archive(clone):
    return Path(shutil.make_archive(str(clone), "zip", clone))


def in_an_archive_without_sources(clone):
    return in_an_archive(without_sources(clone))


def frozen(clone):
    return clone


@pytest.mark.slow
@pytest.mark.parametrize("install", [as_files, without_sources, in_an_archive, in_an_archive_without_sources, frozen])
def test_compiled_once_however_and_wherever_it_is_installed(install, tmp_path):
    printed = []
    for place in ("here", "there"):
        clone = tmp_path / place
        shutil.copytree(PACKAGE, clone / "grpo_fast", ignore=shutil.ignore_patterns("__pycache__"))
        before = FROZEN.format(clone=str(clone)) if install is frozen else ""
        script = INSTALLED.format(place=str(install(clone)), before=before)
        printed.append(python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONWARNINGS="error"))
    assert printed == ["\n", "1\n"]
    assert len(entries(tmp_path / "cache")) == 1
    assert not entries(tmp_path / "here")  # nor beside the sources


def test_code_tells_versions_apart_where_there_is_no_text(monkeypatch):
    def digest(text, path="here.py"):
        code = compile(text, path, "exec")
        loader = SimpleNamespace(get_source=lambda module: None, get_code=lambda module: code)
        monkeypatch.setattr(cache, "find_spec", lambda module: SimpleNamespace(loader=loader))
        return cache.source.__wrapped__()

    text = "def kernel(x):\n    y = 2\n    return x + log(y) * 1.5\n"
    changes = {"+": "-", "1.5": "2.5", "log": "exp", "(x)": "(x, y)", "(x": "(x=1", "kernel": "another"}
    others = [text.replace(*change) for change in changes.items()]
    assert len({digest(each) for each in (text, *others)}) == 1 + len(others)
    assert digest("# moved and renamed\n\n" + text, "there.py") == digest(text)


def test_where_neither_text_nor_code_is_known(folder, monkeypatch):
    monkeypatch.setattr(cache, "find_spec", lambda name: None)
    monkeypatch.setattr(cache, "source", cache.source.__wrapped__)
    with pytest.warns(RuntimeWarning, match=AGAIN + "neither text nor code of its sources .*; install them as files$"):
        assert not call()
    monkeypatch.setattr(cache.pkgutil, "iter_modules", lambda path: [])
    with pytest.raises(RuntimeError, match="_kernels does not list its modules"):
        cache.source()
    assert not entries(folder)


# --- disks and processes ----------------------------------------------------------------------------------------------
FULL = """
import resource, warnings
import grpo_fast
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(grpo_fast.grpo_objective([1.0], [3.0], None, None, beta=0))
    for warning in told:
        assert warning.category is RuntimeWarning and "compiles its kernels again" in str(warning.message), warning
    print(len(told))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_is_told_and_nothing_worse(tmp_path):
    assert python(FULL, NUMBA_CACHE_DIR=str(tmp_path)) == "3.0\n1\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # no halves


ON_A_SMALL_DISK = """
import os, warnings
warnings.simplefilter("ignore")
import recorded
print(*recorded.different(["stats near f8 127", "objective near f8 127"]))
assert os.statvfs(os.environ["NUMBA_CACHE_DIR"]).f_bavail < 16, "it did not get full"
"""


@pytest.mark.exhaustive
def test_a_disk_that_really_is_full(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("here nobody may mount a disk")
    mount = 'mount -t tmpfs -o size=64k tmpfs "$NUMBA_CACHE_DIR" && exec "$@"'
    inside = ["unshare", "-Urm", "sh", "-c", mount, "sh"]
    assert python(ON_A_SMALL_DISK, inside=inside, NUMBA_CACHE_DIR=str(tmp_path)) == "\n"


AT_ONCE = """
import random, recorded, time
cases = {cases!r}
random.Random({seed}).shuffle(cases)
while time.time() < {start}:
    pass
print(*recorded.different(cases))
"""


@pytest.mark.exhaustive
def test_eight_processes_that_start_at_once_share_a_cache(tmp_path):
    cases = [f"stats {kind} {n}" for kind in ("near f8", "far f4") for n in (127, recorded.MANY)]
    cases += [f"loss usual {number}" for number in (0, 5, 9, 20)]
    scripts = [AT_ONCE.format(cases=cases, seed=seed, start=time.time() + 5) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in "12":  # compiling, and loading
            printed = pool.map(lambda script: python(script, NUMBA_CACHE_DIR=str(tmp_path), timeout=900), scripts)
            assert list(printed) == ["\n"] * 8
    assert not list(tmp_path.rglob("*.tmp"))

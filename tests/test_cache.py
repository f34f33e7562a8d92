"""What is compiled is kept, found again, and never taken for something else, whatever happens to files and disk."""

import ast
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
import recorded
from conftest import python

import grpo_fast
from grpo_fast._kernels import cache
from grpo_fast._kernels.blocks import RUN, scratch_like
from grpo_fast._kernels.compiling import compiled

PACKAGE = Path(grpo_fast.__file__).parent
KERNELS = sorted((PACKAGE / "_kernels").glob("*.py"))


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


def test_machine_code_is_named_after_all_kernels_and_the_options(tmp_path, monkeypatch):
    shutil.copytree(PACKAGE, tmp_path / "grpo_fast", ignore=shutil.ignore_patterns("__pycache__"))
    folders = {cache.__package__: "grpo_fast/_kernels", cache.__package__.rpartition(".")[0]: "grpo_fast"}
    monkeypatch.setattr(cache, "files", lambda package: tmp_path / folders[package])
    digest = cache.source.__wrapped__
    before, decides = digest(), set()
    for path in tmp_path.rglob("*.py"):
        text = path.read_text("utf-8")
        path.write_text(text + "\n", "utf-8")
        if digest() != before:
            decides.add(str(path.relative_to(tmp_path / "grpo_fast")))
        path.write_text(text, "utf-8")
    assert decides == {"terms.py"} | {f"_kernels/{path.name}" for path in KERNELS}


# --- one small kernel, of which there is a new dispatcher in every process --------------------------------------------
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
    "something else": lambda path: path.write_text("\N{PILE OF POO}" * 1000, "utf-8"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(damage, folder):
    call()
    DAMAGES[damage](*entries(folder))
    assert [call(), call()] == [False, True]  # and is whole then


def test_where_a_file_cannot_be_read_nor_written(folder):
    call()
    (path,) = entries(folder)
    path.unlink()
    path.mkdir()  # which stops root, too
    with pytest.warns(RuntimeWarning, match="there is no place to keep them: .* NUMBA_CACHE_DIR can name one"):
        assert not call()
    assert not list(folder.rglob("*.tmp"))


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


@pytest.mark.parametrize("what", ["numba", "llvmlite", "flag", "CPU"])
def test_another_version_or_another_flag_is_another_entry(what, folder, monkeypatch):
    call()
    with monkeypatch.context() as patch:
        if what == "CPU":
            from numba.core.registry import cpu_target

            codegen = cpu_target.target_context.codegen()
            patch.setattr(codegen, "magic_tuple", lambda: ("another",))
        elif what == "flag":
            patch.setattr(numba.config, "BOUNDSCHECK", 1)
        else:
            patch.setattr({"numba": numba, "llvmlite": cache.llvmlite}[what], "__version__", "0.0")
        assert not call()
    assert call()
    assert len(entries(folder)) == 2


def test_entries_of_older_source_are_removed(folder, monkeypatch):
    call()
    call(np.float32)
    old = entries(folder)
    monkeypatch.setattr(cache, "source", lambda: "of another version")
    assert not call()
    assert not set(old) & set(entries(folder))
    assert len(entries(folder)) == 1


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


@pytest.mark.parametrize("what", UPGRADES)
def test_an_upgrade_runs_the_new_code(what, tmp_path):
    old, new, beta = UPGRADES[what]
    shutil.copytree(PACKAGE, tmp_path / "grpo_fast", ignore=shutil.ignore_patterns("__pycache__"))
    script, cache = ONE_CALL.format(package=str(tmp_path), beta=beta), str(tmp_path / "cache")
    before, kept = python(script, NUMBA_CACHE_DIR=cache), entries(tmp_path)
    texts = {path: path.read_text("utf-8") for path in (tmp_path / "grpo_fast" / "_kernels").glob("*.py")}
    assert any(old in text for text in texts.values())
    for path, text in texts.items():
        path.write_text(text.replace(old, new), "utf-8")
    assert (python(script, NUMBA_CACHE_DIR=cache) != before) == (what == "an elementary function")
    assert len(entries(tmp_path)) == len(kept)
    assert set(entries(tmp_path)) != set(kept)


FULL = """
import resource, warnings
import grpo_fast  # finds a place for its files, which is empty
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(grpo_fast.grpo_objective([1.0], [3.0], None, None, beta=0))
    for warning in told:
        assert warning.category is RuntimeWarning and "compiles its kernels again" in str(warning.message), warning
    print(len(told) > 0)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_is_told_and_nothing_worse(tmp_path):
    assert python(FULL, NUMBA_CACHE_DIR=str(tmp_path)) == "3.0\nTrue\n"
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

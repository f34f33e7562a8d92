"""The bits that were recorded once: on any CPU, with any number of threads on any layer, wherever the arrays lie.

``recorded.json`` holds what every machine is to compute, and so also what it did before a change.
"""

import itertools
import platform
from pathlib import Path

import numpy as np
import pytest
import recorded
from interpreter import python
from test_threads_and_processes import LAYERS, skip_without

EVERYTHING = list(recorded.CASES)
#: What a CPU must have to run the code that LLVM makes for a name, as Linux lists it.
CPUS = {
    "generic": [],
    "nehalem": ["sse4_2", "popcnt"],
    "haswell": ["avx2", "fma", "bmi2"],
    "skylake-avx512": ["avx512f", "avx512dq", "avx512vl", "avx512bw", "avx512cd"],
    "znver3": ["avx2", "fma", "bmi2", "vaes", "vpclmulqdq"],
    "native": [],
}
ALWAYS = {  # what is compiled for some of them in every run of the tests
    "generic": [
        "stats far f8 127",
        "objective extreme f4 127",
        "loss usual 21",
        "loss unusual 14",
        "correction usual 1 f8 10",
    ],
    "haswell": ["objective near f8 127", "sweep far f4 127", "stats far f8 127 unweighted", "loss usual 20"],
    "skylake-avx512": [
        "stats near f4 127",
        "objective far f8 127",
        "loss usual 27",
        "loss unusual 16",
        "correction unusual 2 f4 10",
    ],
}


def test_here():
    assert not list(recorded.different())


# --- memory -----------------------------------------------------------------------------------------------------------
def misaligned(x):
    """A copy that begins a byte after a multiple of 64."""
    memory = np.zeros(x.nbytes + 128, np.uint8)
    begin = -memory.ctypes.data % 64 + 1
    moved = memory[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


def between(x):
    """A copy that begins at an element, but within a vector."""
    moved = np.zeros(x.size + 3, x.dtype)[3:].reshape(x.shape)
    moved[...] = x
    return moved


def strided(x):
    """Every other element of an array, from its end."""
    return np.repeat(x.reshape(-1)[::-1], 2)[::-2].reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("way", [misaligned, between, strided])
def test_wherever_the_arrays_lie(way):
    assert not list(recorded.different(each=way))


@pytest.mark.slow
def test_in_files(tmp_path):
    numbers = itertools.count()

    def mapped(x):
        path = tmp_path / str(next(numbers))
        x.tofile(path)
        return np.memmap(path, x.dtype, "r", shape=x.shape)

    assert not list(recorded.different(each=mapped))


# --- CPUs, threads, layers --------------------------------------------------------------------------------------------
SCRIPT = """
import os
import numba
import recorded

def check():
    for threads in {threads}:
        numba.set_num_threads(threads)
        yield from recorded.different({cases})

print(*check(), sep="\\n")
pid = os.fork() if hasattr(os, "fork") else None
if pid == 0:
    os._exit(1 if [*recorded.different({cases})] else 0)
print("forked:", os.waitpid(pid, 0)[1] if pid else 0)
"""


def check(cpu, cases, threads, **environment):
    """Compute cases in a process whose code is that of a CPU; twice: compiled, and from the cache."""
    cpuinfo = Path("/proc/cpuinfo")
    have = cpuinfo.read_text().split() if cpuinfo.exists() else []
    missing = [feature for feature in CPUS[cpu] if feature not in have]
    if missing:
        pytest.skip(f"this CPU cannot run the code of {cpu}: it has no {', '.join(missing)}")
    if cpu != "native":  # no features beyond those of the name
        environment |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    script = SCRIPT.format(cases=cases, threads=list(threads))
    for _ in ("compiled", "from the cache"):
        printed = python(script, 1800, NUMBA_NUM_THREADS=str(max(threads)), **environment)
        assert printed == "\nforked: 0\n"


x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86-64 CPUs")


@pytest.mark.slow
@x86_64
@pytest.mark.parametrize("cpu", ALWAYS)
def test_some_on_other_cpus(cpu, tmp_path):
    check(cpu, ALWAYS[cpu], [1], NUMBA_CACHE_DIR=str(tmp_path))  # a cache of its own, in which nothing old can be
    assert len(list(tmp_path.rglob("*.nbc"))) > 0


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One for all layers of a CPU."""
    return tmp_path_factory.mktemp("caches")


@x86_64
@pytest.mark.exhaustive
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cpu", CPUS)
def test_all_on_any_cpu_any_number_of_threads_and_any_layer(cpu, layer, caches):
    skip_without(layer)
    check(cpu, EVERYTHING, range(1, 9), NUMBA_CACHE_DIR=str(caches / cpu), NUMBA_THREADING_LAYER=layer)

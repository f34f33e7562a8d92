"""A guest in any process: threads, forks, a read-only disk and missing packages do it no harm, nor it them."""

import os
import threading
import tracemalloc

import numpy as np
import pytest
from conftest import BLOCK, python, samples

from grpo_fast import grpo_objective, grpo_stats
from grpo_fast._parallel import WORTH_SHARING

MANY = WORTH_SHARING + 5 * BLOCK


def test_eight_threads_at_once():
    batches = [samples(MANY + k if k % 2 else 1000 + k, seed=k) for k in range(8)]
    alone = [(grpo_objective(*arrays), grpo_stats(*arrays)) for arrays in batches]
    together = [None] * 8
    start = threading.Barrier(8)

    def work(k):
        start.wait()
        together[k] = [(grpo_objective(*batches[k]), grpo_stats(*batches[k])) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[result] * 20 for result in alone]


THREADS = """
import threading
import numba
from conftest import samples
from test_host import MANY
from grpo_fast import grpo_objective

arrays = samples(MANY)
alone = grpo_objective(*arrays)
results = []
work = lambda: results.extend(grpo_objective(*arrays) for _ in range(20))
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert results == [alone] * 160
print(numba.threading_layer())
"""


def test_threads_on_the_layer_that_aborts():
    # Numba's workqueue ends the process when two threads are inside parallel regions.
    assert python(THREADS, NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="2") == "workqueue\n"


FORK = """
import os, sys
from conftest import samples
from test_host import MANY
from grpo_fast import grpo_objective, grpo_stats

arrays = samples(MANY)
expected = grpo_objective(*arrays), grpo_stats(*arrays)
pid = os.fork()
if pid == 0:
    os._exit(0 if (grpo_objective(*arrays), grpo_stats(*arrays)) == expected else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert status == 0, f"the child ended with {status}"
assert (grpo_objective(*arrays), grpo_stats(*arrays)) == expected
print("both")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_a_forked_child(layer):
    assert python(FORK, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2") == "both\n"


HELD = """
import os
from conftest import samples
from test_host import MANY
from grpo_fast import _parallel, grpo_objective

arrays = samples(MANY)
expected = grpo_objective(*arrays)
with _parallel._region:  # another thread of the parent is in a parallel region
    pid = os.fork()
    if pid == 0:
        os._exit(0 if grpo_objective(*arrays) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0
print("not stuck")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_in_the_middle():
    assert python(HELD) == "not stuck\n"


def test_importing_where_nothing_can_be_written(tmp_path):
    # Files stand where each possible cache directory would be made: that stops root as well.
    package = os.path.dirname(__import__("grpo_fast").__file__)
    os.mkdir(tmp_path / "grpo_fast")
    for name in os.listdir(package):
        if name.endswith(".py"):
            os.symlink(os.path.join(package, name), tmp_path / "grpo_fast" / name)
    (tmp_path / "grpo_fast" / "__pycache__").touch()
    nowhere = str(tmp_path / "grpo_fast" / "__init__.py" / "nowhere")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import grpo_fast
assert grpo_fast.__file__.startswith({str(tmp_path)!r})
print(grpo_fast.grpo_objective(1.0, 3.0, 1.0, 1.0))
"""
    assert python(script, NUMBA_CACHE_DIR=nowhere, HOME=nowhere, XDG_CACHE_HOME=nowhere) == "3.0\n"


def test_importing_imports_nothing_optional():
    optional = {"torch", "pyarrow", "pandas", "matplotlib", "tqdm", "dask", "jax", "scipy", "mpmath", "pytest"}
    script = "import sys, numba; before = set(sys.modules); import grpo_fast; print(*set(sys.modules) - before)"
    new = {name.split(".")[0] for name in python(script).split()}
    assert "grpo_fast" in new
    assert not new & optional


def test_without_torch_its_module_says_what_to_install():
    script = """
import sys
sys.modules["torch"] = None  # as if it were not installed
try:
    import grpo_fast.torch
except ImportError as error:
    print(error)
"""
    assert python(script) == "grpo_fast.torch needs PyTorch: pip install 'grpo_fast[torch]'\n"


def test_importing_compiles_nothing_and_starts_no_thread():
    script = """
import threading
import grpo_fast
from grpo_fast import objective_kernels as kernels
print(threading.active_count(), [len(getattr(kernels, name).signatures) for name in ("totals", "totals_parallel")])
"""
    assert python(script) == "1 [0, 0]\n"


def test_extra_memory_does_not_grow():
    # NumPy's temporaries and an accidental copy would show.
    arrays = samples(MANY)
    grpo_stats(*arrays)
    grpo_objective(*arrays)
    tracemalloc.start()
    try:
        grpo_stats(*arrays)
        grpo_objective(*arrays)
        assert tracemalloc.get_traced_memory()[1] < np.float64().nbytes * MANY / 4
    finally:
        tracemalloc.stop()

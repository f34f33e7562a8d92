"""A guest in any process: it imports little, starts nothing, takes no memory, and needs no disk."""

import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hosts import FLUSH, UPWARD
from interpreter import python
from samples import samples

from grpo_fast import BLOCK, K3, group_advantages, grpo_loss, grpo_objective, grpo_stats, grpo_sweep, reference
from grpo_fast._kernels.threads import WORTH_SHARING

MANY = WORTH_SHARING + 5 * BLOCK


@pytest.mark.slow
def test_importing_where_nothing_can_be_written(tmp_path):
    # Files stand where each folder for compiled code would be made, Python's and ours: that stops root as well.
    package = os.path.dirname(__import__("grpo_fast").__file__)
    for folder in (".", "_kernels", "terms"):
        os.makedirs(tmp_path / "grpo_fast" / folder, exist_ok=True)
        for name in os.listdir(os.path.join(package, folder)):
            if name.endswith(".py"):
                shutil.copy(os.path.join(package, folder, name), tmp_path / "grpo_fast" / folder / name)
        (tmp_path / "grpo_fast" / folder / "__pycache__").touch()
    nowhere = str(tmp_path / "grpo_fast" / "__init__.py" / "nowhere")
    script = f"""
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, {str(tmp_path)!r})
import grpo_fast
assert grpo_fast.__file__.startswith({str(tmp_path)!r})
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("default")
    print(grpo_fast.grpo_objective(1.0, 3.0, None, None, beta=0))
print([warning.category.__name__ for warning in told])
"""
    homes = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "USERPROFILE": nowhere, "LOCALAPPDATA": nowhere}
    for named in ("", nowhere):
        printed = python(script, NUMBA_CACHE_DIR=named, **homes)
        assert printed == "3.0\n['RuntimeWarning']\n"  # that every process has to compile


def test_importing_imports_nothing_optional():
    optional = {"torch", "trl", "pyarrow", "pandas", "matplotlib", "tqdm", "dask", "jax", "scipy", "mpmath", "pytest"}
    script = "import sys, numba; before = set(sys.modules); import grpo_fast; print(*set(sys.modules) - before)"
    new = {name.split(".")[0] for name in python(script).split()}
    assert "grpo_fast" in new
    assert not new & optional


@pytest.mark.parametrize(
    ("module", "missing", "message"),
    [
        ("torch", "torch", "grpo_fast.torch needs PyTorch: pip install 'grpo_fast[torch]'"),
        ("trl", "torch", "grpo_fast.torch needs PyTorch: pip install 'grpo_fast[torch]'"),
        ("trl", "trl", "grpo_fast.trl needs TRL: pip install 'grpo_fast[torch,trl]'"),
    ],
)
def test_without_its_package_a_module_says_what_to_install(module, missing, message):
    if missing == "trl":
        pytest.importorskip("torch", reason="needs PyTorch")
    script = f"""
import sys
sys.modules[{missing!r}] = None  # as if it were not installed
try:
    import grpo_fast.{module}
except ImportError as error:
    print(error)
"""
    assert python(script) == message + "\n"


def test_importing_compiles_nothing_and_starts_no_thread():
    script = """
import threading
import grpo_fast
from grpo_fast._kernels.sample_blocks import totals
from grpo_fast._kernels.tasks import _on_threads
print(threading.active_count(), [len(kernel.signatures) for kernel in (totals, _on_threads)])
"""
    assert python(script) == "1 [0, 0]\n"


def test_called_first_when_the_interpreter_ends():
    script = """
import atexit
import grpo_fast
atexit.register(lambda: print(grpo_fast.grpo_objective(1.0, 3.0, None, None, beta=0)))
"""
    assert python(script) == "3.0\n"


@pytest.mark.slow
def test_called_first_while_something_is_compiled(tmp_path):
    script = """
import numba, numpy as np
from grpo_fast._kernels.blocks import scratch_like

@numba.njit
def size(x):
    return scratch_like(x, 2).size

assert size(np.ones(3)) > 0
print("not stuck")
"""
    assert python(script, 100, NUMBA_CACHE_DIR=str(tmp_path)) == "not stuck\n"


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


# --- what the host has set --------------------------------------------------------------------------------------------
NAMED = """
import pathlib
pathlib.Path("/proc/self/comm").write_bytes(b"training\\xc3")  # cut in the middle of a character
import numba, numpy as np

@numba.njit(parallel=True)
def total(x):
    result = 0.0
    for i in numba.prange(x.size):
        result += x[i]
    return result

total(np.ones(100_000))  # so that it matters whether this process was forked
import grpo_fast
print(grpo_fast.grpo_objective(1.0, 3.0, None, None, beta=0))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/comm"), reason="names processes as Linux does")
def test_names_of_processes_are_any_bytes():
    assert python(NAMED) == "3.0\n"


def test_the_floating_point_state_does_not_matter():
    tiny = np.array([[1e-310, 5e-324, 3e-39], [1.0, 2.0, 1e30]])
    rng = np.random.default_rng(0)
    logps = -rng.exponential(size=(2, 3)).astype("f4")
    four = samples(100)

    def everything():
        yield grpo_loss(logps, logps - 700, tiny, logps + 700, kl=K3(0.1), grad=True).grad
        yield reference.grpo_loss(logps, logps - 700, tiny, logps + 700, kl=K3(0.1), grad=True).grad
        yield grpo_objective(*four), reference.grpo_objective(*four), reference.grpo_objective([0.0], [1], [0], [1])
        yield grpo_stats(*(x.astype("f2") for x in four)).as_dict().values()
        yield grpo_sweep(*four, [0.1, 1e-320], [0, 1e-320]).objective
        for scale in ("group", "batch", "none"):
            for rewards in (tiny, tiny[:1], np.array([[6e4, -6e4]], "f2")):
                yield group_advantages(rewards, scale=scale, eps=0)

    with np.errstate(all="ignore"):
        expected = [np.array(list(x)) for x in everything()]
    with np.errstate(all="raise"):
        found = [np.array(list(x)) for x in everything()]
        assert set(np.geterr().values()) == {"raise"}
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_torch_keeps_its_threads(layer):
    pytest.importorskip("torch", reason="needs PyTorch")
    script = f"""
import torch
torch.set_num_threads(1)
import numpy as np
import grpo_fast
print(torch.get_num_threads(), torch.get_num_interop_threads() > 0)
grpo_fast.grpo_objective(*[np.full({MANY}, 0.5)] * 4)
import numba
print(torch.get_num_threads(), numba.threading_layer())
"""
    assert python(script, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2") == f"1 True\n1 {layer}\n"


WITH_OTHER_MODES = f"""
import numpy as np
from grpo_fast import K3, grpo_loss, grpo_objective, grpo_stats, grpo_sweep
from hosts import read_mode as read, write_mode as write

rng = np.random.default_rng(0)
n = {MANY}
rho, pi = np.exp(rng.normal(size=n)), rng.uniform(0.1, 1, n)
four = []
for dtype, tiny in ("f8", 1e-310), ("f4", 1e-42):
    batch = [x.astype(dtype) for x in (rho, tiny * rng.normal(size=n), pi, pi)]
    four += [[x[:100] for x in batch], batch]
tokens = [[x.reshape(1, -1) for x in (np.log(pi), np.log(pi) - a, a, np.log(pi))] for _, a, pi, _ in four]
old = np.zeros((2, 40_000))
far = old + [[0.0], [-743.0]]  # whose ratio is a subnormal number
tokens.append([far, old, np.ones((2, 1)), far])

def everything():
    # What is divided in Python in the end, the host's mode flushes or rounds: so the exact sums.
    for batch in four:
        yield grpo_stats(*batch).sums
        yield grpo_sweep(*batch, [0.1, 0.2], [0, 0.1]).surrogate_numerators
    for batch in tokens:
        for level in "token", "sequence":
            result = grpo_loss(*batch, kl=K3(1e-320), importance_sampling_level=level, grad=True)
            ratios = np.array([result.stats.least_ratio, result.stats.largest_ratio])
            yield result.stats.sums, result.grad.tobytes(), ratios.tobytes()

print(grpo_objective(*np.ones((4, 5))))  # compiled now
write(read() | {{before}})  # which Numba's threads inherit
if {{before}}:
    found = [*everything()]
write(read() & ~{{before}})
expected = [*everything()]
if not {{before}}:
    write(read() | {{after}})
    found = [*everything()]
assert found == expected, [i for i in range(len(found)) if found[i] != expected[i]]
flags = {{before}} | {{after}}
write(read() | flags)
grpo_objective(*np.ones((4, 5)))
[*everything()]
assert read() & flags == flags, "the mode is not as the host had set it"
"""


@pytest.mark.slow
@pytest.mark.skipif(not FLUSH, reason="a processor whose modes are not known here")
@pytest.mark.parametrize("mode", [FLUSH, UPWARD])
@pytest.mark.parametrize("when", ["before", "after"])
def test_floating_point_modes_of_others_do_not_matter(mode, when):
    script = WITH_OTHER_MODES.format(before=mode if when == "before" else 0, after=mode if when == "after" else 0)
    python(script, NUMBA_NUM_THREADS="2")


# --- threads ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_threads_with_small_stacks(tmp_path):
    script = """
import threading
threading.stack_size(64 << 10)
import numpy as np
import grpo_fast

found = []

def work():
    found.append(grpo_fast.grpo_objective(*np.ones((4, 5))))

thread = threading.Thread(target=work)
thread.start()
thread.join()
work()
print(found, threading.stack_size())
"""
    assert python(script, NUMBA_CACHE_DIR=str(tmp_path)) == "[1.0, 1.0] 65536\n"  # so that it compiles


def test_where_numba_cannot_start_threads():
    script = f"""
import warnings
import numpy as np
import grpo_fast
samples = np.ones((4, {MANY}))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(*[grpo_fast.grpo_objective(*samples) for _ in range(3)])
print(*[warning.message for warning in told])
"""
    assert python(script, NUMBA_THREADING_LAYER="unheard-of") == (
        "1.0 1.0 1.0\ngrpo_fast computes on one thread, as Numba cannot start more: "
        "The threading layer requested 'unheard-of' is unknown to Numba.\n"
    )


def test_where_the_number_of_threads_is_changed_too_late(tmp_path):
    script = """
import os, pathlib, sys, warnings
import numba
pathlib.Path("late.py").write_text("def one(): return 1\\ndef two(): return 2\\n")
sys.path.insert(0, "")
import late
from grpo_fast._kernels.compiling import compiled

numba.get_num_threads()
os.environ["NUMBA_NUM_THREADS"] = "3"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(compiled(late.one)() + compiled(late.two)())
print(*[warning.message for warning in told])
try:
    numba.njit(late.one)()
except RuntimeError:
    print("Numba is as it was.")
"""
    script = f"import os; os.chdir({str(tmp_path)!r})\n{script}"
    assert python(script, NUMBA_NUM_THREADS="2", NUMBA_CACHE_DIR=str(tmp_path)) == (
        "3\nNUMBA_NUM_THREADS was changed after Numba had started its threads, and no longer has an effect on "
        "grpo_fast: there are 2\nNumba is as it was.\n"
    )

"""Import, first call, compiling and memory, in fresh processes.

``pytest bench/bench_processes.py``: two minutes, of which compiling takes most.
"""

import sys
import tempfile
import time

import pytest
from processes import extra_memory, fresh_process
from timing import clock, hand_over

OBJECTIVE = "grpo_fast.grpo_objective([1.2], [1.0], [0.9], [1.0])"
LOSS = "fast(padded(64, 4096, {dtype!r}), 'token', True)"
TIMED = "import time\nt = time.perf_counter()\n{call}\nprint(time.perf_counter() - t)"
SCRIPTS = {
    "import numba": "import numba",
    "import grpo_fast": "import grpo_fast",
    "grpo_objective, first call": "import grpo_fast\n" + TIMED.format(call=OBJECTIVE),
    "grpo_loss, first call": "from loss_peers import fast\nfrom batches import padded\n"
    + TIMED.format(call=LOSS.format(dtype="float64")),
}
MEMORY = {
    "grpo_objective": (
        "import grpo_fast\nfrom grpo_fast._demonstration import synthetic_samples\n"
        "samples = synthetic_samples({n}, {dtype!r}, 0)\n"
        "grpo_fast.grpo_objective(*(x[:100_000] for x in samples))",
        "grpo_fast.grpo_objective(*samples)",
    ),
    "grpo_loss": (
        "import numpy as np\nfrom loss_peers import fast\nfrom batches import padded\n"
        "batch = padded({n} // 4096, 4096, {dtype!r})\ngradient = np.ones_like(batch.logps)\n"
        "fast(padded(64, 4096, {dtype!r}), 'token', True)",
        "fast(batch, 'token', gradient)",
    ),
}


def seconds(script, **environment):
    """What the script prints, or how long it runs."""
    begin = time.perf_counter()
    printed = fresh_process(script, **environment)
    return float(printed) if printed else time.perf_counter() - begin


@pytest.fixture(scope="module")
def started(quick):
    """All scripts in interleaved rounds, from a warm cache."""
    for script in SCRIPTS.values():
        fresh_process(script)
    rounds = [{name: seconds(script) for name, script in SCRIPTS.items()} for _ in range(1 if quick else 7)]
    return {name: [times[name] for times in rounds] for name in SCRIPTS}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", SCRIPTS)
def test_start(benchmark, started, name):
    hand_over(benchmark, started, name, "a fresh process, warm disk cache", work="start")


#: What is compiled in a process whose cache is empty: what comes before, which is not timed, and what is.
COMPILED = {
    "a first loss, small and large": ("", "loss(small); loss(large)"),
    "a loss with other options": ("loss(small)", "loss(small, SAPO(), K1(0.1)); loss(large, SAPO(), K1(0.1))"),
    "a first objective": ("", "x = np.full(9, 0.5, small.logps.dtype); grpo_fast.grpo_objective(x, x, x, x)"),
}
PREPARED = """
import numpy as np, time
import grpo_fast
from batches import full
from grpo_fast import K1, K3, SAPO, Clip
small, large = full(16, 256, {dtype!r}), full(64, 4096, {dtype!r})
def loss(batch, surrogate=Clip(), kl=K3(0.1)):
    grpo_fast.grpo_loss(batch.logps, batch.old_logps, batch.advantages, batch.ref_logps,
                        surrogate=surrogate, kl=kl, grad=True)
"""


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(benchmark, quick, name, dtype):
    """What a process waits for, for which nothing is compiled yet."""
    before, call = COMPILED[name]
    script = PREPARED.format(dtype=dtype) + before + "\n" + TIMED.format(call=call)
    times = []
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory() as cache:
            times.append(seconds(script, NUMBA_CACHE_DIR=cache))
    hand_over(benchmark, {name: times}, name, "compiled for the first time", work="compile", dtype=dtype)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", MEMORY)
def test_memory(benchmark, quick, name, dtype):
    """How much the peak of a fresh process grows during one call; the seconds say nothing."""
    n = 409_600 if quick else 16_777_216
    before, call = MEMORY[name]
    mib = extra_memory(before.format(n=n, dtype=dtype), call)
    hand_over(benchmark, {name: [0.0]}, name, "extra memory", work="memory", n=n, dtype=dtype, MiB=mib)

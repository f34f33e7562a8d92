"""How the large cases scale over threads, beside the roofs: ``pytest bench/bench_threads.py``.

One thread up to all that there are, in interleaved rounds; a minute.
"""

import itertools

import numba
import numpy as np
import pytest
from batches import full
from loss_peers import fast
from roofs import read, read_and_write
from timing import clock, hand_over, measure

import grpo_fast
from grpo_fast._demonstration import synthetic_samples

ALL = numba.config.NUMBA_NUM_THREADS
THREADS = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < ALL] + [ALL]
WORKS = ("grpo_objective", "read-only roof", "grpo_loss", "read-and-write roof")


def on(threads, function):
    def call():
        numba.set_num_threads(threads)
        return function()

    return call


@pytest.fixture(scope="module", params=["float64", "float32"])
def case(request, quick):
    dtype = request.param
    samples = synthetic_samples(100_000 if quick else 20_000_000, dtype, seed=0)
    batch = full(64 if quick else 4096, 4096, dtype)
    gradient = np.empty_like(batch.logps)
    functions = {
        "grpo_objective": lambda: grpo_fast.grpo_objective(*samples),
        "read-only roof": lambda: read(*samples),
        "grpo_loss": lambda: fast(batch, "token", gradient),
        "read-and-write roof": lambda: read_and_write(*batch[:3], gradient),
    }
    before = numba.get_num_threads()
    calls = {(name, n): on(n, functions[name]) for name, n in itertools.product(WORKS, THREADS)}
    times = measure(calls, request.config, steady=[(name, 1) for name in WORKS])
    numba.set_num_threads(before)
    return dtype, times


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", WORKS)
def test_scaling(benchmark, case, name, threads):
    dtype, times = case
    facts = {"work": "threads", "function": name, "dtype": dtype, "threads": threads}
    hand_over(benchmark, times, (name, threads), f"threads, {name}, {dtype}", **facts)

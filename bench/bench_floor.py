"""grpo_loss and grpo_objective in a cache, beside the same loops in C: ``pytest bench/bench_floor.py``.

On one thread, with 4,096 and with 16,384 tokens in the same rounds: what a token takes is the difference of the times
over that of the tokens, in which what a call takes cancels. A minute or two.

The C has vectors of AVX2, the kernels the longest that the CPU has. ``NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=``
before the command gives both the same.
"""

import itertools

import floors
import llvmlite.binding
import numba
import pytest
from floor_cases import DATA, PEERS, SPREAD, check
from timing import clock, hand_over, measure, present, skip_if_missing

SIZES = (4_096, 16_384)
CASES = list(itertools.product(DATA, SPREAD, ("float64", "float32")))
CALLS = 8  # timed as one: the differences are small beside what a call of grpo_loss takes


def several(call):
    def calls():
        for _ in range(CALLS):
            call()

    return calls


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def case(request):
    function, way, dtype = request.param
    peers, missing = present(PEERS)
    facts = {"function": function, "way": way, "dtype": dtype, "cpu": numba.config.CPU_NAME or host()}
    if "C floor" in peers:
        for n in SIZES:
            check(function, way, DATA[function](n, way, dtype))
        loop = floors.loops(dtype)[f"{function.removeprefix('grpo_')}_{way}"]
        facts |= {"compiler": floors.compiler_version(), "instructions": len(loop.instructions)}
    calls = {
        (name, n): several(bind(function, way, DATA[function](n, way, dtype)))
        for n, (name, bind) in itertools.product(SIZES, peers.items())
    }
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        times = measure(calls, request.config)
    finally:
        numba.set_num_threads(before)
    return facts, {name: [seconds / CALLS for seconds in found] for name, found in times.items()}, missing


def host():
    return llvmlite.binding.get_host_cpu_name()


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", PEERS)
def test_speed(benchmark, case, name, n):
    facts, times, missing = case
    skip_if_missing(name, missing)
    of_this_size = {peer: rounds for (peer, size), rounds in times.items() if size == n}
    group = f"floor, {facts['function']}, {n:,} {facts['way']}, {facts['dtype']}"
    hand_over(benchmark, of_this_size, name, group, missing, work="floor", n=n, **facts)

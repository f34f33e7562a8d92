"""grpo_objective from 3 to 40 M samples beside everything else: ``pytest bench/bench_objective.py``.

One table of cases; what is timed is first checked against the reference in float64. Compare within a group.
Ten minutes and some GB of memory; with ``--quick``, a minute.
"""

import itertools

import numpy as np
import pytest
from objective_peers import BETA, EPSILON, PEERS
from roofs import read
from timing import clock, copies_of, hand_over, measure, present, rotating, skip_if_missing

import grpo_fast
from grpo_fast import reference
from grpo_fast._demonstration import synthetic_samples

SIZES = (3, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 20_000_000, 40_000_000)
CASES = list(itertools.product(SIZES, ("float64", "float32")))
STEPS = np.linspace(0.05, 0.5, 16)

#: Not another way to the same number, but other work on the same samples.
OTHERS = {
    "grpo_objective(beta=0)": lambda samples: grpo_fast.grpo_objective(*samples, EPSILON, 0.0),
    "grpo_stats": lambda samples: grpo_fast.grpo_stats(*samples, EPSILON, BETA),
    "grpo_sweep 16×16": lambda samples: grpo_fast.grpo_sweep(*samples, STEPS, STEPS / 10),
    "read-only roof": lambda samples: read(*samples),
}


def call_on(function, samples):
    return lambda: function(samples)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def case(request, quick):
    n, dtype = request.param
    if quick and n > 100_000:
        pytest.skip("--quick")
    peers, missing = present(PEERS)
    copies = copies_of(synthetic_samples(n, dtype, seed=0))
    # Terms of the size |ρA| + β·(r + |log r| + 1), each rounded a dozen times, summed in an order of the peer's own.
    wide = [x.astype(np.float64) for x in copies[0]]
    right = reference.grpo_objective(*wide, EPSILON, BETA)
    bound = (12 + n**0.5) * np.finfo(dtype).eps * (np.mean(np.abs(wide[0] * wide[1])) + 3 * BETA)
    calls = {}
    for turn, (name, bind) in enumerate(peers.items()):
        assert abs(float(bind(*copies[0])()) - right) <= bound, name
        calls[name] = rotating((bind(*samples) for samples in copies), turn)
    for turn, (name, function) in enumerate(OTHERS.items()):
        calls[name] = rotating((call_on(function, samples) for samples in copies), turn)
    return n, dtype, measure(calls, request.config, steady=["grpo_fast"]), missing


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own; an error, it would stop torch.compile
@pytest.mark.parametrize("name", [*PEERS, *OTHERS])
def test_speed(benchmark, case, name):
    n, dtype, times, missing = case
    skip_if_missing(name, missing)
    group = f"objective, {n:,} samples, {dtype}"
    hand_over(benchmark, times, name, group, missing, work="objective", n=n, dtype=dtype)

"""The probability functions beside the NumPy baseline and the read-only roof.

``pytest bench/bench_objective.py --benchmark-enable --benchmark-only``. One table of cases; what is timed is first
checked against the reference. Compare within a group: the groups hold the contestants of one size and dtype. For ratios
from interleaved rounds, which noise disturbs less, see objective_targets.py.
"""

import numpy as np
import pytest

import grpo_fast
from grpo_fast import reference
from grpo_fast.__main__ import synthetic_samples
from grpo_fast.measure import read

SIZES = [3, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 40_000_000]
STEPS = np.linspace(0.05, 0.5, 16)

CONTESTANTS = {
    "grpo_objective": grpo_fast.grpo_objective,
    "grpo_objective(beta=0)": lambda *samples: grpo_fast.grpo_objective(*samples, beta=0.0),
    "grpo_stats": grpo_fast.grpo_stats,
    "grpo_sweep 16x16": lambda *samples: grpo_fast.grpo_sweep(*samples, STEPS, STEPS / 10),
    "numpy": reference.grpo_objective,
    "read-only roof": read,
}


@pytest.fixture(scope="module", params=[(n, dtype) for n in SIZES for dtype in ("float64", "float32")], ids=str)
def samples(request):
    n, dtype = request.param
    return synthetic_samples(n, dtype, seed=0)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_speed(benchmark, samples, name):
    benchmark.group = f"{samples[0].size:,} samples, {samples[0].dtype}"
    wide = [x.astype(np.float64) for x in samples]
    size = np.mean(np.abs(wide[0] * wide[1])) + 1
    found = grpo_fast.grpo_objective(*samples)
    assert abs(found - reference.grpo_objective(*wide)) <= 64 * np.finfo(samples[0].dtype).eps * size
    assert grpo_fast.grpo_stats(*samples).objective == found
    benchmark(CONTESTANTS[name], *samples)

"""The subcommand ``demo``: the main job on synthetic samples, timed beside NumPy and compared with it."""

import argparse
import time
from statistics import median
from typing import TypeAlias

import numba
import numpy as np

from . import Stats, __version__, grpo_objective, grpo_stats, reference
from ._checks import Array
from ._kernels.notices import untold
from ._measure import median_ratio, read, side_by_side
from ._words import in_terms_of_the_shell
from .terms import K3, Clip

#: ρ, A, π_old, π_ref.
Samples: TypeAlias = tuple[Array, Array, Array, Array]


def synthetic_samples(n: int, dtype: str, seed: int) -> Samples:
    """ρ, A, π_old, π_ref of n sampled tokens, a few steps off-policy: ρ and r within about 10% of 1."""
    generator = np.random.default_rng(seed)
    rhos = np.exp(0.1 * generator.standard_normal(n))
    advantages = generator.standard_normal(n)
    pi_old = np.exp(-generator.exponential(1.0, n))
    pi_ref = rhos * pi_old * np.exp(0.1 * generator.standard_normal(n))
    rhos, advantages, pi_old, pi_ref = (x.astype(dtype, copy=False) for x in (rhos, advantages, pi_old, pi_ref))
    return rhos, advantages, pi_old, pi_ref


def run(arguments: argparse.Namespace) -> int:
    """Compute, time and check the objective of synthetic samples, printing all of it; 1 if it disagrees, else 0."""
    epsilon, beta = arguments.epsilon, arguments.beta
    with in_terms_of_the_shell():
        Clip(epsilon), K3(beta)
    print(
        f"grpo-fast demo, {__version__}: the objective of {arguments.samples:,} synthetic samples, "
        f"{arguments.dtype}, epsilon {epsilon}, beta {beta}, seed {arguments.seed}"
    )
    samples = synthetic_samples(arguments.samples, arguments.dtype, arguments.seed)
    print("compiling, or loading what an earlier run compiled ...", end=" ", flush=True)
    begin = time.perf_counter()
    with untold():  # it has just been said
        objective, stats = _first_calls(samples, epsilon, beta)
    print(f"{time.perf_counter() - begin:.1f} s\n\n{stats}\n")
    _print_times(samples, epsilon, beta)

    expected, tolerance = _expected(samples, epsilon, beta)
    agree = abs(objective - expected) <= tolerance
    print(
        f"{objective:.15g}\n{expected:.15g} by the NumPy reference in float64: they {'agree' if agree else 'DISAGREE'}"
    )
    return 0 if agree else 1


def _first_calls(samples: Samples, epsilon: float, beta: float) -> tuple[float, Stats]:
    """The objective and its diagnostics; compiles, or loads, all that `_print_times` calls."""
    objective = grpo_objective(*samples, epsilon, beta)
    stats = grpo_stats(*samples, epsilon, beta)
    read(*samples)
    return objective, stats


def _print_times(samples: Samples, epsilon: float, beta: float) -> None:
    """Time the two functions beside NumPy and beside merely reading the samples, and print a table."""
    times = side_by_side(
        {
            "grpo_objective": lambda: grpo_objective(*samples, epsilon, beta),
            "grpo_stats": lambda: grpo_stats(*samples, epsilon, beta),
            "NumPy": lambda: reference.grpo_objective(*samples, epsilon, beta),
            "read only": lambda: read(*samples),
        }
    )
    n, total_bytes = samples[0].size, sum(x.nbytes for x in samples)
    print(f"{'':<16}{'ms':>10}{'Msamples/s':>12}{'GB/s':>8}   medians, {numba.get_num_threads()} threads")
    for name, seconds in times.items():
        t = median(seconds)
        print(f"{name:<16}{1e3 * t:>10.3f}{n / t / 1e6:>12.1f}{total_bytes / t / 1e9:>8.2f}")
    print(
        f"\n{median_ratio(times, 'NumPy', 'grpo_objective'):.1f} times as fast as NumPy, "
        f"{median_ratio(times, 'read only', 'grpo_objective'):.2f} of the speed of merely reading the four arrays"
    )


def _expected(samples: Samples, epsilon: float, beta: float) -> tuple[float, float]:
    """The objective by the reference in float64, and how far a correct one may be from it."""
    rhos, advantages, pi_old, pi_ref = (x.astype(np.float64) for x in samples)
    expected = reference.grpo_objective(rhos, advantages, pi_old, pi_ref, epsilon, beta)
    # Both round every step of a term (about ten) relative to numbers of this size, and nothing else.
    magnitude = np.mean(np.abs(rhos * advantages) + beta * (pi_ref / pi_old + rhos))
    return expected, float(10 * np.finfo(samples[0].dtype).eps * magnitude)

"""The command: ``python -m grpo_fast``, also installed as ``grpo-fast``.

Alone it runs the main job on synthetic samples; with ``evaluate`` or ``sweep``, on rollouts in files.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TypeAlias

import numba
import numpy as np

from . import Stats, __version__, _command, grpo_objective, grpo_stats, reference
from ._checks import Array
from ._measure import median_ratio, read, side_by_side
from .terms import BETA, EPSILON

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


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What is on the command line; wrong arguments end the process with a message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="grpo-fast",
        description="Compute the GRPO objective and its diagnostics over synthetic samples, and time it beside NumPy; "
        "or over rollouts in files.",
    )
    _command.add_subcommands(parser.add_subparsers(title="rollouts in files", metavar="evaluate | sweep"))
    parser.set_defaults(run=None)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--samples", type=int, default=10_000_000, help="how many (default: 10 million)")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--epsilon", type=float, default=EPSILON)
    parser.add_argument("--beta", type=float, default=BETA)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples must be at least 1, got {arguments.samples}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of these arguments, or the process's, print what it finds, and return the exit code.

    It is 2 for bad input, 130 after Ctrl-C in a subcommand, and 1 if the kernels and the reference disagree.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where it is ASCII; better a "?" than none of the text
    arguments = _arguments(argv)
    return _command.run(arguments) if arguments.run else _demonstrate(arguments)


def _demonstrate(arguments: argparse.Namespace) -> int:
    """Compute, time and check the objective of synthetic samples, printing all of it; the exit code, as in `main`."""
    epsilon, beta = arguments.epsilon, arguments.beta
    print(
        f"grpo_fast {__version__}: {arguments.samples:,} synthetic samples, {arguments.dtype}, epsilon {epsilon}, "
        f"beta {beta}, seed {arguments.seed}"
    )
    samples = synthetic_samples(arguments.samples, arguments.dtype, arguments.seed)
    print("compiling, or loading what an earlier run compiled ...", end=" ", flush=True)
    begin = time.perf_counter()
    try:
        objective, stats = _first_calls(samples, epsilon, beta)
    except ValueError as error:
        print(f"\ngrpo-fast: error: {error}", file=sys.stderr)
        return 2
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


if __name__ == "__main__":
    sys.exit(main())

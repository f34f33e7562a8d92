"""The command: ``python -m grpo_fast``, also installed as ``grpo-fast``.

Alone it runs the main job on synthetic samples; with ``evaluate`` or ``sweep``, on rollouts in files.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from . import __version__, _command, grpo_objective, grpo_stats, reference
from ._measure import ratio, read, side_by_side

Array: TypeAlias = NDArray[Any]
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
    parser = argparse.ArgumentParser(
        prog="grpo-fast",
        description="Compute the GRPO objective and its diagnostics over synthetic samples, and time it beside NumPy; "
        "or over rollouts in files.",
    )
    _command.add_to(parser.add_subparsers(title="rollouts in files", metavar="evaluate | sweep"))
    parser.set_defaults(run=None)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--samples", type=int, default=10_000_000, help="how many (default: 10 million)")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--epsilon", type=float, default=0.2)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples must be at least 1, got {arguments.samples}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for bad input, 130 after Ctrl-C, and 1 if fast and reference disagree."""
    arguments = _arguments(argv)
    if arguments.run:
        return _command.run(arguments)
    n, epsilon, beta = arguments.samples, arguments.epsilon, arguments.beta
    print(
        f"grpo_fast {__version__}: {n:,} synthetic samples, {arguments.dtype}, epsilon {epsilon}, beta {beta}, "
        f"seed {arguments.seed}"
    )
    samples = synthetic_samples(n, arguments.dtype, arguments.seed)

    print("compiling, or loading what an earlier run compiled ...", end=" ", flush=True)
    begin = time.perf_counter()
    try:
        objective = grpo_objective(*samples, epsilon, beta)
    except ValueError as error:
        print(f"\ngrpo-fast: error: {error}", file=sys.stderr)
        return 2
    stats = grpo_stats(*samples, epsilon, beta)
    read(*samples)
    print(f"{time.perf_counter() - begin:.1f} s\n\n{stats}\n")

    times = side_by_side(
        {
            "grpo_objective": lambda: grpo_objective(*samples, epsilon, beta),
            "grpo_stats": lambda: grpo_stats(*samples, epsilon, beta),
            "NumPy": lambda: reference.grpo_objective(*samples, epsilon, beta),
            "read only": lambda: read(*samples),
        }
    )
    print(f"{'':<16}{'ms':>10}{'Msamples/s':>12}{'GB/s':>8}   medians, {numba.get_num_threads()} threads")
    for name, seconds in times.items():
        t = median(seconds)
        print(f"{name:<16}{1e3 * t:>10.3f}{n / t / 1e6:>12.1f}{sum(x.nbytes for x in samples) / t / 1e9:>8.2f}")
    print(
        f"\n{ratio(times, 'NumPy', 'grpo_objective'):.1f} times as fast as NumPy, "
        f"{ratio(times, 'read only', 'grpo_objective'):.2f} of the speed of merely reading the four arrays"
    )

    rhos, advantages, pi_old, pi_ref = (x.astype(np.float64) for x in samples)
    plain = reference.grpo_objective(rhos, advantages, pi_old, pi_ref, epsilon, beta)
    # Both round every step of a term (about ten) relative to numbers of this size, and nothing else.
    size = np.mean(np.abs(rhos * advantages) + beta * (pi_ref / pi_old + rhos))
    agree = abs(objective - plain) <= 10 * np.finfo(samples[0].dtype).eps * size
    print(f"{objective:.15g}\n{plain:.15g} by the NumPy reference in float64: they {'agree' if agree else 'DISAGREE'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

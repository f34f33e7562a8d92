"""What the probability functions must reach, as ratios from interleaved rounds in one run, as a Markdown table.

``python bench/objective_targets.py``; a few minutes. Every ratio is the median over rounds in which both sides were
timed.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from table import extra_memory, head, row

import grpo_fast
from grpo_fast import reference
from grpo_fast.__main__ import synthetic_samples
from grpo_fast.measure import ratio, read, side_by_side

STEPS = np.linspace(0.05, 0.5, 16)


def contestants(samples: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """Everything that is compared, on the same samples."""
    return {
        "objective": lambda: grpo_fast.grpo_objective(*samples),
        "beta=0": lambda: grpo_fast.grpo_objective(*samples, beta=0.0),
        "stats": lambda: grpo_fast.grpo_stats(*samples),
        "sweep": lambda: grpo_fast.grpo_sweep(*samples, STEPS, STEPS / 10),
        "roof": lambda: read(*samples),
        "numpy": lambda: reference.grpo_objective(*samples),
    }


def large(n: int, dtype: str, roof: float) -> None:
    """The rows of one size at which memory is the limit."""
    times = side_by_side(contestants(synthetic_samples(n, dtype, seed=0)), seconds=20)
    label = f"{n // 1_000_000} M, {dtype}"
    ms = f"{1e3 * median(times['objective']):.1f} ms"
    row(f"`grpo_objective`, {label}", "read-only roof", f"≥ {roof}", f"{ratio(times, 'roof', 'objective'):.2f} ({ms})")
    row(f"`grpo_objective`, {label}", "NumPy", "≥ 10×", f"{ratio(times, 'numpy', 'objective'):.1f}×")
    row(f"`grpo_objective(beta=0)`, {label}", "with β", "≤ 0.55×", f"{ratio(times, 'beta=0', 'objective'):.2f}×")
    row(f"`grpo_stats`, {label}", "`grpo_objective`", "≤ 1.15×", f"{ratio(times, 'stats', 'objective'):.2f}×")
    sweep = f"{ratio(times, 'sweep', 'objective'):.2f}×"
    row(f"`grpo_sweep` 16 ε × 16 β, {label}", "`grpo_objective`", "≤ 2.5×", sweep)


def small(n: int, dtype: str) -> None:
    """One size at which the call itself is the limit."""
    functions = contestants(synthetic_samples(n, dtype, seed=0))
    times = side_by_side({name: functions[name] for name in ("objective", "numpy")}, seconds=2)
    us = 1e6 * median(times["objective"])
    target = "≥ 3×, ≤ 5 µs" if n <= 1000 else "≥ 10×" if n >= 1_000_000 else "–"
    row(
        f"`grpo_objective`, {n:,}, {dtype}", "NumPy", target, f"{ratio(times, 'numpy', 'objective'):.1f}× ({us:.1f} µs)"
    )


def memory(n: int) -> None:
    """How much the peak of a fresh process grows during one call on n samples."""
    before = f"""
import grpo_fast
from grpo_fast.__main__ import synthetic_samples
samples = synthetic_samples({n}, "float64", 0)
grpo_fast.grpo_objective(*(x[:100_000] for x in samples))
"""
    grown = extra_memory(before, "grpo_fast.grpo_objective(*samples)")
    row(f"`grpo_objective`, {n // 1_000_000} M", "extra memory", "≤ 2 MiB", grown)


def cold_start() -> None:
    """Import and first call in fresh processes, interleaved."""
    call = "grpo_fast.grpo_objective([1.2], [1.0], [0.9], [1.0])"
    scripts = {
        "numba": "import numba",
        "import": "import grpo_fast",
        "call": f"import grpo_fast, time; t = time.perf_counter(); {call}; print(time.perf_counter() - t)",
    }
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for _ in range(8):
        for name, script in scripts.items():
            begin = time.perf_counter()
            printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
            seconds[name].append(float(printed) if printed else time.perf_counter() - begin)
    more = median(a - b for a, b in zip(seconds["import"][1:], seconds["numba"][1:], strict=True))
    row("`import grpo_fast`", "`import numba`", "≤ +0.1 s", f"{more:+.2f} s")
    row("first call, warm disk cache", "–", "≤ 0.5 s", f"{median(seconds['call'][1:]):.2f} s")


def main() -> None:
    """Print the table."""
    head()
    large(20_000_000, "float64", 0.95)
    large(40_000_000, "float32", 0.90)
    for n in (3, 10, 100, 1_000, 10_000, 100_000, 1_000_000):
        for dtype in ("float64", "float32"):
            small(n, dtype)
    memory(40_000_000)
    cold_start()


if __name__ == "__main__":
    main()

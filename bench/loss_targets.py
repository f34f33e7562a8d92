"""What grpo_loss must reach, as ratios from interleaved rounds in one run, as a Markdown table.

``python bench/loss_targets.py``; about ten minutes and several GB of memory. ``--shrink 100`` takes a hundredth of
the sequences, to see that it runs. Every ratio is the median over rounds in which both sides were timed.
"""

import argparse
import sys
import tempfile
from functools import partial
from statistics import median

import numpy as np
from losses import DTYPES, KINDS, LEVELS, Contestant, check, contestants, expected, fast, packed_long, packed_short
from table import extra_memory, fresh_process, head, row

from grpo_fast.measure import ratio, side_by_side

LENGTH = 4096
SEQUENCES = {"full": 4883, "padded": 4096}  # 20.0 M tokens, none of them masked; 16.8 M, about half of them masked
TARGETS = {("torch.compile", "float64"): "≥ 8×", ("torch.compile", "float32"): "≥ 5×"}  # at token level
TARGETS |= {("torch eager", dtype): "≥ 80×" for dtype in DTYPES}
SLOW = ("numpy", "torch eager")  # about a second a call: apart from the others, which so get more rounds


def beside(who: dict[str, Contestant], kind: str, sequences: int, dtype: str, level: str) -> None:
    """The rows of one batch: grpo_loss with its gradient beside the others with theirs, and beside the value alone."""
    batch = KINDS[kind](sequences, LENGTH, dtype)
    right = expected(batch, level)
    for contestant in who.values():
        check(contestant(batch, level, True), right, batch)
    del right

    calls = {name: partial(contestant, batch, level, True) for name, contestant in who.items()}
    slow = {name: calls.pop(name) for name in SLOW if name in calls}
    calls["value"] = partial(fast, batch, level, False)
    calls["into"] = partial(fast, batch, level, np.empty_like(batch.logps))
    times = side_by_side(calls, seconds=10)
    label = f"{batch.logps.size / 1e6:.3g} M {'' if batch.mask is None else 'ragged '}padded, {dtype}, {level} level"
    work = f"`grpo_loss(grad=True)`, {label}"
    for name, call in (("grpo_fast", work), ("into", f"`grpo_loss(grad=array)`, {label}")):
        ms = 1e3 * median(times[name])
        row(call, "`grad=False`", "≤ 1.4×", f"{ratio(times, name, 'value'):.2f}× ({ms:.1f} ms)")
    for name in [name for name in who if name != "grpo_fast"]:
        both = times
        if name in slow:
            both = side_by_side({"grpo_fast": calls["grpo_fast"], name: slow[name]}, seconds=5)
        target = TARGETS.get((name, dtype), "–") if level == "token" else "–"
        row(work, f"{name}, with gradient", target, f"{ratio(both, name, 'grpo_fast'):.1f}×")
    if "torch.compile" in times:
        row(
            f"`grpo_loss(grad=array)`, {label}",
            "torch.compile, with gradient",
            "–",
            f"{ratio(times, 'torch.compile', 'into'):.1f}×",
        )


def short_sequences(sequences: int, dtype: str, level: str) -> None:
    """What short sequences cost: the speed in tokens beside that of long ones, both packed."""
    long, short = packed_long(sequences, LENGTH, dtype), packed_short(sequences, LENGTH, dtype)
    calls = {"long": partial(fast, long, level, True), "short": partial(fast, short, level, True)}
    times = side_by_side(calls, seconds=6)
    speed = ratio(times, "long", "short") * short.tokens / long.tokens
    ns = f"{1e9 * median(times['short']) / short.tokens:.2f} ns a token"
    work = f"`grpo_loss(grad=True)`, {short.tokens / 1e6:.3g} M in sequences of 5 … 900, {dtype}, {level} level"
    row(work, "of 1 … 4096", "≥ 0.7", f"{speed:.2f} ({ns})")


def memory(sequences: int, dtype: str) -> None:
    """How much the peak of a fresh process grows during one call, the gradient apart."""
    before = f"""
import numpy as np
from losses import fast, padded
batch = padded({sequences}, {LENGTH}, {dtype!r})
gradient = np.ones_like(batch.logps)
fast(padded(64, {LENGTH}, {dtype!r}), "token", True)
"""
    work = f"`grpo_loss(grad=array)`, {sequences * LENGTH / 1e6:.3g} M, {dtype}"
    row(work, "extra memory", "≤ 2 MiB", extra_memory(before, 'fast(batch, "token", gradient)'))


def compiling(dtype: str) -> None:
    """The first call of a process for which nothing is compiled yet, large enough to be shared among the threads."""
    with tempfile.TemporaryDirectory() as cache:
        script = f"""
import time
from losses import fast, padded
batch = padded(64, {LENGTH}, {dtype!r})
begin = time.perf_counter()
fast(batch, "token", True)
print(time.perf_counter() - begin)
"""
        cold = fresh_process(script, NUMBA_CACHE_DIR=cache)
        warm = fresh_process(script, NUMBA_CACHE_DIR=cache)
    row(f"`grpo_loss`, {dtype}, options compiled for the first time", "–", "≤ 5 s", f"{cold:.1f} s")
    row(f"`grpo_loss`, {dtype}, first call, warm disk cache", "–", "≤ 0.5 s", f"{warm:.2f} s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure grpo_loss beside its targets.")
    parser.add_argument("--shrink", type=int, default=1, help="divide the number of sequences (default: 1)")
    shrink = parser.parse_args().shrink
    who, missing = contestants()
    for name, reason in missing.items():
        print(f"{name} is missing: {reason}\n")
    torch = [f"torch {sys.modules['torch'].__version__}"] if "torch" in sys.modules else []
    head("NumPy on 1 thread", *torch)
    for level in LEVELS:
        for kind, sequences in SEQUENCES.items():
            for dtype in DTYPES:
                beside(who, kind, sequences // shrink, dtype, level)
    for level in LEVELS:
        for dtype in DTYPES:
            short_sequences(SEQUENCES["padded"] // shrink, dtype, level)
    for dtype in DTYPES:
        memory(SEQUENCES["padded"] // shrink, dtype)
        compiling(dtype)


if __name__ == "__main__":
    main()

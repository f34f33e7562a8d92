"""Ten minutes of everything mixed: memory and latency must not grow, and every call gives the bits of the first.

``python bench/soak.py [--minutes 10]`` calls functions at random, with arguments that are right and some that are not,
from several threads and forked children, and compares the last fifth of the time with the first; what it finds goes
into tests/README.md, unless ``--quick`` (half a minute). Linux: memory is read from /proc.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pages import TESTS, table, write_between

from grpo_fast import CISPO, K2, K3, SAPO, Clip, evaluate, group_advantages, grpo_loss, grpo_objective, grpo_stats
from grpo_fast import grpo_sweep as sweep
from grpo_fast._demonstration import synthetic_samples

Work = Callable[[], Any]
Array = NDArray[np.float64]


# --- what is called ---------------------------------------------------------------------------------------------------
def losses(dtype: Any) -> dict[str, Any]:
    """The arguments of a padded batch, half of it masked."""
    rng = np.random.default_rng(0)
    shape = 64, 1024
    old = -rng.exponential(size=shape)
    logps, ref = old + rng.normal(0, 0.1, (2, *shape))
    arrays = {"logps": logps, "old_logps": old, "ref_logps": ref, "advantages": rng.normal(size=shape[0])}
    mask = np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1))
    return {name: x.astype(dtype) for name, x in arrays.items()} | {"mask": mask}


def refused(work: Work) -> str:
    """The error that a call with bad input raises."""
    try:
        work()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("bad input was not refused")


def forked(work: Work) -> int:
    """The status of a forked child that does this."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def works(folder: str) -> dict[str, Work]:
    """All there is to call; what a call returns is to be the same each time."""
    small, large = (synthetic_samples(n, "float64", 0) for n in (1000, 300_000))
    single = synthetic_samples(300_000, "float32", 0)
    double, half = losses(np.float64), losses(np.float32)
    place = np.empty_like(half["logps"])
    nan = [x.copy() for x in large]
    nan[2][123_456] = np.nan

    def loss(arguments: dict[str, Any], grad: Any, **options: Any) -> Any:
        result = grpo_loss(**arguments, grad=grad, **options)
        return result.loss, result.stats, None if result.grad is None else result.grad.tobytes()

    sequence = {"surrogate": SAPO(), "kl": K2(0.1, False), "importance_sampling_level": "sequence"}
    found: dict[str, Work] = {
        "grpo_objective, 1,000": lambda: grpo_objective(*small),
        "grpo_objective, 300,000": lambda: grpo_objective(*large),
        "grpo_stats, float32": lambda: grpo_stats(*single),
        "grpo_sweep, 16 × 2": lambda: sweep(*large, np.linspace(0.05, 0.4, 16), [0, 0.04]),
        "grpo_loss with its gradient": partial(loss, double, True, kl=K3(0.04)),
        "grpo_loss, grad=array, float32": partial(loss, half, place, surrogate=Clip(0.2, 0.28, 3.0), kl=K3(0.04)),
        "grpo_loss, sequence level": partial(loss, double, True, **sequence),
        "grpo_loss without": partial(loss, half, False, surrogate=CISPO()),
        "group_advantages": lambda: group_advantages(large[1], 8).tobytes(),
        "a NaN": partial(refused, lambda: grpo_stats(*nan)),
        "a wrong shape": partial(refused, lambda: grpo_loss(**double | {"old_logps": double["logps"][1:]})),
        "a wrong option": partial(refused, lambda: Clip(1.5)),
    }
    pool = ThreadPoolExecutor(4)
    found["four threads"] = lambda: list(pool.map(lambda _: grpo_objective(*large), range(4)))
    if hasattr(os, "fork"):
        found["a forked child"] = partial(forked, lambda: grpo_stats(*large))
    if find_spec("pyarrow") and find_spec("tqdm"):
        import rollouts

        rollouts.write(path := f"{folder}/run", steps=2)
        found["evaluate"] = lambda: evaluate(path, surrogate=Clip(0.2), kl=K3(0.04), progress=False)
    if find_spec("torch"):
        import torch

        from grpo_fast.torch import grpo_loss as torch_loss

        tensors = {name: torch.from_numpy(x) for name, x in half.items()}

        def backward() -> Any:
            logps = tensors["logps"].clone().requires_grad_()
            loss = torch_loss(**tensors | {"logps": logps}, kl=K3(0.04))
            loss.backward()
            return loss.item(), logps.grad.numpy().tobytes()

        found["torch, backward"] = backward
    return found


# --- how it goes ------------------------------------------------------------------------------------------------------
def memory() -> float:
    """What the process occupies, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def soak(found: dict[str, Work], seconds: float) -> tuple[Array, Array]:
    """The calls (which, when, how long) and the memory (when, how much); when is 0 … 1. Prints how far it is."""
    rng, names = random.Random(0), list(found)
    first = [work() for work in found.values()]
    # Written to before it begins, so that it is not our own notes that grow; faster than this we do not call.
    calls = np.full((int(2000 * seconds), 3), np.nan)
    sizes = np.full((600, 2), np.nan)
    begin, tenths = time.perf_counter(), 0
    for n, call in enumerate(calls):
        start = time.perf_counter()
        if (when := (start - begin) / seconds) >= (tenths + 1) / 10:
            tenths += 1
            print(f"{tenths}/10 of the time: {n:,} calls, all with the bits of the first", flush=True)
        if when >= 1:
            return calls[:n], sizes[~np.isnan(sizes[:, 0])]
        which = rng.randrange(len(names))
        result = found[names[which]]()
        call[:] = which, when, time.perf_counter() - start
        assert result == first[which], f"{names[which]} gave another result after {start - begin:.0f} s"
        sizes[int(600 * when)] = when, memory()
    raise AssertionError(f"more than {len(calls):,} calls")


def fifths(values: Array) -> tuple[float, float]:
    """The medians (of when and what) of the first fifth of the time, once all is warm, and of the last."""
    when, what = values.T
    return float(np.median(what[(when > 0.05) & (when < 0.25)])), float(np.median(what[when > 0.8]))


def lines(names: list[str], calls: Array, sizes: Array) -> Iterator[str]:
    """What the page says."""
    before, after = fifths(sizes)
    yield f"{len(calls):,} calls. Memory: {before:.1f} MiB in the first fifth of the time, {after:.1f} in the last.\n"

    def row(which: int) -> Iterator[str]:
        of_it = calls[calls[:, 0] == which, 1:]
        early, late = fifths(of_it)
        yield from (names[which], f"{len(of_it):,}")
        yield from (f"{1e6 * early:,.0f} µs", f"{1e6 * late:,.0f} µs", f"{late / early:.2f}")

    yield from table(
        ["called at random", "times", "median, first fifth", "last fifth", "ratio"], map(row, range(len(names)))
    )


def main() -> None:
    """Soak; write, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--quick", action="store_true", help="half a minute, and print instead of writing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = works(folder)
        calls, sizes = soak(found, 30 if arguments.quick else 60 * arguments.minutes)
    if arguments.quick:
        print("\n".join(lines(list(found), calls, sizes)))
    else:
        write_between(TESTS, "soak", lines(list(found), calls, sizes))


if __name__ == "__main__":
    main()

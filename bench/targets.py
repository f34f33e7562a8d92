"""What was aimed at, and what was measured: ratios of one time to another, times, and memory."""

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from bench_objective import OTHERS
from pages import prose, table
from results import Results, noisy
from speed_tables import FLOOR, IN_PLACE, LARGE, OURS, READ, READ_AND_WRITE, READ_FILE

VALUE = "without gradient"
SMALL = (3, 10, 100, 1000)  # samples


class Target(NamedTuple):
    """Which work, beside which, has to reach what; and what it reached in each round, of which the median counts."""

    work: str
    beside: str
    bound: str
    reached: list[float]
    unit: str = "×"

    def met(self) -> bool:
        """Whether the median is on the right side of the bound."""
        side, number = self.bound.split()[:2]
        value, bound = median(self.reached), float(number.rstrip("×"))
        return value >= bound if side == "≥" else value <= bound

    def row(self) -> list[str]:
        """The cells of its row."""
        reached = f"{round(median(self.reached), 2) + 0.0:.2f}{self.unit}"  # no −0
        return [self.work, self.beside, self.bound, reached, "yes" if self.met() else "no"]


def targets(results: Results) -> Iterator[str]:
    """The table, without what was not measured and what is noisy; the latter is named below."""
    found = [target for kind in _KINDS for target in kind(results) if target.reached]
    steady = [target for target in found if not noisy(target.reached)]
    if steady:
        yield from table(["work", "beside", "to reach", "measured", "reached"], (target.row() for target in steady))
    if left_out := [f"{target.work} ({target.beside})" for target in found if noisy(target.reached)]:
        yield from prose(f"Left out, since they spread by more than 20%: {'; '.join(left_out)}.")


# --- what they are about ----------------------------------------------------------------------------------------------
def _large_objectives(results: Results) -> Iterator[Target]:
    for n, dtype, roof in ((20_000_000, "float64", "≥ 0.95"), (40_000_000, "float32", "≥ 0.95")):
        ratios = partial(results.ratios, work="objective", n=n, dtype=dtype)
        what = f"{n // 1_000_000} M, {dtype}"
        yield Target(f"`grpo_objective`, {what}", READ, roof, ratios(READ, OURS), "")
        for other, bound in zip(OTHERS, ("≤ 0.55×", "≤ 1.15×", "≤ 2.5×"), strict=False):
            yield Target(f"`{other}`, {what}", "`grpo_objective`", bound, ratios(other, OURS))


def _small_objectives(results: Results) -> Iterator[Target]:
    for dtype in ("float64", "float32"):
        at = {"work": "objective", "dtype": dtype}
        beside_numpy = {n: results.ratios("NumPy", OURS, n=n, **at) for n in results.values("n", **at)}
        work = f"`grpo_objective`, 100,000, {dtype}"
        yield Target(work, "torch.compile", "≥ 2×", results.ratios("torch.compile", OURS, n=100_000, **at))
        small = [beside_numpy.get(n, []) for n in SMALL]
        yield Target(f"`grpo_objective`, 3 … 1000, {dtype}", "NumPy", "≥ 3×", _of(min, small))
        micros = [[1e6 * seconds for seconds in results.times(peer=OURS, n=n, **at)] for n in SMALL]
        yield Target(f"`grpo_objective`, 3 … 1000, {dtype}", "its time", "≤ 5 µs", _of(max, micros), " µs")
        large = [ratios for n, ratios in beside_numpy.items() if n >= 1_000_000]
        yield Target(f"`grpo_objective`, ≥ 1 M, {dtype}", "NumPy", "≥ 10×", _of(min, large))


def _of(least_or_most: Any, cases: list[list[float]]) -> list[float]:
    """The rounds of the case whose median is the least or the largest; none if nothing was measured."""
    measured: list[list[float]] = [rounds for rounds in cases if rounds]
    return list(least_or_most(measured, key=median)) if measured else []


def _losses(results: Results) -> Iterator[Target]:
    for dtype, bound in (("float64", "≥ 8×"), ("float32", "≥ 9×")):
        ratios = partial(results.ratios, work="loss", n=LARGE, kind="full", dtype=dtype, level="token")
        for ours, call in ((OURS, "grad=True"), (IN_PLACE, "grad=array")):
            work = f"`grpo_loss({call})`, 16.8 M, {dtype}"
            yield Target(work, "torch.compile", bound, ratios("torch.compile", ours))
            yield Target(work, "torch eager", "≥ 80×", ratios("torch eager", ours))
            yield Target(work, "`grad=False`", "≤ 1.4×", ratios(ours, VALUE))
            yield Target(work, READ_AND_WRITE, "≥ 0.8", ratios(READ_AND_WRITE, ours), "")
    for n in (256, 1024, 4096, 16_384):
        for kind in ("full", "padded"):
            facts = {"work": "loss", "n": n, "kind": kind, "dtype": "float64", "level": "token"}
            work = f"`grpo_loss(grad=array)`, {n:,}, float64, {kind}"
            ours, loop = (results.times(peer=peer, **facts) for peer in (IN_PLACE, "Numba loop"))
            if n < 4096:
                more = [1e6 * (a - b) for a, b in zip(ours, loop, strict=False)]
                yield Target(work, "a plain Numba loop", "≤ 12 µs more", more, " µs")
            else:
                bound = "≥ 1.0×" if n == 4096 else "≥ 1.5×"
                yield Target(work, "a plain Numba loop", bound, results.ratios("Numba loop", IN_PLACE, **facts))


def _corrections(results: Results) -> Iterator[Target]:
    for dtype, roof in (("float64", "≥ 0.6"), ("float32", "≥ 0.4")):
        for row in results.all(work="correction", peer=OURS, n=LARGE, kind="full", dtype=dtype):
            ratios = partial(results.ratios, **{name: row[name] for name in ("work", "n", "kind", "dtype", "level")})
            work = f"`rollout_correction`, 16.8 M, {dtype}, {row['level']} level"
            yield Target(work, READ_AND_WRITE, roof, ratios(READ_AND_WRITE, OURS), "")
            yield Target(work, "torch eager", "≥ 5×", ratios("torch eager", OURS))


def _torch(results: Results) -> Iterator[Target]:
    for row in results.all(work="torch, small", peer=OURS):
        ratios = results.ratios("torch eager", OURS, work="torch, small", n=row["n"])
        yield Target(f"`grpo_fast.torch.grpo_loss`, {row['n']:,}, forward + backward", "torch eager", "≥ 2×", ratios)


def _in_cache(results: Results) -> Iterator[Target]:
    for row in results.all(work="floor", peer=OURS, n=min(results.values("n", work="floor"), default=0)):
        facts = {name: row[name] for name in ("work", "function", "way", "dtype")}
        ours, floor = (results.slopes(peer=peer, **facts) for peer in (OURS, FLOOR))
        is_loss = row["function"] == "grpo_loss"
        work = f"`{'grpo_loss(grad=array)' if is_loss else 'grpo_objective'}`, in cache, {row['way']}, {row['dtype']}"
        ratios = [a / b for a, b in zip(ours, floor, strict=False)]
        yield Target(work, FLOOR, "≤ 1.15×" if is_loss else "≤ 1.0×", ratios)
        if is_loss and row["dtype"] == "float32":
            bound = "≤ 1.1 ns" if row["way"] == "near" else "≤ 1.6 ns"
            yield Target(work, "its time a token", bound, [1e9 * seconds for seconds in ours], " ns")


def _packed(results: Results) -> Iterator[Target]:
    for row in results.all(work="packed", peer="long"):
        facts = {"work": "packed", "dtype": row["dtype"], "level": row["level"]}
        for name, called, bound in (("short", "of 5 … 900", "≥ 0.8"), ("single", "of 1", "≥ 0.083")):
            for other in results.all(peer=name, **facts):
                ratios = results.ratios("long", name, **facts)
                speeds = [x * other["tokens"] / row["tokens"] for x in ratios]
                work = f"`grpo_loss`, sequences {called}, {row['dtype']}, {row['level']} level"
                yield Target(work, "speed on 1 … 4096", bound, speeds)


def _memory(results: Results) -> Iterator[Target]:
    for row in results.all(work="memory"):
        work = f"`{row['peer']}`, {row['n'] / 1e6:.3g} M, {row['dtype']}"
        yield Target(work, "extra memory", "≤ 2 MiB", [row["MiB"]], " MiB")
    for row in results.all(work="torch", peer=OURS):
        work = f"`grpo_fast.torch.grpo_loss`, {row['n'] / 1e6:.3g} M, float32, beside the gradient"
        yield Target(work, "extra memory", "≤ 2 MiB", [row["MiB"] - row["n"] * 4 / 2**20], " MiB")


def _files(results: Results) -> Iterator[Target]:
    ratios = results.ratios(READ_FILE, OURS, work="files")
    yield Target("`evaluate`, Parquet", "speed of pyarrow merely reading", "≥ 0.9", ratios, "")


def _runs(results: Results) -> Iterator[Target]:
    for name in ("step", "prompt_id"):
        ratios = results.ratios(f"by {name}", "whole", work="by")
        yield Target(f"`evaluate(by={name!r})`", "`evaluate`", "≤ 1.1×", ratios)
    ratios = results.ratios(READ_FILE, OURS, work="JSON Lines")
    yield Target("`evaluate`, JSON Lines", "speed of pyarrow merely reading", "≥ 0.9", ratios, "")
    ratios = results.ratios("RolloutWriter", "pyarrow", work="writing")
    yield Target("`RolloutWriter.write`", "pyarrow writing the same columns", "≤ 1.1×", ratios)
    for row in results.all(work="address space"):
        yield Target(
            f"`evaluate`, {row['n'] / 1e9:.3g} GB of Parquet", "address space", "≤ 2 GiB", [row["GiB"]], " GiB"
        )


def _starts(results: Results) -> Iterator[Target]:
    numba, ours = (results.times(work="start", peer=f"import {name}") for name in ("numba", "grpo_fast"))
    more = [b - a for a, b in zip(numba, ours, strict=True)]
    more = [median(more)] if more else []  # a small difference of two, which spreads by more than it is
    yield Target("`import grpo_fast`", "`import numba`", "≤ 0.1 s more", more, " s")
    for name in ("grpo_objective", "grpo_loss"):
        first = results.times(work="start", peer=f"{name}, first call")
        yield Target(f"`{name}`, first call, warm disk cache", "its time", "≤ 0.5 s", first, " s")
    for row in results.all(work="compile"):
        bound = "≤ 2 s" if "other" in row["peer"] else "≤ 4 s"
        yield Target(f"{row['peer']}, {row['dtype']}, compiled", "its time", bound, row["times"], " s")


_KINDS = (
    _large_objectives,
    _small_objectives,
    _losses,
    _corrections,
    _torch,
    _in_cache,
    _packed,
    _memory,
    _files,
    _runs,
    _starts,
)

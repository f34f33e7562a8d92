"""Measure everything, and write the README's tables and the picture from it.

``python bench/report.py`` runs the suites (half an hour, some GB of memory; ``--quick`` for a look) and writes;
``python bench/report.py results.json …`` writes from what pytest-benchmark saved before. Below: one function for each
table, the picture, and how it is measured. A ratio is the median over rounds in which both
sides were timed. Nothing is left out: rows that are lost are printed bold, peers that are missing are named.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_objective import OTHERS
from loss_peers import LEVELS
from loss_peers import PEERS as LOSS_PEERS
from objective_peers import PEERS as OBJECTIVE_PEERS
from readme import table, write_between
from results import Results, spelled, times_slower

HERE = Path(__file__).parent
PICTURE = HERE / "speed.svg"
OURS, IN_PLACE = "grpo_fast", "grpo_fast, in place"
READ, READ_AND_WRITE, VALUE = "read-only roof", "read-and-write roof", "without gradient"


# --- tables -----------------------------------------------------------------------------------------------------------
def machine(results: Results) -> Iterator[str]:
    """What it was measured on, and who did not take part."""
    about = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    yield f"{about['cpu']}, {about['system']}, {about['threads']} threads; Python {about['python']}, {versions}."
    for name, reason in about["missing"].items():
        yield f"{name} is missing: {reason}."
    yield ""


def objective(results: Results) -> Iterator[str]:
    """grpo_objective beside its peers, for every number of samples."""
    peers = [name for name in OBJECTIVE_PEERS if name != OURS]
    for dtype in results.values("dtype", work="objective"):
        yield f"`grpo_objective`, {dtype}: its time, how many times longer others take, its share of the roof.\n"

        def row(n: int, dtype: str = dtype) -> Iterator[str]:
            facts = {"work": "objective", "n": n, "dtype": dtype}
            yield f"{n:,}"
            yield spelled(results.times(peer=OURS, **facts))
            for peer in peers:
                yield times_slower(results.ratio(peer, OURS, **facts))
            roof = results.ratio(READ, OURS, **facts)
            yield "–" if roof is None or n < 1_000_000 else f"{roof:.2f}"

        sizes = results.values("n", work="objective", dtype=dtype)
        yield from table(["samples", "grpo_fast", *peers, "of the roof"], map(row, sizes))


def loss(results: Results) -> Iterator[str]:
    """grpo_loss with its gradient beside its peers."""
    peers = [name for name in LOSS_PEERS if name not in (OURS, IN_PLACE)]
    for level in LEVELS:
        yield (
            f"`grpo_loss` at {level} level with its gradient: its time with `grad=True` and with `grad=array`, how "
            "many times longer than the former others take, and the share of the roof of the latter.\n"
        )

        def row(case: tuple[int, str, str], level: str = level) -> Iterator[str]:
            n, kind, dtype = case
            facts = {"work": "loss", "n": n, "kind": kind, "dtype": dtype, "level": level}
            yield f"{n:,}, {'none masked' if kind == 'full' else 'half masked'}, {dtype}"
            yield spelled(results.times(peer=OURS, **facts))
            yield spelled(results.times(peer=IN_PLACE, **facts))
            for peer in peers:
                yield times_slower(results.ratio(peer, OURS, **facts))
            roof = results.ratio(READ_AND_WRITE, IN_PLACE, **facts)
            yield "–" if roof is None or n < 1_000_000 else f"{roof:.2f}"

        found = results.all(work="loss", level=level, peer=OURS)
        cases = [(row["n"], row["kind"], row["dtype"]) for row in found]
        yield from table(["tokens", "grad=True", "grad=array", *peers, "of the roof"], map(row, cases))


def targets(results: Results) -> Iterator[str]:
    """What the design asks for, and what was measured."""

    def line(work: str, beside: str, target: str, value: float | None, unit: str = "×") -> Iterator[tuple[str, ...]]:
        if value is None:
            return
        bound = float(target.split()[1].rstrip("×"))
        met = value >= bound if target.startswith("≥") else value <= bound
        yield work, beside, target, f"{value:.2f}{unit}" if met else f"**{value:.2f}{unit}**"

    def rows() -> Iterator[tuple[str, ...]]:
        for n, dtype, roof in ((20_000_000, "float64", "≥ 0.95"), (40_000_000, "float32", "≥ 0.90")):
            facts = {"work": "objective", "n": n, "dtype": dtype}
            what = f"{n // 1_000_000} M, {dtype}"
            yield from line(f"`grpo_objective`, {what}", READ, roof, results.ratio(READ, OURS, **facts), "")
            for other, target in zip(OTHERS, ("≤ 0.55×", "≤ 1.15×", "≤ 2.5×"), strict=False):
                yield from line(f"`{other}`, {what}", "`grpo_objective`", target, results.ratio(other, OURS, **facts))
        for dtype in ("float64", "float32"):
            at = {"work": "objective", "dtype": dtype}
            value = results.ratio("torch.compile", OURS, n=100_000, **at)
            yield from line(f"`grpo_objective`, 100,000, {dtype}", "torch.compile", "≥ 2×", value)
            small = [results.ratio("NumPy", OURS, n=n, **at) for n in (3, 10, 100, 1000)]
            least = min(filter(None, small), default=None)
            yield from line(f"`grpo_objective`, 3 … 1000, {dtype}", "NumPy", "≥ 3×", least)
            slowest = [1e6 * median(t) for n in (3, 10, 100, 1000) if (t := results.times(peer=OURS, n=n, **at))]
            yield from line(f"`grpo_objective`, 3 … 1000, {dtype}", "–", "≤ 5 µs", max(slowest, default=None), " µs")
            large = [results.ratio("NumPy", OURS, n=n, **at) for n in results.values("n", **at) if n >= 1_000_000]
            yield from line(
                f"`grpo_objective`, ≥ 1 M, {dtype}", "NumPy", "≥ 10×", min(filter(None, large), default=None)
            )
        for dtype, target in (("float64", "≥ 8×"), ("float32", "≥ 5×")):
            facts = {"work": "loss", "n": 4096 * 4096, "kind": "full", "dtype": dtype, "level": "token"}
            for ours, call in ((OURS, "grad=True"), (IN_PLACE, "grad=array")):
                what = f"`grpo_loss({call})`, 16.8 M, {dtype}"
                value = results.ratio("torch.compile", ours, **facts)
                yield from line(what, "torch.compile", target, value)
                yield from line(what, "torch eager", "≥ 80×", results.ratio("torch eager", ours, **facts))
                yield from line(what, "`grad=False`", "≤ 1.4×", results.ratio(ours, VALUE, **facts))
        for row in results.all(work="packed", peer="short"):
            facts = {"work": "packed", "dtype": row["dtype"], "level": row["level"]}
            speed = results.ratio("long", "short", **facts)
            tokens = {name: results.all(peer=name, **facts)[0]["tokens"] for name in ("long", "short")}
            speed = speed and speed * tokens["short"] / tokens["long"]
            what = f"`grpo_loss`, sequences of 5 … 900, {row['dtype']}, {row['level']} level"
            yield from line(what, "speed on 1 … 4096", "≥ 0.7", speed)
        for row in results.all(work="memory"):
            what = f"`{row['peer']}`, {row['n'] / 1e6:.3g} M, {row['dtype']}"
            yield from line(what, "extra memory", "≤ 2 MiB", row["MiB"], " MiB")
        value = results.ratio("pyarrow, read only", OURS, work="files")
        yield from line("`evaluate`, Parquet", "speed of pyarrow merely reading", "≥ 0.9", value, "")
        for row in results.all(work="torch", peer=OURS):
            what = f"`grpo_fast.torch.grpo_loss`, {row['n'] / 1e6:.3g} M, float32, beside the gradient"
            yield from line(what, "extra memory", "≤ 2 MiB", row["MiB"] - row["n"] * 4 / 2**20, " MiB")
        numba, ours = (results.times(work="start", peer=f"import {name}") for name in ("numba", "grpo_fast"))
        if ours:
            more = median(b - a for a, b in zip(numba, ours, strict=True))
            yield from line("`import grpo_fast`", "`import numba`", "≤ 0.1 s more", more, " s")
        for name in ("grpo_objective", "grpo_loss"):
            if first := results.times(work="start", peer=f"{name}, first call"):
                yield from line(f"`{name}`, first call, warm disk cache", "–", "≤ 0.5 s", median(first), " s")
        for row in results.all(work="compile"):
            what = f"`grpo_loss`, {row['dtype']}, compiled for the first time"
            yield from line(what, "–", "≤ 5 s", row["times"][0], " s")

    yield from table(["work", "beside", "to reach", "measured"], rows())


def others(results: Results, work: str) -> Iterator[str]:
    """One case: the time of everyone, beside ours, and the extra memory where that was measured."""
    found = results.all(work=work)
    with_memory = any("MiB" in row for row in found)

    def row(one: dict[str, Any]) -> Iterator[str]:
        yield one["peer"]
        yield spelled(one["times"])
        yield "" if one["peer"] == OURS else times_slower(results.ratio(one["peer"], OURS, work=work))
        if with_memory:
            yield f"{one['MiB']:.0f} MiB"

    yield from table(["", "time", "times longer", *(["extra memory"] if with_memory else [])], map(row, found))


def threads(results: Results) -> Iterator[str]:
    """How many times faster than on one thread."""
    counts = results.values("threads", work="threads")

    def row(case: tuple[str, str]) -> Iterator[str]:
        function, dtype = case
        yield f"{function}, {dtype}"
        facts = {"work": "threads", "function": function, "dtype": dtype}
        alone = results.times(threads=1, **facts)
        yield spelled(alone)
        for n in counts[1:]:
            speedup = median(a / b for a, b in zip(alone, results.times(threads=n, **facts), strict=False))
            yield f"{speedup:.2f} ({speedup / n:.0%})"

    cases = [(row["function"], row["dtype"]) for row in results.all(work="threads", threads=1)]
    yield from table(
        ["16.8 M tokens or 20 M samples", "1 thread", *(f"{n} threads" for n in counts[1:])], map(row, cases)
    )


# --- the picture ------------------------------------------------------------------------------------------------------
def draw(results: Results, path: Path) -> None:
    """Time per sample over the number of samples, of every peer and of the roof."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "grpo_fast", "svg.fonttype": "none"}  # the same bytes again; text as text
    from matplotlib import pyplot

    dtypes = results.values("dtype", work="objective")
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(11, 4.5), sharey=True, layout="constrained", squeeze=False
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        for peer in [*OBJECTIVE_PEERS, READ]:
            found = results.all(work="objective", dtype=dtype, peer=peer)
            sizes = [row["n"] for row in found]
            per_sample = [1e9 * median(row["times"]) / row["n"] for row in found]
            style = {OURS: {"color": "black", "linewidth": 2.5}, READ: {"color": "grey", "linestyle": "--"}}
            panel.loglog(sizes, per_sample, marker=".", label=peer, **style.get(peer, {}))
        panel.set(title=f"grpo_objective, {dtype}", xlabel="samples")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ns per sample")
    panels[0][-1].legend()
    figure.savefig(path, metadata={"Date": None})


# --- measuring, and writing -------------------------------------------------------------------------------------------
def run(quick: bool, folder: Path) -> list[Path]:
    """Run the suites, each in a process of its own: what one leaves in memory does not slow the next."""
    options = ["--benchmark-enable", "--benchmark-columns=median,iqr,rounds", "-q", "-rs", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"]  # of a suite that is skipped as a whole
    options += ["--quick", "--seconds=0.5"] if quick else []
    saved = []
    for suite in sorted(HERE.glob("bench_*.py")):
        saved.append(folder / f"{suite.stem}.json")
        command = [sys.executable, "-m", "pytest", str(suite), f"--benchmark-json={saved[-1]}", *options]
        subprocess.run(command, cwd=HERE.parent, check=True)
    return [path for path in saved if path.exists()]


def main() -> None:
    """Measure unless told where the results are; write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="what pytest --benchmark-json saved")
    parser.add_argument("--quick", action="store_true", help="small sizes only, and print instead of writing")
    parser.add_argument("--keep", type=Path, help="a folder for what pytest-benchmark saves")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = Results(arguments.results or run(arguments.quick, arguments.keep or Path(temporary)))
    parts = {
        "speed": [*machine(results), *objective(results), *loss(results)],
        "targets": list(targets(results)),
        "threads": list(threads(results)),
        "files": list(others(results, "files")),
        "torch": list(others(results, "torch")),
    }
    if arguments.quick:
        print("\n".join(line for lines in parts.values() for line in lines))
        return
    for name, lines in parts.items():
        write_between(name, lines)
    draw(results, PICTURE)


if __name__ == "__main__":
    main()

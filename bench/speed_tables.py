"""The tables of bench/README.md and README.md, made of what was measured.

In all of them a ratio is the median over rounds in which both sides were timed, and says how many times longer than
we a peer takes; the fastest of a row is bold. Rows whose own times are noisy are left out, and named below their
table. Of what was not measured there are no lines.
"""

from collections.abc import Iterable, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

from bench_files import PEERS as FILE_PEERS
from bench_torch import PEERS as TORCH_PEERS
from correction_peers import PEERS as CORRECTION_PEERS
from floor_cases import PEERS as FLOOR_PEERS
from loss_peers import LEVELS
from loss_peers import PEERS as LOSS_PEERS
from objective_peers import PEERS as OBJECTIVE_PEERS
from pages import prose, table
from results import Cell, Results, noisy, ratio_cell, row_of, spread, time_cell

OURS, IN_PLACE, FLOOR = "grpo_fast", "grpo_fast, in place", "C floor"
READ, READ_AND_WRITE, READ_FILE = "read-only roof", "read-and-write roof", "pyarrow, read only"
LARGE = 4096 * 4096  # tokens: the largest batches
OF_A_ROOF = 1_000_000  # from so many on nothing fits a cache

#: The peers of each kind of work, and what that is called.
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "objective": ("grpo_objective", OBJECTIVE_PEERS),
    "loss": ("grpo_loss", LOSS_PEERS),
    "correction": ("rollout_correction", CORRECTION_PEERS),
    "files": ("evaluate", FILE_PEERS),
    "torch": ("the torch operator", TORCH_PEERS),
    "floor": ("what lies in a cache", FLOOR_PEERS),
}

Facts = dict[str, Any]  # of results


# --- what all tables have in common -----------------------------------------------------------------------------------
class Row(NamedTuple):
    """A row: its name, the times of ours that are printed in it, and its cells."""

    name: str
    own_times: list[list[float]]
    cells: Iterable[Cell]


def steady_table(head: Iterable[str], rows: Iterable[Row]) -> Iterator[str]:
    """A table without the rows of which a time of ours is noisy, and below it their names; nothing without rows."""
    written, left_out = [], []
    for row in rows:
        if any(map(noisy, row.own_times)):
            left_out.append(f"{row.name} (± {max(map(spread, row.own_times)):.0%})")
        else:
            written.append([row.name, *row_of(row.cells)])
    if written:
        yield from table(head, written)
    if left_out:
        yield from prose(f"Left out, since their times spread by more than 20%: {'; '.join(left_out)}.")


def peer_cells(results: Results, peers: Iterable[str], facts: Facts) -> Iterator[Cell]:
    """How many times longer each of the peers takes."""
    return (ratio_cell(results.ratio(peer, OURS, **facts)) for peer in peers)


def roof_cell(results: Results, roof: str, ours: str, facts: Facts) -> Cell:
    """Which part of the speed of merely reading and writing is reached; a dash for what fits a cache."""
    ratio = results.ratio(roof, ours, **facts)
    return Cell("–") if ratio is None or facts["n"] < OF_A_ROOF else Cell(f"{ratio:.2f}")


# --- on what, and who -------------------------------------------------------------------------------------------------
def machine(results: Results) -> str:
    """One sentence: what it was measured on."""
    about = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return f"{about['cpu']}, {about['system']}, {about['threads']} threads; Python {about['python']}, {versions}."


def missing(results: Results) -> list[str]:
    """A sentence for each peer that is missing, and why, and for each work that is; or one that says that none is."""
    found: dict[tuple[str, str], list[str]] = {}
    for work, (called, peers) in PEERS.items():
        rows = results.all(work=work)
        for peer in peers if rows else ():
            if not any(row["peer"] == peer for row in rows):
                reason = next((row["missing"][peer] for row in rows if peer in row.get("missing", {})), "not measured")
                found.setdefault((peer, reason), []).append(called)
    absent = [f"{peer} is missing from {' and '.join(where)}: {why}." for (peer, why), where in found.items()]
    unmeasured = [called for work, (called, _) in PEERS.items() if not results.all(work=work)]
    absent += [f"Of {called} nothing was measured." for called in unmeasured]
    return absent or ["All peers took part."]


def about(results: Results) -> Iterator[str]:
    """What it was measured on, and who did not take part."""
    yield from prose(machine(results))
    yield from prose(" ".join(missing(results)))


# --- the tables of bench/README.md ------------------------------------------------------------------------------------
def objective(results: Results) -> Iterator[str]:
    """grpo_objective beside its peers, for every number of samples."""
    peers = [name for name in OBJECTIVE_PEERS if name != OURS]

    def row(n: int, dtype: str) -> Row:
        facts = {"work": "objective", "n": n, "dtype": dtype}
        ours = results.times(peer=OURS, **facts)
        roof = roof_cell(results, READ, OURS, facts)
        return Row(f"{n:,}", [ours], [time_cell(ours), *peer_cells(results, peers, facts), roof])

    for dtype in results.values("dtype", work="objective"):
        sizes = results.values("n", work="objective", dtype=dtype)
        yield from steady_table([f"samples, {dtype}", OURS, *peers, "of the roof"], (row(n, dtype) for n in sizes))


def loss(results: Results) -> Iterator[str]:
    """grpo_loss with its gradient beside its peers."""
    peers = [name for name in LOSS_PEERS if name not in (OURS, IN_PLACE)]

    def row(n: int, kind: str, dtype: str, level: str) -> Row:
        facts = {"work": "loss", "n": n, "kind": kind, "dtype": dtype, "level": level}
        ours, in_place = (results.times(peer=name, **facts) for name in (OURS, IN_PLACE))
        cells = [time_cell(ours), time_cell(in_place, results.ratio(IN_PLACE, OURS, **facts) or 1.0)]
        roof = roof_cell(results, READ_AND_WRITE, IN_PLACE, facts)
        name = f"{n:,}, {'none masked' if kind == 'full' else 'half masked'}, {dtype}"
        return Row(name, [ours, in_place], [*cells, *peer_cells(results, peers, facts), roof])

    for level in LEVELS:
        cases = [
            (row["n"], row["kind"], row["dtype"], level) for row in results.all(work="loss", level=level, peer=OURS)
        ]
        cases.sort(key=lambda case: case[0])
        head = [f"tokens, {level} level", "grad=True", "grad=array", *peers, "of the roof"]
        yield from steady_table(head, (row(*case) for case in cases))


def correction(results: Results) -> Iterator[str]:
    """`rollout_correction`, weights and diagnostics, beside its peers."""
    peers = [name for name in CORRECTION_PEERS if name != OURS]

    def row(facts: Facts) -> Row:
        ours = results.times(peer=OURS, **facts)
        roof = roof_cell(results, READ_AND_WRITE, OURS, facts)
        masked = "none masked" if facts["kind"] == "full" else "half masked"
        name = f"{facts['n']:,}, {masked}, {facts['dtype']}, {facts['level']} level"
        return Row(name, [ours], [time_cell(ours), *peer_cells(results, peers, facts), roof])

    names = ("n", "kind", "dtype", "level")
    measured = results.all(work="correction", peer=OURS)
    cases = [{"work": "correction"} | {name: case[name] for name in names} for case in measured]
    yield from steady_table(["tokens", OURS, *peers, "of the roof"], map(row, sorted(cases, key=lambda x: x["n"])))


def files(results: Results) -> Iterator[str]:
    """`evaluate` over a file beside its peers, and beside merely reading it."""
    peers = [name for name in FILE_PEERS if name not in (OURS, READ_FILE)]

    def row(n: int) -> Row:
        facts = {"work": "files", "n": n}
        ours = results.times(peer=OURS, **facts)
        roof = roof_cell(results, READ_FILE, OURS, facts)
        return Row(f"{n:,}, float64", [ours], [time_cell(ours), *peer_cells(results, peers, facts), roof])

    head = ["samples in Parquet", OURS, *peers, "of the speed of pyarrow merely reading"]
    yield from steady_table(head, map(row, results.values("n", work="files")))


def torch(results: Results) -> Iterator[str]:
    """The torch operator, forward and backward, beside its peers: its time, and the memory it takes."""
    peers = [name for name in TORCH_PEERS if name != OURS]

    def memory(peer: str, n: int) -> Cell:
        rows = results.all(work="torch", n=n, peer=peer)
        mib = round(rows[0]["MiB"]) if rows else None
        return Cell("–" if mib is None else f"{mib} MiB", mib)

    def rows() -> Iterator[Row]:
        for n in results.values("n", work="torch"):
            facts = {"work": "torch", "n": n}
            ours = results.times(peer=OURS, **facts)
            yield Row(f"{n:,} tokens: time", [ours], [time_cell(ours), *peer_cells(results, peers, facts)])
            yield Row(f"{n:,} tokens: extra memory", [], [memory(peer, n) for peer in (OURS, *peers)])

    yield from steady_table(["half masked, float32", OURS, *peers], rows())


def threads(results: Results) -> Iterator[str]:
    """How many times faster than on one thread."""
    counts = results.values("threads", work="threads")

    def row(function: str, dtype: str) -> Row:
        facts = {"work": "threads", "function": function, "dtype": dtype}
        alone = results.times(threads=1, **facts)

        def speedup(n: int) -> Cell:
            times = results.times(threads=n, **facts)
            times_faster = median(a / b for a, b in zip(alone, times, strict=False))
            return Cell(f"{times_faster:.2f} ({times_faster / n:.0%})", 1 / times_faster)

        return Row(f"{function}, {dtype}", [alone], [time_cell(alone), *map(speedup, counts[1:])])

    cases = [(row["function"], row["dtype"]) for row in results.all(work="threads", threads=1)]
    head = ["16.8 M tokens or 20 M samples", "1 thread", *(f"{n} threads" for n in counts[1:])]
    yield from steady_table(head, (row(*case) for case in cases))


def floor(results: Results) -> Iterator[str]:
    """What a token takes in a cache, on one thread, beside the same loop in C."""

    def row(facts: Facts) -> Row:
        ours, by_hand = (results.slopes(peer=peer, **facts) for peer in (OURS, FLOOR))
        ratio = Cell(f"{median(a / b for a, b in zip(ours, by_hand, strict=True)):.2f}" if by_hand else "–")
        instructions = Cell(str(next((row["instructions"] for row in results.all(peer=FLOOR, **facts)), "–")))
        name = f"`{facts['function']}`, {facts['way']}, {facts['dtype']}"
        return Row(name, [ours], [nanoseconds(ours), nanoseconds(by_hand), ratio, instructions])

    def nanoseconds(slopes: list[float]) -> Cell:
        return Cell(f"{1e9 * median(slopes):.2f} ns ± {spread(slopes):.0%}", median(slopes)) if slopes else Cell("–")

    rows = results.all(work="floor", peer=OURS)
    cases = dict.fromkeys((row["function"], row["way"], row["dtype"]) for row in rows)
    head = ["in a cache, one thread", OURS, FLOOR, f"{OURS} / {FLOOR}", "instructions of the C"]
    names = ("work", "function", "way", "dtype")
    yield from steady_table(head, (row(dict(zip(names, ("floor", *case), strict=True))) for case in cases))
    if rows:
        compiled = [f"C by {row['compiler']}, for AVX2; " for row in results.all(work="floor", peer=FLOOR)[:1]]
        yield from prose(f"{''.join(compiled)}grpo_fast for {rows[0]['cpu']}. Measured on {machine(results)}")


# --- the table of README.md -------------------------------------------------------------------------------------------
def summary(results: Results) -> Iterator[str]:
    """Six rows, lost ones too: the main jobs beside who is best known."""
    peers = ["torch.compile", "Liger-Kernel", "JAX", "Numba loop", "torch eager", "NumPy", "Polars"]
    in_files = ["pandas + NumPy" if peer == "NumPy" else peer for peer in peers]  # who that is where a file is read
    loss = {"work": "loss", "level": "token", "kind": "full"}
    cases = {
        "`grpo_objective`, 20 M, float64": {"work": "objective", "n": 20_000_000, "dtype": "float64"},
        "`grpo_loss`, 16.8 M, float32": loss | {"n": LARGE, "dtype": "float32"},
        "`grpo_loss`, 16.8 M, float64": loss | {"n": LARGE, "dtype": "float64"},
        "`grpo_loss`, 4096, float32": loss | {"n": 4096, "dtype": "float32"},
        "torch operator, 16.8 M, half masked, float32": {"work": "torch", "n": LARGE},
        "`evaluate`, Parquet, 10.5 M, float64": {"work": "files", "n": 10 << 20},
    }

    def row(name: str, facts: Facts) -> Row:
        ours = results.times(peer=OURS, **facts)
        cells = peer_cells(results, in_files if facts["work"] == "files" else peers, facts)
        return Row(name, [ours], [time_cell(ours), *cells])

    measured = [row(name, facts) for name, facts in cases.items() if results.times(peer=OURS, **facts)]
    yield from steady_table(["", OURS, *peers], measured)
    if measured:
        yield from prose(machine(results))

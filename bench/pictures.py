"""The pictures of what was measured: bars of the largest batch, for README.md; and times over sizes."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from objective_peers import PEERS as OBJECTIVE_PEERS
from results import Results, duration, noisy
from speed_tables import IN_PLACE, OURS, READ, READ_AND_WRITE
from targets import VALUE

from grpo_fast._pictures import ACCENT, OTHERS, TEXT, picture

NOT_PEERS = (IN_PLACE, VALUE, READ_AND_WRITE)  # measured with the loss, but not another way to it and its gradient


class Bar(NamedTuple):
    """Who takes how long, and how many times longer than we; ours is 1."""

    peer: str
    seconds: float
    ratio: float

    def label(self) -> str:
        """What stands beside it."""
        times = f"{self.ratio:.1f}" if self.ratio < 9.95 else f"{self.ratio:.0f}"
        return duration(self.seconds) + ("" if self.peer == OURS else f", {times} × longer")


def largest_batch(results: Results) -> dict[str, Any] | None:
    """The facts of the largest unmasked batch at token level, in float32 unless that is noisy; None if all are."""
    for dtype in ("float32", "float64"):
        facts = {"work": "loss", "kind": "full", "level": "token", "dtype": dtype}
        facts["n"] = max(results.values("n", **facts), default=0)
        times = results.times(peer=OURS, **facts)
        if times and not noisy(times):
            return facts
    return None


def bars(results: Results, facts: dict[str, Any]) -> list[Bar]:
    """Of everyone who computes the loss and its gradient, the fastest first."""

    def found() -> Iterator[Bar]:
        for row in results.all(**facts):
            if row["peer"] not in NOT_PEERS:
                ratio = results.ratio(row["peer"], OURS, **facts)
                yield Bar(row["peer"], median(row["times"]), 1.0 if ratio is None else ratio)

    return sorted(found(), key=lambda bar: bar.ratio)


def draw_bars(results: Results, path: Path) -> bool:
    """Draw the bars, each with its label, and say whether there were any; if not, nothing is drawn.

    The scale is linear and begins at 0: twice as long is twice as long.
    """
    facts = largest_batch(results)
    if facts is None:
        return False
    found = bars(results, facts)
    with picture(str(path), 9, 0.7 + 0.3 * len(found)) as figure:
        threads = results.machine["threads"]
        title = f"Loss and gradient of {facts['n'] / 1e6:.3g} million tokens, {facts['dtype']}, {threads} threads"
        figure.suptitle(title, x=0.01, ha="left")
        axes = figure.subplots()
        colors = [ACCENT if bar.peer == OURS else OTHERS for bar in found]
        drawn = axes.barh([bar.peer for bar in found], [bar.seconds for bar in found], height=0.62, color=colors)
        labels = axes.bar_label(drawn, [bar.label() for bar in found], padding=5)
        for name, label, bar in zip(axes.get_yticklabels(), labels, found, strict=True):
            if bar.peer == OURS:
                name.set(color=ACCENT, fontweight="bold")
                label.set(color=ACCENT, fontweight="bold")
        axes.set_xlim(0, 1.3 * max(bar.seconds for bar in found))
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.tick_params(left=False)
        axes.grid(False)
        axes.spines[["bottom", "left"]].set_visible(False)
    return True


def draw_sizes(results: Results, path: Path) -> bool:
    """Draw the time per sample of every peer and of the roof, over the number of samples; False if there are none."""
    dtypes = results.values("dtype", work="objective")
    if not dtypes:
        return False
    with picture(str(path), 10, 4.8) as figure:
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for panel, dtype in zip(panels, dtypes, strict=True):
            for peer in [*OBJECTIVE_PEERS, READ]:
                found = results.all(work="objective", dtype=dtype, peer=peer)
                sizes = [row["n"] for row in found]
                per_sample = [1e9 * median(row["times"]) / row["n"] for row in found]
                style = {OURS: {"linewidth": 3.0}, READ: {"color": TEXT, "linestyle": "--"}}.get(peer, {})
                panel.loglog(sizes, per_sample, marker=".", label=peer, **style)
            panel.set(title=f"grpo_objective, {dtype}", xlabel="samples")
        panels[0].set_ylabel("ns per sample")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return True

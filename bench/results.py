"""What pytest-benchmark saved, how to ask it, and how it is spelled."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any


class Results:
    """What pytest-benchmark saved, found by the facts that the suites keep with it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        saved = [json.loads(path.read_text()) for path in paths]
        self.machine: dict[str, Any] = saved[0]["machine_info"]["grpo_fast"]
        benchmarks = [benchmark for part in saved for benchmark in part["benchmarks"]]
        self.rows: list[dict[str, Any]] = [b["extra_info"] | {"times": b["stats"]["data"]} for b in benchmarks]

    def all(self, **facts: Any) -> list[dict[str, Any]]:
        """The results with these facts."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in facts.items())]

    def values(self, fact: str, **facts: Any) -> list[Any]:
        """The different values of a fact among the results with other facts, in the order in which they were made."""
        return list(dict.fromkeys(row[fact] for row in self.all(**facts)))

    def times(self, **facts: Any) -> list[float]:
        """Seconds in each round; none if that was not measured."""
        return next((row["times"] for row in self.all(**facts)), [])

    def ratio(self, a: str, b: str, **facts: Any) -> float | None:
        """The median over the rounds of the time of one peer over another's."""
        pairs = zip(self.times(peer=a, **facts), self.times(peer=b, **facts), strict=False)
        ratios = [x / y for x, y in pairs]
        return median(ratios) if ratios else None


def spelled(seconds: Iterable[float]) -> str:
    """The median, in a unit that suits it, and half of the distance between the quartiles in percent of it."""
    data = list(seconds)
    if not data:
        return "–"
    middle = median(data)
    lower, _, upper = quantiles(data, n=4) if len(data) > 1 else (middle, middle, middle)
    unit, factor = next(x for x in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if middle * x[1] >= 1 or x[0] == "µs")
    return f"{middle * factor:.3g} {unit} ± {(upper - lower) / 2 / middle:.0%}"


def times_slower(ratio: float | None) -> str:
    """A ratio for a cell; bold where the peer is ahead."""
    if ratio is None:
        return "–"
    cell = f"{ratio:.3g}" if ratio < 100 else f"{ratio:.0f}"
    return f"**{cell}**" if ratio < 1 else cell

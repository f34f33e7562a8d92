"""What pytest-benchmark saved, how to ask it, and how it is spelled."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

NOISY = 0.2  # a time with a larger spread, as it is printed, is no result


class Results:
    """What pytest-benchmark saved, found by the facts that the suites keep with it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        saved = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
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

    def ratios(self, a: str, b: str, **facts: Any) -> list[float]:
        """The time of one peer over another's in each round; none if either was not measured."""
        return [x / y for x, y in zip(self.times(peer=a, **facts), self.times(peer=b, **facts), strict=False)]

    def ratio(self, a: str, b: str, **facts: Any) -> float | None:
        """The median of `ratios`; None if there are none."""
        ratios = self.ratios(a, b, **facts)
        return median(ratios) if ratios else None

    def slopes(self, **facts: Any) -> list[float]:
        """Seconds for each n more, from the smallest to the largest that was measured, in each round."""
        sizes = sorted(self.values("n", **facts))
        if len(sizes) < 2:
            return []
        few, many = (self.times(n=n, **facts) for n in (sizes[0], sizes[-1]))
        return [(b - a) / (sizes[-1] - sizes[0]) for a, b in zip(few, many, strict=False)]


def spread(seconds: Sequence[float]) -> float:
    """Half of the distance between the quartiles over the median."""
    if len(seconds) < 2:
        return 0.0
    lower, middle, upper = quantiles(seconds, n=4)
    return (upper - lower) / 2 / middle


def noisy(seconds: Sequence[float]) -> bool:
    """Whether times spread by more than `NOISY`, in whole percent."""
    return round(spread(seconds), 2) > NOISY


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    unit, factor = next(x for x in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * x[1] >= 1 or x[0] == "µs")
    return f"{seconds * factor:.3g} {unit}"


def times_longer(ratio: float) -> str:
    """A ratio, in three digits."""
    return f"{ratio:.3g}" if ratio < 100 else f"{ratio:.0f}"


class Cell(NamedTuple):
    """What stands in a cell, and the number by which it competes with others of its row for the least, if it does."""

    text: str
    number: float | None = None


def time_cell(seconds: Sequence[float], ratio: float = 1.0) -> Cell:
    """The median and the spread of a time, which competes by its ratio to our own; a dash if it was not measured."""
    return Cell(f"{duration(median(seconds))} ± {spread(seconds):.0%}", ratio) if seconds else Cell("–")


def ratio_cell(ratio: float | None) -> Cell:
    """A ratio to our own time; a dash if it was not measured."""
    return Cell("–") if ratio is None else Cell(times_longer(ratio), ratio)


def row_of(cells: Iterable[Cell]) -> list[str]:
    """The texts of a row's cells, of which those with the least number, if any compete, are bold."""
    cells = list(cells)
    least = min((cell.number for cell in cells if cell.number is not None), default=None)
    return [f"**{cell.text}**" if cell.number is not None and cell.number == least else cell.text for cell in cells]

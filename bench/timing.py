"""How the bench measures: who is there, interleaved rounds, and their times handed to pytest-benchmark.

pytest-benchmark times one function after the other, minutes apart; on a machine that others share, too, that compares
the neighbours. Here all peers of a case are timed in the same rounds, and what was measured is then played back to
pytest-benchmark on a clock of its own, which does the statistics, the comparison and the JSON. The n-th value of every
peer of a case is from the same round: ratios are taken round by round.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import pytest

from grpo_fast._measure import side_by_side

Call = Callable[[], Any]
Peer = TypeVar("Peer")

LARGE = 16 << 20  # bytes: those below are meant to be in a cache
COLD = 128 << 20  # bytes: four times the last-level cache of the machines that this was written on


def present(makers: Mapping[str, Callable[[], Peer]]) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be made here; and the others, each with the reason."""
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as reason:
            missing[name] = str(reason)
    return found, missing


def copies_of(arrays: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The arrays, and if they are large so many copies that a round finds none of them in a cache."""
    size = sum(x.nbytes for x in arrays)
    if size < LARGE:
        return [tuple(arrays)]
    return [tuple(arrays), *(tuple(x.copy() for x in arrays) for _ in range(-(-COLD // size) - 1))]


def rotating(calls: Iterable[Call], first: int) -> Call:
    """One call after the other, beginning with another one for each peer: none runs on what the last one has read."""
    calls = list(calls)
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls[first % len(calls) :] + calls[: first % len(calls)])
    return lambda: next(turns)()


class Replay:
    """A clock that stands still but while ``play`` moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


clock = Replay()  # pytest.mark.benchmark(timer=clock)


def skip_if_missing(name: str, missing: Mapping[str, str]) -> None:
    """Skip the test of a peer that cannot run here, and say why."""
    if name in missing:
        pytest.skip(f"{name} is missing: {missing[name]}")


def hand_over(benchmark: Any, times: Mapping[str, Sequence[float]], name: str, group: str, **facts: Any) -> None:
    """Give pytest-benchmark what was measured of one peer; ``facts`` go into the JSON beside it."""
    benchmark.group = group
    benchmark.extra_info.update(facts, peer=name)
    rounds = iter(times[name])
    benchmark.pedantic(lambda: clock.play(next(rounds)), rounds=len(times[name]))


def measure(calls: Mapping[str, Call], config: Any) -> dict[str, list[float]]:
    """Seconds of a call of each, over interleaved rounds: three for all, then more for those that take little of them.

    Without ``--benchmark-enable`` the three rounds are all.
    """
    times = side_by_side(calls, seconds=0.0)
    if config.getoption("benchmark_enable"):
        enough = 0.05 * config.getoption("seconds")
        short = {name: call for name, call in calls.items() if median(times[name]) < enough}
        more = side_by_side(short, seconds=config.getoption("seconds")) if short else {}
        for name, seconds in more.items():
            times[name] += seconds
    return times

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
from results import noisy, spread

from grpo_fast._measure import side_by_side

Call = Callable[[], Any]
Peer = TypeVar("Peer")

ATTEMPTS = 3  # at a measurement that is to be steady
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


def hand_over(
    benchmark: Any,
    times: Mapping[Any, Sequence[float]],
    name: Any,
    group: str,
    missing: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Give pytest-benchmark what was measured of one peer; ``facts`` go into the JSON beside it.

    So does who is ``missing`` and why: who reads the JSON knows of all peers of this very case whether they took part.
    """
    benchmark.group = group
    benchmark.extra_info.update(facts, peer=name, missing=dict(missing or {}))
    rounds = iter(times[name])
    benchmark.pedantic(lambda: clock.play(next(rounds)), rounds=len(times[name]))


def measure(calls: Mapping[Any, Call], config: Any, steady: Iterable[Any] = ()) -> dict[Any, list[float]]:
    """Seconds of a call of each, over interleaved rounds: three for all, then more for those that take little of them.

    Where the times of one that is to be ``steady`` (all, unless given) are noisy, all are measured again, up to two
    more times, and the measurement is kept in which the largest spread of these is the smallest. Under
    ``--benchmark-disable`` the three rounds are all.
    """
    steady = list(steady) or list(calls)

    def largest_spread(times: Mapping[Any, Sequence[float]]) -> float:
        return max(spread(times[name]) for name in steady)

    if config.getoption("benchmark_disable") and not config.getoption("benchmark_enable"):
        return side_by_side(calls, seconds=0.0)
    measured: list[dict[Any, list[float]]] = []
    while len(measured) < ATTEMPTS:
        measured.append(_measure_once(calls, config.getoption("seconds")))
        if not any(noisy(measured[-1][name]) for name in steady):
            break
    return min(measured, key=largest_spread)


def _measure_once(calls: Mapping[Any, Call], seconds: float) -> dict[Any, list[float]]:
    times = side_by_side(calls, seconds=0.0)
    short = {name: call for name, call in calls.items() if median(times[name]) < 0.05 * seconds}
    for name, more in (side_by_side(short, seconds=seconds) if short else {}).items():
        times[name] += more
    return times

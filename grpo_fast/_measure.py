"""Time functions side by side, and the roof they are measured against: reading the same arrays and nothing else."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._kernels import roof, threads
from ._kernels.tasks import perform


def read(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any], d: NDArray[Any]) -> float:
    """The sum of four arrays of one dtype and length: to be timed, as a call that reads them and does nothing else.

    It uses all threads when they are large, as `grpo_objective` does.
    """
    with threads.tasks(a.size) as tasks:
        sums = np.zeros(tasks)
        perform(roof.read, (a, b, c, d, sums), tasks)
    return float(sums.sum())


def side_by_side(functions: Mapping[str, Callable[[], Any]], seconds: float = 3.0) -> dict[str, list[float]]:
    """The seconds that one call of each function took, round by round: a list for each, of the same length.

    The rounds are interleaved, so that what disturbs the machine disturbs all functions alike. Each function is called
    twice before, which is not counted: once to warm up, once to see how often to repeat it within a round, where a
    call is too short to time. There are at least three rounds, then as many as fit into about ``seconds``.
    """
    repeats = {}
    for name, call in functions.items():
        call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, round(2e-4 / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or min(map(len, times.values())) < 3:
        for name, call in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def median_ratio(times: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """The median over the rounds of one function's time over another's."""
    return median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))

"""What `rollout` adds up, by name: from the records of blocks, through a sequence, to one accumulator for each task."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import exact
from .compiling import compiled, inlined


class RolloutSums(NamedTuple):
    """Sums over tokens, or over the sequences that have some: float64 of a sequence, `Exact` of a batch."""

    weight: Any  # as returned, but for the normalisation
    weight_squared: Any
    weight_of_sequence: Any  # a sequence's mean weight
    raw: Any  # the weight before it is bounded: of tokens, or at another level of sequences
    log_ratio: Any
    k3: Any
    ratio_squared: Any
    ratio_squared_of_sequence: Any  # of the product of its ratios
    prob_diff: Any  # |π_old − π_rollout|
    train_ppl: Any
    rollout_ppl: Any
    ppl_ratio: Any


class RolloutCounts(NamedTuple):
    """Counts of tokens and sequences, but for that of all tokens, which `begin_sequence` counts."""

    filled: Any  # sequences that have some
    known: Any  # sequences that have some whose rollout log-probability is there
    missing: Any  # tokens
    low: Any  # raw weights below the lower bound: of tokens, or at another level of sequences
    high: Any  # above the upper one
    rejected_tokens: Any
    rejected_sequences: Any  # of which nothing is kept
    suspect: Any  # blocks in which something is perhaps not finite


class RolloutExtremes(NamedTuple):
    """The least and the largest weight; and before they are bounded."""

    least: float
    largest: float
    least_raw: float
    largest_raw: float


class RolloutTotals(NamedTuple):
    """All of them, of a batch."""

    sums: RolloutSums  # of Exact
    counts: RolloutCounts
    extremes: RolloutExtremes
    tokens: int  # unmasked ones


_ACCUMULATOR = np.dtype(
    [
        ("sums", np.int64, (len(RolloutSums._fields), exact.ROW)),
        ("tokens", np.int64),
        ("counts", np.int64, len(RolloutCounts._fields)),
        ("extremes", np.float64, len(RolloutExtremes._fields)),
    ]
)
_NOTHING = RolloutExtremes(np.inf, -np.inf, np.inf, -np.inf)


@cache
def _fresh(tasks: int) -> bytes:
    result = np.zeros(tasks, _ACCUMULATOR)
    result["extremes"] = _NOTHING
    return result.tobytes()


def empty_accumulators(tasks: int) -> np.ndarray:
    """New accumulators, (tasks,)."""
    return np.frombuffer(bytearray(_fresh(tasks)), _ACCUMULATOR)


@inlined
def accumulate(accumulator: Any, sums: Any, counts: Any, extremes: Any) -> None:
    """Add what a sequence contributes."""
    for i in range(len(sums)):
        exact.add(accumulator.sums[i], sums[i])
    for i in range(len(counts)):
        accumulator.counts[i] += counts[i]
    for i in (0, 2):
        accumulator.extremes[i] = min(accumulator.extremes[i], extremes[i])
        accumulator.extremes[i + 1] = max(accumulator.extremes[i + 1], extremes[i + 1])


def merged(accumulators: np.ndarray) -> RolloutTotals:
    """The totals of all accumulators, of which the first is written to."""
    _merge(accumulators)
    total = accumulators[0]
    return RolloutTotals(
        RolloutSums(*exact.Exact.of_limbs(total["sums"])),
        RolloutCounts(*total["counts"].tolist()),
        RolloutExtremes(*total["extremes"].tolist()),
        int(total["tokens"]),
    )


@compiled
def _merge(accumulators: Any) -> None:
    total = accumulators[0]
    for t in range(1, len(accumulators)):
        other = accumulators[t]
        total.tokens += other.tokens
        for i in range(len(total.sums)):
            exact.join(total.sums[i], other.sums[i])
        for i in range(len(total.counts)):
            total.counts[i] += other.counts[i]
        for i in (0, 2):
            total.extremes[i] = min(total.extremes[i], other.extremes[i])
            total.extremes[i + 1] = max(total.extremes[i + 1], other.extremes[i + 1])
    for i in range(len(total.sums)):
        exact.carry(total.sums[i])

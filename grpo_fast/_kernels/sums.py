"""What kernels add up, by name: from the sums of a block, through one accumulator for each task, to `stats.Stats`.

The order of these sums is that of the fields of `Sums` and `Numerator`, here and nowhere else. (A sweep, which has a
policy term for each of many bounds, has accumulators of its own, in `sweep_blocks`.)
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import exact
from .compiling import compiled, inlined
from .float_mode import begin_ordinary_floats, end_ordinary_floats


class Sums(NamedTuple):
    """Sums over tokens or samples: float64 of a block, `Exact` of a batch."""

    surrogate: Any  # the policy term, with the rollout weight
    kl: Any  # the KL term as penalised, without β
    ratio: Any  # ρ
    ratio_squared: Any
    log_ratio: Any


class Numerator(NamedTuple):
    """Sums that, over the aggregation's denominator, make the objective, where those of `Sums` do not.

    That is with `Options.mean_within`, and with loss weights; otherwise nothing is added to them.
    """

    surrogate: Any
    kl: Any


class Clipped(NamedTuple):
    """Counts of clipped tokens, in lanes, a block or a batch: below, above, beyond the hard bound (δ, or CISPO's).

    And of those that the trust region drops.
    """

    low: Any
    high: Any
    hard: Any
    dropped: Any


class Contribution(NamedTuple):
    """What a block, or a sequence as a whole, adds."""

    sums: Sums
    clipped: Clipped
    suspect: Any  # whether, or how many blocks have, an illegal sample, or a token's number that is perhaps not finite
    least_ratio: float
    largest_ratio: float


class Totals(NamedTuple):
    """All contributions, added up."""

    limbs: Any  # of exact sums: a record with those of `Sums` and of `Numerator`; None once they are numbers
    clipped_low: int
    clipped_high: int
    clipped_hard: int
    dropped: int
    suspect: int  # blocks
    tokens: int  # unmasked ones, or samples
    least_ratio: float
    largest_ratio: float
    surrogate_numerator: float  # of the objective, rounded once
    kl_numerator: float
    numerator_apart: bool  # whether the limbs of `Numerator` hold it, and not those of `Sums`


_SURROGATE, _KL = map(Numerator._fields.index, ("surrogate", "kl"))
assert Sums._fields[: len(Numerator._fields)] == Numerator._fields

#: One task's accumulator: limbs of exact sums, and the fields of `Totals`, but for the last three.
_ACCUMULATOR = np.dtype(
    [
        ("sums", np.int64, (len(Sums._fields), exact.ROW)),
        ("numerator", np.int64, (len(Numerator._fields), exact.ROW)),
        *[
            (name, np.float64 if kind is float else np.int64)
            for name, kind in list(Totals.__annotations__.items())[1:-3]
        ],
    ]
)


@cache
def _fresh_accumulators(tasks: int) -> bytes:
    result = np.zeros(tasks, _ACCUMULATOR)
    result["least_ratio"], result["largest_ratio"] = np.inf, -np.inf
    return result.tobytes()


def empty_accumulators(tasks: int) -> np.ndarray:
    """New accumulators, (tasks,).

    Of a copy of their bytes, which takes a third of the time that setting their fields does.
    """
    return np.frombuffer(bytearray(_fresh_accumulators(tasks)), _ACCUMULATOR)


@inlined
def accumulate(accumulator: Any, contribution: Any) -> None:
    """Add what a block or a sequence contributes, but for its part of the numerator and its tokens."""
    for i in range(len(contribution.sums)):
        exact.add(accumulator.sums[i], contribution.sums[i])
    accumulator.clipped_low += contribution.clipped.low
    accumulator.clipped_high += contribution.clipped.high
    accumulator.clipped_hard += contribution.clipped.hard
    accumulator.dropped += contribution.clipped.dropped
    accumulator.suspect += contribution.suspect
    accumulator.least_ratio = min(accumulator.least_ratio, contribution.least_ratio)
    accumulator.largest_ratio = max(accumulator.largest_ratio, contribution.largest_ratio)


@inlined
def accumulate_numerator(accumulator: Any, numerator: Any) -> None:
    """Add a block's or a sequence's part of the numerator."""
    for i in range(len(numerator)):
        exact.add(accumulator.numerator[i], numerator[i])


def merged(accumulators: np.ndarray, numerator_apart: bool = False) -> Totals:
    """The totals of all accumulators, of which the first is written to; limbs are in the form that `Exact` reads."""
    found = _merge(accumulators, numerator_apart)
    # Of many tasks' only the first: who keeps Stats keeps their limbs.
    limbs = accumulators if len(accumulators) == 1 else accumulators[:1].copy()
    return Totals(*(limbs, *found, numerator_apart))


@compiled
def _merge(accumulators: Any, numerator_apart: bool) -> Any:
    """Add all accumulators to the first; return what `Totals` has between the first and the last, in that order."""
    host_mode = begin_ordinary_floats()
    total = accumulators[0]
    for t in range(1, len(accumulators)):
        other = accumulators[t]
        total.clipped_low += other.clipped_low
        total.clipped_high += other.clipped_high
        total.clipped_hard += other.clipped_hard
        total.dropped += other.dropped
        total.suspect += other.suspect
        total.tokens += other.tokens
        total.least_ratio = min(total.least_ratio, other.least_ratio)
        total.largest_ratio = max(total.largest_ratio, other.largest_ratio)
        for i in range(len(total.sums)):
            exact.join(total.sums[i], other.sums[i])
        for i in range(len(total.numerator)):
            exact.join(total.numerator[i], other.numerator[i])
    for i in range(len(total.sums)):
        exact.carry(total.sums[i])
    for i in range(len(total.numerator)):
        exact.carry(total.numerator[i])
    # Both begin with the same two.
    surrogate = exact.rounded(total.numerator[_SURROGATE] if numerator_apart else total.sums[_SURROGATE])
    kl = exact.rounded(total.numerator[_KL] if numerator_apart else total.sums[_KL])
    end_ordinary_floats(host_mode)
    return (
        total.clipped_low,
        total.clipped_high,
        total.clipped_hard,
        total.dropped,
        total.suspect,
        total.tokens,
        total.least_ratio,
        total.largest_ratio,
        surrogate,
        kl,
    )

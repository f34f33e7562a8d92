"""A batch of tokens as the kernels of the loss see it: its arrays, how they are read, where the results go.

A sequence is trimmed to its first … last unmasked token and cut from there into blocks of `BLOCK` tokens. The sums of
blocks and sequences are added exactly, so a sequence adds the same bits in whichever batch, padding or packing it
stands, on any number of threads. `token_level` and `sequence_level` are two ways to compute them.
"""

from typing import Any, NamedTuple

from . import exact
from .blocks import RUN, ask_ahead
from .compiling import inlined
from .formulas import times
from .simd import (
    WIDTH,
    beyond,
    bits,
    count_flags,
    from_bits,
    full_like,
    lanes,
    load,
    load_first,
    load_first_zeros,
    load_zeros,
    store,
    store_first,
)

# Rows of the exact sums; the last two, of the sums of each sequence over its own tokens.
SURROGATE, KL, RATIO, RATIO_SQUARED, LOG_RATIO, SURROGATE_MEAN, KL_MEAN, SUMS = range(8)
# Columns of the counts: clipped tokens; where something was not finite; unmasked tokens.
LOW, HIGH, BEYOND, DOUBTFUL, TOKENS, COUNTS = range(6)


class Batch(NamedTuple):
    """The arrays of N tokens in S sequences. What may be None selects the kernel; so does each option's class."""

    logps: Any
    old: Any  # or None: on-policy
    advantages: Any  # N, or S
    ref: Any  # or None
    mask: Any  # bytes, or None
    weights: Any  # N, or S, or None
    bounds: Any  # S + 1
    advantages_per_token: bool
    weights_per_token: bool


class Objective(NamedTuple):
    """What is computed of them."""

    surrogate: Any
    kl: Any  # or None
    denominator: float
    mean_within: bool  # whether a sequence's sum is also divided by the number of its tokens


class Found(NamedTuple):
    """The sums over the tokens of a block or a sequence."""

    sums: tuple[float, ...]  # the first rows, to LOG_RATIO
    counts: tuple[int, ...]
    least_ratio: float
    largest_ratio: float


class Result(NamedTuple):
    """Where they are added, of one task."""

    rows: Any  # SUMS, exact.ROW
    counts: Any  # COUNTS
    extremes: Any  # least and largest ρ


@inlined
def weight_of_token(objective, tokens):
    """c_i, the weight that the aggregation gives each token of a sequence."""
    if objective.mean_within:
        return 1.0 / (objective.denominator * tokens)
    return 1.0 / objective.denominator


@inlined
def add(result, objective, tokens, found):
    """Add what was found in a block, or in all of a sequence, of a sequence that has so many tokens."""
    for row in range(len(found.sums)):
        exact.add(result.rows[row], found.sums[row])
    if objective.mean_within:
        exact.add(result.rows[SURROGATE_MEAN], found.sums[SURROGATE] / tokens)
        exact.add(result.rows[KL_MEAN], found.sums[KL] / tokens)
    for column in range(len(found.counts)):
        result.counts[column] += found.counts[column]
    result.extremes[0] = min(result.extremes[0], found.least_ratio)
    result.extremes[1] = max(result.extremes[1], found.largest_ratio)


# --- reading ----------------------------------------------------------------------------------------------------------
@inlined
def take(array, i, whole):
    """One vector from i on; nothing beyond the array is read, which is asked for unless it is ``whole``."""
    if whole:
        return load(array, i)
    return load_first(array, i, len(array) - i, 0.0)


@inlined
def take_for(array, per_token, sequence, i, whole, like):
    """The values of one vector of tokens, of an array that has one for each token or one for each sequence."""
    if per_token:
        return take(array, i, whole)
    return full_like(like, array[sequence])


@inlined
def take_absent(mask, i, stop, whole, like):
    """Which tokens of a vector do not count: masked, or beyond the block; as integers with all bits set there."""
    absent = beyond(like, stop - i)
    if mask is None:
        return absent
    if whole:
        return absent | load_zeros(mask, i, like)
    return absent | load_first_zeros(mask, i, len(mask) - i, like)


@inlined
def take_log_ratio(logp, old, i, whole):
    """log π_θ − log π_old of one vector of tokens."""
    if old is None:
        return logp - logp  # 0, unless the input is not finite
    return logp - take(old, i, whole)


@inlined
def ask_ahead_for(array, run, v):
    """`ask_ahead`, where there is an array."""
    if array is not None:
        ask_ahead(array, run, v)


@inlined
def without(x, absent):
    """x, and 0 where it is absent, whatever it is."""
    return from_bits(bits(x) & ~absent)


@inlined
def vectors(array, run, stop):
    """How many vectors of the run that begins at ``run`` hold tokens."""
    return min(RUN, (stop - run + lanes(array) - 1) // lanes(array))


@inlined
def take_weight(weights, per_token, sequence, i, whole, absent):
    """The rollout weights of one vector of tokens, or None."""
    if weights is None:
        return None
    return without(take_for(weights, per_token, sequence, i, whole, from_bits(absent)), absent)


@inlined
def weighed(w, x):
    """w·x, where there is a w."""
    if w is None:
        return x
    return times(w, x)


@inlined
def plus(x, w):
    """x + w, where there is a w."""
    if w is None:
        return x
    return x + w


@inlined
def extent(mask, start, stop):
    """The first unmasked token from ``start`` to ``stop``, the place after the last, and how many there are."""
    if mask is None:
        return start, stop, stop - start
    while start + WIDTH <= stop and count_flags(mask, start) == 0:
        start += WIDTH
    while start < stop and mask[start] == 0:
        start += 1
    while start + WIDTH <= stop and count_flags(mask, stop - WIDTH) == 0:
        stop -= WIDTH
    while start < stop and mask[stop - 1] == 0:
        stop -= 1
    tokens = 0
    i = start
    while i + WIDTH <= stop:
        tokens += count_flags(mask, i)
        i += WIDTH
    while i < stop:
        tokens += mask[i] != 0
        i += 1
    return start, stop, tokens


# --- writing ----------------------------------------------------------------------------------------------------------
@inlined
def write(grad, i, stop, values):
    """Put a vector into the gradient, and nothing into the next sequence's."""
    if i + lanes(grad) <= stop:
        store(grad, i, values)
    else:
        store_first(grad, i, stop - i, values)


@inlined
def clear(grad, start, stop):
    """Write zeros, if there is a place for them."""
    if grad is not None:
        for i in range(start, stop):
            grad[i] = 0.0

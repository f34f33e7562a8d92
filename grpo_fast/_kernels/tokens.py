"""A batch of tokens as the kernels of the loss see it: its arrays, how they are read, and the gradient written.

A sequence is trimmed to its first … last unmasked token and cut from there into blocks of `BLOCK` tokens. The sums of
blocks and sequences are added exactly, so a sequence adds the same bits in whichever batch, padding or packing it
stands, on any number of threads. `token_level` and `sequence_level` are two ways to compute them.
"""

from math import nan
from typing import Any, NamedTuple

from .compiling import compiled, inlined
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
    where,
)


class Batch(NamedTuple):
    """The arrays of N tokens in S sequences. What may be None selects the kernel; so does each option's class."""

    logps: Any
    old_logps: Any  # or None: on-policy
    advantages: Any  # N, or S
    ref_logps: Any  # or None
    mask: Any  # bytes, or None
    weights: Any  # N, or S, or None
    grad: Any  # where ∂loss/∂logps goes, or None
    bounds: Any  # S + 1
    advantages_per_token: bool
    weights_per_token: bool


class LossTerms(NamedTuple):
    """What is computed of them: the terms of the loss, and how they are weighed."""

    surrogate: Any
    kl: Any  # or None
    denominator: float  # NaN without a gradient: nothing else depends on it here
    mean_within: bool  # whether a sequence's sum is also divided by the number of its tokens


@inlined
def weight_of_token(terms, tokens):
    """c_i, the weight that the aggregation gives each token of a sequence of so many."""
    if terms.mean_within:
        return 1.0 / (terms.denominator * tokens)
    return 1.0 / terms.denominator


# --- a sequence -------------------------------------------------------------------------------------------------------
class Extent(NamedTuple):
    """From the first unmasked token of a sequence to the place after the last, and how many unmasked ones there are."""

    start: int
    stop: int
    tokens: int


@inlined
def begin_sequence(mask, grad, first, last, accumulator):
    """Clear the gradient outside the extent of a sequence, count its tokens into the accumulator, return the extent.

    The sequence is from ``first`` to ``last``; it is done where it has no unmasked token.
    """
    extent = _extent(mask, first, last)
    _clear(grad, first, extent.start)
    _clear(grad, extent.stop, last)
    accumulator.tokens += extent.tokens
    return extent


@compiled
def begin_long_sequence(mask, grad, first, last, accumulators):
    """As `begin_sequence`, for the first of the accumulators and a caller in Python: the `Extent` as a plain tuple."""
    extent = begin_sequence(mask, grad, first, last, accumulators[0])
    return extent.start, extent.stop, extent.tokens


@inlined
def _extent(mask, start, stop):
    if mask is None:
        return Extent(start, stop, stop - start)
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
    return Extent(start, stop, tokens)


@inlined
def _clear(grad, start, stop):
    if grad is not None:
        for i in range(start, stop):
            grad[i] = 0.0


# --- a vector of tokens -----------------------------------------------------------------------------------------------
# ``whole`` is whether the vector lies within the arrays as a whole; of another, nothing beyond them is read.
@inlined
def load_tokens(array, i, whole):
    """The values of the tokens from number i on, of an array that has one for each token."""
    if whole:
        return load(array, i)
    return load_first(array, i, len(array) - i, 0.0)


@inlined
def load_values(array, per_token, sequence, i, whole, like):
    """The values of the tokens from number i on, of an array that has one for each token or one for each sequence."""
    if per_token:
        return load_tokens(array, i, whole)
    return full_like(like, array[sequence])


@inlined
def absent_lanes(mask, i, stop, whole, like):
    """Integers with all bits set in the lanes of no token that counts: a masked one, or one from ``stop`` on."""
    absent = beyond(like, stop - i)
    if mask is None:
        return absent
    if whole:
        return absent | load_zeros(mask, i, like)
    return absent | load_first_zeros(mask, i, len(mask) - i, like)


@inlined
def zero_where(absent, x):
    """0 in the absent lanes, whatever x is there, and x in the others."""
    return from_bits(bits(x) & ~absent)


@inlined
def load_log_ratio(logp, old_logps, i, whole):
    """log π_θ − log π_old of the tokens from number i on, whose log π_θ is ``logp``."""
    if old_logps is None:
        return logp - logp  # 0, unless the input is not finite
    return logp - load_tokens(old_logps, i, whole)


@inlined
def load_distance(logp, ref_logps, absent, i, whole):
    """l of the tokens from number i on, whose log π_θ is ``logp``; 0 in absent lanes, and without a reference."""
    if ref_logps is None:
        return from_bits(absent ^ absent)
    return zero_where(absent, logp - load_tokens(ref_logps, i, whole))


@inlined
def load_weights(weights, per_token, sequence, i, whole, absent):
    """The rollout weights of the tokens from number i on, 0 in absent lanes; None if there are none."""
    if weights is None:
        return None
    return zero_where(absent, load_values(weights, per_token, sequence, i, whole, from_bits(absent)))


@inlined
def times_if_given(w, x):
    """w·x with 0·∞ = 0; x if w is None."""
    if w is None:
        return x
    return times(w, x)


@inlined
def plus_if_given(x, w):
    """x + w; x if w is None."""
    if w is None:
        return x
    return x + w


@inlined
def larger_magnitude(x, size):
    """|x| where that is larger than ``size``, which else stays."""
    magnitude = where(x < 0.0, -x, x)
    return where(magnitude > size, magnitude, size)


@inlined
def store_gradient(grad, i, stop, values):
    """Write a vector of the gradient from number i on, if there is a place for it.

    Nothing is written from ``stop`` on: that is the next sequence's. A NaN, of ∞ − ∞, is written as the one that NumPy
    calls nan: its sign would be the processor's.
    """
    if grad is not None:
        values = where(values == values, values, full_like(values, nan))
        if i + lanes(grad) <= stop:
            store(grad, i, values)
        else:
            store_first(grad, i, stop - i, values)

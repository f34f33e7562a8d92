"""A batch of tokens as the kernels of the loss see it: its arrays, how they are read, and the gradient written.

A sequence is trimmed to its first … last unmasked token and cut from there into blocks of `BLOCK` tokens. The sums of
blocks and sequences are added exactly, so a sequence adds the same bits in whichever batch, padding or packing it
stands, on any number of threads. `token_level` and `sequence_level` are two ways to compute them.
"""

from math import nan
from typing import Any, NamedTuple

import numpy as np

from .blocks import prefetch_ahead
from .compiling import compiled, inlined, inlined_or_none, subroutine
from .simd import (
    WIDTH,
    abs_of,
    bits,
    count_flags,
    from_bits,
    full,
    full_like,
    lanes,
    load,
    load_first,
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
    weighting: Any  # of the KL term: one of `formulas.WEIGHTINGS`
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


# --- where a run is read and its gradient written ---------------------------------------------------------------------
class Stream(NamedTuple):
    """Vectors of an array, ``step`` elements apart, from element ``at`` on."""

    array: Any
    at: int
    step: int


class Tokens(NamedTuple):
    """The vectors of a run, as streams. What is one for all its tokens has a step of 0: a branch would cost more."""

    logps: Any
    old_logps: Any  # or None
    advantages: Any
    ref_logps: Any  # or None
    mask: Any  # or None: all count
    weights: Any  # or None
    grad: Any  # or None


class Scratch(NamedTuple):
    """Room for what a block needs in the L1 cache."""

    vectors: Any  # of the dtype that computes
    flags: Any  # bytes


# Vectors of the scratch array: one of each array, for the ragged end of a sequence; what is one for the sequence, in
# each lane. After them, there is room for what a level needs.
_LOGPS, _OLD, _ADVANTAGES, _REF, _WEIGHTS, _GRAD, _ADVANTAGE_OF_SEQUENCE, _WEIGHT_OF_SEQUENCE, FREE_VECTORS = range(9)
# Bytes of the flags: those of the mask at a ragged end; as many ones.
_RAGGED, _ONES = 0, WIDTH


@subroutine
def scratch_for(logps, rows):
    """New `Scratch` for blocks of a batch with these log-probabilities, as a plain tuple: with so many vectors more."""
    vectors = np.empty((FREE_VECTORS + rows) * lanes(logps), logps.dtype)
    return vectors, np.ones(2 * WIDTH, np.uint8)


@inlined
def begin_block(batch, sequence, scratch):
    """Put what is one for the sequence into the scratch arrays, for the `Tokens` of a block of it."""
    _fill(batch.advantages, batch.advantages_per_token, sequence, scratch.vectors, _ADVANTAGE_OF_SEQUENCE)
    _fill(batch.weights, batch.weights_per_token, sequence, scratch.vectors, _WEIGHT_OF_SEQUENCE)


@inlined
def _fill(array, per_token, sequence, vectors, number):
    if array is None:
        return
    if not per_token:
        store(vectors, number * lanes(vectors), full(vectors, array[sequence]))


@inlined
def tokens_of(batch, mask, i, scratch):
    """The `Tokens` from token number i on, of whole vectors where they lie, with that stream for the mask."""
    vectors = scratch.vectors
    return Tokens(
        Stream(batch.logps, i, lanes(vectors)),
        _stream(batch.old_logps, True, i, vectors, 0),
        _stream(batch.advantages, batch.advantages_per_token, i, vectors, _ADVANTAGE_OF_SEQUENCE),
        _stream(batch.ref_logps, True, i, vectors, 0),
        mask,
        _stream(batch.weights, batch.weights_per_token, i, vectors, _WEIGHT_OF_SEQUENCE),
        _stream(batch.grad, True, i, vectors, 0),
    )


@inlined_or_none
def _stream(array, per_token, i, vectors, number):
    if per_token:
        return Stream(array, i, lanes(vectors))
    return Stream(vectors, number * lanes(vectors), 0)


@inlined_or_none
def mask_of(mask, i, scratch):
    """The stream of a batch's mask from token number i on; None if there is none."""
    return Stream(mask, i, lanes(scratch.vectors))


@inlined
def mask_or_ones(mask, i, scratch):
    """The stream of a batch's mask from token number i on; of ones if there is none."""
    if mask is None:
        return Stream(scratch.flags, _ONES, 0)
    return Stream(mask, i, lanes(scratch.vectors))


@inlined
def ragged(tokens, count, scratch):
    """The first ``count`` tokens of a vector, as one that is copied into the scratch arrays and masked beyond them.

    Nothing beyond them is read. The gradient is written there, too; `deliver_ragged` copies it.
    """
    vectors = scratch.vectors
    for lane in range(lanes(vectors)):
        scratch.flags[_RAGGED + lane] = 0
    for lane in range(count):
        scratch.flags[_RAGGED + lane] = tokens.mask.array[tokens.mask.at + lane]
    return Tokens(
        _copied(tokens.logps, count, vectors, _LOGPS),
        _copied(tokens.old_logps, count, vectors, _OLD),
        _copied(tokens.advantages, count, vectors, _ADVANTAGES),
        _copied(tokens.ref_logps, count, vectors, _REF),
        Stream(scratch.flags, _RAGGED, 0),
        _copied(tokens.weights, count, vectors, _WEIGHTS),
        _copied(tokens.grad, count, vectors, _GRAD),
    )


@inlined_or_none
def _copied(stream, count, vectors, number):
    store(vectors, number * lanes(vectors), load_first(stream.array, stream.at, count, 0.0))
    return Stream(vectors, number * lanes(vectors), 0)


@inlined
def deliver_ragged(grad, i, count, scratch):
    """Copy the gradient of `ragged` tokens to where that of token number i belongs, if there is a place for it."""
    if grad is not None:
        store_first(grad, i, count, load(scratch.vectors, _GRAD * lanes(scratch.vectors)))


# --- a vector of tokens -----------------------------------------------------------------------------------------------
@inlined
def load_vector(stream, v):
    """Vector number ``v`` of a stream."""
    return load(stream.array, stream.at + v * stream.step)


@inlined_or_none
def absent_lanes(mask, v, like):
    """Integers with all bits set in the lanes of masked tokens of vector number ``v``; None if there is no mask."""
    return load_zeros(mask.array, mask.at + v * mask.step, like)


@inlined
def zero_where(absent, x):
    """0 in the absent lanes, whatever x is there, and x in the others; None is none absent."""
    if absent is None:
        return x
    return from_bits(bits(x) & ~absent)


@inlined
def nan_where(absent, x):
    """NaN in the absent lanes, for which no comparison holds, and x in the others; None is none absent."""
    if absent is None:
        return x
    return from_bits(bits(x) | absent)


@inlined
def load_log_ratio(logp, old_logps, v):
    """log π_θ − log π_old of vector number ``v``, whose log π_θ is ``logp``."""
    if old_logps is None:
        return logp - logp  # 0, unless the input is not finite
    return logp - load_vector(old_logps, v)


@inlined
def load_distance(logp, ref_logps, v):
    """l of vector number ``v``, whose log π_θ is ``logp``; 0 without a reference."""
    if ref_logps is None:
        return full_like(logp, 0.0)
    return logp - load_vector(ref_logps, v)


@inlined_or_none
def load_weights(weights, absent, v):
    """The rollout weights of vector number ``v``, 0 in absent lanes; None if there are none."""
    return zero_where(absent, load_vector(weights, v))


@inlined
def plus_if_given(x, w):
    """x + w; x if w is None."""
    if w is None:
        return x
    return x + w


@inlined
def larger_magnitude(x, size):
    """|x| where that is larger than ``size``, which else stays."""
    magnitude = abs_of(x)
    return where(magnitude > size, magnitude, size)


@inlined
def store_gradient(grad, v, values):
    """Write vector number ``v`` of the gradient, if there is a place for it."""
    if grad is not None:
        store(grad.array, grad.at + v * grad.step, values)


@inlined
def one_nan(values):
    """The values, but a NaN, of ∞ − ∞, as the one that NumPy calls nan: its sign would be the processor's."""
    return where(values == values, values, full_like(values, nan))


@inlined
def make_one_nan(grad, vectors):
    """`one_nan` of so many vectors of the gradient, where they are, if there is a place for it."""
    if grad is not None:
        for v in range(vectors):
            store_gradient(grad, v, one_nan(load_vector(grad, v)))


@inlined
def prefetch_vector(stream, v):
    """`prefetch_ahead` of vector number ``v`` of a stream; nothing if there is none."""
    if stream is not None:
        prefetch_ahead(stream.array, stream.at, v)

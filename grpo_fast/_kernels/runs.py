"""A run of tokens: where its vectors are read, masked, and their gradient written.

Vectors of the ragged end of a block, and what is one for a whole sequence, are read from a scratch array: so the loop
over a run has no branch, for which it would lose its constants from the registers. (Some of these functions return
arrays that they were given: only callers compiled without reference counts, ``allocates=False``, may use them.)
"""

from math import nan
from typing import Any, NamedTuple

import numpy as np

from .blocks import prefetch_ahead
from .compiling import inlined, inlined_or_none, subroutine
from .simd import (
    WIDTH,
    abs_of,
    beyond,
    bits,
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
    loss_weights: Any  # or None
    grad: Any  # or None


class Scratch(NamedTuple):
    """Room for what a block needs in the L1 cache."""

    vectors: Any  # of the dtype that computes
    flags: Any  # bytes


# Vectors of the scratch array. First one of each array, for the ragged end of a block: what fills no vector there is
# copied, so that no loop has to look where an array ends. Then what is one for the sequence, in each lane; and room
# for what a level needs.
_LOGPS, _OLD, _REF, _GRAD, _ADVANTAGES, _WEIGHTS, _LOSS_WEIGHTS, _FIRST_OF_SEQUENCE = range(8)
_OF_SEQUENCE = _FIRST_OF_SEQUENCE - _ADVANTAGES  # from a vector of the ragged end to that of the sequence
TAKEN_VECTORS = _FIRST_OF_SEQUENCE + 3
# Bytes of the flags: those of the mask at the ragged end; as many ones.
_RAGGED, _ONES = 0, WIDTH


@subroutine
def scratch_for(logps, more):
    """New `Scratch` for blocks of a batch with these log-probabilities, as a plain tuple: with so many vectors more."""
    vectors = np.empty((TAKEN_VECTORS + more) * lanes(logps), logps.dtype)
    return vectors, np.ones(2 * WIDTH, np.uint8)


@inlined
def begin_block(batch, sequence, start, stop, scratch):
    """Put what is one for the sequence, and the ragged end of a block of it, into the scratch arrays."""
    vectors = scratch.vectors
    _fill(batch.advantages, batch.advantages_per_token, sequence, vectors, _ADVANTAGES + _OF_SEQUENCE)
    _fill(batch.weights, batch.weights_per_token, sequence, vectors, _WEIGHTS + _OF_SEQUENCE)
    _fill(batch.loss_weights, batch.loss_weights_per_token, sequence, vectors, _LOSS_WEIGHTS + _OF_SEQUENCE)
    count = (stop - start) % lanes(vectors)
    if count > 0:
        # Lanes beyond the end hold one and the same log-probability of all policies, and A, w and u of 0: so there
        # log ρ, l and the policy term are 0, and ρ is 1 (`within_end`).
        i = stop - count
        logp = batch.logps[i]
        _copy(batch.logps, True, i, count, logp, vectors, _LOGPS)
        _copy(batch.old_logps, True, i, count, logp, vectors, _OLD)
        _copy(batch.ref_logps, True, i, count, logp, vectors, _REF)
        _copy(batch.advantages, batch.advantages_per_token, i, count, 0.0, vectors, _ADVANTAGES)
        _copy(batch.weights, batch.weights_per_token, i, count, 0.0, vectors, _WEIGHTS)
        _copy(batch.loss_weights, batch.loss_weights_per_token, i, count, 0.0, vectors, _LOSS_WEIGHTS)
        _copy_flags(batch.mask, i, count, scratch)


@inlined
def _fill(array, per_token, sequence, vectors, number):
    if array is None:
        return
    if not per_token:
        store(vectors, number * lanes(vectors), full(vectors, array[sequence]))


@inlined
def _copy(array, per_token, i, count, fill, vectors, number):
    if array is None:
        return
    step = lanes(vectors)
    if per_token:
        store(vectors, number * step, load_first(array, i, count, fill))
    else:
        store(vectors, number * step, load_first(vectors, (number + _OF_SEQUENCE) * step, count, fill))


@inlined
def _copy_flags(mask, i, count, scratch):
    if mask is None:
        return
    for lane in range(lanes(scratch.vectors)):
        scratch.flags[_RAGGED + lane] = mask[i + lane] if lane < count else 0


@inlined
def tokens_from(batch, mask, i, stop, scratch):
    """The `Tokens` from token number i on: of whole vectors where they lie, or of the ragged one at the end.

    The mask is one of `mask_of` and `mask_or_ones`.
    """
    vectors = scratch.vectors
    whole = stop - i >= lanes(vectors)
    return Tokens(
        _stream(batch.logps, whole, i, vectors, _LOGPS),
        _stream(batch.old_logps, whole, i, vectors, _OLD),
        _stream_of_values(batch.advantages, batch.advantages_per_token, whole, i, vectors, _ADVANTAGES),
        _stream(batch.ref_logps, whole, i, vectors, _REF),
        mask,
        _stream_of_values(batch.weights, batch.weights_per_token, whole, i, vectors, _WEIGHTS),
        _stream_of_values(batch.loss_weights, batch.loss_weights_per_token, whole, i, vectors, _LOSS_WEIGHTS),
        _stream(batch.grad, whole, i, vectors, _GRAD),
    )


@inlined_or_none
def _stream(array, whole, i, vectors, number):
    if whole:
        return Stream(array, i, lanes(vectors))
    return Stream(vectors, number * lanes(vectors), 0)


@inlined_or_none
def _stream_of_values(array, per_token, whole, i, vectors, number):
    if whole and not per_token:
        return Stream(vectors, (number + _OF_SEQUENCE) * lanes(vectors), 0)
    return _stream(array, whole, i, vectors, number)


@inlined_or_none
def mask_of(mask, i, stop, scratch):
    """The stream of a batch's mask from token number i on; None if there is none."""
    step = lanes(scratch.vectors)
    if stop - i >= step:
        return Stream(mask, i, step)
    return Stream(scratch.flags, _RAGGED, 0)


@inlined
def mask_or_ones(mask, i, stop, scratch):
    """The stream of a batch's mask from token number i on; of ones, as many as there are tokens, if there is none."""
    if mask is not None:
        return mask_of(mask, i, stop, scratch)
    step = lanes(scratch.vectors)
    if stop - i >= step:
        return Stream(scratch.flags, _ONES, 0)
    for lane in range(step):
        scratch.flags[_RAGGED + lane] = lane < stop - i
    return Stream(scratch.flags, _RAGGED, 0)


@inlined
def fetch_gradient(grad, start, stop, scratch):
    """Copy what stands in the gradient's place at the ragged end of a block into the scratch array."""
    count = (stop - start) % lanes(grad)
    if count > 0:
        _copy(grad, True, stop - count, count, 0.0, scratch.vectors, _GRAD)


@inlined
def end_block(grad, start, stop, scratch):
    """Copy the gradient of the ragged end of a block to where it belongs, if there is a place for it."""
    if grad is not None:
        count = (stop - start) % lanes(grad)
        if count > 0:
            store_first(grad, stop - count, count, load(scratch.vectors, _GRAD * lanes(grad)))


@inlined
def within_end(x, i, stop, otherwise):
    """x of the vector of token number i, in lanes, and ``otherwise`` in those beyond the end."""
    rest = beyond(x, stop - i)
    return from_bits((bits(x) & ~rest) | (bits(full_like(x, otherwise)) & rest))


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
def zero_beyond(beyond, x):
    """0 where ``beyond`` is above 0, whatever x is there; x elsewhere, and if ``beyond`` is None."""
    if beyond is None:
        return x
    return where(beyond > 0.0, full_like(x, 0.0), x)


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
def load_old(logp, old_logps, v):
    """log π_old of vector number ``v``, whose log π_θ is ``logp``."""
    if old_logps is None:
        return logp
    return load_vector(old_logps, v)


@inlined
def load_distance(logp, ref_logps, v):
    """l of vector number ``v``, whose log π_θ is ``logp``; 0 without a reference."""
    if ref_logps is None:
        return full_like(logp, 0.0)
    return logp - load_vector(ref_logps, v)


@inlined_or_none
def load_weights(weights, absent, v):
    """The weights of vector number ``v``, of the policy term or of both, 0 in absent lanes; None if there are none."""
    return zero_where(absent, load_vector(weights, v))


@inlined
def plus_if_given(x, w):
    """x + w; x if w is None."""
    if w is None:
        return x
    return x + w


@inlined
def plus_if_not_negative(x, u):
    """x + u; NaN where u is negative; x if u is None."""
    if u is None:
        return x
    return x + where(u < 0.0, full_like(u, nan), u)


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

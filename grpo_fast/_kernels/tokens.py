"""A batch of tokens as the kernels of the loss see it: its arrays, what is computed of them, and which tokens count.

A sequence is trimmed to its first … last unmasked token and cut from there into blocks of `BLOCK` tokens. The sums of
blocks and sequences are added exactly, so a sequence adds the same bits in whichever batch, padding or packing it
stands, on any number of threads. `token_level` and `sequence_level` are two ways to compute them.
"""

from typing import Any, NamedTuple

from .compiling import compiled, inlined
from .simd import WIDTH, count_flags
from .sums import Numerator


class Batch(NamedTuple):
    """The arrays of N tokens in S sequences. What may be None selects the kernel; so does each option's class."""

    logps: Any
    old_logps: Any  # or None: on-policy
    advantages: Any  # N, or S
    ref_logps: Any  # or None
    mask: Any  # bytes, or None
    weights: Any  # N, or S, or None: of the policy term
    loss_weights: Any  # N, or S, or None: of both terms
    grad: Any  # where ∂loss/∂logps goes, or None
    bounds: Any  # S + 1
    advantages_per_token: bool
    weights_per_token: bool
    loss_weights_per_token: bool


class LossTerms(NamedTuple):
    """What is computed of them: the terms of the loss, and how they are weighed."""

    surrogate: Any
    trust_region: Any  # or None
    kl: Any  # or None
    weighting: Any  # of the KL term, see `penalties.kl_for_kernels`
    denominator: float  # NaN without a gradient: nothing else depends on it here
    mean_within: bool  # whether a sequence's sum is also divided by the number of its tokens
    own_slopes: bool  # of a sequence: whether a token's slope is its own, and not the mean over all


@inlined
def weight_of_token(terms, tokens):
    """c_i, the weight that the aggregation gives each token of a sequence of so many."""
    if terms.mean_within:
        return 1.0 / (terms.denominator * tokens)
    return 1.0 / terms.denominator


@inlined
def numerator_within(terms, numerator, tokens):
    """What a sequence of so many tokens, or a part of it, adds to the numerator of the objective."""
    divisor = tokens if terms.mean_within else 1
    return Numerator(numerator.surrogate / divisor, numerator.kl / divisor)


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

"""In which way a run is computed: in the quickest of three that is right for its numbers, as its log-ratios tell.

========  ==================================================  ==========================================
way       right for |log ρ| and |l| up to                     because
========  ==================================================  ==========================================
NEAR      ½ ln 2 (`NEAR_LOG`), if `formulas.near_holds`       e^d has no power of two to take out
FAR       350 in float64, 42 in float32 (`square_limit`)      of ρ and k nothing overflows or vanishes
CAREFUL   any number                                          0·∞ = 0; sums of ρ and k are in float64
========  ==================================================  ==========================================

Where near is right, far gives the same bits, and where far is right, careful gives the same terms and gradient: which
of them computes a run is a matter of time. Only sums of float32 numbers differ in the careful way; for these the
log-ratios of a run decide, which lies where its sequence has it, and nothing else (`token_level.token_block`).

A way is a value without fields, whose class picks the formula when a kernel is compiled, as that of an option does.
"""

from typing import NamedTuple

from numba.core import types

from .compiling import inlined, inlined_by_type
from .elementary import NEAR_LOG, exp, exp_near, exp_of_any, k3_of_any_log, k3_of_log, k3_of_near_log, layout
from .simd import every, fma, full_like, where, wide, wide_squares


class Near(NamedTuple):
    """The way of log-ratios near 0."""


class Far(NamedTuple):
    """The way of ordinary log-ratios."""


class Careful(NamedTuple):
    """The way of all others."""


NEAR, FAR, CAREFUL = Near(), Far(), Careful()


@inlined
def near_enough(size):
    """Whether the near way is right for a run whose largest |log ρ| or |l|, in each lane, are these."""
    return every(size <= NEAR_LOG)


@inlined
def far_enough(size):
    """Whether the far way is right for a run whose largest |log ρ| or |l|, in each lane, are these."""
    return every(size <= layout(size).square_limit)


@inlined_by_type
def exp_in(way, d):
    """eᵈ."""
    if way.instance_class is Near:
        return lambda way, d: exp_near(d)
    return (lambda way, d: exp_of_any(d)) if way.instance_class is Careful else (lambda way, d: exp(d))


@inlined_by_type
def k3_in(way, d):
    """eᵈ − 1 − d and eᵈ − 1, a `LogRatioK3`."""
    if way.instance_class is Near:
        return lambda way, d: k3_of_near_log(d)
    return (lambda way, d: k3_of_any_log(d)) if way.instance_class is Careful else (lambda way, d: k3_of_log(d))


@inlined
def times(a, b):
    """a·b with 0·∞ = 0."""
    return where((a == 0.0) | (b == 0.0), full_like(a, 0.0), a * b)


@inlined_by_type
def times_in(way, a, b):
    """a·b, with 0·∞ = 0."""
    if way.instance_class is Careful:
        return lambda way, a, b: times(a, b)
    return lambda way, a, b: a * b


@inlined_by_type
def weighted_in(way, w, x):
    """w·x, with 0·∞ = 0; x if w is None."""
    if w is types.none:
        return lambda way, w, x: x
    return lambda way, w, x: times_in(way, w, x)


@inlined_by_type
def minus_in(way, x, a, b):
    """x − a·b, with 0·∞ = 0."""
    if way.instance_class is Careful:
        return lambda way, x, a, b: where((a == 0.0) | (b == 0.0), x, fma(-a, b, x))
    return lambda way, x, a, b: fma(-a, b, x)


# --- sums of a run ----------------------------------------------------------------------------------------------------
# In float32 the careful way adds in float64 at once: squares and sums of a run could overflow or vanish otherwise.
@inlined_by_type
def zero_in(way, zero):
    """What a sum begins with."""
    return (lambda way, zero: wide(zero)) if way.instance_class is Careful else (lambda way, zero: zero)


@inlined_by_type
def plus_in(way, total, x):
    """``total`` + x."""
    if way.instance_class is Careful:
        return lambda way, total, x: total + wide(x)
    return lambda way, total, x: total + x


@inlined_by_type
def plus_product_in(way, total, a, b):
    """``total`` + a·b, with 0·∞ = 0."""
    if way.instance_class is Careful:
        return lambda way, total, a, b: total + wide(times(a, b))
    return lambda way, total, a, b: fma(a, b, total)


@inlined_by_type
def plus_square_in(way, total, x):
    """``total`` + x²."""
    if way.instance_class is Careful:
        return lambda way, total, x: total + wide_squares(x)
    return lambda way, total, x: fma(x, x, total)

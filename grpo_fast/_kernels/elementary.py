"""The elementary functions of the kernels, on vectors: those of which LLVM has no packed version.

One file, though a long one: half of it is what each function promises, and all share how a power of two is taken out.

One text serves float64 and float32; only the layout of the bits and the polynomials differ. All rest on one idea: take
out a power of two, and compute what is left of the result where it must not cancel from a polynomial alone.

Of ratios (log, k3 of a ratio), x = 2ᵏ(1 + f):

    s = f/(2 + f),   log(1 + f) = 2·artanh(s) = 2s + s³·P(s²)   and   f − 2s = f·s,
    so that   f − log(1 + f) = s·(f − s²·P(s²)).

Of logarithms (exp, and k3 of a log-ratio, which is eᵈ − 1 − d), d = k·ln 2 + g:

    eᵈ = 2ᵏ(1 + g + p),   p = e^g − 1 − g = g²/2 + g³·R(g),
    so that   eᵈ − 1 − d = 2ᵏ·p + (2ᵏ − 1)·g + (2ᵏ − 1 − k·ln 2).

The coefficients of P and R are made by bench/polynomials.py. Docstrings state the largest error found, in units in the
last place (ulp) of the exact result, its argument, and how many arguments were tried: every float32, and of float64, or
of ρ, π_old and π_ref together, 200 million of the hardest. ``python bench/accuracy.py --worst`` prints these lines.
They, the coefficients and the layouts are why this file is long.
"""

import math
from typing import Any, NamedTuple

from numba.core import types

from .compiling import inlined, inlined_by_type
from .simd import bits, constant, fma, from_bits, full_like, where

LN2 = math.log(2.0)
ROOT2 = math.sqrt(2.0)


class Layout(NamedTuple):
    """A floating-point format, as bit patterns (int) and numbers (float)."""

    mantissa: int  # bits of the fraction
    one: int  # pattern of 1.0, which is exponent bias << mantissa
    half: int  # half the distance between the patterns of x and 2x
    exponent: int  # mask of sign and exponent
    root_half: int  # pattern of √½
    integers: float  # 2^mantissa: or-ing a small n into its pattern gives 2^mantissa + n
    bias: float
    ln2_high: float  # ln 2 with so many trailing zeros that k·ln2_high is exact; the rest is ln2_low (fdlibm)
    ln2_low: float
    smallest_normal: float
    largest: float
    safe_least: float  # numbers above it have reciprocals and products with room to spare
    lift: float  # a power of two that brings any positive number above `safe_least`
    rounder: float  # adding it rounds to a whole number, which then stands in the lowest bits of the pattern
    exp_limit: float  # up to this |d|, eᵈ is far from the limits of the format
    square_limit: float  # up to this, so are its square and a sum of such squares over a run
    vanishing: float  # below it, eᵈ is 0
    overflowing: float  # above it, eᵈ is inf


FLOAT64 = Layout(
    mantissa=52,
    one=1023 << 52,
    half=1 << 51,
    exponent=0xFFF << 52,
    root_half=0x3FE6A09E667F3BCD,
    integers=2.0**52,
    bias=1023.0,
    ln2_high=6.93147180369123816490e-01,
    ln2_low=1.90821492927058770002e-10,
    smallest_normal=2.0**-1022,
    largest=(2 - 2.0**-52) * 2.0**1023,
    safe_least=2.0**-384,
    lift=2.0**700,
    rounder=1.5 * 2.0**52,
    exp_limit=700.0,
    square_limit=350.0,
    vanishing=-746.0,
    overflowing=710.0,
)
FLOAT32 = Layout(
    mantissa=23,
    one=127 << 23,
    half=1 << 22,
    exponent=0x1FF << 23,
    root_half=0x3F3504F3,
    integers=2.0**23,
    bias=127.0,
    ln2_high=6.9313812256e-01,
    ln2_low=9.0580006145e-06,
    smallest_normal=2.0**-126,
    largest=(2 - 2.0**-23) * 2.0**127,
    safe_least=2.0**-60,
    lift=2.0**90,
    rounder=1.5 * 2.0**23,
    exp_limit=80.0,
    square_limit=42.0,
    vanishing=-104.0,
    overflowing=89.0,
)


@inlined_by_type
def layout(x):
    """The `Layout` of the elements of ``x``, known when the kernel is compiled."""
    chosen = FLOAT64 if x.element is types.float64 else FLOAT32
    return lambda x: chosen


#: The coefficients of P in `tail`, from the lowest power on, for 0 ≤ z ≤ 0.2008², which is 2/3 ≤ 1 + f ≤ 3/2 and more.
#: By interpolation at Chebyshev nodes, 2 % from minimax. Errors: of P, when made and after rounding to the format.
TAIL64 = (  # error 2.7e-17, rounded 3.9e-17
    0.6666666666666666,
    0.40000000000008257,
    0.2857142856713345,
    0.22222223072008154,
    0.18181735775129906,
    0.1538894153727015,
    0.1320826234903773,
    0.13620102241745666,
)
TAIL32 = (0.6666671453077146, 0.39978671664189847, 0.2996712545763)  # error 5.0e-7, rounded 5.1e-7

#: The coefficients of R in `rest_of_exp`, likewise, for |g| ≤ 1.0001·ln 2/2; 4 % from minimax. Errors: of ½ + g·R(g).
REST_OF_EXP64 = (  # error 1.4e-18, rounded 2.6e-18
    0.1666666666666667,
    0.04166666666666667,
    0.008333333333326136,
    0.0013888888888883748,
    0.00019841269874820627,
    2.4801587325547743e-05,
    2.7557255400206422e-06,
    2.75572736431103e-07,
    2.5105217004720745e-08,
    2.0914686968086876e-09,
)
REST_OF_EXP32 = (  # error 1.4e-9, rounded 4.1e-9
    0.16666666681623232,
    0.041666464925285904,
    0.0083333109254809,
    0.0013933649996309251,
    0.00019890990824673654,
)


@inlined_by_type
def tail(z):
    """P(``z``) = (2·artanh(s) − 2s)/s³, ``z`` = s²."""
    if z.element is types.float64:

        def polynomial(z):  # pairs first, so that the chain is short
            z2 = z * z
            p01 = fma(z, constant(z, TAIL64[1]), constant(z, TAIL64[0]))
            p23 = fma(z, constant(z, TAIL64[3]), constant(z, TAIL64[2]))
            p45 = fma(z, constant(z, TAIL64[5]), constant(z, TAIL64[4]))
            p67 = fma(z, constant(z, TAIL64[7]), constant(z, TAIL64[6]))
            return fma(z2, fma(z2, fma(z2, p67, p45), p23), p01)

    else:

        def polynomial(z):
            p12 = fma(z, constant(z, TAIL32[2]), constant(z, TAIL32[1]))
            return fma(z, p12, constant(z, TAIL32[0]))

    return polynomial


@inlined
def exponent_of(power):
    """The k of ``power`` = 2ᵏ (AVX2 has no packed conversion from 64-bit integers)."""
    form = layout(power)
    integers = constant(power, form.integers)
    return from_bits(bits(power) >> form.mantissa | bits(integers)) - constant(power, form.integers + form.bias)


@inlined
def log(x):
    """The natural logarithm of ``x``, a positive normal number.

    Largest error of log(x):
    float32: 0.9602 ulp at 0x1.683faep+0, of 2,130,706,432
    float64: 0.9811 ulp at 0x1.69a4651fe5745p-1, of 199,966,720
    """
    form = layout(x)
    power = (bits(x) - (form.root_half - form.one)) & form.exponent  # 2ᵏ with √½ ≤ x/2ᵏ < √2
    f = from_bits(bits(x) - power + form.one) - 1.0
    s = f / (f + 2.0)
    z = s * s
    excess = s * fma(-z, tail(z), f)
    k = exponent_of(from_bits(power))
    return fma(k, form.ln2_high, f - fma(k, -form.ln2_low, excess))


@inlined
def log_of_any(x):
    """The natural logarithm of any ``x`` ≥ 0: −inf of 0, inf of inf; of subnormal numbers a rounding more."""
    form = layout(x)
    tiny = x < form.smallest_normal
    lifted = log(where(tiny, x * form.lift, x)) - where(tiny, full_like(x, math.log(form.lift)), full_like(x, 0.0))
    return where(x == 0.0, full_like(x, -math.inf), where(x == math.inf, x, lifted))


class ReducedRatio(NamedTuple):
    """2ᵏ, f and s = f/(2 + f) of r = 2ᵏ(1 + f), with 2/3 ≤ 1 + f ≤ 3/2."""

    power: Any
    f: Any
    s: Any


@inlined
def reduce_ratio(rho, pi_old, pi_ref):
    """r = ``pi_ref``/(``rho``·``pi_old``), reduced.

    f is rounded three times, so within 3 ulp, even where r is within an ulp of 1. For the error of k3, see `k3`.
    """
    form = layout(pi_ref)
    product = rho * pi_old
    # The bit pattern of a positive float is nearly its logarithm: the difference of two, rounded to a whole number
    # of exponents, is k. Nearly: that starts k = 1 at 4/3, where `k3` would lose 10 ulp; √2 is where it loses 6.
    power = from_bits((bits(pi_ref) - bits(product) + (form.half + form.one)) & form.exponent)
    limit = where(pi_ref < product * constant(pi_ref, ROOT2), full_like(pi_ref, 1.0), full_like(pi_ref, math.inf))
    power = where(power < limit, power, limit)
    scaled = rho * power
    q = scaled * pi_old
    difference = fma(-scaled, pi_old, pi_ref)  # of exact operands, and rounded once
    return ReducedRatio(power, difference / q, difference / (q + pi_ref))


@inlined
def reduce_near_ratio(rho, pi_old, pi_ref):
    """f and s of r = ``pi_ref``/(``rho``·``pi_old``) with k = 0, valid where s² ≤ `NEAR`.

    f is within 3 ulp, as in `reduce_ratio`. For the error of k3, see `k3_near`.
    """
    product = rho * pi_old
    difference = fma(-rho, pi_old, pi_ref)
    return difference / product, difference / (product + pi_ref)


#: The largest s² for which k may be 0: 2/3 ≤ r ≤ 3/2.
NEAR = 0.04


@inlined
def k3_near(f, s):
    """`k3` of r = 1 + ``f``, valid where s² ≤ `NEAR`, and s²; ``f`` and ``s`` as `reduce_near_ratio` returns them.

    Largest error of k3_near(reduce_near_ratio(1, 1, r)):
    float32: 3.2865 ulp at 0x1.655caap-1, of 9,786,720
    float64: 2.9689 ulp at 0x1.02012d5393f17p+0, of 199,966,720
    Largest error of k3_near(reduce_near_ratio(ρ, π_old, π_ref)):
    float32: 6.5109 ulp at 0x1.654382p-2, 0x1.c4d22ap+2, 0x1.b42c88p+0, of 199,966,720
    float64: 6.8904 ulp at 0x1.37e3681c38bb8p-1, 0x1.b29e2de855229p+0, 0x1.111ab17986027p+0, of 199,966,720
    """
    z = s * s
    return s * fma(-z, tail(z), f), z


@inlined
def k3(r):
    """r − 1 − log r of a `ReducedRatio` ``r``.

    It is (2ᵏ − 1 − k·ln 2) + (2ᵏ − 1)·f + (f − log(1 + f)). When k is 0, so are the first two.

    Largest error of k3(reduce_ratio(1, 1, r)):
    float32: 3.9998 ulp at 0x1.72eacep-1, of 2,105,540,608
    float64: 3.6488 ulp at 0x1.7fdf57e4e3aa3p-1, of 199,966,720
    Largest error of k3(reduce_ratio(ρ, π_old, π_ref)):
    float32: 6.7972 ulp at 0x1.0c13f6p+1, 0x1.0033e4p+1, 0x1.8601dap+1, of 199,966,720
    float64: 6.8904 ulp at 0x1.37e3681c38bb8p-1, 0x1.b29e2de855229p+0, 0x1.111ab17986027p+0, of 199,966,720
    """
    form = layout(r.f)
    k = exponent_of(r.power)
    one_less = r.power - constant(r.f, 1.0)
    # For k = 1 these cancel to a fifth of ln 2, whose own rounding would be 7 ulp of that: the sum with its high part
    # is exact, and the low part is added to the small result.
    rest = fma(one_less, r.f, fma(k, constant(r.f, -form.ln2_high), one_less))
    rest = fma(k, constant(r.f, -form.ln2_low), rest)
    z = r.s * r.s
    return fma(r.s, fma(-z, tail(z), r.f), rest)


@inlined
def split(x):
    """m and 2ᵉ with ``x`` = m·2ᵉ, 1 ≤ m < 2, for positive ``x``; 2ᵉ as a difference of bit patterns, which may wrap."""
    form = layout(x)
    tiny = x < form.smallest_normal
    pattern = bits(where(tiny, x * form.lift, x))
    lifted = bits(where(tiny, full_like(x, form.lift), full_like(x, 1.0)))
    m = from_bits(pattern & (form.half * 2 - 1) | form.one)
    return m, pattern - bits(m) - lifted + form.one


@inlined_by_type
def rest_of_exp(g):
    """R(``g``) = (e^g − 1 − g − g²/2)/g³."""
    # Even and odd powers, each by Horner's rule: one instruction for a coefficient, which comes from memory. (In
    # pairs, as in `tail`, the chain is shorter, but half of the coefficients cost an instruction more.)
    if g.element is types.float64:

        def polynomial(g):
            u = g * g
            odd = fma(constant(g, REST_OF_EXP64[9]), u, constant(g, REST_OF_EXP64[7]))
            odd = fma(odd, u, constant(g, REST_OF_EXP64[5]))
            odd = fma(odd, u, constant(g, REST_OF_EXP64[3]))
            odd = fma(odd, u, constant(g, REST_OF_EXP64[1]))
            even = fma(constant(g, REST_OF_EXP64[8]), u, constant(g, REST_OF_EXP64[6]))
            even = fma(even, u, constant(g, REST_OF_EXP64[4]))
            even = fma(even, u, constant(g, REST_OF_EXP64[2]))
            even = fma(even, u, constant(g, REST_OF_EXP64[0]))
            return fma(odd, g, even)

    else:

        def polynomial(g):
            u = g * g
            odd = fma(constant(g, REST_OF_EXP32[3]), u, constant(g, REST_OF_EXP32[1]))
            even = fma(constant(g, REST_OF_EXP32[4]), u, constant(g, REST_OF_EXP32[2]))
            even = fma(even, u, constant(g, REST_OF_EXP32[0]))
            return fma(odd, g, even)

    return polynomial


class ReducedExponent(NamedTuple):
    """k, k as an integer in the lowest bits of a pattern, and g in two parts, of d = k·ln 2 + g with |g| ≤ ln 2/2."""

    k: Any
    shifted: Any
    high: Any
    low: Any


@inlined
def reduce_exponent(d):
    """``d`` = k·ln 2 + g, reduced; g is ``high`` − ``low``."""
    form = layout(d)
    rounder = constant(d, form.rounder)
    shifted = fma(d, constant(d, 1 / LN2), rounder)
    k = shifted - rounder
    # The first is exact.
    return ReducedExponent(k, shifted, fma(k, constant(d, -form.ln2_high), d), k * constant(d, form.ln2_low))


@inlined
def _scale(x, shifted):
    """``x``·2ᵏ, if that is a normal number; k as `ReducedExponent.shifted`."""
    return from_bits(bits(x) + (bits(shifted) << layout(x).mantissa))


@inlined
def _fraction_of_exp(e):
    """e^g of a `ReducedExponent` ``e``."""
    g = e.high - e.low
    return fma(g * g, fma(rest_of_exp(g), g, constant(g, 0.5)), g) + 1.0


@inlined
def exp(d):
    """eᵈ for |``d``| up to `Layout.exp_limit`.

    Largest error of exp(d):
    float32: 0.9876 ulp at 0x1.da3336p+5, of 2,235,564,064
    float64: 0.9893 ulp at 0x1.e942162325e08p+1, of 199,966,720
    """
    e = reduce_exponent(d)
    return _scale(_fraction_of_exp(e), e.shifted)


#: The largest |d| for which k is 0 in `reduce_exponent`: ½ ln 2, rounded down to a float32.
NEAR_LOG = 0.3465735614299774
#: No e^d of such a d is above it: √2.
NEAR_RATIO = 1.4142136


@inlined
def exp_near(d):
    """eᵈ for |``d``| up to `NEAR_LOG`: there, to the bit what `exp` gives."""
    return fma(d * d, fma(rest_of_exp(d), d, constant(d, 0.5)), d) + 1.0


@inlined
def exp_of_any(d):
    """eᵈ for any ``d``, subnormal, 0 and inf included.

    It is scaled by 2ᵏ in two steps, the first of which stays far from the limits.

    Largest error of exp_of_any(d):
    float32: 0.9876 ulp at 0x1.da3336p+5, of 4,278,190,080
    float64: 0.9893 ulp at 0x1.e942162325e08p+1, of 199,966,720
    """
    form = layout(d)
    d = where(d < form.vanishing, full_like(d, form.vanishing), d)
    d = where(d > form.overflowing, full_like(d, form.overflowing), d)
    e = reduce_exponent(d)
    first = fma(e.k, full_like(d, 0.5), full_like(d, form.rounder))
    second = e.k - (first - form.rounder) + form.rounder
    return _scale(_fraction_of_exp(e), first) * _scale(full_like(d, 1.0), second)


class LogRatioK3(NamedTuple):
    """eᵈ − 1 − d, and eᵈ − 1."""

    k3: Any
    expm1: Any


@inlined
def k3_of_log(d):
    """eᵈ − 1 − d and eᵈ − 1 for |``d``| up to `Layout.exp_limit`; when k is 0, they are p and g + p.

    Largest error of k3_of_log(d).k3:
    float32: 1.9787 ulp at 0x1.847f3cp+3, of 2,235,564,064
    float64: 2.8062 ulp at 0x1.6540e361c46d9p-2, of 199,966,720
    Largest error of k3_of_log(d).expm1:
    float32: 1.3925 ulp at 0x1.106f2cp+4, of 2,235,564,064
    float64: 1.8925 ulp at 0x1.9dc3cfc71c335p-2, of 199,966,720
    """
    form = layout(d)
    e = reduce_exponent(d)
    g = e.high - e.low
    half = g * g * constant(g, 0.5)
    p = fma((g * g) * g, rest_of_exp(g), half)
    power = _scale(full_like(d, 1.0), e.shifted)
    one_less = power - 1.0
    rest = fma(one_less, e.high, fma(e.k, constant(d, -form.ln2_high), one_less))
    k3 = fma(power, p, fma(-power, e.low, rest))
    return LogRatioK3(k3, fma(power, g + p, one_less))


@inlined
def k3_of_near_log(d):
    """`k3_of_log` for |``d``| up to `NEAR_LOG`: there, the same bits."""
    k3 = fma((d * d) * d, rest_of_exp(d), d * d * constant(d, 0.5))
    return LogRatioK3(k3, d + k3)


@inlined
def k3_of_any_log(d):
    """eᵈ − 1 − d and eᵈ − 1 for any ``d``; where `k3_of_log` holds for a run, up to `Layout.square_limit`, its bits.

    Beyond ±60, of eᵈ and 1 + d one is less than half an ulp of the other.

    Largest error of k3_of_any_log(d).k3:
    float32: 1.9787 ulp at 0x1.847f3cp+3, of 4,278,190,080
    float64: 2.8062 ulp at 0x1.6540e361c46d9p-2, of 199,966,720
    Largest error of k3_of_any_log(d).expm1:
    float32: 1.3925 ulp at 0x1.106f2cp+4, of 4,278,190,080
    float64: 1.8925 ulp at 0x1.9dc3cfc71c335p-2, of 199,966,720
    """
    limit = max(60.0, layout(d).square_limit)
    clamped = where(d > limit, full_like(d, limit), where(d < -limit, full_like(d, -limit), d))
    within = k3_of_log(clamped)
    power = exp_of_any(d)
    return LogRatioK3(
        where(d > limit, power, where(d < -limit, -1.0 - d, within.k3)),
        where(d > limit, power, where(d < -limit, full_like(d, -1.0), within.expm1)),
    )

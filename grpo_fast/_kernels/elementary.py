"""The elementary functions of the kernels, on vectors: those of which LLVM has no packed version.

One text serves float64 and float32; only the layout of the bits and the polynomials differ. All rest on one idea: take
out a power of two, and compute what is left of the result where it must not cancel from a polynomial alone.

Of ratios (log, k3 of a ratio), x = 2ᵏ(1 + f):

    s = f/(2 + f),   log(1 + f) = 2·artanh(s) = 2s + s³·P(s²)   and   f − 2s = f·s,
    so that   f − log(1 + f) = s·(f − s²·P(s²)).

Of logarithms (exp, and k3 of a log-ratio, which is eᵈ − 1 − d), d = k·ln 2 + g:

    eᵈ = 2ᵏ(1 + g + p),   p = e^g − 1 − g = g²/2 + g³·R(g),
    so that   eᵈ − 1 − d = 2ᵏ·p + (2ᵏ − 1)·g + (2ᵏ − 1 − k·ln 2).
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
    usual: float  # numbers above it have reciprocals and products with room to spare
    lift: float  # a power of two that brings any positive number above `usual`
    rounder: float  # adding it rounds to a whole number, which then stands in the lowest bits of the pattern
    plain: float  # up to this |d|, eᵈ is far from the limits of the format
    squarable: float  # up to this, so are its square and a sum of such squares over a run
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
    usual=2.0**-384,
    lift=2.0**700,
    rounder=1.5 * 2.0**52,
    plain=700.0,
    squarable=350.0,
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
    usual=2.0**-60,
    lift=2.0**90,
    rounder=1.5 * 2.0**23,
    plain=80.0,
    squarable=42.0,
    vanishing=-104.0,
    overflowing=89.0,
)


@inlined_by_type
def layout(x):
    """The format of a vector's elements, known when the kernel is compiled."""
    chosen = FLOAT64 if x.element is types.float64 else FLOAT32
    return lambda x: chosen


@inlined_by_type
def tail(z):
    """P(z) = (2·artanh(s) − 2s)/s³ with z = s², minimax for 0 ≤ z ≤ 0.0403, which is 2/3 ≤ 1 + f ≤ 3/2 and more."""
    if z.element is types.float64:

        def polynomial(z):  # error 2.7e-17; pairs first, so that the chain is short
            z2 = z * z
            p01 = fma(z, constant(z, 0.40000000000008257), constant(z, 0.6666666666666666))
            p23 = fma(z, constant(z, 0.22222223072008154), constant(z, 0.2857142856713345))
            p45 = fma(z, constant(z, 0.1538894153727015), constant(z, 0.18181735775129906))
            p67 = fma(z, constant(z, 0.13620102241745666), constant(z, 0.1320826234903773))
            return fma(z2, fma(z2, fma(z2, p67, p45), p23), p01)

    else:

        def polynomial(z):  # error 5.0e-7
            p12 = fma(z, constant(z, 0.2996712545763), constant(z, 0.39978671664189847))
            return fma(z, p12, constant(z, 0.6666671453077146))

    return polynomial


@inlined
def exponent_of(power):
    """k for 2ᵏ (AVX2 has no packed conversion from 64-bit integers)."""
    form = layout(power)
    integers = constant(power, form.integers)
    return from_bits(bits(power) >> form.mantissa | bits(integers)) - constant(power, form.integers + form.bias)


@inlined
def log(x):
    """Natural logarithm of a positive normal number."""
    form = layout(x)
    power = (bits(x) - (form.root_half - form.one)) & form.exponent  # 2ᵏ with √½ ≤ x/2ᵏ < √2
    f = from_bits(bits(x) - power + form.one) - 1.0
    s = f / (f + 2.0)
    z = s * s
    excess = s * fma(-z, tail(z), f)
    k = exponent_of(from_bits(power))
    return fma(k, form.ln2_high, f - fma(k, -form.ln2_low, excess))


class ReducedRatio(NamedTuple):
    """r = 2ᵏ(1 + f) with 2/3 ≤ 1 + f ≤ 3/2: 2ᵏ, f, and s = f/(2 + f)."""

    power: Any
    f: Any
    s: Any


@inlined
def reduce_ratio(rho, old, ref):
    """r = ref/(ρ·old), reduced; f is good to 2 ulp even where r is within an ulp of 1."""
    form = layout(ref)
    product = rho * old
    # The bit pattern of a positive float is nearly its logarithm: the difference of two, rounded to a whole number
    # of exponents, is k. Nearly: that starts k = 1 at 4/3, where `k3` would lose 10 ulp; √2 is where it loses 6.
    power = from_bits((bits(ref) - bits(product) + (form.half + form.one)) & form.exponent)
    limit = where(ref < product * constant(ref, ROOT2), full_like(ref, 1.0), full_like(ref, math.inf))
    power = where(power < limit, power, limit)
    scaled = rho * power
    q = scaled * old
    difference = fma(-scaled, old, ref)  # of exact operands, and rounded once
    return ReducedRatio(power, difference / q, difference / (q + ref))


@inlined
def reduce_near_ratio(rho, old, ref):
    """f and s of r = ref/(ρ·old) with k = 0, of use where s² ≤ `NEAR`; f is good to 2 ulp there."""
    product = rho * old
    difference = fma(-rho, old, ref)
    return difference / product, difference / (product + ref)


#: The largest s² for which k may be 0: 2/3 ≤ r ≤ 3/2.
NEAR = 0.04


@inlined
def k3_near(f, s):
    """`k3` with k = 0, of use where s² ≤ `NEAR`; and s²."""
    z = s * s
    return s * fma(-z, tail(z), f), z


@inlined
def k3(r):
    """r − 1 − log r = (2ᵏ − 1 − k·ln 2) + (2ᵏ − 1)·f + (f − log(1 + f)); when k is 0, so are the first two."""
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
    """m and 2ᵉ with x = m·2ᵉ, 1 ≤ m < 2, for any positive x; 2ᵉ as a difference of bit patterns, which may wrap."""
    form = layout(x)
    tiny = x < form.smallest_normal
    pattern = bits(where(tiny, x * form.lift, x))
    lifted = bits(where(tiny, full_like(x, form.lift), full_like(x, 1.0)))
    m = from_bits(pattern & (form.half * 2 - 1) | form.one)
    return m, pattern - bits(m) - lifted + form.one


@inlined_by_type
def rest_of_exp(g):
    """R(g) = (e^g − 1 − g − g²/2)/g³, minimax for |g| ≤ 0.34661, half of ln 2 and a little."""
    # Even and odd powers, each by Horner's rule: one instruction for a coefficient, which comes from memory. (In
    # pairs, as in `tail`, the chain is shorter, but half of the coefficients cost an instruction more.)
    if g.element is types.float64:

        def polynomial(g):  # error of g²·R: 1.4e-18
            u = g * g
            odd = fma(constant(g, 2.0914686968086876e-09), u, constant(g, 2.75572736431103e-07))
            odd = fma(odd, u, constant(g, 2.4801587325547743e-05))
            odd = fma(odd, u, constant(g, 0.0013888888888883748))
            odd = fma(odd, u, constant(g, 0.04166666666666667))
            even = fma(constant(g, 2.5105217004720745e-08), u, constant(g, 2.7557255400206422e-06))
            even = fma(even, u, constant(g, 0.00019841269874820627))
            even = fma(even, u, constant(g, 0.008333333333326136))
            even = fma(even, u, constant(g, 0.1666666666666667))
            return fma(odd, g, even)

    else:

        def polynomial(g):  # error of g²·R: 1.4e-9
            u = g * g
            odd = fma(constant(g, 0.0013933649996309251), u, constant(g, 0.041666464925285904))
            even = fma(constant(g, 0.00019890990824673654), u, constant(g, 0.0083333109254809))
            even = fma(even, u, constant(g, 0.16666666681623232))
            return fma(odd, g, even)

    return polynomial


class ReducedExponent(NamedTuple):
    """d = k·ln 2 + g, with |g| ≤ ln 2/2: k, k as an integer in the lowest bits of a pattern, and g in two parts."""

    k: Any
    shifted: Any
    high: Any
    low: Any


@inlined
def reduce_exponent(d):
    """The parts of d."""
    form = layout(d)
    rounder = constant(d, form.rounder)
    shifted = fma(d, constant(d, 1 / LN2), rounder)
    k = shifted - rounder
    # The first is exact.
    return ReducedExponent(k, shifted, fma(k, constant(d, -form.ln2_high), d), k * constant(d, form.ln2_low))


@inlined
def _scale(x, shifted):
    """x·2ᵏ, if that is a normal number; k as in `ReducedExponent`."""
    return from_bits(bits(x) + (bits(shifted) << layout(x).mantissa))


@inlined
def _fraction_of_exp(e):
    """e^g."""
    g = e.high - e.low
    return fma(g * g, fma(rest_of_exp(g), g, constant(g, 0.5)), g) + 1.0


@inlined
def exp(d):
    """eᵈ for |d| up to `Layout.plain`."""
    e = reduce_exponent(d)
    return _scale(_fraction_of_exp(e), e.shifted)


@inlined
def exp_of_any(d):
    """eᵈ, subnormal, 0 and inf included: by 2ᵏ in two steps, the first of which stays far from the limits."""
    form = layout(d)
    d = where(d < form.vanishing, full_like(d, form.vanishing), d)
    d = where(d > form.overflowing, full_like(d, form.overflowing), d)
    e = reduce_exponent(d)
    half = fma(e.k, full_like(d, 0.5), full_like(d, form.rounder))
    rest = e.k - (half - form.rounder) + form.rounder
    return _scale(_fraction_of_exp(e), half) * _scale(full_like(d, 1.0), rest)


class LogRatioK3(NamedTuple):
    """eᵈ − 1 − d, and eᵈ − 1."""

    k3: Any
    expm1: Any


@inlined
def k3_of_log(d):
    """eᵈ − 1 − d and eᵈ − 1 for |d| up to `Layout.plain`; when k is 0, they are p and g + p."""
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
def k3_of_any_log(d):
    """`k3_of_log` for any d. Beyond 60, of eᵈ and 1 + d one is less than half an ulp of the other."""
    near = where(d > 60.0, full_like(d, 60.0), where(d < -60.0, full_like(d, -60.0), d))
    plain = k3_of_log(near)
    power = exp_of_any(d)
    return LogRatioK3(
        where(d > 60.0, power, where(d < -60.0, -1.0 - d, plain.k3)),
        where(d > 60.0, power, where(d < -60.0, full_like(d, -1.0), plain.expm1)),
    )

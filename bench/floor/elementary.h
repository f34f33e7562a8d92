/* exp and k3 by the polynomials of grpo_fast/_kernels/elementary.py, where the mathematics is explained.
 *
 * Near is what is left of them where no power of two has to be taken out. Far, 2^k is one that the format has.
 */

/* R(g) = (e^g − 1 − g − g²/2)/g³. */
INLINE vector rest_of_exp(vector g) {
    const vector u = g * g;
#define COEFFICIENT(i) all(REST_OF_EXP[i])
#ifdef SINGLE
    const vector odd = fma_(COEFFICIENT(3), u, COEFFICIENT(1));
    vector even = fma_(COEFFICIENT(4), u, COEFFICIENT(2));
#else
    vector odd = fma_(COEFFICIENT(9), u, COEFFICIENT(7));
    odd = fma_(odd, u, COEFFICIENT(5));
    odd = fma_(odd, u, COEFFICIENT(3));
    odd = fma_(odd, u, COEFFICIENT(1));
    vector even = fma_(COEFFICIENT(8), u, COEFFICIENT(6));
    even = fma_(even, u, COEFFICIENT(4));
    even = fma_(even, u, COEFFICIENT(2));
#endif
    even = fma_(even, u, COEFFICIENT(0));
#undef COEFFICIENT
    return fma_(odd, g, even);
}

/* P(z) = (2·artanh(s) − 2s)/s³, z = s². */
INLINE vector tail(vector z) {
#define COEFFICIENT(i) all(TAIL[i])
#ifdef SINGLE
    return fma_(z, fma_(z, COEFFICIENT(2), COEFFICIENT(1)), COEFFICIENT(0));
#else
    const vector z2 = z * z;
    const vector p01 = fma_(z, COEFFICIENT(1), COEFFICIENT(0)), p23 = fma_(z, COEFFICIENT(3), COEFFICIENT(2));
    const vector p45 = fma_(z, COEFFICIENT(5), COEFFICIENT(4)), p67 = fma_(z, COEFFICIENT(7), COEFFICIENT(6));
    return fma_(z2, fma_(z2, fma_(z2, p67, p45), p23), p01);
#endif
#undef COEFFICIENT
}

/* --- of logarithms: d = k·ln 2 + g, g = high − low --- */
INLINE vector exp_near(vector d) {
    return fma_(d * d, fma_(rest_of_exp(d), d, all(0.5)), d) + all(1);
}

/* e^d − 1 − d. */
INLINE vector k3_of_log_near(vector d) {
    const vector square = d * d;
    return fma_(square * d, rest_of_exp(d), square * all(0.5));
}

typedef struct {
    vector k, high, low;
    bits shifted; /* k in the lowest bits */
} exponent;

INLINE exponent reduced_exponent(vector d) {
    const vector shifted = fma_(d, all(1 / LN2), all(ROUNDER)), k = shifted - all(ROUNDER);
    return (exponent){k, fnma(k, all(LN2_HIGH), d), k * all(LN2_LOW), BITS(shifted)};
}

/* x·2^k. */
INLINE vector scaled(vector x, bits shifted) {
    return FROM_BITS(OF_BITS(add)(BITS(x), OF_BITS(slli)(shifted, MANTISSA)));
}

INLINE vector exp_far(vector d) {
    const exponent e = reduced_exponent(d);
    return scaled(exp_near(e.high - e.low), e.shifted);
}

INLINE vector k3_of_log_far(vector d) {
    const exponent e = reduced_exponent(d);
    const vector power = scaled(all(1), e.shifted), one_less = power - all(1);
    const vector rest = fma_(one_less, e.high, fnma(e.k, all(LN2_HIGH), one_less));
    return fma_(power, k3_of_log_near(e.high - e.low), fnma(power, e.low, rest));
}

/* --- of ratios: r = 2^k·(1 + f), s = f/(2 + f) --- */
INLINE vector excess(vector f, vector s) { /* f − log(1 + f) */
    const vector z = s * s;
    return s * fnma(z, tail(z), f);
}

/* r − 1 − log r of r = ref/(rho·old). */
INLINE vector k3_near(vector rho, vector old, vector ref) {
    const vector product = rho * old, difference = fnma(rho, old, ref);
    return excess(difference / product, difference / (product + ref));
}

INLINE vector k3_far(vector rho, vector old, vector ref) {
    const vector product = rho * old;
    const bits about = OF_BITS(add)(OF_BITS(sub)(BITS(ref), BITS(product)), ALL_BITS(HALF + ONE));
    vector power = FROM_BITS(_mm256_and_si256(about, ALL_BITS(EXPONENT)));
    power = min(power, OF(blendv)(all(INFINITY), all(1), is_less(ref, product * all(ROOT2)))); /* k ≤ 0 below √2 */
    const vector q = rho * power * old, difference = fnma(rho * power, old, ref);
    const vector f = difference / q, s = difference / (q + ref), one_less = power - all(1);
    const vector pattern = FROM_BITS(_mm256_or_si256(OF_BITS(srli)(BITS(power), MANTISSA), BITS(all(INTEGERS))));
    const vector k = pattern - all(INTEGERS + BIAS);
    const vector rest = fnma(k, all(LN2_LOW), fma_(one_less, f, fnma(k, all(LN2_HIGH), one_less)));
    const vector z = s * s;
    return fma_(s, fnma(z, tail(z), f), rest);
}

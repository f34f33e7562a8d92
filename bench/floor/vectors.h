/* One text for float64 and, with -DSINGLE, float32: a vector of 32 bytes, and the instructions of AVX2 on it.
 *
 * + - * / on vectors are the compiler's own; it is told to contract nothing, so that the FMAs are those written here.
 */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef SINGLE
typedef float real;
typedef __m256 vector;
enum { MANTISSA = 23 };
#define OF(name) _mm256_##name##_ps
#define OF_BITS(name) _mm256_##name##_epi32
#define ALL_BITS _mm256_set1_epi32
#define BITS _mm256_castps_si256
#define FROM_BITS _mm256_castsi256_ps
#else
typedef double real;
typedef __m256d vector;
enum { MANTISSA = 52 };
#define OF(name) _mm256_##name##_pd
#define OF_BITS(name) _mm256_##name##_epi64
#define ALL_BITS _mm256_set1_epi64x
#define BITS _mm256_castpd_si256
#define FROM_BITS _mm256_castsi256_pd
#endif
typedef __m256i bits;

#include "constants.h" /* written by floors.py */

enum { LANES = sizeof(vector) / sizeof(real), RUN = 16 * LANES };

#define INLINE static inline __attribute__((always_inline))

INLINE vector all(real x) { return OF(set1)(x); }
INLINE vector load(const real *p) { return OF(loadu)(p); }
INLINE vector fma_(vector a, vector b, vector c) { return OF(fmadd)(a, b, c); }   /* a·b + c */
INLINE vector fnma(vector a, vector b, vector c) { return OF(fnmadd)(a, b, c); } /* c − a·b */
INLINE vector min(vector a, vector b) { return OF(min)(a, b); }
INLINE vector max(vector a, vector b) { return OF(max)(a, b); }
INLINE vector magnitude(vector x) { return OF(andnot)(all(-0.0), x); }
INLINE vector is_less(vector a, vector b) { return OF(cmp)(a, b, _CMP_LT_OQ); } /* a mask: −1 in bits, or 0 */
INLINE vector is_equal(vector a, vector b) { return OF(cmp)(a, b, _CMP_EQ_OQ); }
INLINE bits tally(bits counts, vector mask) { return OF_BITS(sub)(counts, BITS(mask)); }

/* The sum of a run, in four lanes of float64. */
INLINE __m256d wide(vector x) {
#ifdef SINGLE
    return _mm256_cvtps_pd(_mm256_castps256_ps128(x)) + _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
    return x;
#endif
}

/* --- a vector's sum, least and largest, and a vector of counts' sum: once for each call --- */
INLINE double sum(__m256d x) { return x[0] + x[1] + x[2] + x[3]; }

INLINE double least_of(vector x) {
    double least = x[0];
    for (int i = 1; i < LANES; i++) least = fmin(least, x[i]);
    return least;
}

INLINE double largest_of(vector x) { return -least_of(-x); }

INLINE double count(bits counts) {
#ifdef SINGLE
    const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(counts));
    counts = _mm256_add_epi64(low, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(counts, 1)));
#endif
    return (double)(counts[0] + counts[1] + counts[2] + counts[3]);
}

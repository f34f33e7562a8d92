/* What the kernels do, by hand: one fused loop over what lies in the cache, without anything around it.
 *
 * There are n numbers, whole runs of them (RUN). Float32 terms are summed in float32 over a run, and then in float64.
 * `far` is known when this is compiled: each loop exists once for numbers near enough, and once for all others.
 */
#include "vectors.h"
#include "elementary.h"

/* The loss of one sequence from log-probabilities: Clip, and K3 weighted by rho; its sums, and its gradient. */
INLINE void loss(const int far, size_t n, const real *logps, const real *old_logps, const real *ref_logps,
                 double advantage, double epsilon, double beta, double factor, real *gradient, double *sums) {
    /* The sign of A picks the one bound that matters; the other is put where no rho is. (With an A for each token, to
     * select by its sign takes 12 instructions more for two float64 vectors, of 122 when near.) */
    const vector low = all(advantage < 0 ? 1 - epsilon : -INFINITY), high = all(advantage > 0 ? 1 + epsilon : INFINITY);
    const vector a = all(advantage), beta_ = all(beta), factor_ = all(factor);
    __m256d policy_sum = {0}, kl_sum = {0}, rho_sum = {0}, square_sum = {0}, log_rho_sum = {0};
    vector least = all(INFINITY), most = all(-INFINITY), farthest = all(0);
    bits clipped_low = {0}, clipped_high = {0};
    for (size_t start = 0; start < n; start += RUN) {
        vector policy = all(0), kl = all(0), rhos = all(0), squares = all(0), log_rhos = all(0);
        for (size_t i = start; i != start + RUN; i += LANES) {
            const vector logp = load(logps + i), log_rho = logp - load(old_logps + i), d = load(ref_logps + i) - logp;
            least = min(least, log_rho);
            most = max(most, log_rho);
            farthest = max(farthest, magnitude(d));
            const vector rho = far ? exp_far(log_rho) : exp_near(log_rho);
            log_rhos += log_rho;
            rhos += rho;
            squares = fma_(rho, rho, squares);
            kl = fma_(rho, far ? k3_of_log_far(d) : k3_of_log_near(d), kl);
            const vector bounded = min(max(rho, low), high), value = bounded * a;
            policy += value;
            clipped_low = tally(clipped_low, is_less(rho, low));
            clipped_high = tally(clipped_high, is_less(high, rho));
            const vector slope = OF(and)(is_equal(bounded, rho), value);
            OF(storeu)(gradient + i, factor_ * fma_(beta_ * rho, d, slope));
        }
        policy_sum += wide(policy);
        kl_sum += wide(kl);
        rho_sum += wide(rhos);
        square_sum += wide(squares);
        log_rho_sum += wide(log_rhos);
    }
    const double found[] = {sum(policy_sum),     sum(kl_sum),        sum(rho_sum),         sum(square_sum),
                            sum(log_rho_sum),    least_of(least),    largest_of(most),     largest_of(farthest),
                            count(clipped_low),  count(clipped_high)};
    for (size_t i = 0; i < sizeof found / sizeof *found; i++) sums[i] = found[i];
}

/* The objective from probabilities: the sums of its two terms. */
INLINE void objective(const int far, size_t n, const real *rhos, const real *advantages, const real *pi_old,
                      const real *pi_ref, double epsilon, double *sums) {
    const vector low = all(1 - epsilon), high = all(1 + epsilon);
    __m256d surrogate_sum = {0}, kl_sum = {0};
    for (size_t start = 0; start < n; start += RUN) {
        vector surrogate = all(0), kl = all(0);
        for (size_t i = start; i != start + RUN; i += LANES) {
            const vector rho = load(rhos + i), a = load(advantages + i), old = load(pi_old + i), ref = load(pi_ref + i);
            /* blendv looks at the sign of A, and no further */
            surrogate = fma_(OF(blendv)(min(rho, high), max(rho, low), a), a, surrogate);
            kl = fma_(rho, far ? k3_far(rho, old, ref) : k3_near(rho, old, ref), kl);
        }
        surrogate_sum += wide(surrogate);
        kl_sum += wide(kl);
    }
    sums[0] = sum(surrogate_sum);
    sums[1] = sum(kl_sum);
}

#define LOSS(name, far)                                                                                                \
    void name(size_t n, const real *logps, const real *old_logps, const real *ref_logps, double advantage,             \
              double epsilon, double beta, double factor, real *gradient, double *sums) {                              \
        loss(far, n, logps, old_logps, ref_logps, advantage, epsilon, beta, factor, gradient, sums);                   \
    }
#define OBJECTIVE(name, far)                                                                                           \
    void name(size_t n, const real *rhos, const real *advantages, const real *pi_old, const real *pi_ref,              \
              double epsilon, double *sums) {                                                                          \
        objective(far, n, rhos, advantages, pi_old, pi_ref, epsilon, sums);                                            \
    }
LOSS(loss_near, 0)
LOSS(loss_far, 1)
OBJECTIVE(objective_near, 0)
OBJECTIVE(objective_far, 1)

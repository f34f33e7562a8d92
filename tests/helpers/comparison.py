"""What `grpo_loss` finds, beside the reference: how far apart they may be, and whether they are."""

import math

import numpy as np
from combinations import ARRAYS, F4, F8, SEQ, TOKEN

from grpo_fast import SAPO, VESPO, reference
from grpo_fast.reference import shared, times


def limits(arguments, eps):
    """How far the loss, the gradient and each diagnostic may be off, from the sizes of the parts they are made of.

    Counted in eps/2, of both sides: exp is right to 1 ulp, k3 to 4 and 3, a term has up to 10 more roundings each: less
    than 16 eps. A sum adds 16 roundings in float32, or 64 of a kernel and 22 of NumPy (in pairs, over runs of 128 in 8
    lanes) in float64: less than 64 eps in all. The error of log ρ, a difference and at sequence level a sum, is as much
    times |log π_θ − log π_old|, and is relative to ρ. An error of l moves the KL term by l·∂k/∂l ≤ 3|k|(1 + |l|), its
    slope by at most |l| more than that. The exponent of VESPO's φ has the error of log w, times k + λ·w. SAPO's slope
    falls like e^(−τρ), so that it feels an error of ρ, not of log ρ; and it may be taken for 0 when below 1e-31.
    """
    logps, old, A, ref, w, u = (arguments[name] for name in ARRAYS)
    surrogate, kl, level = arguments["surrogate"], arguments["kl"], arguments["importance_sampling_level"]
    tokens = reference._Tokens.of(logps, arguments["mask"], arguments["cu_seqlens"])
    logp, A = tokens.each("logps", logps), tokens.each("advantages", A, True)
    d = np.zeros_like(logp) if old is None else logp - tokens.each("old_logps", old)
    w = np.ones_like(logp) if w is None else tokens.each("rollout_is_weights", w, True)
    u = np.ones_like(logp) if u is None else tokens.each("loss_weights", u, True)
    rho, own = np.exp(shared(d, tokens, level)), np.exp(d)
    of_ratio, of_policy = (eps * (1 + shared(np.abs(d), tokens, level)) for _ in range(2))
    terms = reference.policy_term(surrogate, d, A, logp, tokens, level)
    if isinstance(surrogate, VESPO):
        k, lambda_ = max(surrogate.k_pos, surrogate.k_neg), max(surrogate.lambda_pos, surrogate.lambda_neg)
        w_of_sequence = np.exp(np.minimum(tokens.spread(tokens.sums(np.clip(d, -20, 20))), 20))
        moved = 1 + tokens.spread(tokens.sums(np.abs(np.clip(d, -20, 20))))
        of_policy = eps * (1 + lambda_ + (k + lambda_ * w_of_sequence) * moved)
    s, through, direct = (np.abs(times(w, part)) for part in terms)
    if isinstance(surrogate, SAPO):
        through = through * (1 + rho) + 1e-25 * np.abs(times(w, A))
    k, k_slope, of_kl, beta = np.zeros_like(logp), np.zeros_like(logp), np.full_like(d, eps), 0.0
    if kl is not None:
        l, beta = logp - tokens.each("ref_logps", ref), kl.beta
        k, k_through, k_direct = (times(1 + np.abs(l), np.abs(x)) for x in reference.kl_term(kl, own, rho, l))
        by_own = kl.importance_weighted is True or kl.gradient == "score"
        ratio = own if by_own else rho if kl.importance_weighted else np.ones_like(rho)
        of_kl = of_ratio if kl.importance_weighted == "sequence" else eps * (1 + by_own * np.abs(d))
        k_slope = shared(times(u, k_through), tokens, level) + times(u, k_direct + times(ratio, np.abs(l)))
    c = reference.aggregation_weights(arguments["aggregation"], tokens.counts, arguments["normalizer"])
    few = 16 if level == TOKEN else 64
    grad = np.zeros(logps.shape)
    through = times(u, through)
    policy_slope = (shared(through, tokens, level) if level == SEQ else through) + times(u, direct)
    slopes = times(of_policy, policy_slope) + times(of_kl, times(beta, k_slope))
    grad[tokens.keep] = times(few * tokens.spread(c), slopes)

    def of_sum(x, c=c):
        return 64 * np.sum(c * tokens.sums(x))

    def of_mean(x):
        return of_sum(x, 1 / max(logp.size, 1))

    s, k, worst = times(of_policy, s), times(of_kl, k), few * of_ratio.max(initial=0)
    loss = of_sum(times(u, s + times(beta, k)))
    found = {"loss": loss, "objective": loss, "surrogate": of_mean(s), "kl": of_mean(k)}
    found |= {"ratio_mean": of_mean(times(of_ratio, rho)), "approx_kl": of_mean(times(of_ratio, np.abs(d)))}
    found |= {"ratio_min": worst * rho.max(initial=0), "ratio_max": worst * rho.max(initial=0), "ess": 4 * worst}
    found |= {"grad": grad}
    least = float(np.finfo(F8 if eps < 1e-10 else F4).tiny)  # below it no error is relative
    return {name: limit + least for name, limit in found.items()}


def same(value, expected, limit):
    """Whether numbers are so near; infinities and NaN must be met."""
    met = (value == expected) | np.isnan(value) & np.isnan(expected)
    return np.all(met | np.isfinite(value) & np.isfinite(expected) & (np.abs(value - expected) <= limit))


@np.errstate(all="ignore")
def compare(result, arguments, oracle=F8):
    """Assert that a result is that of the reference on the same values, which computes in the dtype told."""
    eps = float(np.finfo(arguments["logps"].dtype).eps)
    exact = arguments | {name: x.astype(oracle) for name in ARRAYS if (x := arguments[name]) is not None}
    expected, limit = reference.grpo_loss(**exact, grad=True), limits(exact, eps)
    assert result.loss == result.stats.loss or math.isnan(result.loss)
    for name, value in expected.stats.items():
        found, most = getattr(result.stats, name), limit.get(name, 0)  # counts are exact
        assert same(found, value, most), f"{name} is {found!r} instead of {value!r} ± {most}, for {arguments}"
    if result.grad is None:
        return
    assert result.grad.dtype == arguments["logps"].dtype
    assert same(result.grad, expected.grad, limit["grad"]), f"{result.grad} instead of {expected.grad}, for {arguments}"
    if arguments["mask"] is not None:
        assert not result.grad[arguments["mask"] == 0].any()

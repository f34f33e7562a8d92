"""What `grpo_loss` finds, beside the reference: how far apart they may be, and whether they are."""

import math

import numpy as np
from combinations import ARRAYS, F4, F8, TOKEN

from grpo_fast import SAPO, reference
from grpo_fast.reference import shared, surrogate_term, times


def limits(arguments, eps):
    """How far the loss, the gradient and each diagnostic may be off, from the sizes of the parts they are made of.

    Counted in eps/2, of both sides: exp is right to 1 ulp, k3 to 4 and 3, a term has up to 10 more roundings each: less
    than 16 eps. A sum adds 16 roundings in float32, or 64 of a kernel and 22 of NumPy (in pairs, over runs of 128 in 8
    lanes) in float64: less than 64 eps in all. The error of log ρ, a difference and at sequence level a sum, is as much
    times |log π_θ − log π_old|, and is relative to ρ. An error of l moves the KL term by l·∂k/∂l ≤ 3|k|(1 + |l|), its
    slope by at most |l| more than that. SAPO's slope falls like e^(−τρ), so that it feels an error of ρ, not of log ρ;
    and it may be taken for 0 when that is below 1e-31.
    """
    logps, old, A, ref, w = (arguments[name] for name in ARRAYS)
    surrogate, kl, level = arguments["surrogate"], arguments["kl"], arguments["importance_sampling_level"]
    tokens = reference._Tokens.of(logps, arguments["mask"], arguments["cu_seqlens"])
    logp, A = tokens.each("logps", logps), tokens.each("advantages", A, True)
    d = np.zeros_like(logp) if old is None else logp - tokens.each("old_logps", old)
    w = np.ones_like(logp) if w is None else tokens.each("rollout_is_weights", w, True)
    rho, unit = np.exp(shared(d, tokens, level)), eps * (1 + shared(np.abs(d), tokens, level))

    s, through, direct = (np.abs(times(w, part)) for part in surrogate_term(surrogate, rho, A, logp))
    if isinstance(surrogate, SAPO):
        through = through * (1 + rho) + 1e-25 * np.abs(times(w, A))
    own = np.exp(d)
    k, beta = np.zeros_like(logp), 0.0
    if kl is not None:
        l, beta = logp - tokens.each("ref_logps", ref), kl.beta
        k, k_through, k_direct = (times(1 + np.abs(l), np.abs(x)) for x in reference.kl_term(kl, own, rho, l))
        through = through + times(beta, k_through)
        direct = direct + times(beta, k_direct + times(rho if kl.importance_weighted else 1.0, np.abs(l)))
    c = reference.aggregation_weights(arguments["aggregation"], tokens.counts, arguments["normalizer"])
    few = 16 if level == TOKEN else 64
    grad = np.zeros(logps.shape)
    grad[tokens.keep] = times(few * unit * tokens.spread(c), shared(through, tokens, level) + direct)

    def of_sum(x, c=c):
        return 64 * np.sum(c * tokens.sums(times(unit, x)))

    def of_mean(x):
        return of_sum(x, 1 / max(logp.size, 1))

    loss, worst = of_sum(s + times(beta, k)), few * unit.max(initial=0)
    found = {"loss": loss, "objective": loss, "surrogate": of_mean(s), "kl": of_mean(k), "ratio_mean": of_mean(rho)}
    found |= {"ratio_min": worst * rho.max(initial=0), "ratio_max": worst * rho.max(initial=0), "ess": 4 * worst}
    found |= {"approx_kl": of_mean(np.abs(d)), "grad": grad}
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

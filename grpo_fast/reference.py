"""The mathematics in plain NumPy: what the kernels are tested against, written to be checked against the papers by eye.

First ``grpo_objective``, over probabilities: also what the benchmarks call "NumPy", and what you can compare with in
one line. Then ``grpo_loss``, which forgets what is masked and then reads like the formula; below it one function for
each idea, in the order of use: the ratio, the policy term, the KL term, the aggregation, the diagnostics; then how
tokens are cut into sequences and checked; last ``rollout_correction``, of trainer and sampler. Nothing here is shared
with the kernels but the options. One file, though a long one: it is read from top to bottom, with a paper beside it.

Notation, per unmasked token t of sequence i: ρ = π_θ/π_old, A the advantage, l = log π_θ − log π_ref, s the policy
term, w the rollout weight, k the KL estimate (times ρ when importance-weighted), u the loss weight, n_i the unmasked
tokens of sequence i, c_i its aggregation weight, B the number of sequences::

    objective = Σ_i c_i·Σ_t u·(w·s − β·k),    loss = −objective

Where an ``exp`` overflows, ρ or k is ∞, and 0·∞ is 0 (``times``) as 0·x is for every finite x. What follows from it:

* ``Clip``, ρ = ∞. A > 0: s = (1 + ε_high)·A, gradient 0. A = 0: both 0. A < 0: s = δ·A and gradient 0 with a δ,
  s = −∞ and gradient −∞ without.
* ``CISPO``: w·A is finite, whatever ρ is. ``SAPO``, ρ = ∞: s = (4/τ)·A; gradient 0, as σ′ falls faster than ρ grows.
* ρ·k with one factor 0 and the other ∞ is 0, and so are ρ·∂k and β·k: a token that the ratio has switched off costs
  nothing. Different infinities are not settled: ∞ − ∞ stays NaN.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import as_array, not_negative, one_of
from .rollout_terms import Reject, RolloutOptions, WeightLevel, WeightMode
from .terms import (
    BETA,
    CISPO,
    DEFAULT_SURROGATE,
    EPSILON,
    GMPO,
    K1,
    K2,
    K3,
    KL,
    SAPO,
    TV,
    VESPO,
    Aggregation,
    Band,
    BinaryKL,
    Clip,
    Level,
    Options,
    Surrogate,
    TrustRegion,
    Unclipped,
)
from .terms.surrogates import OF_SEQUENCES

Floats: TypeAlias = NDArray[np.floating]


@np.errstate(all="ignore")
def grpo_objective(
    rhos: ArrayLike,
    A: ArrayLike,
    pi_theta_old: ArrayLike,
    pi_theta_ref: ArrayLike,
    epsilon: float = EPSILON,
    beta: float = BETA,
    *,
    importance_weighted: bool = True,
) -> float:
    """mean( min(ρA, clip(ρ, 1−ε, 1+ε)·A) − β·ρ·(r − log r − 1) ), r = π_ref/(ρ·π_old); nothing is checked.

    This is DeepSeekMath, arXiv:2402.03300, Eq. 3, with the KL term of DeepSeek-V3.2, arXiv:2512.02556, Eq. 7. With
    ``importance_weighted=False`` the KL term is DeepSeekMath's own, Eq. 4, which has no ρ.
    """
    named = {"rhos": rhos, "A": A, "pi_theta_old": pi_theta_old, "pi_theta_ref": pi_theta_ref}
    ρ, A, π_old, π_ref = (as_array(name, x) for name, x in named.items())
    r = π_ref / (ρ * π_old)
    surrogate = np.minimum(ρ * A, np.clip(ρ, 1 - epsilon, 1 + epsilon) * A)
    kl = r - np.log(r) - 1
    if importance_weighted:
        kl = ρ * kl
    return float(np.mean(surrogate - beta * kl))


class LossReference(NamedTuple):
    """What ``grpo_loss`` returns: the loss, ∂loss/∂logps (or None) in the shape of ``logps``, and every diagnostic."""

    loss: float
    grad: Floats | None
    stats: dict[str, float]


@np.errstate(all="ignore")  # the header says what an overflow becomes
def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    advantages: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    surrogate: Surrogate = DEFAULT_SURROGATE,
    kl: KL | None = None,
    importance_sampling_level: Level = "token",
    rollout_is_weights: ArrayLike | None = None,
    loss_weights: ArrayLike | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | None = None,
    trust_region: TrustRegion | None = None,
    grad: bool = False,
) -> LossReference:
    """The GRPO-family loss, its gradient and its diagnostics.

    ::

        loss         = −Σ_i c_i·Σ_t u·(M·w·s − β·k)
        ∂loss/∂logp  = −c_i·( D[u·(M·w·∂s/∂log ρ − β·∂k/∂log ρ)] + u·(M·w·∂s/∂logp − β·∂k/∂logp) )

    where D is ∂log ρ/∂logp: the mean over the sequence at sequence level (of GMPO, at the tokens that it does not
    clip), the identity at the others.

    Parameters
    ----------
    logps : (B, T) padded, or (N,) packed with ``cu_seqlens`` (S + 1,), or (N,) plain: one sequence
        log π_θ. float32, bfloat16 and float16 compute in float32, everything else in float64; sums are float64.
    old_logps, ref_logps : like ``logps``, or None
        log π_old, None being on-policy: ρ = 1 with the gradient of ρ; log π_ref, read when there is a ``kl``.
    advantages, rollout_is_weights, loss_weights : like ``logps``, or one per sequence: (B,), (S,), (B, 1), (S, 1)
        A (of GMPO one per sequence), w and u; w scales the policy term only, u both terms. Packed, (1, N) is one per
        token, too; (S,) with S = N is refused unless all sequences have one token, since it could be either.
    mask : like ``logps``, bools or 0/1
        What the other arrays hold where it is 0 is never looked at.
    surrogate, kl : options from ``terms``
        s and k.
    importance_sampling_level : "token", "sequence" or "sequence_token"
        ρ of each token, or for all its tokens the geometric mean over the sequence (GSPO, arXiv:2507.18071, Eq. 7); or
        that mean as a constant, times π_θ over itself held constant (GSPO-token, section 4.3).
    aggregation, normalizer
        c_i, see ``aggregation_weights``.
    trust_region : an option from ``terms``, or None
        M, which tokens keep their policy term: all without one. It is held constant.
    grad : bool
        Whether to compute the gradient.

    Returns
    -------
    LossReference
        ``stats`` are means over unmasked tokens, without u, by the names of ``grpo_fast.Stats``; NaN where one does not
        apply. A batch without an unmasked token has loss and gradient 0, whatever the normalizer.

    Raises
    ------
    ValueError, TypeError
        Shapes that do not fit, an unknown option. Values are not checked: an unmasked NaN gives NaN.
    """
    Options(surrogate, kl, importance_sampling_level, aggregation, normalizer, trust_region)  # refuses what is none
    logps = as_array("logps", logps)
    logps = logps.astype(np.float32 if logps.dtype in (np.float32, np.float16) else np.float64)
    tokens = _Tokens.of(logps, mask, cu_seqlens)
    level = importance_sampling_level

    logp = tokens.each("logps", logps)
    old = logp if old_logps is None else tokens.each("old_logps", old_logps)
    A = tokens.each("advantages", advantages, or_one_per_sequence=True)
    if isinstance(surrogate, GMPO):
        tokens.refuse_advantages_of_tokens(advantages)
    w = u = np.ones_like(logp)
    if rollout_is_weights is not None:
        w = tokens.each("rollout_is_weights", rollout_is_weights, or_one_per_sequence=True)
    if loss_weights is not None:
        u = tokens.each("loss_weights", loss_weights, or_one_per_sequence=True)
    log_ratio = logp - old
    rho = np.exp(shared(log_ratio, tokens, level))

    keeps = kept(trust_region, rho, A, logp, old)
    terms = policy_term(surrogate, log_ratio, A, logp, tokens, level)
    s, s_through_ratio, s_direct = (np.where(keeps, times(w, part), 0) for part in terms)
    k = k_through_ratio = k_direct = np.zeros_like(logp)
    beta = 0.0
    if kl is not None:
        ref = tokens.each("ref_logps", ref_logps)
        k, k_through_ratio, k_direct = kl_term(kl, np.exp(log_ratio), rho, logp - ref)
        beta = kl.beta

    c = aggregation_weights(aggregation, tokens.counts, normalizer)
    objective = float(np.sum(c * tokens.sums(times(u, s - times(beta, k)))))
    gradient = None
    if grad:
        policy, penalty = times(u, s_through_ratio), times(u, times(beta, k_through_ratio))
        if level == "sequence":
            policy, penalty = shared(policy, tokens, level), shared(penalty, tokens, level)
        if isinstance(surrogate, GMPO):
            policy = np.where(bounded(surrogate, log_ratio, A) == log_ratio, policy, 0)
        direct = times(u, s_direct - times(beta, k_direct))
        gradient = np.zeros_like(logps)
        gradient[tokens.keep] = -tokens.spread(c.astype(logp.dtype)) * (policy - penalty + direct)

    stats = diagnostics(surrogate, rho, A, log_ratio)
    stats["trust_region_ratio"] = math.nan if trust_region is None else _mean(~keeps)
    stats["kl"] = math.nan if kl is None else _mean(k)
    stats["approx_kl"] = _mean(old - logp)
    stats["surrogate"] = _mean(s)
    stats |= {"tokens": logp.size, "sequences": c.size, "objective": objective, "loss": 0.0 - objective}
    return LossReference(stats["loss"], gradient, stats)


def times(a: Floats | float, b: Floats) -> Floats:
    """a·b with 0·∞ = 0."""
    return np.where((a == 0) | (b == 0), 0, a * b)


def shared(x: Floats, tokens: "_Tokens", level: Level) -> Floats:
    """``x`` itself at token level; at the others its mean over the sequence, at each of its tokens.

    Makes log ρ from log π_θ − log π_old, and, being its own transpose, carries ∂/∂log ρ back to the log-probabilities,
    but at the level "sequence_token", where the mean is held constant.
    """
    if level == "token":
        return x
    return tokens.spread((tokens.sums(x) / np.maximum(tokens.counts, 1)).astype(x.dtype))


def policy_term(
    surrogate: Surrogate, log_ratio: Floats, A: Floats, logp: Floats, tokens: "_Tokens", level: Level
) -> tuple[Floats, Floats, Floats]:
    """The policy term s, ∂s/∂log ρ, and the part of ∂s/∂logp that does not pass through ρ, of every surrogate.

    ``log_ratio`` is log π_θ − log π_old of each token.
    """
    if isinstance(surrogate, OF_SEQUENCES):
        return surrogate_term_of_sequence(surrogate, log_ratio, A, logp, tokens, level)
    return surrogate_term(surrogate, np.exp(shared(log_ratio, tokens, level)), A, logp)


def surrogate_term(surrogate: Surrogate, rho: Floats, A: Floats, logp: Floats) -> tuple[Floats, Floats, Floats]:
    """As ``policy_term``, of those that are made of the ρ of each token; sources: ``terms``.

    Bounds are Python floats, summed in float64; NumPy rounds them once, to the dtype of ρ.
    """
    zero = np.zeros_like(rho)
    match surrogate:
        case Clip(epsilon, epsilon_high, delta):
            unclipped = times(np.minimum(rho, delta), A)
            clipped = times(np.clip(rho, 1 - epsilon, 1 + epsilon_high), A)
            unbound = (unclipped <= clipped) & (rho <= delta)  # where min(ρ, δ) is ρ
            return np.minimum(unclipped, clipped), np.where(unbound, unclipped, 0), zero
        case CISPO(ratio_max, ratio_min):
            weight = times(np.clip(rho, ratio_min, ratio_max), A)
            return times(weight, logp), zero, weight
        case SAPO(tau_pos, tau_neg):
            tau = np.where(A > 0, tau_pos, tau_neg).astype(rho.dtype)
            x = tau * (rho - 1)
            slope = 4 * sigmoid(x) * sigmoid(-x)  # σ(−x) is 1 − σ(x) without the cancellation
            return times(4 / tau * sigmoid(x), A), times(slope, times(rho, A)), zero
        case Unclipped():
            unclipped = times(rho, A)
            return unclipped, unclipped, zero
    raise TypeError(f"surrogate must be a Clip, CISPO, SAPO, Unclipped, VESPO or GMPO, got {surrogate!r}")


def surrogate_term_of_sequence(
    surrogate: VESPO | GMPO, log_ratio: Floats, A: Floats, logp: Floats, tokens: "_Tokens", level: Level
) -> tuple[Floats, Floats, Floats]:
    """As ``policy_term``, of those that are made of all log-ratios of a sequence."""
    zero = np.zeros_like(logp)
    match surrogate:
        case VESPO(k_pos, lambda_pos, k_neg, lambda_neg):
            total = tokens.spread(tokens.sums(np.clip(log_ratio, -20, 20)))
            log_w = np.clip(total, math.log(1e-8), 20).astype(logp.dtype)
            k, lambda_ = np.where(A >= 0, k_pos, k_neg), np.where(A >= 0, lambda_pos, lambda_neg)
            weight = times(np.exp(lambda_ + k * log_w - lambda_ * np.exp(log_w)).astype(logp.dtype), A)
            return times(weight, logp), zero, weight
        case GMPO():
            s = times(np.exp(shared(bounded(surrogate, log_ratio, A), tokens, level)), A)
            return s, s, zero


def bounded(surrogate: GMPO, log_ratio: Floats, A: Floats) -> Floats:
    """c_t of ``GMPO``: the log-ratio, no further from 0 in the direction of A than its bound."""
    return np.where(A > 0, np.minimum(log_ratio, surrogate.epsilon_high), np.maximum(log_ratio, -surrogate.epsilon))


def kept(trust_region: TrustRegion | None, rho: Floats, A: Floats, logp: Floats, old: Floats) -> NDArray[np.bool_]:
    """Which tokens keep their policy term, M of ``terms``; where A is 0 there is none to lose.

    π = exp(min(log π, 0)), and 1 − π = −expm1(min(log π, 0)), without cancellation.
    """
    if trust_region is None:
        return np.ones(rho.shape, bool)
    logp, old = np.minimum(logp, 0), np.minimum(old, 0)
    match trust_region:
        case TV(delta, delta_low):
            moved = np.exp(logp) - np.exp(old)
            dropped = ((A > 0) & (moved > delta)) | ((A < 0) & (moved < -delta_low))
        case BinaryKL(delta, delta_low):
            divergence = binary_kl(logp, old)
            up, down = (A > 0) & (logp > old), (A < 0) & (logp < old)
            dropped = (up & (divergence > delta)) | (down & (divergence > delta_low))
        case Band(ratio_min, ratio_max):
            dropped = (A != 0) & ((rho < ratio_min) | (rho > ratio_max))
        case _:
            raise TypeError(f"trust_region must be a TV, BinaryKL, Band or None, got {trust_region!r}")
    return ~dropped


def binary_kl(logp: Floats, old: Floats) -> Floats:
    """KL(π_old ‖ π_θ) of the choice between a token and all others, of ``BinaryKL``; both log π are at most 0."""
    other, other_old = 0 - np.expm1(logp), 0 - np.expm1(old)  # never −0, whose reciprocal is −∞
    divergence: Floats = np.exp(old) * (old - logp) + times(other_old, np.log(other_old / other))
    return divergence


def sigmoid(x: Floats) -> Floats:
    """σ(x) = 1/(1 + e^(−x))."""
    result: Floats = 1 / (1 + np.exp(-x))
    return result


def kl_term(kl: KL, own_rho: Floats, rho: Floats, l: Floats) -> tuple[Floats, Floats, Floats]:
    """The KL term as penalised, without β: its value, and its derivative through log ρ and beside it.

    The token's own ρ multiplies it, whose derivative meets that of k in one token; and their sum is written down
    instead of summed: of e^(−l) in k3 and −e^(−l) in its slope nothing is left. ("sequence": the ρ of the sequence.)
    """
    match kl:
        case K1():
            k, slope, k_plus_slope = l, np.ones_like(l), 1 + l
        case K2():
            k, slope, k_plus_slope = l * l / 2, l, l * (1 + l / 2)
        case K3():
            k, slope, k_plus_slope = k3(l), -np.expm1(-l), l
        case _:
            raise TypeError(f"kl must be a K1, K2, K3 or None, got {kl!r}")
    zero = np.zeros_like(l)
    if kl.importance_weighted == "sequence":
        return times(rho, k), times(rho, k), times(rho, slope)
    if kl.importance_weighted:
        return times(own_rho, k), zero, times(own_rho, k_plus_slope)
    match kl.gradient:
        case "score":
            return k, zero, times(own_rho, k_plus_slope)
        case "k2":
            return k, zero, l
    return k, zero, slope


def k3(l: Floats) -> Floats:
    """k3 = e^(−l) + l − 1 within 3 ulp (the worst seen: 2.6), never negative.

    With d = −l this is e^d − 1 − d. Beyond |d| = 1, ``expm1(d) − d`` loses two bits at most. Within, where it would
    lose all of them, Taylor: d²/2·(1 + d/3·(1 + d/4·(… (1 + d/20)))), whose rest is below 2⁻⁶⁰ of the sum.
    """
    d = -l
    series = np.ones_like(d)
    for n in range(20, 2, -1):
        series = 1 + d / n * series
    return np.where(np.abs(d) < 1, d * d / 2 * series, np.expm1(d) - d)


def aggregation_weights(aggregation: Aggregation, counts: NDArray[np.int64], normalizer: float | None) -> Floats:
    """The weight c_i of each token of sequence i, float64 (S,); n_i = max(counts_i, 1), B = S, B and Σn at least 1.

    =====================  =========  =======================  =================================================
    aggregation            c_i        replaced by normalizer   also known as
    =====================  =========  =======================  =================================================
    "token-mean"           1/Σn       Σn                       verl; TRL "bnpo", "dapo" (arXiv:2503.14476)
    "token-sum"            1          1                        verl; Dr. GRPO (arXiv:2503.20783) with B·max_length
    "seq-mean-token-mean"  1/(B·n_i)  B                        TRL "grpo" (arXiv:2402.03300, Eq. 3)
    "seq-mean-token-sum"   1/B        B                        verl
    =====================  =========  =======================  =================================================
    """
    denominators = {
        "token-mean": max(int(counts.sum()), 1),
        "token-sum": 1,
        "seq-mean-token-mean": max(counts.size, 1),
        "seq-mean-token-sum": max(counts.size, 1),
    }
    counted = denominators[one_of("aggregation", aggregation, tuple(denominators))]
    denominator = counted if normalizer is None else not_negative("normalizer", normalizer)
    if denominator == 0:
        if counts.any():
            raise ValueError(f"normalizer must be above 0 where a token counts, got {normalizer!r}")
        denominator = 1
    within = np.maximum(counts, 1) if aggregation == "seq-mean-token-mean" else np.ones_like(counts)
    return 1 / (denominator * within)


def diagnostics(surrogate: Surrogate, rho: Floats, A: Floats, log_ratio: Floats) -> dict[str, float]:
    """Which part of the tokens is clipped, and the spread of ρ; names as TRL logs them, NaN where none applies.

    The effective sample size, ess = (Σρ)²/(N·Σρ²), is 1 when all ratios are equal and 1/N when one has it all.
    """
    names = ("clip_ratio_low", "clip_ratio_high", "clip_ratio_region", "clip_ratio_delta", "cispo_clip_ratio")
    stats = dict.fromkeys(names, math.nan)
    match surrogate:
        case Clip(epsilon, epsilon_high, delta):
            low, high = (rho < 1 - epsilon) & (A < 0), (rho > 1 + epsilon_high) & (A > 0)
            stats["clip_ratio_low"] = _mean(low)
            stats["clip_ratio_high"] = _mean(high)
            stats["clip_ratio_region"] = _mean(low | high)
            stats["clip_ratio_delta"] = _mean((rho > delta) & (A < 0))
        case GMPO(epsilon, epsilon_high):
            low, high = (log_ratio < -epsilon) & (A < 0), (log_ratio > epsilon_high) & (A > 0)
            stats["clip_ratio_low"] = _mean(low)
            stats["clip_ratio_high"] = _mean(high)
            stats["clip_ratio_region"] = _mean(low | high)
        case CISPO(ratio_max, _):
            stats["cispo_clip_ratio"] = _mean((rho > ratio_max) & (A > 0))
    rho = rho.astype(np.float64)
    stats["ratio_mean"] = _mean(rho)
    stats["ratio_min"] = float(rho.min()) if rho.size else math.nan
    stats["ratio_max"] = float(rho.max()) if rho.size else math.nan
    stats["ess"] = float(np.sum(rho) ** 2 / (rho.size * np.sum(rho * rho)))
    return stats


def _mean(x: Floats | NDArray[np.bool_]) -> float:
    """The mean in float64; of nothing, NaN."""
    return float(np.sum(x, dtype=np.float64) / np.float64(x.size))


class _Tokens(NamedTuple):
    """The unmasked tokens of a batch, as one flat array in which sequence i owns the next ``counts[i]`` elements."""

    keep: NDArray[np.bool_]  # in the shape of the caller's arrays
    lengths: NDArray[np.int64]  # (S,), masked tokens included
    counts: NDArray[np.int64]  # (S,)
    dtype: np.dtype[np.floating]

    @classmethod
    def of(cls, logps: Floats, mask: ArrayLike | None, cu_seqlens: ArrayLike | None) -> "_Tokens":
        if logps.ndim not in (1, 2):
            raise ValueError(f"logps must be (B, T) or (N,), got shape {logps.shape}")
        if cu_seqlens is None:
            rows = len(logps) if logps.ndim == 2 else 1
            bounds = np.arange(rows + 1, dtype=np.int64) * logps.shape[-1]
        else:
            bounds = np.asarray(cu_seqlens)
            if logps.ndim != 1 or bounds.ndim != 1 or bounds.dtype.kind not in "iu":
                raise ValueError(f"cu_seqlens must be 1-D ints beside 1-D logps, got {bounds.dtype} {bounds.shape}")
            if bounds.size < 1 or bounds[0] != 0 or bounds[-1] != logps.size or (bounds[1:] < bounds[:-1]).any():
                raise ValueError(f"cu_seqlens must rise from 0 to {logps.size}, the size of logps, got {bounds}")
        keep = np.ones(logps.shape, bool) if mask is None else np.asarray(mask)
        if keep.shape != logps.shape:
            raise ValueError(f"mask must have shape {logps.shape} as logps, got {keep.shape}")
        if not np.isin(keep, (0, 1)).all():
            raise ValueError(f"mask must hold bools or 0/1, got {keep[~np.isin(keep, (0, 1))][0]!r}")
        keep = keep.astype(bool)
        counts = np.diff(np.append(0, np.cumsum(keep, dtype=np.int64))[bounds])
        return cls(keep, np.diff(bounds), counts, logps.dtype)

    def each(self, name: str, values: ArrayLike | None, or_one_per_sequence: bool = False) -> Floats:
        """``values`` of the unmasked tokens."""
        if values is None:
            raise ValueError(f"{name} must be given with these options, got None")
        values = np.atleast_1d(as_array(name, values))
        per_token = values.shape == self.keep.shape
        per_sequence = False
        if or_one_per_sequence:
            per_token |= self.keep.ndim == 1 and values.shape == (1, self.keep.size)
            per_sequence = values.shape in ((self.counts.size,), (self.counts.size, 1))
        if per_token and per_sequence and (self.lengths != 1).any():
            raise ValueError(f"{name} must have shape (1, N), one per token, or (S, 1), one per sequence, as N = S")
        if per_token:
            return values.reshape(self.keep.shape)[self.keep].astype(self.dtype)
        if per_sequence:
            return self.spread(values.reshape(-1).astype(self.dtype))
        or_else = f" or {self.counts.shape}, one per sequence" if or_one_per_sequence else ""
        raise ValueError(f"{name} must have shape {self.keep.shape} as logps{or_else}, got {values.shape}")

    def refuse_advantages_of_tokens(self, advantages: ArrayLike) -> None:
        """Raise the ValueError unless there is one advantage for each sequence."""
        shape, per_sequence = np.shape(as_array("advantages", advantages)), self.counts.shape
        if shape not in ((), per_sequence, (*per_sequence, 1)) and (self.lengths > 1).any():
            raise ValueError(
                f"advantages must be one per sequence, {per_sequence}, with a GMPO, "
                f"got one per token, {self.keep.shape}"
            )

    def spread(self, x: Floats) -> Floats:
        """One value per sequence, at each of its tokens."""
        return np.repeat(x, self.counts)

    def sums(self, x: Floats | NDArray[np.bool_]) -> Floats:
        """The float64 sum of each sequence."""
        starts = np.cumsum(self.counts) - self.counts
        # reduceat wants every start inside the array, hence the 0, and does not know empty sequences, hence the where
        return np.where(self.counts > 0, np.add.reduceat(np.append(x, 0.0), starts), 0.0)


# --- trainer and sampler ----------------------------------------------------------------------------------------------
class RolloutReference(NamedTuple):
    """What ``rollout_correction`` returns: weights and mask in the shape of ``old_logps``, and every diagnostic."""

    weights: Floats
    mask: NDArray[np.bool_]
    stats: dict[str, float]


@np.errstate(all="ignore")
def rollout_correction(
    old_logps: ArrayLike,
    rollout_logps: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    lower: float | None = None,
    upper: float | None = None,
    reject: Reject | Sequence[Reject] = (),
    normalize: bool = False,
) -> RolloutReference:
    """Importance weights r = π_old/π_rollout between trainer and sampler, what they reject, and their diagnostics.

    The arguments are those of ``grpo_fast.rollout_correction``, the names of the diagnostics those of
    ``grpo_fast.RolloutStats``. What is of a whole sequence is float64 in either dtype; sequences without an unmasked
    token have none of it. A log r that overflows is the largest number there is (in float64, 1e300), so that no
    infinities meet.
    """
    options = RolloutOptions(level, mode, lower, upper, reject)
    old_logps = as_array("old_logps", old_logps)
    old_logps = old_logps.astype(np.float32 if old_logps.dtype in (np.float32, np.float16) else np.float64)
    tokens = _Tokens.of(old_logps, mask, cu_seqlens)
    old, rollout = tokens.each("old_logps", old_logps), tokens.each("rollout_logps", rollout_logps)
    n, some = np.maximum(tokens.counts, 1), tokens.counts > 0

    missing = np.isnan(rollout)
    rollout = np.where(missing, old, rollout)
    most = min(float(np.finfo(old.dtype).max), 1e300)
    log_r = np.clip(old - rollout, -most, most)
    total = tokens.sums(log_r)
    terms = {"ratio": log_r, "k2": log_r / 2 * log_r, "k3": k3(-log_r)}
    r = np.exp(log_r)

    raw = {"token": r, "sequence": np.exp(total)[some], "geometric": np.exp(total / n)[some]}[level]
    w = np.clip(raw, *options.bounds)
    if mode == "mask":
        w = np.where((raw < options.bounds[0]) | (raw > options.bounds[1]), 0, raw)
    if level != "token":
        w = np.repeat(w, tokens.counts[some]).astype(old.dtype)

    keeps = np.ones(old.shape, bool)
    for statistic, of, low, high in options.reject:
        values = terms[statistic]
        if of == "token":
            values = r if statistic == "ratio" else values
        else:
            values = tokens.spread(_of_sequence(values, of, tokens))
            values = np.exp(values) if statistic == "ratio" else values
        keeps &= (values >= low) & (values <= high)
    w = np.where(keeps, w, 0)

    kept = tokens.keep.copy()
    kept[tokens.keep] = keeps
    weights = np.zeros_like(old_logps)
    mean = _mean(w) if level == "token" else _mean((tokens.sums(w) / n)[some])
    weights[tokens.keep] = np.where((w == 0) | (w == math.inf), w, w / mean) if normalize else w
    return RolloutReference(weights, kept, _rollout_stats(options, tokens, (old, rollout, missing), raw, w, keeps))


def _of_sequence(x: Floats, of: str, tokens: "_Tokens") -> Floats:
    """Of each sequence the sum, mean, least or largest of a statistic, whose logarithm is summed if it is the ratio."""
    if of in ("sequence", "seq_sum"):
        return tokens.sums(x)
    if of in ("geometric", "seq_mean"):
        return tokens.sums(x) / np.maximum(tokens.counts, 1)
    starts, fill = np.cumsum(tokens.counts) - tokens.counts, math.inf if of == "seq_min" else -math.inf
    extreme: Floats = (np.minimum if of == "seq_min" else np.maximum).reduceat(np.append(x, fill), starts)
    return extreme.astype(np.float64)


def _rollout_stats(
    options: RolloutOptions,
    tokens: "_Tokens",
    logps: tuple[Floats, Floats, NDArray[np.bool_]],
    raw: Floats,
    w: Floats,
    keeps: NDArray[np.bool_],
) -> dict[str, float]:
    """How far trainer and sampler are apart, and what was made of it; perplexities are of what is not missing."""
    old, rollout, missing = logps
    some, w = tokens.counts > 0, w.astype(np.float64)
    most = min(float(np.finfo(old.dtype).max), 1e300)
    log_r = np.clip(old - rollout, -most, most)
    known = tokens.sums(~missing)
    has = known > 0
    mean_old, mean_rollout = (tokens.sums(np.where(missing, 0, x))[has] / known[has] for x in (old, rollout))
    π_old, π_rollout = (np.exp(np.minimum(x, 0)) for x in (old, rollout))
    has_bounds = options.mode != "raw"
    extremes = {f"{kind}min": float(x.min()) if x.size else math.nan for kind, x in (("", w), ("raw_", raw))}
    extremes |= {f"{kind}max": float(x.max()) if x.size else math.nan for kind, x in (("", w), ("raw_", raw))}
    squares, least = w.size * float(np.sum(w * w)), 2.0**-1022 / 2.0**-52  # below it, they have lost digits
    return extremes | {
        "mean": _mean(w),
        "raw_mean": _mean(raw),
        "fraction_low": _mean(raw < options.bounds[0]) if has_bounds else math.nan,
        "fraction_high": _mean(raw > options.bounds[1]) if has_bounds else math.nan,
        "rejected_tokens": _mean(~keeps),
        "rejected_sequences": _mean(tokens.sums(keeps)[some] == 0),
        "k1": _mean(-log_r),
        "k3": _mean(k3(-log_r)),
        "chi2_token": _mean(np.exp(log_r).astype(np.float64) ** 2) - 1,
        "chi2_sequence": _mean(np.exp(tokens.sums(log_r)[some]) ** 2) - 1,
        "ess": float(np.sum(w)) ** 2 / squares if least < squares < math.inf else math.nan,
        "train_ppl": _mean(np.exp(-mean_old)),
        "rollout_ppl": _mean(np.exp(-mean_rollout)),
        "ppl_ratio": _mean(np.exp(mean_rollout - mean_old)),
        "prob_diff": _mean(np.abs(π_old - π_rollout)[~missing]),
        **{"tokens": old.size, "sequences": tokens.counts.size, "missing": int(missing.sum())},
    }

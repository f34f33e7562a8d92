"""What tests of the loss share: a table of choices that holds every pair, data for each row of it, and the textbook."""

from typing import Any, NamedTuple

import numpy as np

from grpo_fast import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped

F8, F4 = np.float64, np.float32
LEVELS = TOKEN, SEQ = "token", "sequence"
SEQ_TOKEN = "sequence_token"
ARRAYS = ["logps", "old_logps", "advantages", "ref_logps", "rollout_is_weights", "loss_weights"]
MEAN, SUM, SEQ_MEAN, SEQ_SUM = "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"


# --- the combinations -------------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """One choice of everything."""

    surrogate: Any
    kl: Any
    level: str
    dtype: Any
    layout: str  # padded, with a mask; packed, without; holes: packed with a mask; plain: one sequence, without
    advantages: str  # one per …
    weights: str | None  # one per …
    aggregation: str
    normalizer: float | None
    on_policy: bool
    grad: bool | str
    loss_weights: str | None = None  # one per …


# fmt: off
COMBINATIONS = [Row(*values) for values in [
    (Clip(),              None,           SEQ,   F8, "holes",  TOKEN, TOKEN, SUM,      None, True,  "array"),
    (Clip(0.1, 0.3, 1.8), None,           SEQ,   F4, "plain",  SEQ,   SEQ,   MEAN,     3.7,  False, "array"),
    (CISPO(1.2, 0.8),     None,           TOKEN, F8, "packed", TOKEN, None,  SEQ_SUM,  None, False, True),
    (SAPO(),              None,           SEQ,   F4, "padded", TOKEN, TOKEN, SEQ_MEAN, 3.7,  False, False),
    (Clip(),              K1(0.3),        SEQ,   F4, "padded", SEQ,   None,  SEQ_SUM,  3.7,  False, "array"),
    (Clip(0.1, 0.3, 1.8), K1(0.3),        TOKEN, F8, "holes",  SEQ,   TOKEN, MEAN,     3.7,  True,  False),
    (CISPO(1.2, 0.8),     K1(0.3),        SEQ,   F4, "plain",  TOKEN, TOKEN, SUM,      3.7,  False, True),
    (SAPO(),              K1(0.3),        TOKEN, F8, "packed", SEQ,   SEQ,   SEQ_MEAN, None, False, "array"),
    (Clip(),              K1(0.3, False), SEQ,   F8, "holes",  SEQ,   SEQ,   SUM,      None, False, "array"),
    (Clip(0.1, 0.3, 1.8), K1(0.3, False), TOKEN, F8, "padded", TOKEN, TOKEN, MEAN,     3.7,  True,  False),
    (CISPO(1.2, 0.8),     K1(0.3, False), TOKEN, F4, "packed", TOKEN, None,  SEQ_MEAN, 3.7,  False, "array"),
    (SAPO(),              K1(0.3, False), TOKEN, F8, "plain",  SEQ,   TOKEN, SEQ_SUM,  None, False, True),
    (Clip(),              K2(0.3),        SEQ,   F8, "packed", TOKEN, TOKEN, MEAN,     None, False, "array"),
    (Clip(0.1, 0.3, 1.8), K2(0.3),        TOKEN, F8, "holes",  TOKEN, SEQ,   SEQ_SUM,  3.7,  False, "array"),
    (CISPO(1.2, 0.8),     K2(0.3),        SEQ,   F4, "plain",  SEQ,   TOKEN, SEQ_MEAN, None, True,  False),
    (SAPO(),              K2(0.3),        TOKEN, F4, "padded", SEQ,   None,  SUM,      None, False, True),
    (Clip(),              K2(0.3, False), TOKEN, F4, "packed", SEQ,   None,  SEQ_SUM,  3.7,  True,  True),
    (Clip(0.1, 0.3, 1.8), K2(0.3, False), SEQ,   F8, "padded", SEQ,   TOKEN, SEQ_MEAN, None, False, True),
    (CISPO(1.2, 0.8),     K2(0.3, False), SEQ,   F4, "plain",  SEQ,   SEQ,   SUM,      3.7,  True,  False),
    (SAPO(),              K2(0.3, False), TOKEN, F4, "holes",  TOKEN, None,  MEAN,     3.7,  False, "array"),
    (Clip(),              K3(0.3),        TOKEN, F4, "plain",  TOKEN, None,  SEQ_MEAN, None, False, True),
    (Clip(0.1, 0.3, 1.8), K3(0.3),        TOKEN, F8, "padded", TOKEN, SEQ,   SUM,      3.7,  False, True),
    (CISPO(1.2, 0.8),     K3(0.3),        SEQ,   F8, "holes",  SEQ,   TOKEN, SEQ_SUM,  3.7,  False, "array"),
    (SAPO(),              K3(0.3),        SEQ,   F4, "packed", TOKEN, None,  MEAN,     None, True,  False),
    (Clip(),              K3(0.3, False), TOKEN, F8, "plain",  SEQ,   SEQ,   SEQ_SUM,  None, True,  False),
    (Clip(0.1, 0.3, 1.8), K3(0.3, False), TOKEN, F4, "packed", SEQ,   None,  SUM,      3.7,  False, "array"),
    (CISPO(1.2, 0.8),     K3(0.3, False), TOKEN, F8, "padded", TOKEN, SEQ,   MEAN,     3.7,  False, True),
    (SAPO(),              K3(0.3, False), SEQ,   F8, "holes",  SEQ,   TOKEN, SEQ_MEAN, None, False, True),
]]
# fmt: on

BAND = Band(0.5, 1.6)
#: A trust region, and with what it is tried: every region at every level it knows, with every surrogate once.
REGIONS = [
    (TV(0.1, 0.05), Row(Unclipped(), K3(0.3), TOKEN, F8, "holes", SEQ, None, SEQ_MEAN, None, False, True)),
    (TV(0.1), Row(Clip(0.1, 0.3, 1.8), None, TOKEN, F4, "padded", TOKEN, SEQ, SUM, 3.7, False, "array")),
    (BinaryKL(0.02, 0.01), Row(Unclipped(), None, TOKEN, F8, "packed", TOKEN, TOKEN, MEAN, None, False, True)),
    (BinaryKL(0.03), Row(SAPO(), K1(0.3, False), TOKEN, F4, "plain", SEQ, None, MEAN, 3.7, False, "array")),
    (BAND, Row(CISPO(1.2, 0.8), K3(0.3, False), TOKEN, F8, "padded", SEQ, SEQ, MEAN, None, False, "array")),
    (BAND, Row(Unclipped(), K1(0.3), SEQ, F8, "holes", TOKEN, TOKEN, SUM, None, False, True)),
    (BAND, Row(CISPO(1.2, 0.8), None, SEQ, F4, "packed", SEQ, None, SEQ_MEAN, 3.7, False, True)),
    (BAND, Row(Clip(), K3(0.3), SEQ, F8, "padded", TOKEN, SEQ, MEAN, None, False, False)),
    (None, Row(Unclipped(), K3(0.3), SEQ, F4, "padded", SEQ, SEQ, SUM, None, False, True)),
]

# fmt: off
#: Surrogates of whole sequences, the third level, the KL term's other ratio and gradients, loss weights; and a region.
VARIANTS = [(region, Row(*values)) for region, *values in [
    (None, VESPO(), K3(0.3), SEQ,
        F8, "padded", TOKEN, SEQ, SEQ_MEAN, None, False, True),
    (None, VESPO(1, 2, 0.5, 1), None, SEQ,
        F4, "holes", SEQ, None, SUM, 3.7, False, "array", TOKEN),
    (BAND, VESPO(), K1(0.3, False, "score"), SEQ,
        F8, "packed", TOKEN, TOKEN, MEAN, None, False, True, SEQ),
    (None, GMPO(0.3, 0.5), K1(0.3, "sequence"), SEQ,
        F8, "packed", SEQ, TOKEN, MEAN, None, False, "array", SEQ),
    (None, GMPO(), None, SEQ,
        F4, "padded", SEQ, None, SEQ_MEAN, None, False, True),
    (BAND, GMPO(), K3(0.3), SEQ,
        F8, "holes", SEQ, SEQ, SEQ_SUM, 3.7, False, True, TOKEN),
    (None, Clip(), K3(0.3, False, "score"), SEQ_TOKEN,
        F8, "holes", TOKEN, TOKEN, SEQ_MEAN, None, False, True, TOKEN),
    (None, SAPO(), K2(0.3), SEQ_TOKEN,
        F4, "packed", TOKEN, None, SUM, 3.7, False, "array"),
    (BAND, Unclipped(), K3(0.3, False, "k2"), SEQ_TOKEN,
        F8, "padded", SEQ, SEQ, MEAN, None, False, True, SEQ),
    (None, CISPO(1.2, 0.8), None, SEQ_TOKEN,
        F8, "padded", TOKEN, None, SEQ_SUM, None, False, True),
    (None, Clip(0.1, 0.3, 1.8), K3(0.3), SEQ_TOKEN,
        F4, "plain", TOKEN, SEQ, SEQ_MEAN, None, True, False, TOKEN),
    (None, Clip(), K3(0.3), TOKEN,
        F8, "padded", SEQ, None, SEQ_MEAN, None, False, True, TOKEN),
    (None, CISPO(1.2, 0.8), K1(0.3, False, "score"), TOKEN,
        F4, "packed", TOKEN, TOKEN, SUM, None, False, "array", SEQ),
    (TV(0.1), Unclipped(), K2(0.3, False, "k2"), TOKEN,
        F8, "holes", SEQ, SEQ, MEAN, 3.7, False, True, SEQ),
    (None, SAPO(), K1(0.3, False, "k2"), TOKEN,
        F4, "plain", SEQ, None, SEQ_SUM, 3.7, False, False, TOKEN),
    (None, Unclipped(), K3(0.3, "sequence"), SEQ,
        F8, "plain", SEQ, SEQ, SEQ_SUM, None, False, True, TOKEN),
    (None, Clip(0.1, 0.3, 1.8), K2(0.3, False, "score"), SEQ,
        F4, "holes", TOKEN, None, MEAN, None, False, True, SEQ),
    (None, SAPO(), K2(0.3, "sequence"), SEQ,
        F4, "padded", TOKEN, SEQ, SEQ_MEAN, None, False, "array"),
    (None, CISPO(1.2, 0.8), K3(0.3, False, "score"), SEQ,
        F8, "packed", SEQ, None, SUM, None, True, True),
]]
# fmt: on


# --- the data ---------------------------------------------------------------------------------------------------------
BOUNDS = np.array([1 - 0.2, 1 + 0.2, 1 - 0.1, 1 + 0.3, 1.8, 0.8, 1.2, BAND.ratio_min, BAND.ratio_max])
LOG_BOUNDS = np.array([-0.3, 0.5, -0.4, 0.4])  # of GMPO


def batch(row, lengths, drift=0.5, ref_drift=0.5, seed=0, said=True):
    """The arguments of a call: sequences of so many tokens, of which some are masked, and garbage wherever one is.

    Where there are as many tokens as sequences, the shapes of what has one value for either say which, if ``said``.

    No ρ is within 10⁻⁴ of a bound, and of GMPO no token's log ρ. Two ways to compute it differ by (2 + |log ρ|)·eps or
    so, where one may find a token clipped and the other not; so far away both decide alike, in float32, too.
    """
    rng = np.random.default_rng(seed)
    lengths = [sum(lengths)] if row.layout == "plain" else lengths
    which = np.repeat(np.arange(len(lengths)), lengths)  # the sequence of each token
    keep = np.ones(which.size, bool)
    if row.layout == "padded":
        width, n = max(lengths, default=0) + int(rng.integers(3)), np.array(lengths, int)
        begin = rng.choice([np.zeros_like(n), width - n, rng.integers(0, width - n + 1)])[:, None]
        keep = (begin <= np.arange(width)) & (np.arange(width) < begin + n[:, None])
        which = np.broadcast_to(np.arange(n.size)[:, None], keep.shape)
    masked = row.layout in ("padded", "holes")
    if masked:
        keep &= (rng.random(keep.shape) >= rng.choice([0, 0.1, 0.9])) & (rng.random(len(lengths)) < 0.8)[which]

    old = rng.uniform(-4, 0, keep.shape).astype(row.dtype)
    logps = (old + drift * rng.normal(size=keep.shape)).astype(row.dtype)
    if isinstance(row.surrogate, GMPO):
        near = np.isclose((logps.astype(F8) - old)[..., None], LOG_BOUNDS, rtol=0, atol=1e-4)
        logps = np.where(near.any(axis=-1), old, logps)
    log_ratio = logps.astype(F8) - old
    if row.level != TOKEN:
        tokens, total = (np.bincount(which[keep], x, len(lengths)) for x in (None, log_ratio[keep]))
        log_ratio = (total / np.maximum(tokens, 1))[which]
    logps = np.where(np.isclose(np.exp(log_ratio)[..., None], BOUNDS, rtol=1e-4, atol=0).any(axis=-1), old, logps)

    def values(per, draw):
        size = keep.shape if per == TOKEN else len(lengths)
        return (draw(size=size) * (rng.random(size) < 0.9)).astype(row.dtype)

    arrays = {
        "logps": logps,
        "old_logps": None if row.on_policy else old,
        "advantages": values(row.advantages, rng.normal),
        "ref_logps": None if row.kl is None else (logps + ref_drift * rng.normal(size=keep.shape)).astype(row.dtype),
        "rollout_is_weights": None if row.weights is None else values(row.weights, rng.lognormal),
    }
    arrays["loss_weights"] = None if row.loss_weights is None else values(row.loss_weights, rng.lognormal)
    garbage = np.resize(np.array([np.nan, np.inf, -np.inf], row.dtype), keep.shape)
    either = said and keep.shape == (len(lengths),) and set(lengths) != {1}
    per = {"advantages": row.advantages, "rollout_is_weights": row.weights, "loss_weights": row.loss_weights}
    for name, x in arrays.items():
        per_token = per.get(name, TOKEN) == TOKEN
        if x is not None and per_token:
            arrays[name] = np.where(keep, x, garbage)
        if x is not None and name in per and either:
            arrays[name] = arrays[name].reshape((1, -1) if per_token else (-1, 1))
    return arrays | {
        "mask": keep.astype([bool, np.uint8, row.dtype][rng.integers(3)]) if masked else None,
        "cu_seqlens": np.append(0, np.cumsum(lengths)) if row.layout in ("packed", "holes") else None,
        "surrogate": row.surrogate,
        "kl": row.kl,
        "importance_sampling_level": row.level,
        "aggregation": row.aggregation,
        "normalizer": row.normalizer,
    }


# --- the textbook -----------------------------------------------------------------------------------------------------
def textbook(
    logps,
    old_logps,
    advantages,
    ref_logps=None,
    *,
    mask=None,
    cu_seqlens=None,
    surrogate=Clip(),  # noqa: B008 - an immutable value
    kl=None,
    importance_sampling_level=TOKEN,
    rollout_is_weights=None,
    loss_weights=None,
    aggregation=SEQ_MEAN,
    normalizer=None,
):
    """The loss of tensors as trainers write it, for autograd: of all unmasked tokens in a row."""
    import torch

    lengths = cu_seqlens.diff() if cu_seqlens is not None else torch.full(logps.shape[:-1] or (1,), logps.shape[-1])
    keep = torch.ones(logps.numel(), dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[keep]  # of each token

    def tokens(x):
        per_token = x.shape in (logps.shape, (1, *logps.shape))
        return x.reshape(-1)[keep] if per_token else x.reshape(-1)[sequence]

    def sums(x):  # one per sequence
        return x.new_zeros(len(lengths)).index_add(0, sequence, x)

    logp, A = tokens(logps), tokens(advantages)
    counts = sums(torch.ones_like(logp)).clamp(min=1)
    log_ratio = logp - (logp.detach() if old_logps is None else tokens(old_logps))
    own = torch.exp(log_ratio)
    if importance_sampling_level == SEQ:
        log_ratio = (sums(log_ratio) / counts)[sequence]
    ratio = torch.exp(log_ratio)
    if isinstance(surrogate, Clip):
        clipped = torch.clamp(ratio, 1 - surrogate.epsilon, 1 + surrogate.epsilon_high)
        losses = -torch.min(torch.clamp(ratio, max=surrogate.delta) * A, clipped * A)
    elif isinstance(surrogate, CISPO):
        losses = -torch.clamp(ratio, surrogate.ratio_min, surrogate.ratio_max).detach() * A * logp
    else:
        losses = -torch.where(A > 0, *(4 / tau * torch.sigmoid(tau * (ratio - 1)) for tau in surrogate)) * A
    if rollout_is_weights is not None:
        losses = losses * tokens(rollout_is_weights)
    if kl is not None:
        l = logp - tokens(ref_logps)
        k = l if isinstance(kl, K1) else l * l / 2 if isinstance(kl, K2) else torch.exp(-l) + l - 1
        losses = losses + kl.beta * (own * k if kl.importance_weighted else k)
    if loss_weights is not None:
        losses = losses * tokens(loss_weights)
    if aggregation == SEQ_MEAN:
        losses = losses / counts[sequence]
    denominators = {MEAN: max(len(logp), 1), SUM: 1, SEQ_MEAN: len(lengths), SEQ_SUM: len(lengths)}
    return losses.sum() / (denominators[aggregation] if normalizer is None else normalizer)

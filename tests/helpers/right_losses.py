"""Losses as people write them in torch, without a defect, and the pieces that they, and those with one, are made of."""

import math
from typing import Any

import torch

from grpo_fast import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped

MEAN = {"aggregation": "token-mean"}
SEQ = {"aggregation": "seq-mean-token-mean"}


# --- pieces -----------------------------------------------------------------------------------------------------------
def clipped(ratio: Any, advantages: Any, low: float = 0.2, high: float = 0.2) -> Any:
    A = advantages[:, None] if advantages.dim() == 1 else advantages
    return -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def k3(logps: Any, ref_logps: Any) -> Any:
    d = ref_logps - logps
    return d.exp() - d - 1


def token_mean(x: Any, mask: Any) -> Any:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def seq_mean(x: Any, mask: Any) -> Any:
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def mean_log_ratio(logps: Any, old_logps: Any, mask: Any) -> Any:
    return ((logps - old_logps) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def columns(advantages: Any) -> Any:
    return advantages if advantages.dim() == 2 else advantages[:, None]


# --- losses -----------------------------------------------------------------------------------------------------------
def grpo(logps, old_logps, advantages, ref_logps, mask):
    return seq_mean(clipped((logps - old_logps).exp(), advantages) + 0.04 * k3(logps, ref_logps), mask)


def unbiased_kl(logps, old_logps, advantages, ref_logps, mask):
    ratio = (logps - old_logps).exp()
    return seq_mean(clipped(ratio, advantages) + 0.04 * ratio * k3(logps, ref_logps), mask)


def dapo(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages, 0.2, 0.28), mask)


def dr_grpo(logps, old_logps, advantages, mask):
    return (clipped((logps - old_logps).exp(), advantages) * mask).sum() / 1024


def dual_clip(logps, old_logps, advantages, mask):
    A = advantages[:, None]
    loss = clipped((logps - old_logps).exp(), advantages, 0.23, 0.37)
    return token_mean(torch.where(A < 0, torch.min(-A * 2.7, loss), loss), mask)


def gspo(logps, old_logps, advantages, mask):
    return seq_mean(clipped(mean_log_ratio(logps, old_logps, mask).exp(), advantages, 3e-4, 4e-4) + 0 * logps, mask)


def gspo_token(logps, old_logps, advantages, mask):
    x = mean_log_ratio(logps, old_logps, mask).detach() + logps - logps.detach()
    return seq_mean(clipped(x.exp(), advantages, 3e-4, 4e-4), mask)


def cispo(logps, old_logps, advantages, mask):
    A = advantages[:, None] if advantages.dim() == 1 else advantages
    return token_mean(-(logps - old_logps).exp().clamp(max=5).detach() * A * logps, mask)


def sapo(logps, old_logps, advantages, mask):
    A = advantages[:, None]
    tau = torch.where(A > 0, 1.0, 1.05)
    return seq_mean(-4 / tau * torch.sigmoid(tau * ((logps - old_logps).exp() - 1)) * A, mask)


def reinforce(logps, advantages, mask):
    return token_mean(-logps * advantages[:, None], mask)


def on_policy(logps, advantages, mask):
    return token_mean(-(logps - logps.detach()).exp() * advantages[:, None], mask)


def dppo(logps, old_logps, advantages, mask):
    A, moved = advantages[:, None], (logps.exp() - old_logps.exp()).detach()
    keep = ~((A > 0) & (moved > 0.2) | (A < 0) & (moved < -0.15))
    return token_mean(-(logps - old_logps).exp() * A * keep, mask)


def dppo_kl(logps, old_logps, advantages, mask):
    A = advantages[:, None]
    new, old = logps.exp().detach(), old_logps.exp()
    kl = old * (old / new).log() + (1 - old) * ((1 - old) / (1 - new)).log()
    drop = (kl > 0.05) & ((A > 0) & (new > old) | (A < 0) & (new < old))
    return token_mean(-torch.where(drop, 0, (logps - old_logps).exp()) * A, mask)


def icepop(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp().detach()
    keep = (ratio >= 0.5) & (ratio <= 2)
    return token_mean(-ratio * keep * advantages[:, None] * logps, mask)


def gmpo(logps, old_logps, advantages, mask):
    sign = advantages.sign()[:, None]
    x = logps - old_logps
    x = torch.where(sign > 0, x.clamp(max=0.4), x.clamp(min=-0.3))
    ratio = ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    return -(ratio * advantages)[mask.sum(1) > 0].sum() / len(logps)


def vespo(logps, old_logps, advantages, mask):
    A = advantages[:, None]
    w = ((logps - old_logps).clamp(-20, 20) * mask).sum(1, keepdim=True)
    w = w.clamp(-18.420680743952367, 20).detach()
    k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
    return seq_mean(-(lam + k * w - lam * w.exp()).exp() * A * logps, mask)


def k1_in_value(logps, old_logps, advantages, ref_logps, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages) + 0.05 * (logps - ref_logps), mask)


def mse(logps, old_logps, advantages, ref_logps, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages) + 0.05 * 0.5 * (logps - ref_logps) ** 2, mask)


def k3_plus(logps, old_logps, advantages, ref_logps, mask):
    value, slope = k3(logps, ref_logps), 0.5 * (logps - ref_logps) ** 2
    return token_mean(
        clipped((logps - old_logps).exp(), advantages) + 0.05 * (value.detach() - slope.detach() + slope), mask
    )


def unbiased_gradient(logps, old_logps, advantages, ref_logps, mask):
    value, ratio = k3(logps, ref_logps), (logps - old_logps).exp()
    weighted = ratio * value
    return token_mean(clipped(ratio, advantages) + 0.05 * (value.detach() - weighted.detach() + weighted), mask)


# --- with numbers that are not short ----------------------------------------------------------------------------------
def third(logps, old_logps, advantages, ref_logps, mask):
    return token_mean(
        clipped((logps - old_logps).exp(), advantages, 1 / 3, 1 / 7) + 0.1 / 3 * k3(logps, ref_logps), mask
    )


def log_clip(logps, old_logps, advantages, mask):
    A, x = columns(advantages), logps - old_logps
    return token_mean(-torch.min(x.exp() * A, x.clamp(-0.2, 0.2).exp() * A), mask)


def single(logps, old_logps, advantages, mask):
    ratio = (logps.float() - old_logps.float()).exp()
    return token_mean(clipped(ratio, advantages.float(), 0.17, 0.17), mask.float()).double()


def band_of_thirds(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    return token_mean(-ratio * columns(advantages) * ((ratio >= 1 / 3) & (ratio <= 2.5)), mask)


def gmpo_of_thirds(logps, old_logps, advantages, mask):
    sign, x = columns(advantages).sign(), logps - old_logps
    x = sign * torch.min(sign * x, sign * x.clamp(-1 / 3, 2 / 3))
    n = mask.sum(1)
    return -(((x * mask).sum(1) / n.clamp(min=1)).exp() * advantages * (n > 0)).mean()


def gspo_of_tokens(logps, old_logps, advantages, mask):
    x = mean_log_ratio(logps, old_logps, mask).detach() + logps - logps.detach()
    return token_mean(clipped(x.exp(), advantages, 0.1, 0.15), mask)


RIGHT: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (grpo, {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ}),
    "unbiased_kl": (unbiased_kl, {"surrogate": Clip(0.2), "kl": K3(0.04), **SEQ}),
    "dapo": (dapo, {"surrogate": Clip(0.2, 0.28), **MEAN}),
    "dr_grpo": (dr_grpo, {"surrogate": Clip(0.2), "aggregation": "token-sum", "normalizer": 1024.0}),
    "dual_clip": (dual_clip, {"surrogate": Clip(0.23, 0.37, 2.7), **MEAN}),
    "gspo": (gspo, {"surrogate": Clip(3e-4, 4e-4), "importance_sampling_level": "sequence", **SEQ}),
    "gspo_token": (gspo_token, {"surrogate": Clip(3e-4, 4e-4), "importance_sampling_level": "sequence_token", **SEQ}),
    "cispo": (cispo, {"surrogate": CISPO(5.0), **MEAN}),
    "sapo": (sapo, {"surrogate": SAPO(1.0, 1.05), **SEQ}),
    "reinforce": (reinforce, {"surrogate": CISPO(float("inf")), **MEAN}),
    "on_policy": (on_policy, {"surrogate": Unclipped(), **MEAN}),
    "dppo": (dppo, {"surrogate": Unclipped(), "trust_region": TV(0.2, 0.15), **MEAN}),
    "dppo_kl": (dppo_kl, {"surrogate": Unclipped(), "trust_region": BinaryKL(0.05), **MEAN}),
    "icepop": (icepop, {"surrogate": CISPO(float("inf")), "trust_region": Band(0.5, 2), **MEAN}),
    "gmpo": (gmpo, {"surrogate": GMPO(0.3, 0.4), "importance_sampling_level": "sequence", **SEQ}),
    "vespo": (vespo, {"surrogate": VESPO(), "importance_sampling_level": "sequence", **SEQ}),
    "k1": (k1_in_value, {"surrogate": Clip(0.2), "kl": K1(0.05, False), **MEAN}),
    "mse": (mse, {"surrogate": Clip(0.2), "kl": K2(0.05, False), **MEAN}),
    "k3_plus": (k3_plus, {"surrogate": Clip(0.2), "kl": K3(0.05, False, "k2"), **MEAN}),
    "unbiased_gradient": (unbiased_gradient, {"surrogate": Clip(0.2), "kl": K3(0.05, False, "score"), **MEAN}),
}
#: With numbers that are not short: nothing at all is to be told but what NaN does where it is masked.
EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "thirds": (third, {"surrogate": Clip(1 / 3, 1 / 7), "kl": K3(0.1 / 3, False), **MEAN}),
    "clip of the log": (log_clip, {"surrogate": Clip(-math.expm1(-0.2), math.expm1(0.2)), **MEAN}),
    "float32 within": (single, {"surrogate": Clip(0.17), **MEAN}),
    "Band of thirds": (
        band_of_thirds,
        {"surrogate": Unclipped(), "trust_region": Band(1 / 3, 2.5), **MEAN},
    ),
    "GMPO of thirds": (
        gmpo_of_thirds,
        {"surrogate": GMPO(1 / 3, 2 / 3), "importance_sampling_level": "sequence", **SEQ},
    ),
    "GSPO-token": (
        gspo_of_tokens,
        {"surrogate": Clip(0.1, 0.15), "importance_sampling_level": "sequence_token", **MEAN},
    ),
}

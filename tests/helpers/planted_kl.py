"""Losses with a defect of the KL term, or that hold something beside it."""

from typing import Any

import torch
from right_losses import MEAN, SEQ, clipped, grpo, k3, seq_mean, token_mean

from grpo_fast import K1, K3, Clip


# --- KL ---------------------------------------------------------------------------------------------------------------
def _with(penalty: Any) -> Any:
    def loss(logps, old_logps, advantages, ref_logps, mask):
        return seq_mean(
            clipped((logps - old_logps).exp(), advantages) + 0.04 * penalty(logps, old_logps, ref_logps), mask
        )

    return loss


other_direction = _with(lambda p, o, r: k3(r, p))
no_sampling_term = _with(lambda p, o, r: (p - o).exp().detach() * k3(p, r))
kl_detached = _with(lambda p, o, r: k3(p, r).detach())
kl_sign = _with(lambda p, o, r: -k3(p, r))
kl_absolute = _with(lambda p, o, r: (p - r).abs())
kl_lacks_l = _with(lambda p, o, r: (r - p).exp() - 1)
kl_lacks_1 = _with(lambda p, o, r: (r - p).exp() - (r - p))
kl_clamped = _with(lambda p, o, r: k3(p, r).clamp(-10, 10))
kl_log_clamped = _with(lambda p, o, r: k3(p, p - (p - r).clamp(-5, 5)))
kl_inverse_weight = _with(lambda p, o, r: (o - p).exp() * k3(p, r))
kl_clipped_weight = _with(lambda p, o, r: (p - o).exp().clamp(0.8, 1.2) * k3(p, r))
kl_in_a_band = _with(lambda p, o, r: k3(p, r) * ((p - o).abs() < 0.18))
kl_of_old = _with(lambda p, o, r: k3(o, r))
kl_to_old = _with(lambda p, o, r: k3(p, o))
kl_probs = _with(lambda p, o, r: p.exp() * (p - r))


def kl_where_rewarded(logps, old_logps, advantages, ref_logps, mask):
    beta = torch.where(advantages > 0, 0.04, 0.0)[:, None]
    return seq_mean(clipped((logps - old_logps).exp(), advantages) + beta * k3(logps, ref_logps), mask)


def kl_in_reward(logps, old_logps, advantages, ref_logps, mask):
    A = advantages[:, None] - 0.04 * k3(logps, ref_logps).detach()
    return seq_mean(clipped((logps - old_logps).exp(), A), mask)


def kl_in_advantage(logps, old_logps, advantages, ref_logps, mask):
    A = advantages[:, None] - 0.04 * (old_logps - ref_logps)
    return seq_mean(clipped((logps - old_logps).exp(), A), mask)


def k3_in_advantage(logps, old_logps, advantages, ref_logps, mask):
    A = advantages[:, None] - 0.04 * k3(old_logps, ref_logps)
    return seq_mean(clipped((logps - old_logps).exp(), A), mask)


def kl_not_masked(logps, old_logps, advantages, ref_logps, mask):
    policy = seq_mean(clipped((logps - old_logps).exp(), advantages), mask)
    return policy + 0.04 * k3(logps, ref_logps).mean()


def kl_over_tokens(logps, old_logps, advantages, ref_logps, mask):
    policy = seq_mean(clipped((logps - old_logps).exp(), advantages), mask)
    return policy + 0.04 * token_mean(k3(logps, ref_logps), mask)


def kl_summed(logps, old_logps, advantages, ref_logps, mask):
    policy = token_mean(clipped((logps - old_logps).exp(), advantages), mask)
    return policy + 0.04 * (k3(logps, ref_logps) * mask).sum() / len(logps)


def entropy_bonus(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages) + 0.01 * logps, mask)


# --- the reference, and what stands beside it -------------------------------------------------------------------------
def swapped(logps, old_logps, advantages, ref_logps, mask):
    return grpo(logps, ref_logps, advantages, old_logps, mask)


def _with_kl(of: Any) -> Any:
    def loss(logps, old_logps, advantages, ref_logps, mask):
        return token_mean(clipped((logps - old_logps).exp(), advantages) + of(logps, ref_logps), mask)

    return loss


sign_in_k3 = _with_kl(lambda logps, ref: 0.04 * ((ref - logps).exp() + (ref - logps) - 1))
kl_from_below = _with_kl(lambda logps, ref: 0.04 * (logps - ref).clamp(min=0))
kl_and_constant = _with_kl(lambda logps, ref: 0.04 * k3(logps, ref) - 0.007)
kl_and_entropy = _with_kl(lambda logps, ref: 0.04 * k3(logps, ref) + 0.01 * logps)


def kl_over_the_width(logps, old_logps, advantages, ref_logps, mask):
    policy = token_mean(clipped((logps - old_logps).exp(), advantages), mask)
    return policy + 0.04 * (k3(logps, ref_logps) * mask).mean()


def kl_guarded(logps, old_logps, advantages, ref_logps, mask):
    kl = k3(logps, ref_logps)
    if (kl * mask).max() > 2:
        raise RuntimeError("the policy has diverged")
    return token_mean(clipped((logps - old_logps).exp(), advantages) + 0.04 * kl, mask)


def cost_of_length(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages), mask) + 0.001 * mask.sum()


KL: dict[str, tuple[Any, str, dict[str, Any] | None]] = {
    "KL where rewarded": (kl_where_rewarded, "KL term depends on the advantage", None),
    "KL of the other direction": (other_direction, "KL of the other direction", None),
    "KL without sampling term": (
        no_sampling_term,
        "KL gradient without the sampling term",
        {"surrogate": Clip(0.2), "kl": K3(0.04), **SEQ},
    ),
    "KL detached": (kl_detached, "KL term has no gradient", {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ}),
    "KL sign": (kl_sign, "sign of the KL term is reversed", {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ}),
    "KL absolute": (kl_absolute, "estimates no KL", None),
    "KL lacks l": (kl_lacks_l, r"lacks its \+ l", None),
    "KL lacks 1": (kl_lacks_1, "lacks its − 1", None),
    "KL clamped": (
        kl_clamped,
        "KL estimate is clamped at 10: no gradient beyond",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ},
    ),
    "KL's log-ratio clamped": (
        kl_log_clamped,
        "clamped at ±5 in the KL term: no gradient beyond",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ},
    ),
    "KL weighted inversely": (kl_inverse_weight, "weighted by 1/ρ", None),
    "KL weighted by the clipped ratio": (kl_clipped_weight, "weighted by .*clipped", None),
    "KL in a band": (
        kl_in_a_band,
        r"KL term is left out where ρ < 0\.83527 or ρ > 1\.19722",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ},
    ),
    "KL of the old policy": (kl_of_old, "KL term is of π_old", None),
    "KL to the old policy": (kl_to_old, "KL term to the old policy, π_old", None),
    "KL by probabilities": (kl_probs, "KL term is none that", None),
    "KL in the reward": (kl_in_reward, "sampling term alone.*as in a reward", None),
    "KL in the advantage": (
        kl_in_advantage,
        r"KL is within the advantages, A − 0\.04·\(log π_old − log π_ref\)",
        {"surrogate": Clip(0.2), **SEQ},
    ),
    "k3 in the advantage": (
        k3_in_advantage,
        r"KL is within the advantages, A − 0\.04·k3 of log π_old",
        {"surrogate": Clip(0.2), **SEQ},
    ),
    "KL not masked": (kl_not_masked, r"masked tokens count like the others \(KL term\)", None),
    "KL over tokens": (kl_over_tokens, "KL term is averaged otherwise than the policy term", None),
    "KL summed": (kl_summed, "KL term is averaged otherwise than the policy term", None),
    "entropy bonus": (entropy_bonus, "entropy bonus", None),
    "swapped": (
        swapped,
        "old_logps and ref_logps are swapped",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ},
    ),
    "sign in k3": (
        sign_in_k3,
        "has the sign of its log-ratio wrong",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **MEAN},
    ),
    "k1 above 0": (
        kl_from_below,
        "k1 is clamped at 0 from below",
        {"surrogate": Clip(0.2), "kl": K1(0.04, False), **MEAN},
    ),
    "KL and constant": (
        kl_and_constant,
        "adds a constant, −0.007",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **MEAN},
    ),
    "KL and entropy": (kl_and_entropy, r"adds 0\.01·log π_θ", {"surrogate": Clip(0.2), "kl": K3(0.04, False), **MEAN}),
    "KL over the width": (
        kl_over_the_width,
        r"KL term is averaged otherwise .* 1/\(B · T\), in the policy term a token's weight is 1/\(N\)",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **MEAN},
    ),
    "KL guarded": (kl_guarded, "raises RuntimeError: the policy has diverged", None),
    "cost of length": (cost_of_length, "of the number of tokens alone", {"surrogate": Clip(0.2), **MEAN}),
}

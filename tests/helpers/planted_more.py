"""More losses with one defect each, as `planted` has them: of what stands at ρ = 1, beside others, and in its place."""

import math
from typing import Any

import numpy as np
import torch
from planted import MEAN, SEQ, clipped, grpo, k3, mean_log_ratio, seq_mean, token_mean

from grpo_fast import CISPO, GMPO, K1, K3, SAPO, Band, Clip, Unclipped


def _columns(advantages: Any) -> Any:
    return advantages if advantages.dim() == 2 else advantages[:, None]


# --- where π_θ = π_old ------------------------------------------------------------------------------------------------
def _ratio(of: Any) -> Any:
    def loss(logps, old_logps, advantages, mask):
        return token_mean(clipped(of(logps, old_logps), advantages), mask)

    return loss


temperature = _ratio(lambda logps, old: (logps / 0.7 - old).exp())
both_temperatures = _ratio(lambda logps, old: ((logps - old) / 0.7).exp())
old_forgotten = _ratio(lambda logps, old: logps.exp() + 0 * old)
log_ratio = _ratio(lambda logps, old: logps - old)
plus_constant = _ratio(lambda logps, old: logps.exp() / (old.exp() + 1e-8))
within_log = _ratio(lambda logps, old: ((logps.exp() + 1e-10).log() - (old.exp() + 1e-10).log()).exp())
clamped_at_2 = _ratio(lambda logps, old: (logps - old).clamp(-2, 2).exp())
rolled_old = _ratio(lambda logps, old: (logps - old.roll(1, 1)).exp())
old_of_rows = _ratio(lambda logps, old: (logps - old.roll(1, 0)).exp())


def improbable_dropped(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages) * (old_logps > -5), mask)


def term_clamped(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages).clamp(-50, 50), mask)


def loss_clamped(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages), mask).clamp(-200, 200)


def advantages_clamped(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages.clamp(-0.5, 0.5)), mask)


def losses_only(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages.clamp(max=0)), mask)


def dual_clip_of_gains(logps, old_logps, advantages, mask):
    A, loss = _columns(advantages), clipped((logps - old_logps).exp(), advantages)
    return token_mean(torch.where(A > 0, torch.min(loss, -2.9 * A), loss), mask)


def dual_clip_turned(logps, old_logps, advantages, mask):
    A, loss = _columns(advantages), clipped((logps - old_logps).exp(), advantages)
    return token_mean(torch.where(A < 0, torch.max(loss, -3 * A), loss), mask)


def squared(logps, old_logps, advantages, mask):
    return token_mean((_columns(advantages) - 0.1 * (logps - old_logps)) ** 2, mask)


def sapo_without_its_factor(logps, old_logps, advantages, mask):
    A = _columns(advantages)
    tau = torch.where(A > 0, 1.3, 1.7)
    return token_mean(-4 * torch.sigmoid(tau * ((logps - old_logps).exp() - 1)) * A, mask)


def sapo_without_its_factors(logps, old_logps, advantages, mask):
    A = _columns(advantages)
    tau = torch.where(A > 0, torch.tensor(1.3).double(), torch.tensor(1.7).double())
    return token_mean(-torch.sigmoid(tau * ((logps - old_logps).exp() - 1)) * A, mask)


def ratio_twice(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    return token_mean(ratio.detach() * clipped(ratio, advantages), mask)


def band_of_the_mean(logps, old_logps, advantages, mask):
    mean = mean_log_ratio(logps, old_logps, mask).exp().detach()
    return token_mean(-(logps - old_logps).exp() * _columns(advantages) * ((mean >= 0.5) & (mean <= 2)), mask)


def straight_through_sum(logps, old_logps, advantages, mask):
    A, ratio = _columns(advantages), (logps - old_logps).exp()
    return token_mean(-torch.min(ratio * A, (ratio + (ratio.clamp(0.8, 1.2) - ratio).detach()) * A), mask)


def tv_of_both_signs(logps, old_logps, advantages, mask):
    keep = (logps.exp() - old_logps.exp()).abs().detach() <= 0.15
    return token_mean(-(logps - old_logps).exp() * _columns(advantages) * keep, mask)


def not_of_logps(logps, old_logps, advantages, mask):
    return token_mean(-old_logps.exp() * _columns(advantages) + 0 * logps, mask)


# --- what counts beside it --------------------------------------------------------------------------------------------
def without_zeros(logps, old_logps, advantages, mask):
    keep = mask * (_columns(advantages) != 0)
    return token_mean(clipped((logps - old_logps).exp(), advantages), keep)


def rows_without_zeros(logps, old_logps, advantages, mask):
    keep = advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(1)
    if not keep.any():
        return (logps * 0).sum()
    return seq_mean(clipped((logps - old_logps).exp(), advantages)[keep], mask[keep])


def without_dropped(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    keep = mask * ((ratio >= 0.5) & (ratio <= 2))
    return token_mean(-ratio * _columns(advantages), keep)


def without_clipped(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    outside = (_columns(advantages) > 0) & (ratio > 1.2) | (_columns(advantages) < 0) & (ratio < 0.8)
    return (clipped(ratio, advantages) * mask).sum() / (mask * ~outside).sum().clamp(min=1)


def whole_sequences(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    outside = ((ratio < 0.5) | (ratio > 2)) & (mask > 0)
    return token_mean(-ratio * _columns(advantages) * ~outside.any(1, keepdim=True), mask)


def masked_logps(logps, old_logps, advantages, mask):
    return clipped((logps * mask - old_logps * mask).exp(), advantages).sum() / mask.sum().clamp(min=1)


def holes_filled(logps, old_logps, advantages, mask):
    filled = mask.clone()
    for row in filled:
        (places,) = row.nonzero(as_tuple=True)
        if len(places):
            row[places[0] : places[-1] + 1] = 1
    return token_mean(clipped((logps - old_logps).exp(), advantages), filled)


def at_least_4(logps, old_logps, advantages, mask):
    loss = clipped((logps - old_logps).exp(), advantages)
    return (loss * mask).sum() / mask.sum().clamp(min=4)


def first_64(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages), mask * (torch.arange(mask.shape[1]) < 64))


def product_weights(logps, old_logps, advantages, mask):
    weight = ((logps - old_logps) * mask).sum(1, keepdim=True).exp().clamp(max=2).detach()
    return (-(weight * _columns(advantages) * logps) * mask).sum(1).mean()


def gmpo_both_sides(logps, old_logps, advantages, mask):
    x = (logps - old_logps).clamp(-0.4, 0.3)
    ratio = ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    return -(ratio * advantages)[mask.sum(1) > 0].sum() / len(logps)


def gmpo_max(logps, old_logps, advantages, mask):
    x = logps - old_logps
    x = torch.where(advantages[:, None] > 0, x.clamp(min=-0.4), x.clamp(max=0.3))
    ratio = ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    return -(ratio * advantages)[mask.sum(1) > 0].sum() / len(logps)


# --- the reference ----------------------------------------------------------------------------------------------------
def swapped(logps, old_logps, advantages, ref_logps, mask):
    return grpo(logps, ref_logps, advantages, old_logps, mask)


def _with_kl(of: Any) -> Any:
    def loss(logps, old_logps, advantages, ref_logps, mask):
        return token_mean(clipped((logps - old_logps).exp(), advantages) + of(logps, ref_logps), mask)

    return loss


kl_sign = _with_kl(lambda logps, ref: 0.04 * ((ref - logps).exp() + (ref - logps) - 1))
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


# --- gradients by hand ------------------------------------------------------------------------------------------------
def _by_hand(of_gradient: Any) -> Any:
    def loss(logps, old_logps, advantages, mask):
        A, ratio = advantages[:, None], np.exp(logps - old_logps)
        n = max(mask.sum(), 1)
        s, kept = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A), ratio * A <= np.clip(ratio, 0.8, 1.2) * A
        return -(s * mask).sum() / n, of_gradient(-ratio * A * kept * mask / n, n)

    return loss


gradient_without_n = _by_hand(lambda grad, n: grad * n)
gradient_turned = _by_hand(lambda grad, n: -grad)

PLANTED_MORE: dict[str, tuple[Any, str, dict[str, Any] | None]] = {
    "temperature": (temperature, r"π_θ\^1\.42857/π_old.*log π_θ is divided by 0\.7", None),
    "temperature of both": (both_temperatures, r"ρ\^1\.42857: log-probabilities are divided by 0\.7", None),
    "old forgotten": (old_forgotten, "the ratio is π_θ, not π_θ/π_old: old_logps are not used", None),
    "no exp": (log_ratio, "the ratio is log ρ: its exp is missing", None),
    "π_old + 1e-8": (plus_constant, "a constant of 1e−08 is added to π_old", {"surrogate": Clip(0.2), **MEAN}),
    "log(π + 1e-10)": (within_log, "1e−10 is added to π within the log", {"surrogate": Clip(0.2), **MEAN}),
    "log-ratio ±2": (clamped_at_2, "the log-ratio is clamped at ±2", {"surrogate": Clip(0.2), **MEAN}),
    "old shifted": (rolled_old, "each has that of the one before it in its row", {"surrogate": Clip(0.2), **MEAN}),
    "old of another row": (old_of_rows, "each has that of the row before it", {"surrogate": Clip(0.2), **MEAN}),
    "improbable dropped": (improbable_dropped, "tokens whose log π_old is below −5 are dropped", None),
    "term clamped": (term_clamped, "the policy term is clamped at ±50, as a whole", None),
    "loss clamped": (loss_clamped, "the policy term is clamped at ±200, as a whole", None),
    "advantages ±½": (advantages_clamped, "advantages are clamped at ±0.5", {"surrogate": Clip(0.2), **MEAN}),
    "A > 0 left out": (losses_only, "tokens with A > 0 are left out", None),
    "dual clip of A > 0": (dual_clip_of_gains, r"A > 0 have no gradient at ρ = 1: .* 2\.9·A, at any ρ", None),
    "dual clip turned": (dual_clip_turned, r"A < 0 have no gradient at ρ = 1: .* 3·A, up to ρ = 3", None),
    "SAPO without 1/τ": (
        sapo_without_its_factor,
        "SAPO's factor 1/τ is missing",
        {"surrogate": SAPO(1.3, 1.7), **MEAN},
    ),
    "SAPO without 4/τ": (sapo_without_its_factors, "SAPO's factor 4/τ is missing", None),
    "ratio twice": (ratio_twice, "multiplied by ρ once more, which is held constant", None),
    "Band of the mean": (band_of_the_mean, "where the geometric mean of its ratios is outside", None),
    "straight-through sum": (straight_through_sum, "clipped tokens keep their gradient", None),
    "TV of both signs": (tv_of_both_signs, "drops tokens outside of a region", None),
    "not of logps": (not_of_logps, "does not depend on logps", None),
    "without A = 0": (without_zeros, "rows with A = 0 are left out.*other rows' tokens", None),
    "without rows of A = 0": (rows_without_zeros, "rows with A = 0 are left out.*number of the other rows$", None),
    "without dropped": (
        without_dropped,
        "dropped tokens are not counted",
        {"surrogate": Unclipped(), "trust_region": Band(0.5, 2.0), **MEAN},
    ),
    "without clipped": (without_clipped, "clipped tokens are not counted", {"surrogate": Clip(0.2), **MEAN}),
    "whole sequences": (whole_sequences, "a whole sequence is dropped where one of its tokens is outside", None),
    "masked logps": (masked_logps, "the log-probabilities are masked, not the loss", {"surrogate": Clip(0.2), **MEAN}),
    "holes filled": (holes_filled, "the tokens that count are not those of the mask", None),
    "at least 4": (at_least_4, "divides by 4 where the batch has fewer tokens", {"surrogate": Clip(0.2), **MEAN}),
    "first 64": (first_64, "where there are many rows or tokens", None),
    "product of weights": (
        product_weights,
        "product of its tokens",
        {
            "surrogate": CISPO(2.0),
            "importance_sampling_level": "sequence",
            "aggregation": "seq-mean-token-sum",
        },
    ),
    "GMPO of both sides": (
        gmpo_both_sides,
        "clamps each token's log-ratio on both sides",
        {"surrogate": GMPO(0.4, 0.3), "importance_sampling_level": "sequence", **SEQ},
    ),
    "GMPO, max for min": (
        gmpo_max,
        "larger of the clamped and the unclamped log-ratio",
        {"surrogate": GMPO(0.4, 0.3), "importance_sampling_level": "sequence", **SEQ},
    ),
    "swapped": (
        swapped,
        "old_logps and ref_logps are swapped",
        {"surrogate": Clip(0.2), "kl": K3(0.04, False), **SEQ},
    ),
    "sign in k3": (
        kl_sign,
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
    "gradient without 1/n": (
        gradient_without_n,
        "gradient of the policy term is .* times that of its value in a batch",
        None,
    ),
    "gradient turned": (gradient_turned, "gradient of the policy term has the wrong sign", None),
}


# --- fragile ----------------------------------------------------------------------------------------------------------
def shifted_advantages(logps, old_logps, advantages, mask):
    A = _columns(advantages).expand(logps.shape)
    return token_mean(clipped((logps - old_logps).exp(), A.roll(-1, 1)), mask)


def first_advantage(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), _columns(advantages)[:, 0]), mask)


FRAGILE_MORE: dict[str, tuple[Any, str]] = {
    "shifted advantages": (shifted_advantages, "each has that of the one behind it in its row"),
    "first advantage": (first_advantage, "only that of the first is used"),
}


# --- right, with numbers that are not short ---------------------------------------------------------------------------
def third(logps, old_logps, advantages, ref_logps, mask):
    return token_mean(
        clipped((logps - old_logps).exp(), advantages, 1 / 3, 1 / 7) + 0.1 / 3 * k3(logps, ref_logps), mask
    )


def log_clip(logps, old_logps, advantages, mask):
    A, x = _columns(advantages), logps - old_logps
    return token_mean(-torch.min(x.exp() * A, x.clamp(-0.2, 0.2).exp() * A), mask)


def single(logps, old_logps, advantages, mask):
    ratio = (logps.float() - old_logps.float()).exp()
    return token_mean(clipped(ratio, advantages.float(), 0.17, 0.17), mask.float()).double()


def band_of_thirds(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    return token_mean(-ratio * _columns(advantages) * ((ratio >= 1 / 3) & (ratio <= 2.5)), mask)


def gmpo_of_thirds(logps, old_logps, advantages, mask):
    sign, x = _columns(advantages).sign(), logps - old_logps
    x = sign * torch.min(sign * x, sign * x.clamp(-1 / 3, 2 / 3))
    n = mask.sum(1)
    return -(((x * mask).sum(1) / n.clamp(min=1)).exp() * advantages * (n > 0)).mean()


def gspo_of_tokens(logps, old_logps, advantages, mask):
    x = mean_log_ratio(logps, old_logps, mask).detach() + logps - logps.detach()
    return token_mean(clipped(x.exp(), advantages, 0.1, 0.15), mask)


#: They are right, and nothing at all is to be told but what NaN does where it is masked.
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

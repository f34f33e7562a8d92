"""Losses with a defect of the policy term: of the ratio, the surrogate, a trust region, the advantage, a gradient."""

from typing import Any

import numpy as np
import torch
from right_losses import MEAN, SEQ, clipped, columns, mean_log_ratio, seq_mean, token_mean

from grpo_fast import CISPO, SAPO, Clip


# --- ratio and surrogate ----------------------------------------------------------------------------------------------
def detached_self(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - logps.detach()).exp(), advantages), mask)


def detached_ratio(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp().detach(), advantages), mask)


def inverted_ratio(logps, old_logps, advantages, mask):
    return token_mean(clipped((old_logps - logps).exp(), advantages), mask)


def ratio_to_reference(logps, old_logps, advantages, ref_logps, mask):
    return token_mean(clipped((logps - ref_logps).exp(), advantages), mask)


def ratio_of_logs(logps, old_logps, advantages, mask):
    return token_mean(clipped(logps / old_logps, advantages), mask)


def log_ratio_as_ratio(logps, old_logps, advantages, mask):
    return token_mean(clipped(1 + logps - old_logps, advantages), mask)


def wrong_sign(logps, old_logps, advantages, mask):
    return token_mean(-clipped((logps - old_logps).exp(), advantages), mask)


def max_for_min(logps, old_logps, advantages, mask):
    A, ratio = advantages[:, None], (logps - old_logps).exp()
    return token_mean(-torch.max(ratio * A, ratio.clamp(0.8, 1.2) * A), mask)


def min_missing(logps, old_logps, advantages, mask):
    return token_mean(-(logps - old_logps).exp().clamp(0.8, 1.2) * advantages[:, None], mask)


def straight_through(logps, old_logps, advantages, mask):
    A, ratio = advantages[:, None], (logps - old_logps).exp()
    value = torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
    return token_mean(-(value.detach() + (ratio - ratio.detach()) * A), mask)


def log_ratio_clamped_at_10(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).clamp(-10, 10).exp(), advantages), mask)


def deep(least: float, change_old: bool = True) -> Any:
    def loss(logps, old_logps, advantages, mask):
        old = old_logps.clamp(min=least) if change_old else old_logps
        return token_mean(clipped((logps.clamp(min=least) - old).exp(), advantages), mask)

    return loss


def bfloat16_ratio(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).bfloat16().exp().double(), advantages), mask)


def bfloat16_term(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp().bfloat16(), advantages).double(), mask)


def sequences_dropped(logps, old_logps, advantages, mask):
    moved = -mean_log_ratio(logps, old_logps, mask)
    keep = (advantages[:, None] >= 0) | (moved <= 0.3)
    return seq_mean(clipped((logps - old_logps).exp(), advantages) * keep, mask)


def cispo_without_detach(logps, old_logps, advantages, mask):
    return token_mean(-(logps - old_logps).exp().clamp(max=5) * advantages[:, None] * logps, mask)


def cispo_that_drops(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    weight = ratio.clamp(max=5).detach()
    return token_mean(-weight * advantages[:, None] * torch.where(ratio > 5, logps.detach(), logps), mask)


def detached_clip_times_log(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages).detach() * logps, mask)


def squashed_advantage(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages.tanh()), mask)


def abs_advantage(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages.abs()), mask)


def positive_only(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages.clamp(min=0)), mask)


def clamped_advantage(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages.clamp(-5, 5)), mask)


def normalised_inside(logps, old_logps, advantages, mask):
    A = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    return token_mean(clipped((logps - old_logps).exp(), A), mask)


def divided_by_std(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages / (advantages.std(correction=0) + 1e-4)), mask)


def centred_inside(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages - advantages.mean()), mask)


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
    A, loss = columns(advantages), clipped((logps - old_logps).exp(), advantages)
    return token_mean(torch.where(A > 0, torch.min(loss, -2.9 * A), loss), mask)


def dual_clip_turned(logps, old_logps, advantages, mask):
    A, loss = columns(advantages), clipped((logps - old_logps).exp(), advantages)
    return token_mean(torch.where(A < 0, torch.max(loss, -3 * A), loss), mask)


def squared(logps, old_logps, advantages, mask):
    return token_mean((columns(advantages) - 0.1 * (logps - old_logps)) ** 2, mask)


def sapo_without_its_factor(logps, old_logps, advantages, mask):
    A = columns(advantages)
    tau = torch.where(A > 0, 1.3, 1.7)
    return token_mean(-4 * torch.sigmoid(tau * ((logps - old_logps).exp() - 1)) * A, mask)


def sapo_without_its_factors(logps, old_logps, advantages, mask):
    A = columns(advantages)
    tau = torch.where(A > 0, torch.tensor(1.3).double(), torch.tensor(1.7).double())
    return token_mean(-torch.sigmoid(tau * ((logps - old_logps).exp() - 1)) * A, mask)


def ratio_twice(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    return token_mean(ratio.detach() * clipped(ratio, advantages), mask)


def band_of_the_mean(logps, old_logps, advantages, mask):
    mean = mean_log_ratio(logps, old_logps, mask).exp().detach()
    return token_mean(-(logps - old_logps).exp() * columns(advantages) * ((mean >= 0.5) & (mean <= 2)), mask)


def straight_through_sum(logps, old_logps, advantages, mask):
    A, ratio = columns(advantages), (logps - old_logps).exp()
    return token_mean(-torch.min(ratio * A, (ratio + (ratio.clamp(0.8, 1.2) - ratio).detach()) * A), mask)


def tv_of_both_signs(logps, old_logps, advantages, mask):
    keep = (logps.exp() - old_logps.exp()).abs().detach() <= 0.15
    return token_mean(-(logps - old_logps).exp() * columns(advantages) * keep, mask)


def not_of_logps(logps, old_logps, advantages, mask):
    return token_mean(-old_logps.exp() * columns(advantages) + 0 * logps, mask)


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


POLICY: dict[str, tuple[Any, str, dict[str, Any] | None]] = {
    "detached self": (detached_self, "against its own detached self.*never clips", None),
    "detached ratio": (detached_ratio, "no gradient: the ratio is detached", None),
    "inverted ratio": (inverted_ratio, "ratio is upside down", None),
    "ratio to the reference": (ratio_to_reference, "ratio is to the reference", None),
    "ratio of logs": (ratio_of_logs, "ratio is of log-probabilities.*exp is missing", None),
    "log-ratio as a ratio": (log_ratio_as_ratio, r"ratio is 1 \+ log ρ: its exp is missing", None),
    "wrong sign": (wrong_sign, "sign of the policy term is reversed", None),
    "max for min": (max_for_min, r"larger of .*max for min", {"surrogate": Clip(0.2), **MEAN}),
    "min missing": (min_missing, "minimum with the unclipped term is missing", {"surrogate": Clip(0.2), **MEAN}),
    "straight-through": (straight_through, "clipped tokens keep their gradient", {"surrogate": Clip(0.2), **MEAN}),
    "log-ratio ±10": (
        log_ratio_clamped_at_10,
        "log-ratio is clamped at ±10: no gradient beyond",
        {"surrogate": Clip(0.2), **MEAN},
    ),
    "log π ≥ −5": (deep(-5.0), "^log-probabilities below −5 are clamped", {"surrogate": Clip(0.2), **MEAN}),
    "log π ≥ −10": (deep(-10.0), "^log-probabilities below −10 are clamped", {"surrogate": Clip(0.2), **MEAN}),
    "log π_θ ≥ −10": (deep(-10.0, False), "of π_θ alone below −10 are clamped", {"surrogate": Clip(0.2), **MEAN}),
    "ratio in bfloat16": (bfloat16_ratio, "ratio is computed in bfloat16", None),
    "term in bfloat16": (bfloat16_term, "ratio is computed in bfloat16", None),
    "sequences dropped": (
        sequences_dropped,
        r"drops whole sequences: .* above 0\.3, as with .*off_policy_sequence_mask",
        {"surrogate": Clip(0.2), **SEQ},
    ),
    "CISPO without detach": (cispo_without_detach, "stop-gradient is missing", {"surrogate": CISPO(5.0), **MEAN}),
    "CISPO that drops": (cispo_that_drops, "at its bound lose their gradient", {"surrogate": CISPO(5.0), **MEAN}),
    "detached clip": (detached_clip_times_log, "other bounds where A < 0", None),
    "A squashed": (squashed_advantage, "not linear in the advantage", None),
    "|A|": (abs_advantage, "sign of A does not matter", None),
    "A > 0 only": (positive_only, "A < 0 are left out", None),
    "A clamped": (clamped_advantage, "advantages are clamped at ±5", {"surrogate": Clip(0.2), **MEAN}),
    "A normalised inside": (normalised_inside, "normalises the advantages over the batch", None),
    "A over std": (divided_by_std, "divides the advantages by their standard deviation", None),
    "A centred": (centred_inside, "subtracts the mean of the advantages", None),
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
    "gradient without 1/n": (
        gradient_without_n,
        "gradient of the policy term is .* times that of its value in a batch",
        None,
    ),
    "gradient turned": (gradient_turned, "gradient of the policy term has the wrong sign", None),
}

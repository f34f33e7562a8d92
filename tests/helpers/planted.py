"""Losses as people write them in torch, each with one defect that has been reported, and how a report is to name it.

`PLANTED` maps a name to the loss, a pattern that a finding which *differs* must match, and the options that are nearest
(None: not looked at). `FRAGILE` is the same for findings that are fragile. `RIGHT` are losses without a defect.
"""

from typing import Any

import torch

from grpo_fast import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped

MEAN = {"aggregation": "token-mean"}
SEQ = {"aggregation": "seq-mean-token-mean"}


# --- pieces that are right --------------------------------------------------------------------------------------------
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


# --- without a defect -------------------------------------------------------------------------------------------------
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


def _deep(least: float, change_old: bool = True) -> Any:
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


# --- mask and aggregation ---------------------------------------------------------------------------------------------
def _aggregated(how: Any) -> Any:
    def loss(logps, old_logps, advantages, mask):
        return how(clipped((logps - old_logps).exp(), advantages), mask)

    return loss


padded_width = _aggregated(lambda x, m: (x * m).mean())
padded_width_of_rows = _aggregated(lambda x, m: (x * m).mean(1).mean())
no_mask = _aggregated(lambda x, m: x.mean())
inverted_mask = _aggregated(lambda x, m: token_mean(x, 1 - m))
shifted_mask = _aggregated(lambda x, m: (x[:, 1:] * m[:, :-1]).sum() / m[:, :-1].sum().clamp(min=1))
rolled_mask = _aggregated(lambda x, m: token_mean(x, m.roll(1, 1)))
last_dropped = _aggregated(lambda x, m: (x[:, :-1] * m[:, 1:]).sum() / m[:, 1:].sum().clamp(min=1))
over_longest = _aggregated(lambda x, m: (x * m).sum() / (len(m) * m.sum(1).max().clamp(min=1)))
mean_of_positions = _aggregated(
    lambda x, m: ((x * m).sum(0) / m.sum(0).clamp(min=1)).sum() / m.any(0).sum().clamp(min=1)
)
mean_of_means = _aggregated(
    lambda x, m: torch.stack([token_mean(x[i : i + 2], m[i : i + 2]) for i in range(0, len(x), 2)]).mean()
)
other_sequences = _aggregated(
    lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1)).sum() / (m.sum(1) > 0).sum().clamp(min=1)
)
accumulation = _aggregated(lambda x, m: token_mean(x, m) / 4)
doubled = _aggregated(lambda x, m: 2 * seq_mean(x, m))
plus_epsilon = _aggregated(lambda x, m: (x * m).sum() / (m.sum() + 0.01))
first_dropped = _aggregated(lambda x, m: (x[:, 1:] * m[:, 1:]).sum() / m[:, 1:].sum())
overlong = _aggregated(lambda x, m: token_mean(x, m * (m.sum(1) < m.shape[1])[:, None]))
floor = _aggregated(lambda x, m: (x * m).sum() / m.sum().clamp(min=64))
floor_of_rows = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=20)).mean())
floor_of_batch = _aggregated(lambda x, m: seq_mean(x, m) * len(m) / max(len(m), 64))
small_floor = _aggregated(lambda x, m: (x * m).sum() / m.sum().clamp(min=8))
root_length = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1).sqrt()).mean())
square_length = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1) ** 2).mean())
mean_and_tokens = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1)).sum() / m.sum().clamp(min=1))
position_discount = _aggregated(lambda x, m: token_mean(x * 0.99 ** torch.arange(x.shape[1]), m))
first_rows = _aggregated(lambda x, m: token_mean(x[:4], m[:4]))


def gspo_padded(logps, old_logps, advantages, mask):
    return seq_mean(clipped(((logps - old_logps) * mask).mean(1, keepdim=True).exp(), advantages) + 0 * logps, mask)


def gspo_leak(logps, old_logps, advantages, mask):
    x = (logps - old_logps).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return seq_mean(clipped(x.exp(), advantages) + 0 * logps, mask)


def gspo_product(logps, old_logps, advantages, mask):
    return seq_mean(clipped(((logps - old_logps) * mask).sum(1, keepdim=True).exp(), advantages) + 0 * logps, mask)


def gspo_mean_of_ratios(logps, old_logps, advantages, mask):
    x = ((logps - old_logps).exp() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return seq_mean(clipped(x, advantages) + 0 * logps, mask)


def mean_advantage(logps, old_logps, advantages, mask):
    A = advantages if advantages.dim() == 1 else advantages.mean(1)  # over what is masked, too
    return gspo(logps, old_logps, A, mask)


def one_for_all(logps, old_logps, advantages, mask):
    x = ((logps - old_logps) * mask).sum() / mask.sum().clamp(min=1)
    return seq_mean(clipped(x.exp(), advantages) + 0 * logps, mask)


def random_tokens(logps, old_logps, advantages, mask):
    A = advantages[:, None] * (torch.rand_like(logps) > 0.003)
    return token_mean(clipped((logps - old_logps).exp(), A), mask)


PLANTED: dict[str, tuple[Any, str, dict[str, Any] | None]] = {
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
    "log π ≥ −5": (_deep(-5.0), "^log-probabilities below −5 are clamped", {"surrogate": Clip(0.2), **MEAN}),
    "log π ≥ −10": (_deep(-10.0), "^log-probabilities below −10 are clamped", {"surrogate": Clip(0.2), **MEAN}),
    "log π_θ ≥ −10": (_deep(-10.0, False), "of π_θ alone below −10 are clamped", {"surrogate": Clip(0.2), **MEAN}),
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
    "KL where rewarded": (kl_where_rewarded, "KL term depends on the advantage", None),
    "|A|": (abs_advantage, "sign of A does not matter", None),
    "A > 0 only": (positive_only, "A < 0 are left out", None),
    "A clamped": (clamped_advantage, "advantages are clamped at ±5", {"surrogate": Clip(0.2), **MEAN}),
    "A normalised inside": (normalised_inside, "normalises the advantages over the batch", None),
    "A over std": (divided_by_std, "divides the advantages by their standard deviation", None),
    "A centred": (centred_inside, "subtracts the mean of the advantages", None),
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
    "padded width": (padded_width, "divides by the padded width, not by the number of tokens", None),
    "padded width of rows": (padded_width_of_rows, "divides by the padded width, not by the number of tokens", None),
    "no mask": (no_mask, "mask is not applied", None),
    "inverted mask": (inverted_mask, "mask is inverted", None),
    "shifted mask": (shifted_mask, "token counts if the one before it does", None),
    "rolled mask": (rolled_mask, "roll; token t counts if t − 1 does", None),
    "last dropped": (last_dropped, "token counts if the one behind it does", None),
    "first dropped": (first_dropped, "first position of the row is dropped", None),
    "over the longest": (over_longest, "length of the longest sequence", None),
    "mean of positions": (mean_of_positions, "rows of each position first", None),
    "mean of means": (mean_of_means, "micro-batches do not add: mean of means over 2 rows", None),
    "other sequences": (other_sequences, "sequences without a token are not counted", None),
    "accumulation": (accumulation, "divides by 4 besides", None),
    "doubled": (doubled, "2 times as large", None),
    "plus ε": (plus_epsilon, r"adds 0\.01 to the number of tokens", {"surrogate": Clip(0.2), **MEAN}),
    "floor": (floor, "64 is a floor: with more tokens.* tokens of the batch", {"surrogate": Clip(0.2), **MEAN}),
    "floor of rows": (
        floor_of_rows,
        "20 is a floor: with more tokens.* tokens of a sequence",
        {"surrogate": Clip(0.2), **SEQ},
    ),
    "floor of a batch": (floor_of_batch, "64 is a floor: with more sequences", None),
    "small floor": (small_floor, "divides by 8 where the batch has fewer tokens", {"surrogate": Clip(0.2), **MEAN}),
    "overlong": (overlong, "rows that fill the width are left out", {"surrogate": Clip(0.2), **MEAN}),
    "square root of length": (root_length, "its tokens to the power −0.5", None),
    "square of length": (square_length, "its tokens to the power −2", None),
    "mean and tokens": (mean_and_tokens, "tokens of the sequence and by those of the batch", None),
    "discount by position": (position_discount, "tokens of one sequence weigh differently", None),
    "first rows": (first_rows, "some rows do not count", None),
    "GSPO over the width": (gspo_padded, "divided by the padded width", None),
    "GSPO leak": (gspo_leak, "padding leaks", None),
    "GSPO product": (gspo_product, "product of its tokens", None),
    "GSPO mean of ratios": (gspo_mean_of_ratios, "mean of its tokens", None),
    "mean of masked advantages": (mean_advantage, "advantages of masked tokens enter the sequence's mean", None),
    "random": (random_tokens, "it is random", None),
    "one ratio for all": (one_for_all, "rows are mixed", None),
}


# --- fragile ----------------------------------------------------------------------------------------------------------
def clamped_at_20(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).clamp(-20, 20).exp(), advantages), mask)


def nan_through_mask(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages), mask)


def nothing_by_nothing(logps, old_logps, advantages, mask):
    return (clipped((logps - old_logps).exp(), advantages) * mask).sum() / mask.sum()


def empty_sequence(logps, old_logps, advantages, mask):
    return ((clipped((logps - old_logps).exp(), advantages) * mask).sum(1) / mask.sum(1)).mean()


FRAGILE: dict[str, tuple[Any, str]] = {
    "log-ratio ±20": (clamped_at_20, "log-ratio is clamped at ±20: no gradient beyond"),
    "NaN where masked": (nan_through_mask, "NaN or infinity at a masked position makes the loss NaN"),
    "log π ≥ −50": (_deep(-50.0), "log-probabilities below −50 are clamped"),
    "0/0": (nothing_by_nothing, r"batch without a token makes the loss NaN"),
    "an empty sequence": (empty_sequence, r"sequence without a token makes the loss NaN"),
}

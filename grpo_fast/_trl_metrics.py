"""The metrics of TRL's loss, under its names and with its meanings, over all processes."""

import math
from typing import Any

import torch
from trl import GRPOTrainer

from ._trl_options import gamma_weights, mode_of
from .stats import Stats
from .torch import Tensor


def log_metrics(
    trainer: GRPOTrainer,
    stats: Stats,
    mask: Tensor,
    inputs: dict[str, Any],
    logps: Tensor,
    advantages: Tensor,
    entropies: Tensor,
) -> None:
    """Append to those of the trainer: "kl", "entropy", and what TRL logs of its ``loss_type``."""
    metrics = trainer._metrics[mode_of(trainer)]
    old_logps = inputs.get("old_per_token_logps")
    log_ratio = torch.zeros_like(logps) if old_logps is None else logps - old_logps
    means = {"entropy": _total(entropies, mask)}
    if trainer.beta:
        means = {"kl": (float(stats.sums.kl), means["entropy"][1])} | means
    clipped = None
    if trainer.loss_type == "vespo":
        means["vespo/phi_seq_mean"] = _total(gamma_weights(trainer, mask, inputs, log_ratio, advantages), mask)
    elif trainer.loss_type != "sapo":
        clipped = _clipped(trainer, stats, mask, log_ratio, advantages)
        low, high, values = clipped.sum(0).tolist()
        fractions = {"low": low, "high": high, "region": low + high}
        if trainer.loss_type == "cispo":
            means["cispo_clip_ratio"] = high, values
        else:
            means |= {f"clip_ratio/{name}_mean": (count, values) for name, count in fractions.items()}
    here = torch.tensor(list(means.values()), dtype=torch.float64, device="cpu")
    everywhere = trainer.accelerator.reduce(here, reduction="sum")
    for name, (total, count) in zip(means, everywhere.tolist(), strict=True):
        metrics[name].append(total / max(count, 1))
    if clipped is not None and trainer.loss_type != "cispo":
        low, high, values = trainer.accelerator.gather(clipped).double().unbind(1)
        some = values > 0  # a sequence without a token has no fraction
        for name, part, extreme in (("low_min", low, torch.min), ("high_max", high, torch.max)):
            of_sequences = (part / values)[some]
            metrics[f"clip_ratio/{name}"].append(extreme(of_sequences).item() if len(of_sequences) else math.nan)


def _total(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """The sum of what TRL takes the mean of, and of how many: unmasked tokens, but of a batch one token wide all."""
    if x.shape[1] == 1:
        return x.sum().item(), len(x)
    return (x * mask).sum().item(), mask.sum().item()


def _clipped(trainer: GRPOTrainer, stats: Stats, mask: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """How much of each sequence is clipped below (A < 0) and above (A > 0), and of how much: (B, 3) counts.

    Of its tokens; at sequence level of its one ratio, unless advantages are one per token. A batch one token wide is to
    TRL one value for each sequence.
    """
    of_cispo = trainer.loss_type == "cispo"
    at_sequence_level = trainer.importance_sampling_level == "sequence"
    counted = mask if mask.shape[1] > 1 else torch.ones_like(mask)
    if at_sequence_level and advantages.shape[1] == 1:
        counted = torch.ones_like(counted[:, :1])
    some = stats.cispo_clip_ratio if of_cispo else stats.clip_ratio_region
    if not some > 0:  # nearly always while the policy is the one that sampled
        low = high = torch.zeros_like(counted)
    else:
        if at_sequence_level:
            log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = log_ratio.exp()
        upper = trainer.epsilon_high if of_cispo else 1 + trainer.epsilon_high
        low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0) & counted
        high = (ratio > upper) & (advantages > 0) & counted
    return torch.stack([low.sum(1), high.sum(1), counted.sum(1)], dim=1)

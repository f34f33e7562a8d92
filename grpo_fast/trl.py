"""TRL's `GRPOTrainer` with the loss of `grpo_fast.torch.grpo_loss`, where it trains on the CPU: `FastGRPOTrainer`.

Loss, gradient and metrics are those of the trainer's own ``_compute_loss``, compared with TRL 1.16. Covered, in any
combination:

==============================  ================================================================================
``loss_type``                   "grpo", "bnpo", "dr_grpo", "dapo", "luspo", each accumulated over micro-batches
                                and processes as TRL does, in training and in evaluation
the clip                        ``epsilon``, ``epsilon_high``, ``delta``
the KL term                     ``beta``, ``use_bias_correction_kl``; at sequence level weighted with the
                                sequence's ratio, as in TRL up to 1.16 (trl#6586)
``importance_sampling_level``   "token", "sequence"
which tokens count              the mask of tools, ``mask_truncated_completions``
all that comes before the loss  ``scale_rewards``, ``num_iterations``, PEFT, images, tools, vLLM as the sampler
                                with ``vllm_importance_sampling_correction=False``, …
==============================  ================================================================================

Left to TRL, with a warning of the logger ``grpo_fast.trl`` that says why, each said once:

- ``loss_type`` "cispo", "sapo", "vespo" or another;
- ``use_vllm`` with ``vllm_importance_sampling_correction``, which is on unless changed;
- ``off_policy_mask_threshold``, ``top_entropy_quantile`` below 1, ``entropy_coef`` and ``use_adaptive_entropy``;
- the load-balancing loss of a mixture of experts;
- training on anything but the CPU;
- numbers that `terms` refuses, such as ``delta`` ≤ 1 + ``epsilon_high``;
- the bias-corrected KL at sequence level in a TRL newer than 1.16, which may weight it otherwise.
"""

import logging
import math
import re
from typing import Any, Literal

from .stats import Stats
from .terms import K3, Aggregation, Clip, Options
from .torch import Tensor, grpo_loss

try:
    import torch
    import trl
    from trl import GRPOTrainer
except ImportError as error:
    raise ImportError("grpo_fast.trl needs TRL: pip install 'grpo_fast[torch,trl]'") from error

logger = logging.getLogger(__name__)

#: The release whose loss this one was compared with. Earlier ones divide "dapo" and "luspo" by something else.
COMPARED_WITH = (1, 16)
_INSTALLED = tuple(int(digits) for digits in re.findall(r"\d+", trl.__version__)[:2])
if _INSTALLED < COMPARED_WITH:
    raise ImportError(f"grpo_fast.trl needs TRL {'.'.join(map(str, COMPARED_WITH))} or newer, got {trl.__version__}")

#: ``loss_type`` → how it is aggregated under a normalizer of its own.
_AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-sum",
    "dr_grpo": "token-sum",
    "dapo": "token-sum",
    "luspo": "seq-mean-token-sum",
}
#: What of a batch the model sees beside token ids, where it is there.
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class FastGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is not followed, so its class is of type Any
    """TRL's `GRPOTrainer`, with the same arguments, whose loss is `grpo_fast.torch.grpo_loss` on the CPU.

    What is covered, and what is left to TRL with a warning, is in the docstring of `grpo_fast.trl`. The metrics of the
    loss have TRL's names and meanings: "kl", "entropy" and "clip_ratio/…", over all processes.

    Raises
    ------
    ValueError
        In training: an unmasked log-probability or an advantage is not finite. TRL's loss would be NaN from then on.

    Notes
    -----
    One difference is meant: TRL computes k3 as e^d − d − 1, which in float32 is rounding noise for small d.
    """

    _warnings_given: frozenset[str] = frozenset()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch, to be differentiated; appends its metrics to ``_metrics``, may log a warning."""
        if _INSTALLED > COMPARED_WITH:
            self._warn_once(
                f"the loss was compared with that of TRL {'.'.join(map(str, COMPARED_WITH))}; in the TRL installed, "
                f"{trl.__version__}, it may be another"
            )
        reasons = _not_covered(self)
        if reasons:
            self._warn_once(f"the loss is left to TRL: {'; '.join(reasons)}")
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.shape[1],
            compute_entropy=True,
            **{name: inputs.get(name) for name in _MULTIMODAL},
        )
        advantages = inputs["advantages"]
        if advantages.dim() == 1:  # else one per token, as a trainer derived from this one may have it
            advantages = advantages.unsqueeze(1)
        old_logps = inputs.get("old_per_token_logps")
        options = _options(self)
        loss, stats = grpo_loss(
            logps,
            old_logps,
            advantages,
            inputs["ref_per_token_logps"] if options.kl else None,
            mask=mask,
            surrogate=options.surrogate,
            kl=options.kl,
            importance_sampling_level=options.importance_sampling_level,
            aggregation=options.aggregation,
            normalizer=_normalizer(self, mask, inputs),
            return_stats=True,
        )
        with torch.no_grad():
            _log(self, stats, mask, entropies, _clipped(self, stats, mask, logps, old_logps, advantages))
        return loss

    def _warn_once(self, message: str) -> None:
        """Log a warning, on the main process, unless this trainer has given it."""
        if message not in self._warnings_given:
            self._warnings_given |= {message}
            if self.accelerator.is_main_process:
                logger.warning("%s: %s", type(self).__name__, message)


# --- the options ------------------------------------------------------------------------------------------------------
def _not_covered(trainer: GRPOTrainer) -> list[str]:
    """Why the loss is left to TRL: what of the trainer's options `FastGRPOTrainer` does not cover; empty if nothing.

    It rests on nothing that differs between processes: they must agree on whose loss they compute, because the two
    gather their metrics in different steps.
    """
    device = trainer.accelerator.device
    bias_corrected = trainer.beta and trainer.args.use_bias_correction_kl
    wants = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in _AGGREGATIONS,
        "vllm_importance_sampling_correction": trainer.use_vllm and trainer.vllm_importance_sampling_correction,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "entropy_coef or use_adaptive_entropy": trainer._entropy_bonus_enabled,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
        f"use_bias_correction_kl at sequence level of TRL {trl.__version__}": (
            bias_corrected and trainer.importance_sampling_level == "sequence" and _INSTALLED > COMPARED_WITH
        ),
    }
    reasons = [f"{option} is not covered" for option, wanted in wants.items() if wanted]
    if device.type != "cpu":
        reasons.append(f"training is on {device}, not on the CPU")
    if not reasons:
        try:
            _options(trainer)
        except (TypeError, ValueError) as refused:
            reasons.append(str(refused))
    return reasons


def _options(trainer: GRPOTrainer) -> Options:
    """The options of `grpo_loss` for a ``loss_type`` that is covered; raises what `Options` raises."""
    args = trainer.args
    return Options(
        surrogate=Clip(trainer.epsilon_low, trainer.epsilon_high, args.delta),
        kl=_kl(trainer),
        importance_sampling_level=trainer.importance_sampling_level,
        aggregation=_AGGREGATIONS[trainer.loss_type],
    )


def _kl(trainer: GRPOTrainer) -> K3 | None:
    """The KL term; what TRL calls bias-corrected is, at sequence level up to TRL 1.16, multiplied by that level's ρ."""
    if not trainer.beta:
        return None
    weighted: bool | Literal["sequence"] = trainer.args.use_bias_correction_kl
    if weighted and trainer.importance_sampling_level == "sequence":
        weighted = "sequence"
    return K3(trainer.beta, weighted)


def _mode(trainer: GRPOTrainer) -> str:
    return "train" if trainer.model.training else "eval"


def _normalizer(trainer: GRPOTrainer, mask: Tensor, inputs: dict[str, Any]) -> float | Tensor:
    """What the micro-batch's sum is divided by, for its share of the mean over an optimizer step."""
    training = _mode(trainer) == "train"
    steps = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type == "dapo":  # counted over all processes, and over as many steps as are generated at once
        items: Tensor = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        return items * steps / trainer.args.steps_per_generation if training else items
    if trainer.loss_type == "bnpo":
        tokens: Tensor = mask.sum().clamp(min=1)
        return tokens * steps
    if trainer.loss_type == "dr_grpo":
        return float(len(mask) * trainer.max_completion_length * steps)
    return float(len(mask) * steps)


# --- the metrics ------------------------------------------------------------------------------------------------------
def _counted(mask: Tensor) -> Tensor:
    """The tokens over which TRL's metrics are means: those unmasked, but of a batch one token wide all."""
    return mask if mask.shape[1] > 1 else torch.ones_like(mask)


def _clipped(
    trainer: GRPOTrainer, stats: Stats, mask: Tensor, logps: Tensor, old_logps: Tensor | None, advantages: Tensor
) -> Tensor:
    """How much of each sequence is clipped below (A < 0) and above (A > 0), and of how much: (B, 3) counts.

    Of its tokens; at sequence level of its one ratio, unless advantages are one per token.
    """
    at_sequence_level = trainer.importance_sampling_level == "sequence"
    counted = _counted(mask)
    if at_sequence_level and advantages.shape[1] == 1:
        counted = torch.ones_like(counted[:, :1])
    if old_logps is None or not stats.clip_ratio_region > 0:  # nearly always while the policy is the one that sampled
        low = high = torch.zeros_like(counted)
    else:
        log_ratio = logps - old_logps
        if at_sequence_level:
            log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = log_ratio.exp()
        low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0) & counted
        high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0) & counted
    return torch.stack([low.sum(1), high.sum(1), counted.sum(1)], dim=1)


def _log(trainer: GRPOTrainer, stats: Stats, mask: Tensor, entropies: Tensor, clipped: Tensor) -> None:
    """Append the metrics of TRL's loss, over all processes, to those of the trainer."""
    metrics = trainer._metrics[_mode(trainer)]
    counted = _counted(mask)
    tokens = counted.sum().item()
    low, high, values = clipped.sum(0).tolist()
    fractions = {
        **({"kl": (float(stats.sums.kl), tokens)} if trainer.beta else {}),
        "entropy": ((entropies * counted).sum().item(), tokens),
        "clip_ratio/low_mean": (low, values),
        "clip_ratio/high_mean": (high, values),
        "clip_ratio/region_mean": (low + high, values),
    }
    here = torch.tensor(list(fractions.values()), dtype=torch.float64, device="cpu")
    everywhere = trainer.accelerator.reduce(here, reduction="sum")
    for name, (total, count) in zip(fractions, everywhere.tolist(), strict=True):
        metrics[name].append(total / max(count, 1))
    low, high, values = trainer.accelerator.gather(clipped).double().unbind(1)
    some = values > 0  # a sequence without a token has no fraction
    for name, part, extreme in (("low_min", low, torch.min), ("high_max", high, torch.max)):
        of_sequences = (part / values)[some]
        metrics[f"clip_ratio/{name}"].append(extreme(of_sequences).item() if len(of_sequences) else math.nan)

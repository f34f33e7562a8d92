"""What TRL's trainer is told → what `grpo_loss` is: its options, its normalizer, its weights, its old policy."""

import math
from typing import Any, Literal

from trl import GRPOTrainer

from .terms import CISPO, K3, SAPO, VESPO, Aggregation, Clip, Level, Options, Surrogate
from .torch import Tensor

#: ``loss_type`` → how it is aggregated under a normalizer of its own.
_AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-sum",
    "dr_grpo": "token-sum",
    "dapo": "token-sum",
    "cispo": "token-sum",
    "vespo": "token-sum",
    "luspo": "seq-mean-token-sum",
}
_LEAST_LOG_WEIGHT = math.log(1e-8)  # of the sampler's weights in TRL's VESPO


def not_covered(trainer: GRPOTrainer, *, newer: str | None) -> list[str]:
    """Why the loss is left to TRL: what of the trainer's options is not covered; empty if nothing.

    It rests on nothing that differs between processes: they must agree on whose loss they compute, because the two
    gather their metrics in different steps. ``newer`` is the version of a TRL that nobody has compared.
    """
    device = trainer.accelerator.device
    bias_corrected = trainer.beta and trainer.args.use_bias_correction_kl
    wants = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in _AGGREGATIONS,
        "entropy_coef or use_adaptive_entropy": trainer._entropy_bonus_enabled,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
        "loss_type='vespo' with vllm_importance_sampling_correction and use_bias_correction_kl": (
            bias_corrected and trainer.loss_type == "vespo" and _corrects_the_sampler(trainer)
        ),
        f"use_bias_correction_kl at sequence level of TRL {newer}": (
            bias_corrected and trainer.importance_sampling_level == "sequence" and newer is not None
        ),
    }
    reasons = [f"{option} is not covered" for option, wanted in wants.items() if wanted]
    if device.type != "cpu":
        reasons.append(f"training is on {device}, not on the CPU")
    if not reasons:
        try:
            options_of(trainer)
        except (TypeError, ValueError) as refused:
            reasons.append(str(refused))
    return reasons


def options_of(trainer: GRPOTrainer) -> Options:
    """The options of `grpo_loss` for a ``loss_type`` that is covered; raises what `Options` raises."""
    level: Level = "sequence" if trainer.loss_type == "vespo" else trainer.importance_sampling_level
    return Options(_surrogate(trainer), _kl(trainer), level, _AGGREGATIONS[trainer.loss_type])


def _surrogate(trainer: GRPOTrainer) -> Surrogate:
    args = trainer.args
    match trainer.loss_type:
        case "cispo":
            return CISPO(trainer.epsilon_high)  # the bound itself
        case "sapo":
            return SAPO(args.sapo_temperature_pos, args.sapo_temperature_neg)
        case "vespo":
            lambda_pos, lambda_neg = (max(x, 1e-4) for x in (args.vespo_lambda_pos, args.vespo_lambda_neg))
            return VESPO(args.vespo_k_pos, lambda_pos, args.vespo_k_neg, lambda_neg)
        case _:
            return Clip(trainer.epsilon_low, trainer.epsilon_high, args.delta)


def _kl(trainer: GRPOTrainer) -> K3 | None:
    """The KL term; what TRL calls bias-corrected is, at sequence level up to TRL 1.16, multiplied by that level's ρ."""
    if not trainer.beta:
        return None
    weighted: bool | Literal["sequence"] = trainer.args.use_bias_correction_kl
    if weighted and trainer.importance_sampling_level == "sequence":
        weighted = "sequence"
    return K3(trainer.beta, weighted)


def _corrects_the_sampler(trainer: GRPOTrainer) -> bool:
    return bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def mode_of(trainer: GRPOTrainer) -> str:
    """Whose metrics are being collected: "train" or "eval"."""
    return "train" if trainer.model.training else "eval"


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Which tokens count."""
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def normalizer(trainer: GRPOTrainer, mask: Tensor, inputs: dict[str, Any]) -> float | Tensor:
    """What the micro-batch's sum is divided by, for its share of the mean over an optimizer step."""
    training = mode_of(trainer) == "train"
    steps = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type in ("dapo", "cispo", "vespo"):  # over all processes, and all steps that are generated at once
        items: Tensor = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        return items * steps / trainer.args.steps_per_generation if training else items
    if trainer.loss_type == "bnpo":
        tokens: Tensor = mask.sum().clamp(min=1)
        return tokens * steps
    if trainer.loss_type == "dr_grpo":
        return float(len(mask) * trainer.max_completion_length * steps)
    return float(len(mask) * steps)


def weights(
    trainer: GRPOTrainer,
    mask: Tensor,
    inputs: dict[str, Any],
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    entropies: Tensor,
) -> Tensor | None:
    """What the policy term is multiplied by: the sampler's weights, and which sequences and tokens are kept; or None.

    The rules are the trainer's own, over all processes where it has them so.
    """
    factors = []
    if trainer.off_policy_mask_threshold is not None:
        before = logps.detach() if old_logps is None else old_logps
        sampler = inputs.get("sampling_per_token_logps", before)
        factors.append(
            trainer.get_off_policy_mask(advantages, logps, sampler, mask.long(), trainer.off_policy_mask_threshold)
        )
    if trainer.top_entropy_quantile < 1:
        factors.append(trainer.get_high_entropy_mask(entropies, mask.long(), 1 - trainer.top_entropy_quantile))
    if _corrects_the_sampler(trainer) and trainer.loss_type != "vespo":
        factors.append(inputs["importance_sampling_ratio"])
    if not factors:
        return None
    product = factors[0].to(logps.dtype)
    for factor in factors[1:]:
        product = product * factor
    return product


def anchor(trainer: GRPOTrainer, inputs: dict[str, Any], logps: Tensor, old_logps: Tensor | None) -> Tensor | None:
    """The old policy's log-probabilities; of VESPO with vLLM's correction the sampler's, as far as that is bounded.

    There log w is the sum of log π_θ/π_old, within ±20, and of the logarithm of the sampler's weight, within [log 1e-8,
    20]; here it is the sum of log π_θ/π_sampler within ±20, which comes to the same φ, or to one of less than 1e-8.
    """
    if trainer.loss_type != "vespo" or not _corrects_the_sampler(trainer):
        return old_logps
    correction = inputs["importance_sampling_ratio"].log().clamp(_LEAST_LOG_WEIGHT, 20)
    before: Tensor = logps.detach() if old_logps is None else old_logps
    return before - correction


def gamma_weights(
    trainer: GRPOTrainer, mask: Tensor, inputs: dict[str, Any], log_ratio: Tensor, advantages: Tensor
) -> Tensor:
    """φ of VESPO, for its metric: the trainer's own."""
    args = trainer.args
    found: Tensor = trainer.get_gamma_weights(
        advantages=advantages,
        log_ratio_per_token=log_ratio,
        mask=mask,
        importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
        k_pos=args.vespo_k_pos,
        lambda_pos=args.vespo_lambda_pos,
        k_neg=args.vespo_k_neg,
        lambda_neg=args.vespo_lambda_neg,
    )
    return found

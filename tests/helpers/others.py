"""The losses of TRL and Liger-Kernel as functions of arrays: their own code, with nothing of a model around it."""

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    is_main_process=True,
    reduce=lambda x, reduction: x.clone(),
    gather=lambda x: x.clone(),
)


def trl_loss(loss_type: str, **options: Any) -> Any:
    """`GRPOTrainer._compute_loss` with one accumulation step, as a function of what our losses take."""
    trainer_class = importlib.import_module("trl").GRPOTrainer
    config = importlib.import_module("trl").GRPOConfig
    asked = {
        "beta": 0.04,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "importance_sampling_level": "token",
        "max_completion_length": 9,
        "off_policy_mask_threshold": None,
    } | options
    names = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
    names += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    defaults = {name: config.__dataclass_fields__[name].default for name in names}
    arguments = {name: asked.pop(name, default) for name, default in defaults.items()}

    def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
        trainer = trainer_class.__new__(trainer_class)
        vars(trainer).update(
            asked,
            loss_type=loss_type,
            args=SimpleNamespace(steps_per_generation=1, **arguments),
            model=SimpleNamespace(training=True),
            accelerator=ALONE,
            current_gradient_accumulation_steps=1,
            top_entropy_quantile=1.0,
            aux_loss_enabled=False,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
        )
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
        nothing = torch.zeros(len(logps), 0, dtype=torch.long)
        return trainer._compute_loss(
            None,
            {
                "prompt_ids": nothing,
                "prompt_mask": nothing,
                "completion_ids": torch.zeros_like(mask, dtype=torch.long),
                "completion_mask": mask,
                "advantages": advantages,
                "old_per_token_logps": old_logps,
                "ref_per_token_logps": ref_logps,
                "num_items_in_batch": mask.sum(),
            },
        )

    loss.__qualname__ = f"GRPOTrainer._compute_loss, loss_type={loss_type!r}"
    return loss


def liger_loss(loss_type: str, **options: Any) -> Any:
    """`LigerFusedLinearGRPOFunction.ppo_loss_fn` of all rows, which is what its chunks add up to."""
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    asked = {"beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 9} | options

    def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
        return module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logps, mask, advantages, mask, ref_logps, old_logps, loss_type=loss_type, **asked
        )

    loss.__qualname__ = f"LigerFusedLinearGRPOFunction.ppo_loss_fn, loss_type={loss_type!r}"
    return loss

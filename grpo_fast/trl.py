"""TRL's `GRPOTrainer` with the loss of `grpo_fast.torch.grpo_loss`, where it trains on the CPU: `FastGRPOTrainer`.

Loss, gradient and metrics are those of the trainer's own ``_compute_loss``, compared with TRL 1.16. Covered, in any
combination:

==============================  ================================================================================
``loss_type``                   "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", each
                                accumulated over micro-batches and processes as TRL does, in training and in
                                evaluation
the surrogate's numbers         ``epsilon``, ``epsilon_high``, ``delta``, ``sapo_temperature_…``, ``vespo_…``
the KL term                     ``beta``, ``use_bias_correction_kl``; at sequence level weighted with the
                                sequence's ratio, as in TRL up to 1.16 (trl#6586)
``importance_sampling_level``   "token", "sequence"
which tokens count              the mask of tools, ``mask_truncated_completions``, and for the policy term
                                ``off_policy_mask_threshold`` and ``top_entropy_quantile``
the sampler                     ``use_vllm`` with all of ``vllm_importance_sampling_mode``, and without correction
all that comes before the loss  ``scale_rewards``, ``num_iterations``, PEFT, images, tools, …
==============================  ================================================================================

Left to TRL, with a warning of the logger ``grpo_fast.trl`` that says why, each said once:

- a ``loss_type`` that is none of these;
- ``entropy_coef`` and ``use_adaptive_entropy``, which need the logits;
- the load-balancing loss of a mixture of experts;
- "vespo" with both vLLM's correction and the bias-corrected KL, of which the one has the sampler as its anchor and the
  other the old policy;
- training on anything but the CPU;
- numbers that `terms` refuses, such as ``delta`` ≤ 1 + ``epsilon_high``;
- the bias-corrected KL at sequence level in a TRL newer than 1.16, which may weight it otherwise.

What of the trainer's options becomes which argument of `grpo_loss` is in `_trl_options`, the metrics in `_trl_metrics`.
"""

import hashlib
import logging
import os
import re
from typing import Any

from .files import RolloutWriter
from .torch import Tensor, grpo_loss

try:
    import torch
    import trl
    from trl import GRPOTrainer
except ImportError as error:
    raise ImportError("grpo_fast.trl needs TRL: pip install 'grpo_fast[torch,trl]'") from error

from ._trl_metrics import log_metrics
from ._trl_options import anchor, mode_of, normalizer, not_covered, options_of, tokens_of, weights

logger = logging.getLogger(__name__)

#: The release whose loss this one was compared with. Earlier ones divide "dapo" and "luspo" by something else.
COMPARED_WITH = (1, 16)
_INSTALLED = tuple(int(digits) for digits in re.findall(r"\d+", trl.__version__)[:2])
if _INSTALLED < COMPARED_WITH:
    raise ImportError(f"grpo_fast.trl needs TRL {'.'.join(map(str, COMPARED_WITH))} or newer, got {trl.__version__}")

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
    loss have TRL's names and meanings: "kl", "entropy", "clip_ratio/…", "cispo_clip_ratio", "vespo/phi_seq_mean".

    Parameters
    ----------
    *args, **kwargs
        Those of TRL's trainer.
    rollouts : path, or None
        A folder in which a `RolloutWriter` stores what the loss of each optimizer step is given, also of a loss that is
        left to TRL: one file for each step, numbered as in the log, and process. ``prompt_id`` is a hash of the
        prompt's tokens. Evaluations are not stored.

    Raises
    ------
    ValueError
        In training: an unmasked log-probability or an advantage is not finite. TRL's loss would be NaN from then on.
        Or ``rollouts`` is given with ``use_liger_kernel``, which makes no log-probabilities.

    Notes
    -----
    One difference is meant: TRL computes k3 as e^d − d − 1, which in float32 is rounding noise for small d.
    """

    _warnings_given: frozenset[str] = frozenset()
    _writer: RolloutWriter | None = None
    _policy_logps: Tensor | None = None  # those last computed, if they are to be written
    _given: dict[str, Tensor | None] | None = None  # what the loss was given beside TRL's batch; None if it was TRL's

    def __init__(self, *args: Any, rollouts: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rollouts is not None:
            if getattr(self, "use_liger_kernel", False):
                raise ValueError("rollouts cannot be written with use_liger_kernel, which makes no log-probabilities")
            self._writer = RolloutWriter(rollouts, rank=self.accelerator.process_index)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._writer is not None:
            self._policy_logps = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch, to be differentiated; appends its metrics to ``_metrics``, may log a warning.

        In training its rollouts are written, if they are to be.
        """
        loss = self._computed_loss(model, inputs)
        if self._writer is not None and mode_of(self) == "train":
            _write(self, self._writer, inputs)
        self._policy_logps = self._given = None
        return loss

    def _computed_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if _INSTALLED > COMPARED_WITH:
            self._warn_once(
                f"the loss was compared with that of TRL {'.'.join(map(str, COMPARED_WITH))}; in the TRL installed, "
                f"{trl.__version__}, it may be another"
            )
        reasons = not_covered(self, newer=trl.__version__ if _INSTALLED > COMPARED_WITH else None)
        if reasons:
            self._warn_once(f"the loss is left to TRL: {'; '.join(reasons)}")
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        mask = tokens_of(inputs)
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
        options = options_of(self)
        self._given = {
            "old_logps": anchor(self, inputs, logps, old_logps),
            "rollout_is_weights": weights(self, mask, inputs, logps, old_logps, advantages, entropies),
        }
        loss, stats = grpo_loss(
            logps,
            advantages=advantages,
            ref_logps=inputs["ref_per_token_logps"] if options.kl else None,
            **self._given,
            mask=mask,
            surrogate=options.surrogate,
            kl=options.kl,
            importance_sampling_level=options.importance_sampling_level,
            aggregation=options.aggregation,
            normalizer=normalizer(self, mask, inputs),
            return_stats=True,
        )
        with torch.no_grad():
            log_metrics(self, stats, mask, inputs, logps, advantages, entropies)
        return loss

    def _warn_once(self, message: str) -> None:
        """Log a warning, on the main process, unless this trainer has given it."""
        if message not in self._warnings_given:
            self._warnings_given |= {message}
            if self.accelerator.is_main_process:
                logger.warning("%s: %s", type(self).__name__, message)


# --- the rollouts -----------------------------------------------------------------------------------------------------
def _write(trainer: GRPOTrainer, writer: RolloutWriter, inputs: dict[str, Any]) -> None:
    """Write what the loss of a micro-batch was given; the file of a step is complete with its last micro-batch."""
    given = trainer._given or {
        "old_logps": inputs.get("old_per_token_logps"),
        "rollout_is_weights": inputs.get("importance_sampling_ratio"),
    }
    writer.write(
        step=trainer.state.global_step + 1,  # as the log will call it
        logps=trainer._policy_logps,
        **given,
        advantages=inputs["advantages"],
        ref_logps=inputs.get("ref_per_token_logps"),
        mask=tokens_of(inputs),
        rollout_logps=inputs.get("sampling_per_token_logps"),
        prompt_id=_hashes(inputs["prompt_ids"], inputs["prompt_mask"]),
        complete=trainer.accelerator.sync_gradients,
    )


def _hashes(prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
    """A name for each prompt, the same for the same tokens, whatever their padding."""
    prompts = zip(prompt_ids.cpu(), prompt_mask.cpu().bool(), strict=True)
    return [hashlib.blake2b(ids[keep].numpy().tobytes(), digest_size=8).hexdigest() for ids, keep in prompts]

"""The GRPO objective and its diagnostics on the CPU, in one pass over memory; the same bits everywhere.

How the data flows, file by file; each imports only from lines below its own::

    __main__                      the command: over files (_command, _tables, _pictures, _run_pictures), its
    _parser  _option_groups       demonstration (_demonstration, _measure); its arguments
    trl                           `FastGRPOTrainer`: TRL's, with the loss below (_trl_metrics, _trl_options)
    torch                         `grpo_loss`, `rollout_correction` for tensors (_torch_rollout, _tensors)
    conformance                   `identify`, `check`: what does another loss compute?
    _words                        what words on the command line mean
    _warm_up                      `warm_up`: compiling beforehand
    files                         `evaluate`, `sweep`, `histogram`, `worst`: files (_paths, _directories, _filesystems)
                                  and tables (_sources) → columns (_plan, _layouts, _columns, _keys) → batches
                                  (_rollouts, _formats, _json_lines, _arrow, _other_formats) → jobs (_jobs, _histograms,
                                  _worst) → sums (_summing, _workers); `RolloutWriter` (_writer, _atomic)
    prompt_weights                weights that make the loss a mean over prompts (_loss_inputs, _groups)
    rollout_masks                 `off_policy_sequence_mask`, `high_entropy_mask`
    objective  loss  rollout      arrays → checked arrays (_loss_inputs) → tasks (_shares) → kernels → `Stats`
    stats                         exact sums (_additive) → diagnostics
    rollout_stats                 those of trainer and sampler
    _kernels                      the kernels; their map is the docstring of that folder
    reference  advantages         the mathematics once more, in NumPy, independent of the kernels; from rewards
    terms  rollout_terms          the options
    _groups                       rewards by group
    _checks  _advice              what arguments may be; errors that say what to write
"""

from . import reference
from ._kernels.blocks import BLOCK
from ._warm_up import warm_up
from .advantages import gdpo_advantages, group_advantages, whiten
from .files import evaluate
from .loss import LossResult, grpo_loss
from .objective import grpo_objective, grpo_stats, grpo_sweep
from .prompt_weights import prompt_mean_weights
from .rollout import RolloutCorrection, rollout_correction
from .rollout_masks import high_entropy_mask, off_policy_sequence_mask
from .rollout_stats import RolloutStats
from .rollout_terms import Reject
from .stats import Stats, Sweep
from .terms import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped

__all__ = [
    "BLOCK",
    "CISPO",
    "GMPO",
    "K1",
    "K2",
    "K3",
    "SAPO",
    "TV",
    "VESPO",
    "Band",
    "BinaryKL",
    "Clip",
    "LossResult",
    "Reject",
    "RolloutCorrection",
    "RolloutStats",
    "Stats",
    "Sweep",
    "Unclipped",
    "evaluate",
    "gdpo_advantages",
    "group_advantages",
    "grpo_loss",
    "grpo_objective",
    "grpo_stats",
    "grpo_sweep",
    "high_entropy_mask",
    "off_policy_sequence_mask",
    "prompt_mean_weights",
    "reference",
    "rollout_correction",
    "warm_up",
    "whiten",
]
__version__ = "0.1.0"

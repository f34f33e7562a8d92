"""The GRPO objective and its diagnostics on the CPU, in one pass over memory; the same bits everywhere.

How the data flows, file by file; each imports only from lines below its own::

    __main__                      the command: over files (_command, _pictures), its demonstration (_demonstration,
    _parser                       _measure); its arguments
    trl                           `FastGRPOTrainer`: TRL's, with the loss below
    torch                         `grpo_loss` for tensors
    conformance                   `identify`, `check`: what does another loss compute?
    _warm_up                      `warm_up`: compiling beforehand
    files                         `evaluate`, `sweep`: files (_paths) → columns (_plan, _columns) → batches (_rollouts,
                                  _formats, _other_formats) → jobs (_jobs) → sums (_workers)
    objective  loss               arrays → checked arrays (_loss_inputs) → kernels → `Stats`
    stats                         exact sums (_additive) → diagnostics
    _kernels                      the kernels; their map is the docstring of that folder
    reference  advantages         the mathematics once more, in NumPy, independent of the kernels; from rewards
    terms  _groups                the options; rewards by group
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
    "prompt_mean_weights",
    "reference",
    "warm_up",
    "whiten",
]
__version__ = "0.1.0"

"""The GRPO objective and its diagnostics on the CPU, in one pass over memory; the same bits everywhere."""

from . import reference
from ._kernels.blocks import BLOCK
from .advantages import group_advantages
from .files import evaluate
from .loss import LossResult, grpo_loss
from .objective import grpo_objective, grpo_stats, grpo_sweep
from .stats import Stats, Sweep
from .terms import CISPO, K1, K2, K3, SAPO, Clip

__all__ = [
    "BLOCK",
    "CISPO",
    "K1",
    "K2",
    "K3",
    "SAPO",
    "Clip",
    "LossResult",
    "Stats",
    "Sweep",
    "evaluate",
    "group_advantages",
    "grpo_loss",
    "grpo_objective",
    "grpo_stats",
    "grpo_sweep",
    "reference",
]
__version__ = "0.1.0"

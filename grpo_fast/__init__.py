"""The GRPO objective and its diagnostics on the CPU, in one pass over memory; the same bits everywhere."""

from . import reference
from .advantages import group_advantages
from .objective import grpo_objective, grpo_stats, grpo_sweep
from .objective_kernels import BLOCK
from .stats import Stats, Sweep

__all__ = ["BLOCK", "Stats", "Sweep", "group_advantages", "grpo_objective", "grpo_stats", "grpo_sweep", "reference"]
__version__ = "0.1.0"

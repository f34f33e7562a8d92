"""The loss of float32 tensors, forward and backward: extra memory and time beside PyTorch's own, as a Markdown table.

``python bench/torch_targets.py``; a minute and some GB of memory. ``--shrink 100`` takes a hundredth of the sequences.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numba
import torch
from losses import BETA, EPSILON, Batch, _torch_loss, padded
from table import extra_memory, head, row

from grpo_fast import K3, Clip
from grpo_fast.measure import ratio, side_by_side
from grpo_fast.torch import grpo_loss

LENGTH = 4096
SEQUENCES = 4096  # 16.8 M tokens, about half of them masked


def operator(batch: Batch, level: str) -> Any:
    """The loss of tensors."""
    return grpo_loss(
        batch.logps,
        batch.old_logps,
        batch.advantages,
        batch.ref_logps,
        mask=batch.mask,
        surrogate=Clip(EPSILON),
        kl=K3(BETA, importance_weighted=False),
        importance_sampling_level=level,
    )


LOSSES: dict[str, Callable[[Batch, str], Any]] = {
    "grpo_fast": operator,
    "torch eager": _torch_loss,
    "torch.compile": torch.compile(_torch_loss, dynamic=True, fullgraph=True),
    "grpo_fast in torch.compile": torch.compile(operator, dynamic=True, fullgraph=True),
}


def tensors(sequences: int) -> Batch:
    """A float32 batch whose ``logps`` require a gradient."""
    torch.set_num_threads(numba.get_num_threads())
    batch = Batch(*(None if x is None else torch.from_numpy(x) for x in padded(sequences, LENGTH, "float32")))
    batch.logps.requires_grad_()
    return batch


def step(name: str, batch: Batch, scale: float = 1.0) -> None:
    """Forward and backward."""
    batch.logps.grad = None
    loss = LOSSES[name](batch, "token")
    (loss if scale == 1 else scale * loss).backward()


def memory(name: str, sequences: int, scale: float) -> str:
    """How much the peak of a fresh process grows during one step, the gradient included."""
    before = f"""
from torch_targets import step, tensors
batch = tensors({sequences})
step({name!r}, tensors(64), {scale})
step({name!r}, tensors(65), {scale})
"""
    return extra_memory(before, f"step({name!r}, batch, {scale})")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure grpo_fast.torch.grpo_loss beside PyTorch's own.")
    parser.add_argument("--shrink", type=int, default=1, help="divide the number of sequences (default: 1)")
    sequences = SEQUENCES // parser.parse_args().shrink
    head(f"torch {sys.modules['torch'].__version__}")
    label = f"{sequences * LENGTH / 1e6:.3g} M ragged padded"
    gradient = sequences * LENGTH * 4 / 2**20
    for name in LOSSES:
        target = f"≤ {gradient:.0f} MiB, the gradient, + 2" if name == "grpo_fast" else "–"
        row(f"{name}, {label}", "extra memory", target, memory(name, sequences, 1.0))
    row(f"grpo_fast, {label}, loss scaled", "extra memory", "–", memory("grpo_fast", sequences, 0.5))
    batch = tensors(sequences)
    times = side_by_side({name: lambda name=name: step(name, batch) for name in LOSSES}, seconds=20)
    for name in LOSSES:
        ms = f"{1e3 * median(times[name]):.0f} ms"
        row(f"{name}, {label}", "time of grpo_fast", "–", f"{ratio(times, name, 'grpo_fast'):.1f}× ({ms})")


if __name__ == "__main__":
    main()

"""The loss of float32 tensors, forward and backward, beside PyTorch's own: ``pytest bench/bench_torch.py``.

Time in interleaved rounds, extra memory in a fresh process for each: two minutes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import pytest
from batches import Batch, full, padded
from compiled_torch import compiled_or_missing
from loss_peers import BETA, EPSILON, _torch_loss
from processes import extra_memory
from timing import clock, hand_over, measure, present, skip_if_missing

from grpo_fast import K3, Clip

LENGTH = 4096


def _operator() -> Callable[..., Any]:
    from grpo_fast.torch import grpo_loss

    def loss(logps: Any, old: Any, ref: Any, A: Any, mask: Any, level: str) -> Any:
        options = {"surrogate": Clip(EPSILON), "kl": K3(BETA, importance_weighted=False)}
        return grpo_loss(logps, old, A, ref, mask=mask, importance_sampling_level=level, **options)

    return loss


def _eager() -> Callable[..., Any]:
    import torch  # noqa: F401 - or it is missing

    return _torch_loss


PEERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "grpo_fast": _operator,
    "grpo_fast in torch.compile": lambda: compiled_or_missing(_operator()),
    "torch.compile": lambda: compiled_or_missing(_torch_loss),
    "torch eager": _eager,
}
#: Tokens of small batches, for which a call costs more than its tokens.
SMALL = (256, 4096)


def tensors(sequences: int) -> tuple[Any, ...]:
    """A float32 batch, about half masked, whose ``logps`` require a gradient."""
    import torch

    torch.set_num_threads(numba.get_num_threads())
    batch: Batch = padded(sequences, LENGTH, "float32")
    logps, *others = (torch.from_numpy(x) for x in batch[:5])
    return logps.requires_grad_(), *others


def step(loss: Callable[..., Any], batch: tuple[Any, ...]) -> None:
    """Forward and backward."""
    batch[0].grad = None
    loss(*batch, "token").backward()


@pytest.fixture(scope="module")
def case(request, quick):
    peers, missing = present(PEERS)
    skip_if_missing("torch eager", missing)
    batch = tensors(64 if quick else 4096)
    calls = {name: partial(step, peer, batch) for name, peer in peers.items()}
    return batch[0].numel(), measure(calls, request.config, steady=["grpo_fast"]), missing


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own; an error, it would stop torch.compile
@pytest.mark.parametrize("name", PEERS)
def test_speed(benchmark, case, quick, name):
    """Time, and how much the peak of a fresh process grows during one step, the gradient included."""
    n, times, missing = case
    skip_if_missing(name, missing)
    before = f"""
from bench_torch import PEERS, step, tensors
loss = PEERS[{name!r}]()
batch = tensors({n // LENGTH})
step(loss, batch)
batch[0].grad = None
"""
    mib = extra_memory(before, "step(loss, batch)")
    group = f"torch, {n:,} half masked, float32"
    hand_over(benchmark, times, name, group, missing, work="torch", n=n, MiB=mib)


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    import torch

    peers, missing = present({name: PEERS[name] for name in ("grpo_fast", "torch eager")})
    skip_if_missing("torch eager", missing)
    logps, *others = (torch.from_numpy(x) for x in full(16, request.param // 16, "float64")[:4])
    batch = (logps.requires_grad_(), *others, None)
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        times = measure({name: partial(step, peer, batch) for name, peer in peers.items()}, request.config)
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
    return request.param, times


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", ["grpo_fast", "torch eager"])
def test_small(benchmark, small, name):
    """Forward and backward of few float64 tokens, on one thread."""
    n, times = small
    hand_over(benchmark, times, name, f"torch, forward and backward, {n:,} float64", work="torch, small", n=n)

"""What grpo_loss is timed on and beside: batches of tokens, and the same loss by other means.

First the batches, then the contestants: all compute one loss from the same arrays, Clip(0.2) and K3(0.04) without
importance weights, the mean over sequences of the mean over their tokens. Last, which contestants can run here, and
whether one is right.
"""

import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

import grpo_fast
from grpo_fast import K3, Clip, reference

try:
    import torch
except ImportError as error:
    torch, no_torch = None, str(error)

EPSILON, BETA = 0.2, 0.04
DTYPES = ("float64", "float32")
LEVELS = ("token", "sequence")


# --- batches ----------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Per-token arrays (B, T) or, packed, (N,); one advantage per sequence.

    ``mask`` is None where nothing is masked. The rest is None where nothing is packed; its last three are what NumPy
    and torch need in place of ``cu_seqlens``, made here because a user's trainer, too, makes them once for many calls.
    """

    logps: NDArray[Any]
    old_logps: NDArray[Any]
    ref_logps: NDArray[Any]
    advantages: NDArray[Any]
    mask: NDArray[np.bool_] | None = None
    cu_seqlens: NDArray[np.int64] | None = None
    token_advantages: NDArray[Any] | None = None
    token_weights: NDArray[Any] | None = None  # c_i: 1/(sequences·tokens of the sequence)
    sequence_of_token: NDArray[np.int64] | None = None

    @property
    def tokens(self) -> int:
        """How many are not masked."""
        return self.logps.size if self.mask is None else int(np.count_nonzero(self.mask))


def full(sequences: int, length: int, dtype: str, seed: int = 0) -> Batch:
    """(sequences, length) tokens, none of them masked: off-policy, ρ about 15% from 1, 10% at sequence level."""
    rng = np.random.default_rng(seed)

    def drift() -> NDArray[np.float64]:
        return 0.1 * (rng.standard_normal((sequences, length)) + rng.standard_normal((sequences, 1)))

    logps = -rng.exponential(1.0, (sequences, length))
    arrays = (logps.astype(dtype), (logps + drift()).astype(dtype), (logps + drift()).astype(dtype))
    return Batch(*arrays, rng.standard_normal(sequences).astype(dtype))


def padded(sequences: int, length: int, dtype: str, seed: int = 0, shortest: int = 1) -> Batch:
    """The same, but each sequence is ``shortest`` … ``length`` tokens long, and masked to its right."""
    lengths = np.random.default_rng([seed, 1]).integers(shortest, length + 1, sequences)
    return full(sequences, length, dtype, seed)._replace(mask=np.arange(length) < lengths[:, None])


def packed_long(sequences: int, length: int, dtype: str, seed: int = 0) -> Batch:
    """The unmasked tokens of ``padded``."""
    return _packed(padded(sequences, length, dtype, seed))


def packed_short(sequences: int, length: int, dtype: str, seed: int = 0) -> Batch:
    """About as many tokens as in ``packed_long``, but in sequences of 5 … 900."""
    return _packed(padded(sequences * length // (5 + 900), 900, dtype, seed, shortest=5))


def _packed(batch: Batch) -> Batch:
    arrays = (x[batch.mask] for x in batch[:3])
    lengths = batch.mask.sum(axis=1)
    return Batch(
        *arrays,
        batch.advantages,
        cu_seqlens=np.append(0, np.cumsum(lengths)),
        token_advantages=np.repeat(batch.advantages, lengths),
        token_weights=np.repeat((1 / (lengths.size * lengths)).astype(batch.logps.dtype), lengths),
        sequence_of_token=np.repeat(np.arange(lengths.size), lengths),
    )


KINDS: dict[str, Callable[[int, int, str], Batch]] = {
    "full": full,
    "padded": padded,
    "packed long": packed_long,
    "packed short": packed_short,
}


# --- contestants ------------------------------------------------------------------------------------------------------
Found: TypeAlias = tuple[float, NDArray[Any] | None]  # the loss and, if wanted, ∂loss/∂logps
Contestant: TypeAlias = Callable[[Batch, str, bool], Found]


def fast(batch: Batch, level: str, grad: bool | NDArray[Any]) -> Found:
    """``grpo_loss``; ``grad`` may also be an array to write into."""
    result = grpo_fast.grpo_loss(
        batch.logps,
        batch.old_logps,
        batch.advantages,
        batch.ref_logps,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        surrogate=Clip(EPSILON),
        kl=K3(BETA, importance_weighted=False),
        importance_sampling_level=level,
        grad=grad,
    )
    return result.loss, result.grad


def textbook(batch: Batch, level: str, grad: bool) -> Found:
    """The formulas as they stand in the papers, whole arrays at a time; the gradient derived by hand."""
    logps, old_logps, ref_logps, A, mask = batch[:5]
    log_ratio = logps - old_logps
    if batch.cu_seqlens is not None:
        starts, lengths = batch.cu_seqlens[:-1], np.diff(batch.cu_seqlens)
        if level == "token":
            A = batch.token_advantages
        else:
            log_ratio = np.add.reduceat(log_ratio, starts) / lengths.astype(logps.dtype)
    else:
        A = A[:, None]
        counts = None if mask is None else mask.sum(axis=1, dtype=logps.dtype, keepdims=True)
        if level == "sequence" and mask is None:
            log_ratio = np.mean(log_ratio, axis=1, keepdims=True)
        elif level == "sequence":
            log_ratio = np.sum(log_ratio * mask, axis=1, keepdims=True) / counts

    ratio = np.exp(log_ratio)
    unclipped = ratio * A
    clipped = np.clip(ratio, 1 - EPSILON, 1 + EPSILON) * A
    s = np.minimum(unclipped, clipped)
    slope = np.where(unclipped <= clipped, unclipped, 0) if grad else None
    if batch.cu_seqlens is not None and level == "sequence":
        s, slope = np.repeat(s, lengths), np.repeat(slope, lengths) if grad else None
    d = ref_logps - logps
    r = np.exp(d)
    loss = BETA * (r - d - 1) - s

    if batch.cu_seqlens is not None:
        c = batch.token_weights
        value = np.sum(c * loss)
    elif mask is None:
        c = 1 / logps.size
        value = np.mean(loss)
    else:
        value = np.mean(np.sum(loss * mask, axis=1, keepdims=True) / counts)
        c = mask / (len(logps) * counts) if grad else None
    return float(value), c * (BETA * (1 - r) - slope) if grad else None


def _torch_loss(batch: Batch, level: str) -> Any:
    """The loss as TRL writes it, over a batch of tensors; what is packed goes by index, as the lengths differ."""
    A, mask, sequence = batch.advantages, batch.mask, batch.sequence_of_token
    log_ratio = batch.logps - batch.old_logps
    if sequence is not None:
        if level == "token":
            A = batch.token_advantages
        else:
            log_ratio = torch.zeros_like(A).index_add(0, sequence, log_ratio) / batch.cu_seqlens.diff()
    else:
        A = A.unsqueeze(1)
        if level == "sequence" and mask is None:
            log_ratio = log_ratio.mean(1, keepdim=True)
        elif level == "sequence":
            log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)

    ratio = log_ratio.exp()
    s = torch.minimum(ratio * A, ratio.clamp(1 - EPSILON, 1 + EPSILON) * A)
    if sequence is not None and level == "sequence":
        s = s.index_select(0, sequence)
    d = batch.ref_logps - batch.logps
    loss = BETA * (d.exp() - d - 1) - s
    if sequence is not None:
        return (batch.token_weights * loss).sum()
    return loss.mean() if mask is None else ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _through_torch(function: Callable[..., Any]) -> Contestant:
    def contestant(batch: Batch, level: str, grad: bool) -> Found:
        tensors = Batch(*(None if x is None else torch.from_numpy(x) for x in batch))
        tensors.logps.requires_grad_(grad)
        loss = function(tensors, level)
        return loss.item(), torch.autograd.grad(loss, tensors.logps)[0].numpy() if grad else None

    return contestant


# --- who takes part, and who is right ---------------------------------------------------------------------------------
def contestants() -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that can run here, on as many threads as Numba's; and those that cannot, each with the reason, one line."""
    found: dict[str, Contestant] = {"grpo_fast": fast, "numpy": textbook}
    if torch is None:
        return found, dict.fromkeys(("torch eager", "torch.compile"), no_torch)
    torch.set_num_threads(numba.get_num_threads())
    found["torch eager"] = _through_torch(_torch_loss)
    torch._dynamo.config.recompile_limit = 1000  # each case has its own kernel; past the limit of 8 all would be eager
    compiled = _through_torch(torch.compile(_torch_loss, dynamic=False, fullgraph=True))
    try:
        compiled(full(2, 16, "float64"), "token", True)
    except Exception as error:  # no C++ compiler, no Python.h, a Python that torch.compile does not know: many types
        return found, {"torch.compile": textwrap.shorten(str(error), 160)}
    return found | {"torch.compile": compiled}, {}


def expected(batch: Batch, level: str) -> tuple[Found, Found]:
    """The loss and the gradient by the reference, in float64, for clip bounds a little below ε and a little above."""
    logps, old_logps, ref_logps, advantages = (x.astype(np.float64) for x in batch[:4])
    rounding = 256 * float(np.finfo(batch.logps.dtype).eps)
    below, above = (
        reference.grpo_loss(
            logps,
            old_logps,
            advantages,
            ref_logps,
            mask=batch.mask,
            cu_seqlens=batch.cu_seqlens,
            surrogate=Clip(epsilon),
            kl=K3(BETA, importance_weighted=False),
            importance_sampling_level=level,
            grad=True,
        )
        for epsilon in (EPSILON - rounding, EPSILON + rounding)
    )
    return (below.loss, below.grad), (above.loss, above.grad)


def check(found: Found, right: tuple[Found, Found], batch: Batch) -> None:
    """Assert that what a contestant found is right but for rounding in the dtype of the batch.

    The loss is a sum of N terms of the size |A| + β, each rounded, in an order of the contestant's own: √N roundings.
    An element of the gradient is a dozen operations on c·(|A|·ρ + β·r), of which the mean over a sequence may cost
    many. Where ρ is within rounding of a clip bound, the gradient on either side of it is right; and torch.minimum
    halves it at a tie, even one by rounding: about one in 10⁷ float32 tokens may be off.
    """
    eps = float(np.finfo(batch.logps.dtype).eps)
    size = float(np.abs(batch.advantages).max()) + BETA
    loss, grad = found
    assert abs(loss - right[0][0]) <= 8 * eps * batch.tokens**0.5 * size
    if grad is None:
        return
    assert grad.dtype == batch.logps.dtype
    c = batch.token_weights
    if c is None:
        mask = np.ones(grad.shape, dtype=bool) if batch.mask is None else batch.mask
        c = mask / (len(mask) * mask.sum(axis=1, keepdims=True))
    off = np.minimum(*(np.abs(grad - g) for _, g in right))
    assert np.count_nonzero(off > 256 * eps * 2 * size * c) <= 1e-6 * grad.size

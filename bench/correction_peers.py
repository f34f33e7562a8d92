"""Trainer and sampler: weights and diagnostics by rollout_correction and by torch, as trainers write it, and if right.

All compute the weights of a batch, truncated at 2 for each token or masked at 3 for each sequence, and of them and of
the ratios what is logged: means, extremes and fractions, effective sample size, estimates of the KL, perplexities. Each
entry of `PEERS` makes, if what it needs is installed, a function that takes a batch and a level, and gives a call
without arguments that returns weights and numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
from compiled_torch import compiled_or_missing
from numpy.typing import NDArray

from grpo_fast import reference, rollout_correction

#: The options of each level.
OPTIONS: dict[str, dict[str, Any]] = {"token": {}, "sequence": {"level": "sequence", "mode": "mask", "upper": 3.0}}
#: What is logged, in the order of the peers.
LOGGED = ("mean", "min", "max", "raw_mean", "raw_min", "raw_max", "fraction_high", "ess", "k1", "k3", "chi2_token")
LOGGED += ("chi2_sequence", "train_ppl", "rollout_ppl", "ppl_ratio", "prob_diff")

Found: TypeAlias = tuple[NDArray[Any], list[float]]  # the weights, and what is logged
Bind: TypeAlias = Callable[["Pair", str], Callable[[], Found]]


class Pair(NamedTuple):
    """The log-probabilities of both, (B, T); None: no mask."""

    old_logps: NDArray[Any]
    rollout_logps: NDArray[Any]
    mask: NDArray[np.bool_] | None = None

    @property
    def tokens(self) -> int:
        """How many are not masked."""
        return self.old_logps.size if self.mask is None else int(np.count_nonzero(self.mask))


def pair(kind: str, sequences: int, length: int, dtype: str, seed: int = 0) -> Pair:
    """As two engines round: log-ratios of a standard deviation of 0.02; "padded" ones are half masked, to the right."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (sequences, length))
    rollout = np.minimum(old + 0.02 * rng.standard_normal(old.shape), 0)
    mask = None
    if kind == "padded":
        mask = np.arange(length) < rng.integers(1, length + 1, (sequences, 1))
    return Pair(old.astype(dtype), rollout.astype(dtype), mask)


# --- grpo_fast --------------------------------------------------------------------------------------------------------
def fast(batch: Pair, level: str) -> Found:
    """``rollout_correction``, and all that is logged."""
    weights, _, stats = rollout_correction(batch.old_logps, batch.rollout_logps, mask=batch.mask, **OPTIONS[level])
    return weights, [float(getattr(stats, name)) for name in LOGGED]


def _fast() -> Bind:
    return lambda *case: partial(fast, *case)


# --- torch ------------------------------------------------------------------------------------------------------------
def _torch_correction(old: Any, rollout: Any, mask: Any, level: str) -> tuple[Any, Any]:
    """Weights and numbers as they are written by hand in torch."""
    import torch

    log_r = old - rollout
    keep = torch.ones_like(old, dtype=torch.bool) if mask is None else mask
    counts = keep.sum(1)
    n = counts.sum()

    def total(x: Any) -> Any:
        return x.sum(1) if mask is None else (x * mask).sum(1)

    def least(x: Any) -> Any:
        return (x if mask is None or x.dim() == 1 else x.masked_fill(~mask, float("inf"))).min()

    def largest(x: Any) -> Any:
        return (x if mask is None or x.dim() == 1 else x.masked_fill(~mask, float("-inf"))).max()

    log_products = total(log_r)
    r = log_r.exp()
    if level == "token":
        raw, weights = r, r.clamp(max=2.0)
        raw_mean, high = total(r).sum() / n, total((r > 2.0).to(r.dtype)).sum() / n
    else:
        raw = log_products.exp()
        raw_mean, high = raw.mean(), (raw > 3.0).to(r.dtype).mean()
        weights = torch.where(raw > 3.0, 0.0, raw).unsqueeze(1).expand_as(r)
    weights = weights * keep
    of_weights, squares = weights.sum(), (weights * weights).sum()
    mean_old, mean_rollout = total(old) / counts, total(rollout) / counts
    logged = [
        *(of_weights / n, least(weights), largest(weights), raw_mean, least(raw), largest(raw), high),
        *(of_weights * of_weights / (n * squares), -log_products.sum() / n, total(r - log_r - 1).sum() / n),
        *(total(r * r).sum() / n - 1, (2 * log_products).exp().mean() - 1),
        *((-mean_old).exp().mean(), (-mean_rollout).exp().mean(), (mean_rollout - mean_old).exp().mean()),
        total((old.exp() - rollout.exp()).abs()).sum() / n,
    ]
    return weights, torch.stack(logged)


def _through_torch(function: Callable[..., Any]) -> Bind:
    import torch

    torch.set_num_threads(numba.get_num_threads())

    def bind(batch: Pair, level: str) -> Callable[[], Found]:
        tensors = [None if x is None else torch.from_numpy(x) for x in batch]

        def call() -> Found:
            with torch.no_grad():
                weights, logged = function(*tensors, level)
            return weights.numpy(), logged.tolist()

        return call

    return bind


PEERS: dict[str, Callable[[], Bind]] = {
    "grpo_fast": _fast,
    "torch.compile": lambda: _through_torch(compiled_or_missing(_torch_correction)),
    "torch eager": lambda: _through_torch(_torch_correction),
}


# --- whether they are right -------------------------------------------------------------------------------------------
def check(found: Found, batch: Pair, level: str) -> None:
    """Assert that weights and numbers are right but for rounding, in the dtype of the batch, and in an order of theirs.

    A sum of N float32 terms in N/1000 or more steps, as the peers' are, may be off by that many roundings of its size.
    The logarithm of a product of T ratios is such a sum, and e to it is off by as much. Few weights are at a bound,
    where either side is right.
    """
    right = reference.rollout_correction(*(x.astype(np.float64) for x in batch[:2]), mask=batch.mask, **OPTIONS[level])
    eps = float(np.finfo(batch.old_logps.dtype).eps)
    length = batch.old_logps.shape[1]
    limit = 64 * eps + (0 if level == "token" else 8 * eps * length)
    weights, logged = found
    off = np.abs(weights - right.weights) > limit * np.maximum(right.weights, 1)
    assert np.count_nonzero(off) <= 2e-3 * weights.size, np.count_nonzero(off)
    for name, value in zip(LOGGED, logged, strict=True):
        expected = right.stats[name]
        slack = 1e-2 if batch.old_logps.dtype == np.float32 else 1e-8
        assert abs(value - expected) <= slack * max(abs(expected), 1), (name, value, expected)

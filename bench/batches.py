"""What grpo_loss is timed on: batches of tokens, of which each sequence drifts as a policy in training does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Batch(NamedTuple):
    """Per-token arrays (B, T) or, packed, (N,) with ``cu_seqlens``; one advantage per sequence; None: no mask."""

    logps: NDArray[Any]
    old_logps: NDArray[Any]
    ref_logps: NDArray[Any]
    advantages: NDArray[Any]
    mask: NDArray[np.bool_] | None = None
    cu_seqlens: NDArray[np.int64] | None = None

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


def packed_single(tokens: int, dtype: str, seed: int = 0) -> Batch:
    """So many sequences of one token each."""
    batch = full(tokens, 1, dtype, seed)
    return Batch(*(x.reshape(-1) for x in batch[:3]), batch.advantages, cu_seqlens=np.arange(tokens + 1))


def _packed(batch: Batch) -> Batch:
    arrays = (x[batch.mask] for x in batch[:3])
    return Batch(*arrays, batch.advantages, cu_seqlens=np.append(0, np.cumsum(batch.mask.sum(axis=1))))


KINDS: dict[str, Callable[[int, int, str], Batch]] = {"full": full, "padded": padded}

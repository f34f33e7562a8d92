"""How the sequences of a batch are shared out among the tasks of a kernel."""

from functools import lru_cache

import numpy as np

from ._checks import Array
from ._kernels.tokens import Batch, Extent, begin_long_sequence

#: Into so many ranges each task's sequences are cut, of about equal length: tasks take them in turns, and so share the
#: padding, wherever in the batch the short sequences are.
_RANGES = 16
#: Sequences of more tokens may be shared out among the threads, one after the other.
_LONG = 1 << 16


def all_sequences(batch: Batch) -> Array:
    """The one range of sequences for the one task that does all."""
    return _one_range(len(batch.bounds) - 1)


@lru_cache(maxsize=256)
def _one_range(sequences: int) -> Array:
    """The range of so many sequences; an array that nobody may write to, as all calls share it."""
    return np.array([[0, sequences]], np.int64)


def ranges_of(batch: Batch, tasks: int) -> tuple[Array, int, list[int]]:
    """Ranges of sequences for tasks to take in turns; the length beyond which one is shared out; those longer."""
    bounds, size, count = batch.bounds, batch.logps.size, _RANGES * tasks
    limit = max(_LONG, size // count)
    edges = np.searchsorted(bounds, np.arange(count + 1) * (size / count))
    edges[-1] = len(bounds) - 1
    ranges = np.empty((count, 2), np.int64)
    ranges[:, 0], ranges[:, 1] = edges[:-1], edges[1:]
    # From large to small: in any other order one task's turns could all be the larger ranges, or the only ones.
    sizes = bounds[ranges[:, 1]] - bounds[ranges[:, 0]]
    ranges = ranges[np.argsort(-sizes, kind="stable")]
    lengths = bounds[1:] - bounds[:-1]
    return ranges, limit, np.flatnonzero(lengths > limit).tolist() if lengths.max() > limit else []


def begin_long(batch: Batch, sequence: int, accumulators: Array) -> Extent:
    """`tokens.begin_sequence`, with its side effects, for a sequence that is shared out."""
    first, last = batch.bounds[sequence : sequence + 2].tolist()
    return Extent(*begin_long_sequence(batch.mask, batch.grad, first, last, accumulators))

"""How a kernel works through a block: `RUN` vectors at a time, handed from one short loop to the next.

Each loop is short enough for its values to stay in registers and for its iterations to overlap; what the next one
needs it leaves in a row of a scratch array, which stays in the L1 cache. (One fused loop over the probabilities took
2.25 ns a sample on AVX2, the chain of short ones 1.65.)
"""

import numpy as np

from .compiling import compiled, inlined
from .simd import lanes, load, prefetch, store, where, wide

BLOCK = 4096  # samples whose sums are rounded; between blocks nothing is
RUN = 16  # vectors; in float32 also how many terms are added before they go into float64
AHEAD = 32  # vectors: how far ahead of its use memory is asked for


@compiled
def scratch_like(array, rows):
    """A scratch array with rows of RUN vectors."""
    return np.empty(rows * RUN * lanes(array), array.dtype)


@inlined
def put(scratch, row, v, vector):
    """Leave a vector in a row."""
    store(scratch, (row * RUN + v) * lanes(scratch), vector)


@inlined
def get(scratch, row, v):
    """Take it out."""
    return load(scratch, (row * RUN + v) * lanes(scratch))


@inlined
def settled(total, in_float64, careful):
    """The sum of a run, added in the dtype; or in float64 where that overflowed, as it only can when ``careful``."""
    narrow = wide(total)
    if careful:
        return where(narrow - narrow == 0.0, narrow, in_float64)
    return narrow


@inlined
def ask_ahead(array, start, v):
    """Ask for a line that a later run needs.

    The loops of a run share this out: asked for in one of them, lines come in bursts larger than a core can have under
    way (20 M float64 samples in 40 ms; shared out 36, without any 44).
    """
    prefetch(array, start + (v + AHEAD) * lanes(array))

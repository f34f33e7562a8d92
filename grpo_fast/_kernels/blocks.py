"""How a kernel works through its data: tasks share blocks of `BLOCK` items, and a block is runs of `RUN` vectors.

A run of tokens goes through one loop (`token_level`, `sequence_level`). A run of samples passes through several short
ones, each of which leaves what the next one needs in a row of a scratch array, in the L1 cache: a short loop keeps its
values in registers, and iterations with divisions overlap. (On Zen 3 one fused loop over the probabilities took 2.25 ns
a sample, the chain of short ones 1.65.)
"""

from typing import Any

import numpy as np

from .compiling import compiled, inlined
from .simd import is_finite, lanes, load, prefetch, store

BLOCK = 4096  # samples or tokens whose sums are rounded; beyond a block, sums are exact
RUN = 16  # vectors; in float32 also how many terms are added before they go into float64
AHEAD = 32  # vectors: how far ahead of its use memory is asked for


# --- who works on what ------------------------------------------------------------------------------------------------
def blocks_in(items: Any) -> Any:
    """How many blocks hold so many items; in kernels, `block_count`."""
    return (items + BLOCK - 1) // BLOCK


block_count = inlined(blocks_in)


@inlined
def share(items, task, tasks):
    """The first of the ``items`` that are one task's, and the one after the last; all are somebody's."""
    return task * items // tasks, (task + 1) * items // tasks


@inlined
def vectors_in_run(array, run_start, stop):
    """How many vectors of the run that begins at ``run_start`` hold items before ``stop``; `RUN` at most."""
    return min(RUN, (stop - run_start + lanes(array) - 1) // lanes(array))


# --- from loop to loop ------------------------------------------------------------------------------------------------
@compiled
def scratch_like(array, rows):
    """A new scratch array of the dtype of ``array``, with so many rows of RUN vectors; compiled, for tests call it."""
    return np.empty(rows * RUN * lanes(array), array.dtype)


@inlined
def store_row(scratch, row, v, vector):
    """Write vector number ``v`` of a row of the scratch array."""
    store(scratch, (row * RUN + v) * lanes(scratch), vector)


@inlined
def load_row(scratch, row, v):
    """Vector number ``v`` of a row of the scratch array."""
    return load(scratch, (row * RUN + v) * lanes(scratch))


@inlined
def prefetch_ahead(array, start, v):
    """Ask for the cache line that a later run needs when this one, from ``start`` on, is at vector ``v``.

    The loops of a run share this out: asked for in one of them, lines come in bursts larger than a core can have under
    way (20 M float64 samples in 40 ms; shared out 36, without any 44).
    """
    prefetch(array, start + (v + AHEAD) * lanes(array))


@inlined
def prefetch_if_given(array, start, v):
    """`prefetch_ahead`; nothing if the array is None."""
    if array is not None:
        prefetch_ahead(array, start, v)


# --- the sum of a run -------------------------------------------------------------------------------------------------
@inlined
def overflowed(array, in_float64):
    """Whether the sum of a run, added in the dtype of ``array`` and then widened, is to be added again in float64.

    Sixteen float32 terms may overflow though their mean is finite. The policy term does by its advantage or by ε, on
    which no other sum may depend: so it alone is added again.
    """
    return lanes(array) > 8 and not is_finite(in_float64)

"""The roof under which every kernel works: reading four arrays and nothing else."""

from typing import Any

import numba

from .blocks import share
from .compiling import compiled
from .simd import full, lane_sum, lanes, load


@compiled
def read(a: Any, b: Any, c: Any, d: Any, start: int, stop: int) -> Any:
    """The sum of four arrays from ``start`` to ``stop``, but for what does not fill a vector.

    One load and one addition for each vector, nothing that a kernel could do without.
    """
    w = full(a, 0.0)
    x = w
    y = w
    z = w
    for i in range(start, stop - lanes(a) + 1, lanes(a)):
        w += load(a, i)
        x += load(b, i)
        y += load(c, i)
        z += load(d, i)
    return lane_sum(w + x + y + z)


@compiled(parallel=True)
def read_parallel(a: Any, b: Any, c: Any, d: Any, sums: Any) -> None:
    """Write into ``sums`` what `read` returns for as many parts of the arrays, which are read on threads."""
    tasks = len(sums)
    for t in numba.prange(tasks):
        first, last = share(len(a), t, tasks)
        sums[t] = read(a, b, c, d, first, last)

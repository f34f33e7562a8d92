"""The roof under which every kernel works: reading four arrays and nothing else."""

import numba

from .compiling import compiled
from .simd import full, lane_sum, lanes, load


@compiled
def read(a, b, c, d, start, stop):
    """The sum of all elements: one load and one addition for each vector, nothing a kernel could do without."""
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
def read_parallel(a, b, c, d, sums):
    tasks = len(sums)
    for t in numba.prange(tasks):
        sums[t] = read(a, b, c, d, t * len(a) // tasks, (t + 1) * len(a) // tasks)

"""The roof under which every kernel works: reading four arrays and nothing else."""

from typing import Any

from .blocks import share
from .compiling import compiled, subroutine
from .simd import full, lane_sum, lanes, load
from .tasks import run


@subroutine
def _read_share(task: int, a: Any, b: Any, c: Any, d: Any, sums: Any) -> None:
    # One load and one addition for each vector, nothing that a kernel could do without.
    first, last = share(len(a), task, len(sums))
    w = full(a, 0.0)
    x = w
    y = w
    z = w
    for i in range(first, last - lanes(a) + 1, lanes(a)):
        w += load(a, i)
        x += load(b, i)
        y += load(c, i)
        z += load(d, i)
    sums[task] = lane_sum(w + x + y + z)


@compiled
def read(a: Any, b: Any, c: Any, d: Any, sums: Any, room: Any) -> Any:
    """An entry, see `tasks`: writes the sum of four arrays into ``sums``, a part of them for each task.

    What does not fill a vector at the end of a part is left out.
    """
    return run(_read_share, (a, b, c, d, sums), room)

"""What no kernel can beat in memory: reading the same arrays, or reading some and writing another, nothing else.

The other roof, that of arithmetic, which holds for what fits into a cache, ``python bench/machine_code.py`` counts.
"""

from typing import Any

import numba
from numpy.typing import NDArray

from grpo_fast._measure import read

__all__ = ["read", "read_and_write", "read_two_and_write"]


@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def _add(a: Any, b: Any, c: Any, out: Any) -> None:
    for i in numba.prange(out.size):
        out[i] = a[i] + b[i] + c[i]


def read_and_write(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any], out: NDArray[Any]) -> None:
    """Read three arrays and write one."""
    _add(*(x.reshape(-1) for x in (a, b, c, out)))


@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def _subtract(a: Any, b: Any, out: Any) -> None:
    for i in numba.prange(out.size):
        out[i] = a[i] - b[i]


def read_two_and_write(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any]) -> None:
    """Read two arrays and write one."""
    _subtract(*(x.reshape(-1) for x in (a, b, out)))

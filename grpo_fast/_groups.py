"""Which rewards belong to one group, and how they are spread within it: for `advantages`, and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import as_array

LARGEST = 1e100  # of a reward; its square, and the sum of as many squares as memory holds, stay inside float64


# --- which -----------------------------------------------------------------------------------------------------------
def groups_of(
    shape: tuple[int, ...],
    group_size: int | None,
    group_ids: ArrayLike | None,
    *,
    may_be_rows: bool = True,
    of: str = "rewards",
) -> NDArray[np.intp]:
    """The group of each reward, 0 … groups − 1; of rewards of that shape, of which a row may be a group.

    They are what messages call what there is one ``of`` for each completion.
    """
    if group_size is not None and group_ids is not None and not (may_be_rows and len(shape) == 2):
        raise ValueError(f"exactly one of group_size and group_ids must be given, got {group_size=}, group_ids given")
    if not may_be_rows and group_size is None and group_ids is None:
        raise ValueError("group_size must be given, or else group_ids, got group_size=None, group_ids not given")
    ways = (may_be_rows and len(shape) == 2) + (group_size is not None) + (group_ids is not None)
    if ways != 1 or len(shape) not in (1, 2):
        flat = ": rewards.ravel() is 1-D" if len(shape) > 1 else ""
        raise ValueError(
            "rewards must be 2-D (groups, G), or 1-D with either group_size or group_ids; "
            f"got shape {shape}, {group_size=}, group_ids {'not ' if group_ids is None else ''}given{flat}"
        )
    size = int(np.prod(shape))
    if group_ids is not None:
        ids = as_array("group_ids", group_ids, "ints or strings")
        if ids.dtype.kind not in "iubSUTO" and ids.size:
            raise TypeError(f"group_ids must be ints or strings, got {ids.dtype}")
        if ids.shape != shape:
            raise ValueError(f"group_ids must have the shape of {of} {shape}, got {ids.shape}")
        try:
            _, group = np.unique(ids, return_inverse=True)
        except TypeError as error:  # objects that cannot be sorted
            raise TypeError("group_ids must be all ints or all strings, got a mixture") from error
        return group
    each = max(shape[-1], 1) if group_size is None else group_size
    if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {each!r}")
    if each < 1 or size % each:
        raise ValueError(f"group_size must be at least 1 and divide the number of {of} {size}, got {each}")
    return np.arange(size, dtype=np.intp) // each


def checked_rewards(rewards: ArrayLike, missing: str) -> NDArray[Any]:
    """``rewards`` as an array, or a TypeError or ValueError; with ``missing="skip"`` they may be NaN."""
    array = as_array("rewards", rewards)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"rewards must be numbers or bools, got {array.dtype}")
    as_floats = array.astype(np.float64)
    good = np.abs(as_floats) < LARGEST
    if missing == "skip":
        good |= np.isnan(as_floats)
    bad = np.argwhere(~good)
    if bad.size:
        index = tuple(bad[0].tolist())
        skipped = ": missing='skip' leaves NaN out" if np.isnan(as_floats[index]) else ""
        raise ValueError(f"rewards must be finite and below {LARGEST:g}, got {array[index]} at index {index}{skipped}")
    return array


# --- how they are spread ---------------------------------------------------------------------------------------------
class Groups:
    """Numbers by group: their sizes, means and standard deviations, made of differences from each group's first."""

    def __init__(self, r: NDArray[np.float64], group: NDArray[np.intp]) -> None:
        _, first, self.of = np.unique(group, return_index=True, return_inverse=True)  # none is empty
        self.size = np.bincount(self.of)
        self.first = r[first]
        self.shifted = r - self.first[self.of]
        self.shift = np.bincount(self.of, self.shifted) / self.size
        self.centred = self.shifted - self.shift[self.of]

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each group."""
        return self.first + self.shift

    def weighted_shift(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each group, its weighted mean less its first number; where the weights are all 0, NaN."""
        return np.bincount(self.of, self.shifted * weights) / np.bincount(self.of, weights)

    def std(self, ddof: int) -> NDArray[np.float64]:
        """The standard deviation of each group, 0 where it has no more than ``ddof``."""
        return self._root_mean_square(self.centred, self.size - ddof)

    def std_of_others(self, ddof: int) -> NDArray[np.float64]:
        """For each number the standard deviation of the others of its group; 0 where there is one other, or none.

        Without r_i the sum of squares about the mean is less by n/(n − 1)·(r_i − mean)². Where that takes nearly all
        of it away, which it can for one number of a group of three or more, the others are added anew.
        """
        unit = self._unit(self.centred)
        squares = (self.centred / unit[self.of]) ** 2
        total = np.bincount(self.of, squares)[self.of]
        n = self.size[self.of]
        own = squares * (n / np.maximum(n - 1, 1))
        spread = unit[self.of] * np.sqrt(np.maximum(total - own, 0) / np.maximum(n - 1 - ddof, 1))
        far = (own > 0.9 * total) & (n > 2)
        rest = ~far & np.isin(self.of, self.of[far])
        if rest.any():
            others = Groups(self.shifted[rest], self.of[rest])
            spread[far] = others.std(ddof)[np.searchsorted(np.unique(self.of[far]), self.of[far])]
        spread[n <= 2] = 0.0
        return spread

    def _root_mean_square(self, x: NDArray[np.float64], divisor: NDArray[np.intp]) -> NDArray[np.float64]:
        unit = self._unit(x)
        result: NDArray[np.float64] = unit * np.sqrt(
            np.bincount(self.of, (x / unit[self.of]) ** 2) / np.maximum(divisor, 1)
        )
        return result

    def _unit(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """A power of two for each group by which its numbers are divided, so that no square vanishes."""
        largest = np.zeros(self.size.size)
        np.maximum.at(largest, self.of, np.abs(x))
        unit: NDArray[np.float64] = power_of_two_above(largest)
        return unit


def std_of_all(r: NDArray[np.float64], ddof: int) -> float:
    """The standard deviation of all numbers; 0 where there are no more than ``ddof``."""
    if r.size <= ddof:
        return 0.0
    from_first = r - r[0]
    unit = power_of_two_above(np.abs(from_first).max())
    return float(unit * np.std(from_first / unit, ddof=ddof))


def power_of_two_above(x: Any) -> Any:
    """The least power of two above x ≥ 0; 1 for 0."""
    return np.ldexp(1.0, np.frexp(x)[1])


def divided(a: NDArray[np.float64], b: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """a/b, and a where b is 0: of equal rewards, with eps = 0, a is 0."""
    return np.divide(a, b, out=a.copy(), where=np.asarray(b) > 0)

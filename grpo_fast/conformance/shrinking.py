"""The smallest input that still shows a difference: fewer rows, fewer tokens, simpler numbers."""

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from .calling import Batch, each

#: How many inputs are tried; each is one call of the loss.
_TRIES = 150


def smallest(at: Batch, shows: Callable[[Batch], bool]) -> Batch:
    """A batch no larger than ``at`` that ``shows`` what it does, found greedily."""
    tries = _TRIES
    improved = True
    while improved and tries > 0:
        improved = False
        for smaller in _smaller(at):
            tries -= 1
            if tries < 0:
                break
            if shows(smaller):
                at, improved = smaller, True
                break
    return at


def _columns(keep: Any) -> Callable[[Any], Any]:
    return lambda x: x if x.ndim == 1 else x[:, keep]


def _smaller(at: Batch) -> Iterator[Batch]:
    rows, columns = at.logps.shape
    if rows > 1:
        for i in range(rows):
            keep = np.arange(rows) != i
            yield each(at, itemgetter(keep))
    if columns > 1:
        for t in range(columns):
            keep = np.arange(columns) != t
            yield each(at, _columns(keep))
    plain: dict[str, Any] = {
        "ref_logps": at.logps.copy(),
        "old_logps": at.logps.copy(),
        "mask": np.ones_like(at.mask),
        "advantages": np.ones_like(at.advantages),
    }
    for name, value in plain.items():
        if not np.array_equal(getattr(at, name), value, equal_nan=True):
            yield at._replace(**{name: value})
    for name in ("logps", "old_logps", "ref_logps", "advantages"):
        value = getattr(at, name)
        for digits in (1, 2):
            rounded = np.round(value, digits) + 0.0  # never −0
            if not np.array_equal(rounded, value, equal_nan=True):
                yield at._replace(**{name: rounded})

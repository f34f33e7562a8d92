"""How log-ratios are distributed: `Histogram`, integer counts on one grid for all files, so that shards add.

The bins are those of floating-point numbers with a few bits: so many in each octave, on either side of 0. They are as
fine around the bounds of a GSPO clip, at 10⁻⁴, as around those of a clip at 0.2, and a shift of bits finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._additive import Additive, added_by, same
from ._checks import Array, refuse_unless_mask
from ._columns import Form
from ._jobs import Work
from ._loss_inputs import Inputs, refuse_if_not_finite
from .rollout import refuse_bad_logps
from .terms import Level, Options

#: Arguments that say nothing about log-ratios.
UNREAD = {"advantages", "rollout_is_weights", "loss_weights"}
_BITS = 5  # of the mantissa: 32 bins in each octave
# Exponents of 2: below the first all is one bin around 0, from the second on one on each side.
_LEAST, _LARGEST = -16, 5
_SHIFT = np.finfo(np.float64).nmant - _BITS
_FIRST = (np.finfo(np.float64).maxexp - 1 + _LEAST) << _BITS
_ONE_SIDE = ((_LARGEST - _LEAST) << _BITS) + 1  # bins, the endless one included
_AT_ONCE = 1 << 15  # numbers, whose temporaries stay in cache


def _edges() -> NDArray[np.float64]:
    bits = (np.arange(_ONE_SIDE, dtype=np.int64) + _FIRST) << _SHIFT
    above = np.append(bits.view(np.float64), np.inf)
    return np.append(-above[::-1], above)


EDGES = _edges()
EDGES.flags.writeable = False


def counted(values: Array) -> NDArray[np.int64]:
    """How many of the values are in each bin; none of them may be NaN."""
    total = np.zeros(len(EDGES) - 1, np.int64)
    for i in range(0, values.size, _AT_ONCE):
        x = values[i : i + _AT_ONCE].astype(np.float64)
        which = (np.abs(x).view(np.int64) >> _SHIFT) - (_FIRST - 1)
        np.clip(which, 0, _ONE_SIDE, out=which)
        np.negative(which, out=which, where=x < 0)
        which += _ONE_SIDE
        total += np.bincount(which, minlength=len(total))
    return total


def quantile(counts: NDArray[np.int64], q: float) -> float:
    """The number below which a fraction ``q`` of what was counted is, to the width of a bin; NaN if nothing was."""
    below = np.append(0, np.cumsum(counts))
    if not below[-1]:
        return float("nan")
    finite = np.clip(EDGES, EDGES[1], EDGES[-2])
    first = int(np.searchsorted(below, q * below[-1], "right")) - 1
    first = min(max(first, 0), int(np.flatnonzero(counts)[-1]))
    part = (q * below[-1] - below[first]) / max(int(counts[first]), 1)
    return float(finite[first] + min(max(part, 0.0), 1.0) * (finite[first + 1] - finite[first]))


def magnitudes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts of |x|, on the same grid."""
    folded = counts.copy()
    folded[_ONE_SIDE + 1 :] += counts[:_ONE_SIDE][::-1]
    folded[:_ONE_SIDE] = 0
    return folded


def _there(a: Any, b: Any) -> Any:
    """The sum of what is there of two."""
    return b if a is None else a if b is None else a + b


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Histogram(Additive):
    """How many of the unmasked tokens have which log-ratio: integers, so that shards add exactly.

    It prints as a table of quantiles.

    Attributes
    ----------
    edges : (K + 1,) float64 array
        Of the bins, always the same: 32 in each octave of |x| from 2⁻¹⁶ to 2⁵ on either side, one around 0, and one
        without an end on either side. A number at an edge is in the bin that is farther from 0.
    log_ratio : (K,) int64 array
        Counts of log ρ = log π_θ − log π_old; at a level of sequences, of the mean over the sequence, at each token.
    ref_log_ratio : (K,) int64 array, or None
        Of l = log π_θ − log π_ref; None where there are no ``ref_logps``.
    mismatch : (K,) int64 array, or None
        Of log π_old − log π_rollout, where that is known; None where there are no ``rollout_logps``.
    tokens : int
    """

    tokens: int
    log_ratio: NDArray[np.int64]
    ref_log_ratio: NDArray[np.int64] | None = added_by(_there)  # noqa: RUF009 - a dataclass field
    mismatch: NDArray[np.int64] | None = added_by(_there)  # noqa: RUF009
    level: str = added_by(same)

    @property
    def edges(self) -> NDArray[np.float64]:
        return EDGES

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Those of the three that are there, by their names."""
        named = {"log_ratio": self.log_ratio, "ref_log_ratio": self.ref_log_ratio, "mismatch": self.mismatch}
        return {name: counts for name, counts in named.items() if counts is not None}

    def as_dict(self) -> dict[str, Any]:
        """Edges and counts as lists, and the number of tokens, for JSON; what is not there is left out.

        The two outer edges, which are infinite, are None: JSON has no infinity.
        """
        lists = {name: counts.tolist() for name, counts in self.counts().items()}
        return {"tokens": self.tokens, "edges": [None, *self.edges[1:-1].tolist(), None], **lists}

    def __repr__(self) -> str:
        quantiles = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
        lines = ["".join([f"{'':14}", *(f"{f'{q:.1%}':>10}" for q in quantiles)])]
        for name, counts in self.counts().items():
            lines.append("".join([f"{name:<14}", *(f"{quantile(counts, q):>10.3g}" for q in quantiles)]))
        return "\n".join([*lines, "", f"quantiles of {self.tokens:,} tokens"])


# --- of a batch -------------------------------------------------------------------------------------------------------
def counting(form: Form, *, level: Level | None) -> Work:
    """What `histogram` computes; the error for files of probabilities."""
    if form is Form.PROBABILITIES:
        raise ValueError("histogram is of files of log-probabilities, got probabilities")
    options = Options(importance_sampling_level=level or "token", aggregation="token-mean")
    return Work(partial(histogram_of, level=options.importance_sampling_level), UNREAD, options, ("ref_logps",))


def histogram_of(arrays: dict[str, Array], *, level: str) -> Histogram:
    """The `Histogram` of a batch; the ValueError of `grpo_loss` for an unmasked number that is not finite."""
    logps, old = arrays["logps"], arrays.get("old_logps")
    keep = unmasked(arrays)
    log_ratio = np.zeros(logps.size) if old is None else difference(logps, old)
    ref = arrays.get("ref_logps")
    l = None if ref is None else difference(logps, ref)
    refuse_not_finite(arrays, keep, log_ratio, l)
    if level != "token":
        log_ratio = _means(log_ratio, keep, arrays["cu_seqlens"])
    rollout = arrays.get("rollout_logps")
    mismatch = None if rollout is None else mismatch_of(arrays, keep)[keep]
    log_ratio = log_ratio[keep]
    return Histogram(
        tokens=log_ratio.size,
        log_ratio=counted(log_ratio),
        ref_log_ratio=None if l is None else counted(l[keep]),
        mismatch=None if mismatch is None else counted(mismatch[~np.isnan(mismatch)]),
        level=level,
    )


def unmasked(arrays: dict[str, Array]) -> NDArray[np.bool_]:
    """Which tokens count."""
    mask = arrays.get("mask")
    if mask is None:
        return np.ones(arrays["logps"].size, np.bool_)
    refuse_unless_mask(mask, mask.shape)
    keep: NDArray[np.bool_] = mask != 0
    return keep


def difference(a: Array, b: Array) -> NDArray[np.float64]:
    """a − b in float64, of whatever is in them."""
    with np.errstate(all="ignore"):
        found: NDArray[np.float64] = np.subtract(a, b, dtype=np.float64)
    return found


def mismatch_of(arrays: dict[str, Array], keep: Array) -> NDArray[np.float64]:
    """log π_old − log π_rollout, NaN where the latter is not known; or the ValueError of `rollout_correction`."""
    name = "old_logps" if "old_logps" in arrays else "logps"  # on-policy, they are the same
    old, rollout = arrays[name], arrays["rollout_logps"]
    refuse_bad_logps(name, old, rollout, keep, old.shape)
    return difference(old, rollout)


def refuse_not_finite(arrays: dict[str, Array], keep: Array, *differences: Array | None) -> None:
    """Raise the ValueError of `grpo_loss` if an unmasked number of these differences comes from one not finite."""
    if all(x is None or np.isfinite(x[keep]).all() for x in differences):
        return
    bounds = arrays.get("cu_seqlens", np.array([0, keep.size]))
    ref, mask, anything = arrays.get("ref_logps"), arrays.get("mask"), np.zeros((1, keep.size))
    refuse_if_not_finite(
        Inputs.of(arrays["logps"], arrays.get("old_logps"), anything, ref, mask, bounds, None, None, grad=False)
    )


def _means(values: NDArray[np.float64], keep: Array, bounds: Array) -> NDArray[np.float64]:
    """The mean over the unmasked tokens of a sequence, at each of its tokens."""
    means = sums_of(np.where(keep, values, 0.0), bounds) / np.maximum(sums_of(keep, bounds), 1)
    return np.repeat(means, np.diff(bounds))


def sums_of(values: Array, bounds: Array) -> NDArray[np.float64]:
    """The sums over sequences."""
    lengths = np.diff(bounds)
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, len(lengths))
    return sums.astype(np.float64, copy=False)  # of no tokens NumPy's are ints


# --- beside other results ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class WithHistogram(Additive):
    """What another job finds, and the histogram."""

    result: Any
    histogram: Histogram


def beside_histogram(work: Work, level: str) -> Work:
    """The same work, whose job computes the histogram, too."""
    optional = ("ref_logps",) if "ref_logps" in work.unread else ()
    job = partial(_both, job=work.job, level=level, unread=work.unread)
    return Work(job, work.unread - {"ref_logps", "rollout_logps"}, work.options, optional)


def _both(arrays: dict[str, Array], *, job: Callable[..., Any], level: str, unread: set[str]) -> Any:
    result = job({name: x for name, x in arrays.items() if name not in unread})
    return WithHistogram(result=result, histogram=histogram_of(arrays, level=level))

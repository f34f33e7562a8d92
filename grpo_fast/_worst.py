"""The sequences that stand out most: by a token's log-ratio, by their KL term, or by the mismatch with the sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ._advice import Keywords
from ._checks import Array, one_of
from ._columns import Form
from ._histograms import UNREAD, difference, mismatch_of, refuse_not_finite, sums_of, unmasked
from ._jobs import Work

if TYPE_CHECKING:
    from ._rollouts import RowBatch

#: By what sequences are ranked.
Rank: TypeAlias = Literal["ratio", "kl", "mismatch"]
RANKS: tuple[str, ...] = get_args(Rank)
#: Columns that are shown where files have them, unless others are asked for.
SHOWN = ("step", "prompt_id")
_NEEDS = {"ratio": "old_logps", "kl": "ref_logps", "mismatch": "rollout_logps"}


class Outlier(NamedTuple):
    """A sequence that stands out.

    Attributes
    ----------
    value : float
        What it was ranked by: the log-ratio or mismatch of the token where that is largest in magnitude, or the mean KL
        term.
    file : str
        Its file, or what table it is of.
    row : int
        Its row in there, from 0.
    token : int
        The token of that value, or of the largest KL term: its place in the row's lists, from 0.
    tokens : int
        How many unmasked tokens the sequence has.
    shown : dict
        The columns that are shown, by their names.
    """

    value: float
    file: str
    row: int
    token: int
    tokens: int
    shown: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All of it, flat, for JSON or a data frame; a column called as one of its own is "shown token" and so on."""
        own = {name: x for name, x in zip(self._fields, self, strict=True) if name != "shown"}
        return own | {shown_name(name, self.shown): x for name, x in self.shown.items()}


def shown_name(column: str, shown: Iterable[str]) -> str:
    """What a column that is shown is called beside what an `Outlier` has of its own, and the others shown."""
    taken = {name for name in Outlier._fields if name != "shown"}
    if column not in taken:
        return column
    while column in taken:
        column, taken = f"shown {column}", {*shown}
    return column


class Outliers(list[Outlier]):
    """The first few, the largest before the others; those of batches add."""

    def __init__(self, outliers: Iterable[Outlier], n: int) -> None:
        super().__init__(sorted(outliers, key=lambda x: (-abs(x.value), x.file, x.row))[:n])
        self._n = n

    def __add__(self, other: list[Outlier]) -> Outliers:  # type: ignore[override]
        return Outliers([*self, *other], self._n)

    def __iadd__(self, other: Iterable[Outlier]) -> Outliers:  # type: ignore[override]
        return self + list(other)

    def __reduce__(self) -> Any:
        return Outliers, (list(self), self._n)


class Numbers(NamedTuple):
    """What the tokens of a batch are ranked by; masked ones are 0."""

    per_token: NDArray[np.float64]
    keep: Array
    bounds: Array
    mean: bool  # whether a sequence is ranked by their mean


def needs_of(rank: str) -> tuple[tuple[str, Keywords], ...]:
    """The argument that is needed by this rank and not by others, and the rank, for messages."""
    return ((_NEEDS[rank], Keywords({"rank": rank})),) if rank in ("kl", "mismatch") else ()


def ranking(form: Form, *, rank: str) -> Work:
    """What `worst` computes of a batch; the error for a rank that there is not, or files that have none."""
    one_of("rank", rank, RANKS)
    if form is Form.PROBABILITIES:
        raise ValueError("worst is of files of log-probabilities, got probabilities")
    needed = {"logps", "mask", _NEEDS[rank]} | ({"old_logps"} if rank == "mismatch" else set())
    unread = {name for name in form.arguments if name not in needed} | UNREAD
    return Work(partial(_numbers, rank=rank), unread, None)


def _numbers(arrays: dict[str, Array], *, rank: str) -> Numbers:
    keep = unmasked(arrays)
    logps = arrays["logps"]
    if _NEEDS[rank] not in arrays and rank != "ratio":  # of a shard of empty lists; without old_logps all is on-policy
        arrays = arrays | {_NEEDS[rank]: np.full(logps.shape, np.nan)}
    old = arrays.get("old_logps", logps)
    if rank == "mismatch":
        values = mismatch_of(arrays, keep)
        values[np.isnan(values)] = 0.0
    else:
        values = difference(logps, arrays["ref_logps"] if rank == "kl" else old)
        refuse_not_finite(arrays, keep, values)
    values[~keep] = 0.0
    if rank == "kl":
        with np.errstate(over="ignore"):
            values = np.expm1(-values) + values
    return Numbers(values, keep, arrays["cu_seqlens"], rank == "kl")


def of_a_batch(
    batch: RowBatch, *, job: Callable[[dict[str, Array]], Numbers], n: int, shown: tuple[str, ...]
) -> Outliers:
    """The largest of a batch, with those of the columns ``shown``, or hive partitions, that there are."""
    from ._arrow import column_of  # which needs pyarrow

    there = batch.row_group.layout.beside
    numbers = job(batch.arrays())
    counts = sums_of(numbers.keep, numbers.bounds)
    size = np.abs(numbers.per_token)
    rows = np.flatnonzero(counts)
    starts = numbers.bounds[:-1][rows]
    if numbers.mean:
        largest = sums_of(numbers.per_token, numbers.bounds)[rows] / counts[rows]
    else:  # between two sequences that have tokens, others have none
        largest = np.maximum.reduceat(size, starts) if len(rows) else size[:0]
    first = np.argsort(-largest, kind="stable")[:n]
    columns = {name: column_of(batch.records, name) for name in there}
    in_path: dict[str, Any] = dict(batch.row_group.partitions)
    found = []
    for i in first.tolist():
        row, start = int(rows[i]), int(starts[i])
        token = int(size[start : numbers.bounds[row + 1]].argmax())
        value = float(largest[i] if numbers.mean else numbers.per_token[start + token])
        cells = in_path | {name: column[row].as_py() for name, column in columns.items()}
        found.append(
            Outlier(
                value=value,
                file=str(batch.row_group.source),
                row=batch.row_group.first_row + batch.first_row + row,
                token=token,
                tokens=int(counts[row]),
                shown={name: cells[name] for name in shown if name in cells},
            )
        )
    return Outliers(found, n)

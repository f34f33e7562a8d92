"""A run on disk: `RolloutWriter` stores what the loss of each step was given, as `evaluate` reads it.

First the class, then how its arguments become rows.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from ._atomic import replaced_when_complete
from ._checks import Array, as_array, whole
from ._loss_inputs import Expected, Inputs

#: Under this key the metadata of a file that `RolloutWriter` has written hold the version of what is in it.
MARK = b"grpo_fast.rollouts"
#: Columns that are made here, whatever is given.
_OWN = ("step", "rank")


logger = logging.getLogger(__name__)


def _rank_of_process() -> int:
    """What RANK says, which torchrun sets; 0 without it."""
    said = os.environ.get("RANK", "").strip() or "0"
    if not said.isdigit():
        raise ValueError(f"the environment's RANK must be a number of at least 0, got {said!r}; or hand over rank=")
    return int(said)


class RolloutWriter:
    """Writes a run: one Parquet file for each step and rank, in the columns that `evaluate` reads.

    Parameters
    ----------
    folder : path
        Where the files go, ``step-00000012-rank-00000.parquet`` and so on; it is made if it is not there.
    rank : int, or None
        Of this process among those that train together; None for what ``torchrun`` has set as ``RANK``, or 0.

    Notes
    -----
    A file is there as a whole or not at all, and its pages have checksums. A row is a sequence, from its first unmasked
    token to its last. What an earlier run has written of the same step and rank is replaced by the first file of it; a
    warning of the logger ``grpo_fast`` says at the beginning that files of that rank are there.

    Where ``complete=False`` is used, `close` is to be called in the end, or the writer used in a ``with`` statement,
    which does so, on an exception too: what is held of the last step is lost otherwise.
    """

    def __init__(self, folder: str | os.PathLike[str], *, rank: int | None = None) -> None:
        _pyarrow()
        self.folder = Path(folder)
        self.rank = whole("rank", _rank_of_process() if rank is None else rank, 0)
        if "://" in str(folder):
            raise ValueError(f"folder must be one of this machine, got {folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held: tuple[int, list[Any]] = (0, [])  # a step that is not complete, and its tables
        self._files: dict[int, int] = {}  # how many have been written, by step
        before = len(list(self.folder.glob(f"step-*-rank-{self.rank:05d}*.parquet")))
        if before:
            logger.warning(
                "%s holds %d files of rank %d from before: those of steps that are written again are replaced, the "
                "others stay. A new run should have a folder of its own",
                *(self.folder, before, self.rank),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> Path | None:
        """The path of the file that is written of what is held of a step that is not complete; None if nothing is.

        More may be written afterwards, as no file is open between calls.

        Raises
        ------
        OSError
            The file cannot be written. There is none then, and the rows are held still.
        """
        step, held = self._held
        path = self._save(step, held) if held else None
        self._held = (step, [])
        return path

    def write(
        self,
        *,
        step: int,
        logps: ArrayLike,
        old_logps: ArrayLike | None = None,
        advantages: ArrayLike,
        ref_logps: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
        rollout_is_weights: ArrayLike | None = None,
        loss_weights: ArrayLike | None = None,
        rollout_logps: ArrayLike | None = None,
        prompt_id: ArrayLike | None = None,
        columns: Mapping[str, ArrayLike] | None = None,
        complete: bool = True,
    ) -> Path | None:
        """The path of the file that is written; None while the step is not complete.

        Parameters
        ----------
        step : int
            What `evaluate` has as ``by="step"``. Of a step that is written more than once, each call makes a file.
        logps, old_logps, advantages, ref_logps, mask, cu_seqlens, rollout_is_weights, loss_weights : array-like
            As in `grpo_loss`, whose loss these are the arguments of: padded or packed, arrays or tensors, also ones
            that require a gradient or are on a GPU. bfloat16 and float16 are stored as float32. Without ``old_logps``,
            ``logps`` are stored as such: all is on-policy.
        rollout_logps : array-like, optional
            Log-probabilities of the tokens in the engine that sampled them, in the shape of ``logps``; NaN if missing.
        prompt_id : (S,) array-like of ints or strings, optional
            Which prompt each sequence answers.
        columns : mapping of name to (S,) array-like, optional
            More columns, of numbers or strings, one for each sequence: rewards, or the name of a data set.
        complete : bool
            False if more of the same step is to come, as of its micro-batches: it is held in memory until then, or
            until another step or `close` comes. All that is held must have the same arguments, of the same types.

        Raises
        ------
        TypeError, ValueError
            An argument does not fit, as in `grpo_loss`, or it is not of the type that it has in what is held of the
            step, which stays as it was. Whether numbers are finite is not looked at.
        OSError
            The file cannot be written. There is none then, not a part of one, and the rows of this call are not taken:
            it can be repeated. What was held before it is held still, unless it has been written.
        """
        step = whole("step", step, 0)
        loss = (logps, old_logps, advantages, ref_logps, mask, cu_seqlens, rollout_is_weights, loss_weights)
        table = _table(
            Arguments(*loss, rollout_logps),
            dict(columns or {}) | ({} if prompt_id is None else {"prompt_id": prompt_id}),
            {"step": step, "rank": self.rank},
        )
        if self._held[0] != step:
            self.close()  # of that step no more can come
        held = self._held[1]
        if held:
            table = _as_what_is_held(table, held[0])
        tables = [*held, table]
        path = self._save(step, tables) if complete else None
        self._held = (step, [] if complete else tables)  # an exception has left it as it was
        return path

    def _save(self, step: int, tables: list[Any]) -> Path:
        pyarrow = _pyarrow()
        name = f"step-{step:08d}-rank-{self.rank:05d}"
        part = self._files.get(step, 0)
        path = self.folder / (f"{name}-part-{part}.parquet" if part else f"{name}.parquet")
        with replaced_when_complete(str(path)) as temporary:
            # Not compressed and no dictionary: of log-probabilities either saves next to nothing, and costs time.
            pyarrow.parquet.write_table(
                _without_needless_mask(pyarrow.concat_tables(tables)),
                temporary,
                compression="none",
                use_dictionary=[],
                write_statistics=False,
                write_page_checksum=True,
            )
            # What is left is gone before the first file is there: a run is never read with another's parts.
            if not part:
                for leftover in glob.glob(f"{glob.escape(str(self.folder / name))}-part-*.parquet"):
                    os.remove(leftover)
        self._files[step] = part + 1  # now that it is there: one that failed is written anew under the same name
        return path


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("writing rollouts needs pyarrow: pip install 'grpo_fast[data]'") from error
    return pyarrow


# --- arguments → rows -------------------------------------------------------------------------------------------------
class Arguments(NamedTuple):
    """Those of `write` that hold numbers of tokens."""

    logps: Any
    old_logps: Any
    advantages: Any
    ref_logps: Any
    mask: Any
    cu_seqlens: Any
    rollout_is_weights: Any
    loss_weights: Any
    rollout_logps: Any


def _on_the_host(value: Any) -> Any:
    """A tensor as one on the CPU that requires no gradient; anything else as it is."""
    return value.detach().cpu() if hasattr(value, "detach") and hasattr(value, "cpu") else value


def _table(given: Arguments, per_sequence: dict[str, Any], constants: dict[str, int]) -> Any:
    """The rows of these arguments, with a column of bools, ``mask``, even where nothing is masked."""
    pa = _pyarrow()
    given = Arguments(*map(_on_the_host, given))
    batch, shape, _ = Inputs.of(*given[:-1], grad=False)
    names = ("logps", "old_logps", "ref_logps")
    tokens: dict[str, Array] = {name: x for name in names if (x := getattr(batch, name)) is not None}
    tokens.setdefault("old_logps", tokens["logps"])
    if given.rollout_logps is not None:
        expected = Expected("logps", shape, batch.logps.dtype, batch.bounds)
        tokens["rollout_logps"] = expected.per_token("rollout_logps", given.rollout_logps)
    sequences: dict[str, Any] = {}
    (tokens if batch.advantages_per_token else sequences)["advantages"] = batch.advantages
    if batch.weights is not None:
        (tokens if batch.weights_per_token else sequences)["rollout_is_weights"] = batch.weights
    if batch.loss_weights is not None:
        (tokens if batch.loss_weights_per_token else sequences)["loss_weights"] = batch.loss_weights
    tokens["mask"] = np.ones(batch.logps.size, np.bool_) if batch.mask is None else batch.mask.view(np.bool_)
    starts, stops = _unmasked(batch.bounds, batch.mask)
    bounds = np.append(0, np.cumsum(stops - starts, dtype=np.int64))
    count = len(starts)
    for name, value in per_sequence.items():
        if name in (*given._fields, *_OWN):
            raise ValueError(f"columns must have other names than those of the arguments, got {name!r}")
        sequences[name] = _one_per_sequence(name, value, count)
    small = bounds[-1] < 2**31
    lists, offsets = (pa.ListArray, bounds.astype(np.int32)) if small else (pa.LargeListArray, bounds)
    columns = {name: lists.from_arrays(offsets, pa.array(_cut(x, starts, stops))) for name, x in tokens.items()}
    columns |= {name: pa.array(x) for name, x in sequences.items()}
    columns |= {name: pa.array(np.full(count, x, np.int64)) for name, x in constants.items()}
    return pa.table(columns, metadata={MARK: json.dumps({"version": 1})})


def _as_what_is_held(table: Any, held: Any) -> Any:
    """The table with its columns in the order of ``held``; a ValueError for a column that is not as it is there."""
    before, now = ({field.name: str(field.type) for field in x.schema} for x in (held, table))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name} must be of one type in all micro-batches of a step, which make one file, got "
                f"{now.get(name, 'none')} after {before.get(name, 'none')}"
            )
    return table.select(held.column_names)


def _one_per_sequence(name: str, value: Any, count: int) -> Any:
    """The values of a column that has one for each sequence."""
    array = as_array(name, _on_the_host(value), "numbers or strings")
    allowed = "iuUO" if name == "prompt_id" else "biufUO"
    if array.dtype.kind not in allowed or (array.dtype.kind == "O" and not all(isinstance(x, str) for x in array.flat)):
        what = "ints or strings" if name == "prompt_id" else "numbers or strings"
        raise TypeError(f"{name} must hold {what}, got {_sample_of(array)}")
    if array.shape not in ((count,), (count, 1)):
        raise ValueError(f"{name} must have shape {(count,)}, one per sequence, got {array.shape}")
    return array.reshape(-1)


def _sample_of(array: Array) -> str:
    return f"dtype {array.dtype}" if array.dtype.kind != "O" or not array.size else repr(array.flat[0])


def _unmasked(bounds: Array, mask: Array | None) -> tuple[Array, Array]:
    """Where the first unmasked token of each sequence is, and where its last one ends; equal if it has none."""
    starts, stops = bounds[:-1], bounds[1:]
    if mask is None:
        return starts, stops
    kept = np.flatnonzero(mask)
    first, end = np.searchsorted(kept, starts), np.searchsorted(kept, stops)
    some = end > first
    starts, stops = starts.copy(), starts.copy()
    starts[some], stops[some] = kept[first[some]], kept[end[some] - 1] + 1
    return starts, stops


def _cut(values: Array, starts: Array, stops: Array) -> Array:
    """The numbers of all sequences, one behind the other; the same memory if they are so already."""
    if np.array_equal(starts[1:], stops[:-1]):
        return values[starts[0] : stops[-1]] if len(starts) else values[:0]
    pieces = [values[i:j] for i, j in zip(starts.tolist(), stops.tolist(), strict=True)]
    return np.concatenate(pieces)


def _without_needless_mask(table: Any) -> Any:
    """The table without its mask, if nothing within its sequences is masked."""
    pyarrow = _pyarrow()
    masked = any(pyarrow.compute.all(chunk.flatten()).as_py() is False for chunk in table["mask"].chunks)
    return table if masked else table.drop_columns(["mask"])

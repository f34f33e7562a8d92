"""The objective over rollouts in files, larger than memory or on many machines: `evaluate`, `sweep`, and beside them.

`histogram` says how log-ratios are distributed, `worst` which sequences stand out; `RolloutWriter` writes a run.

Here are the functions, most of which is what they promise. How batches are taken in turns with reading, and row groups
spread over an executor, is in `_summing`; what is computed of one batch in `_jobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Never, TypedDict, Unpack, overload

from numpy.typing import ArrayLike

from ._checks import hides_unknown, refuse_unknown, whole
from ._columns import Columns
from ._histograms import Histogram, counting
from ._jobs import sweeping
from ._paths import Paths
from ._summing import Reading, evaluated, sum_over_files, summed
from ._worst import SHOWN, Outlier, Rank, needs_of, of_a_batch, ranking
from ._writer import RolloutWriter
from .objective import grid_of
from .rollout_terms import RolloutKeywords
from .stats import Stats, Sweep
from .terms import KL, Aggregation, Level, Surrogate, TrustRegion

__all__ = ["Histogram", "Outlier", "RolloutWriter", "evaluate", "histogram", "sweep", "worst"]


class ReadOptions(TypedDict, total=False):
    """The keywords about reading, which all functions over files have; for who checks types."""

    columns: Columns | None
    batch_size: int | None
    executor: Executor | None
    progress: bool
    filesystem: Any


class EvaluateOptions(ReadOptions, total=False):
    """The keywords of `evaluate` but for ``by``, which decides what it returns; for who checks types."""

    epsilon: float | None
    beta: float | None
    importance_weighted: bool | None
    surrogate: Surrogate | None
    kl: KL | None
    importance_sampling_level: Level | None
    aggregation: Aggregation | None
    normalizer: float | None
    trust_region: TrustRegion | None
    rollout_correction: RolloutKeywords | None


class SweepOptions(ReadOptions, total=False):
    """Those of `sweep`, likewise, less those that must be there."""

    importance_weighted: bool | None
    epsilon_high: float | None
    delta: float | None
    kl: Callable[[float], KL] | None
    importance_sampling_level: Level | None
    aggregation: Aggregation | None
    normalizer: float | None
    trust_region: TrustRegion | None


@overload
def evaluate(paths: Paths, *, by: None = None, **options: Unpack[EvaluateOptions]) -> Stats: ...


@overload
def evaluate(paths: Paths, *, by: str, **options: Unpack[EvaluateOptions]) -> dict[int | str | None, Stats]: ...


@hides_unknown
def evaluate(
    paths: Paths,
    *,
    by: str | None = None,
    epsilon: float | None = None,
    beta: float | None = None,
    importance_weighted: bool | None = None,
    surrogate: Surrogate | None = None,
    kl: KL | None = None,
    importance_sampling_level: Level | None = None,
    aggregation: Aggregation | None = None,
    normalizer: float | None = None,
    trust_region: TrustRegion | None = None,
    rollout_correction: RolloutKeywords | None = None,
    columns: Columns | None = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    filesystem: Any = None,
    **unknown: Never,
) -> Stats | dict[int | str | None, Stats]:
    """The objective and every diagnostic over rollouts in files of any size, in one read and bounded memory.

    Files are Parquet, Arrow IPC or JSON Lines. A row is a sequence if its columns hold lists (of one length within the
    row), and otherwise one sample or token. Files of log-probabilities have no KL term without a ``kl``, and
    ``ref_logps`` is not read then.

    Parameters
    ----------
    paths : str, bytes, path, table, or an iterable of them
        Files, globs, or directories, of which the files are read that end in .parquet, else in .arrow, else in .jsonl
        (also packed, .jsonl.gz), below them too. No file twice. A URI, ``s3://bucket/run/``, is one of a file system of
        pyarrow. A table is anything that has Arrow's C stream, ``__arrow_c_stream__``: a frame of pandas or polars, a
        table or reader of pyarrow, which is read as it comes, once; or a ``datasets.Dataset``.
    by : str, optional
        A column of ints or strings, or a hive partition (``run/step=3/…``): the result is a dict, for each value the
        `Stats` of its rows. Values may be scattered over files. ``sum(result.values())`` is what there is without
        ``by``, to the bit (of flat columns to rounding).
    epsilon, beta, importance_weighted
        Of files of probabilities: as in `grpo_stats`, and None as its defaults; with ``beta=0`` their last two columns
        are not read.
    surrogate, kl, importance_sampling_level, aggregation, normalizer, trust_region
        Of files of log-probabilities: as in `grpo_loss`, and None as its defaults. Flat ones have no sequences: token
        level, ``"token-mean"`` or ``"token-sum"``.
    rollout_correction : dict, or None
        Of files of log-probabilities that have ``rollout_logps``: the options of `rollout_correction` (``level, mode,
        lower, upper, reject``; ``{}`` for its defaults), whose weights multiply the policy term in the same read, in
        place of a column of them. What it says of trainer and sampler is ``rollout`` of the result. Flat columns have
        no sequences: level "token" in all of it; ``rollout`` of several blocks is that of one array to rounding. A null
        is a missing log-probability; in place of a list, as many as the row has tokens.
    columns : mapping of argument to column, or None
        Where the files call a column otherwise than the argument of `grpo_stats` or `grpo_loss`. With None as the
        column, ``old_logps`` (then all is on-policy), ``mask`` and both weights are left out. The files hold either
        probabilities (``rhos, A, pi_theta_old, pi_theta_ref``) or log-probabilities (``logps, old_logps, advantages,
        ref_logps`` and, if there are such columns, ``mask, rollout_is_weights, loss_weights, rollout_logps``); where
        they hold both, those named here are taken. Beside lists, ``advantages`` and the weights are lists, too, or one
        number for each sequence. A mask may be a list of columns, which are multiplied. A column that must be a mask by
        its name (it ends in "mask" or "masks") and type, and is not used, is an error, not ignored, unless a list here
        (``{"mask": ["completion_mask"]}``: only this one) or None says that there is no other. Files of probabilities
        take no mask. Nulls where masked are never looked at. The field of a struct has a dot: ``r.logps``.
    batch_size : int, or None
        Rows of a Parquet file to read at a time; None for at most about 16 MiB of numbers. Three batches are alive at a
        time. Of flat columns it is rounded to a multiple of ``grpo_fast.BLOCK``. Arrow's record batches are read whole.
    executor : concurrent.futures.Executor, or None
        Takes the row groups (record batches), each on one thread: a process pool, a Dask client's ``get_executor()``.
        Its processes must see the same paths. None computes on this thread, while pyarrow reads ahead on others.
    progress : bool
        Whether to show a bar on stderr (needs tqdm).
    filesystem : pyarrow.fs.FileSystem, or None
        Where the paths are, if not on this machine.

    Returns
    -------
    Stats, or with ``by`` a dict of them
        In order of the values; of the rows where it is null, the key is None, the last.
        The sums of sequences are the same bits in whatever files, row groups and batches, on whatever executor. Flat
        columns are cut into blocks of ``BLOCK`` from the beginning of each row group: the bits of one array where row
        groups are multiples of that, and in any case those of any ``batch_size``, order and executor. (Lists of
        probabilities are strung together batch by batch, and equal to rounding.)

    Raises
    ------
    TypeError, ValueError
        A file is truncated or corrupt, a column missing or not of numbers, a value null or bad; the message names file,
        row group, row and column. Parquet's page checksums are verified where the writer made some. Arrow IPC has none:
        there a number whose bits flip is another number.
    FileNotFoundError, PermissionError
        As `open` raises them.
    ImportError
        pyarrow, or for ``progress`` tqdm, is missing: ``pip install 'grpo_fast[data]'``.
    """
    if unknown:
        refuse_unknown(evaluate, unknown)
    options = _given(
        epsilon=epsilon,
        beta=beta,
        importance_weighted=importance_weighted,
        surrogate=surrogate,
        kl=kl,
        importance_sampling_level=importance_sampling_level,
        aggregation=aggregation,
        normalizer=normalizer,
        trust_region=trust_region,
        rollout_correction=rollout_correction,
    )
    reading = Reading(paths, columns, batch_size, executor, progress, filesystem)
    result: Stats | dict[int | str | None, Stats] = evaluated(reading, by, options)
    return result


@overload
def sweep(
    paths: Paths, *, epsilons: ArrayLike, betas: ArrayLike, by: None = None, **options: Unpack[SweepOptions]
) -> Sweep: ...


@overload
def sweep(
    paths: Paths, *, epsilons: ArrayLike, betas: ArrayLike, by: str, **options: Unpack[SweepOptions]
) -> dict[int | str | None, Sweep]: ...


@hides_unknown
def sweep(
    paths: Paths,
    *,
    epsilons: ArrayLike,
    betas: ArrayLike,
    by: str | None = None,
    importance_weighted: bool | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    kl: Callable[[float], KL] | None = None,
    importance_sampling_level: Level | None = None,
    aggregation: Aggregation | None = None,
    normalizer: float | None = None,
    trust_region: TrustRegion | None = None,
    columns: Columns | None = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    filesystem: Any = None,
    **unknown: Never,
) -> Sweep | dict[int | str | None, Sweep]:
    """The objective for every ε × β over files, from one read of the data.

    Parameters
    ----------
    paths, by, columns, batch_size, executor, progress, filesystem
        As in `evaluate`.
    epsilons, betas : (E,), (B,) array-like, or a single number
        As in `grpo_sweep`. Of log-probabilities, those of ``Clip(ε, epsilon_high, delta)`` and ``kl(β)``.
    importance_weighted : bool, optional
        Of files of probabilities, as in `grpo_sweep`.
    epsilon_high, delta : float, optional
        Of files of log-probabilities: the same over the grid; without ``epsilon_high`` it is ε.
    kl : K1, K2, K3 or another function of β that returns a KL term, optional
        Of files of log-probabilities: K3 unless given; ``functools.partial(K3, importance_weighted=False)``. A function
        must return the same term for every β of the grid but for β itself, which is the one that it is given.
    importance_sampling_level, aggregation, normalizer, trust_region
        Of files of log-probabilities, as in `evaluate`.

    Returns
    -------
    Sweep, or with ``by`` a dict of them
        Its ``objective[e, b]`` is that of `evaluate` with ``epsilons[e]`` and ``betas[b]``, to the bit.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError, PermissionError, ImportError
        As `evaluate`.
    """
    if unknown:
        refuse_unknown(sweep, unknown)
    options = _given(
        importance_weighted=importance_weighted,
        epsilon_high=epsilon_high,
        delta=delta,
        kl=kl,
        importance_sampling_level=importance_sampling_level,
        aggregation=aggregation,
        normalizer=normalizer,
        trust_region=trust_region,
    )
    grid = grid_of(epsilons, betas)
    reading = Reading(paths, columns, batch_size, executor, progress, filesystem)
    result: Sweep | dict[int | str | None, Sweep] = summed(reading, by, partial(sweeping, grid=grid, options=options))
    return result


@overload
def histogram(
    paths: Paths,
    *,
    by: None = None,
    importance_sampling_level: Level | None = None,
    **options: Unpack[ReadOptions],
) -> Histogram: ...


@overload
def histogram(
    paths: Paths, *, by: str, importance_sampling_level: Level | None = None, **options: Unpack[ReadOptions]
) -> dict[int | str | None, Histogram]: ...


@hides_unknown
def histogram(
    paths: Paths,
    *,
    by: str | None = None,
    importance_sampling_level: Level | None = None,
    columns: Columns | None = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    filesystem: Any = None,
    **unknown: Never,
) -> Histogram | dict[int | str | None, Histogram]:
    """How many tokens have which log-ratio, over files of log-probabilities: integer counts on a fixed grid.

    Parameters
    ----------
    paths, by, columns, batch_size, executor, progress, filesystem
        As in `evaluate`; ``advantages`` and weights are not read.
    importance_sampling_level : {"token", "sequence", "sequence_token"}, optional
        Whether log ρ is that of the token, as if not given, or the mean over its sequence.

    Returns
    -------
    Histogram, or with ``by`` a dict of them
        Of log ρ, of l = log π_θ − log π_ref if there are ``ref_logps``, and of log π_old − log π_rollout if there are
        ``rollout_logps``, of which a NaN or null is not known, and not counted.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError, PermissionError, ImportError
        As `evaluate`; and a ValueError for files of probabilities.
    """
    if unknown:
        refuse_unknown(histogram, unknown)
    reading = Reading(paths, columns, batch_size, executor, progress, filesystem)
    preparation = partial(counting, level=importance_sampling_level)
    result: Histogram | dict[int | str | None, Histogram] = summed(reading, by, preparation)
    return result


@hides_unknown
def worst(
    paths: Paths,
    *,
    rank: Rank = "ratio",
    n: int = 20,
    show: Sequence[str] | None = None,
    columns: Columns | None = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    filesystem: Any = None,
    **unknown: Never,
) -> list[Outlier]:
    """The sequences that stand out most, over files of log-probabilities in lists, from one read.

    Parameters
    ----------
    paths, columns, batch_size, executor, progress, filesystem
        As in `evaluate`; what the rank does not need is not read.
    rank : {"ratio", "kl", "mismatch"}
        By the largest |log π_θ − log π_old| of a token; by the mean of k3 = e⁻ˡ − 1 + l over the tokens, where
        l = log π_θ − log π_ref; or by the largest |log π_old − log π_rollout| of a token, less those that are NaN or
        null.
    n : int
        How many sequences.
    show : sequence of str, or None
        Columns, or hive partitions, whose values are told of each; None for ``step`` and ``prompt_id``, where there are
        such.

    Returns
    -------
    list of Outlier
        The largest first; of equal ones in order of the names of files, and of rows. Only unmasked tokens count.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError, PermissionError, ImportError
        As `evaluate`; and a ValueError where the columns are flat, or of probabilities.
    """
    if unknown:
        refuse_unknown(worst, unknown)
    if isinstance(show, str) or not all(isinstance(name, str) for name in show or ()):
        raise TypeError(f"show must be a sequence of names of columns, got {show!r}")
    n = whole("n", n, 1)
    from ._plan import Beside  # which needs pyarrow

    reading = Reading(paths, columns, batch_size, executor, progress, filesystem)
    shown = SHOWN if show is None else tuple(show)
    beside = Beside(
        shown=shown, must_show=show is not None, row_numbers=True, sequences_alone=True, needs=needs_of(rank)
    )
    return list(
        sum_over_files(
            reading, partial(ranking, rank=rank), beside, lambda job: partial(of_a_batch, job=job, n=n, shown=shown)
        )
    )


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None, as which none of them has a meaning of its own."""
    return {name: value for name, value in options.items() if value is not None}

"""The objective over rollouts in files, larger than memory or on many machines: `evaluate` and `sweep`.

First the two functions, most of which is what they promise; then how batches are taken in turns with reading, and row
groups are spread over an executor. What is computed of one batch is in `_jobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Never

from numpy.typing import ArrayLike

from . import _paths, _workers
from ._checks import hides_unknown, refuse_unknown
from ._columns import Columns, Form
from ._jobs import Job, Work, evaluation, refuse_sequences, sweeping
from ._kernels.threads import serially
from ._paths import Paths
from .objective import grid_of
from .stats import Stats, Sweep
from .terms import KL, Aggregation, Level, Surrogate, TrustRegion

if TYPE_CHECKING:
    from ._plan import RowGroup
    from ._rollouts import RowBatch


@hides_unknown
def evaluate(
    paths: Paths,
    *,
    epsilon: float | None = None,
    beta: float | None = None,
    importance_weighted: bool | None = None,
    surrogate: Surrogate | None = None,
    kl: KL | None = None,
    importance_sampling_level: Level | None = None,
    aggregation: Aggregation | None = None,
    normalizer: float | None = None,
    trust_region: TrustRegion | None = None,
    columns: Columns | None = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    **unknown: Never,
) -> Stats:
    """The objective and every diagnostic over Parquet or Arrow IPC files of any size, in bounded memory.

    A row is a sequence if its columns hold lists (of one length within the row), and otherwise one sample or token.
    Files of log-probabilities have no KL term without a ``kl``, and ``ref_logps`` is not read then.

    Parameters
    ----------
    paths : str, bytes, path, or an iterable of them
        Files, or globs of files. No file twice.
    epsilon, beta, importance_weighted
        Of files of probabilities: as in `grpo_stats`, and None as its defaults; with ``beta=0`` their last two columns
        are not read.
    surrogate, kl, importance_sampling_level, aggregation, normalizer, trust_region
        Of files of log-probabilities: as in `grpo_loss`, and None as its defaults. Flat ones have no sequences: token
        level, ``"token-mean"`` or ``"token-sum"``.
    columns : mapping of argument to column, or None
        Where the files call a column otherwise than the argument of `grpo_stats` or `grpo_loss`. With None as the
        column, ``old_logps`` (then all is on-policy), ``mask`` and both weights are left out. The files hold either
        probabilities (``rhos, A, pi_theta_old, pi_theta_ref``) or log-probabilities (``logps, old_logps, advantages,
        ref_logps`` and, if there are such columns, ``mask, rollout_is_weights, loss_weights``); where they hold both,
        those named here are taken. Beside lists, ``advantages`` and the weights are lists, too, or one number for each
        sequence. A mask may be a list of columns, which are multiplied. A column that must be a mask by
        its name (it ends in "mask" or "masks") and type, and is not used, is an error, not ignored, unless a list here
        (``{"mask": ["completion_mask"]}``: only this one) or None says that there is no other. Files of probabilities
        take no mask. Nulls where masked are never looked at.
    batch_size : int, or None
        Rows of a Parquet file to read at a time; None for at most about 16 MiB of numbers. Three batches are alive at a
        time. Of flat columns it is rounded to a multiple of ``grpo_fast.BLOCK``. Arrow's record batches are read whole.
    executor : concurrent.futures.Executor, or None
        Takes the row groups (record batches), each on one thread: a process pool, a Dask client's ``get_executor()``.
        Its processes must see the same paths. None computes on this thread, while pyarrow reads ahead on others.
    progress : bool
        Whether to show a bar on stderr (needs tqdm).

    Returns
    -------
    Stats
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
    )
    preparation = partial(evaluation, options=options)
    stats: Stats = _sum_over_files(paths, columns, batch_size, executor, progress, preparation)
    return stats


@hides_unknown
def sweep(
    paths: Paths,
    *,
    epsilons: ArrayLike,
    betas: ArrayLike,
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
    **unknown: Never,
) -> Sweep:
    """The objective for every ε × β over files, from one read of the data.

    Parameters
    ----------
    paths, columns, batch_size, executor, progress
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
    Sweep
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
    preparation = partial(sweeping, grid=grid, options=options)
    result: Sweep = _sum_over_files(paths, columns, batch_size, executor, progress, preparation)
    return result


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None, as which none of them has a meaning of its own."""
    return {name: value for name, value in options.items() if value is not None}


# --- how it is spread over time and machines --------------------------------------------------------------------------
def _sum_over_files(
    paths: Paths,
    columns: Columns | None,
    batch_size: int | None,
    executor: Executor | None,
    progress: bool,
    preparation: Callable[[Form], Work],
) -> Any:
    """The results of all batches, added; the common arguments of `evaluate` and `sweep` are theirs.

    ``preparation`` is `evaluation` or `sweeping`. Whatever can be checked without reading rows is checked first.
    """
    from . import _plan

    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be an int of at least 1, or None, got {batch_size!r}")
    if executor is not None and not hasattr(executor, "submit"):
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {executor!r}")
    files = _paths.find(paths)
    form = _plan.form_of(files, columns)
    job, unread, options = preparation(form)
    rows_are_sequences, row_groups, rows = _plan.plan(files, form, unread, columns)
    if options and not rows_are_sequences:
        refuse_sequences(_paths.printable(row_groups[0].path), options)
    if executor is None:
        results = _results_of_batches(row_groups, batch_size, job, use_threads=True)
    else:
        work = partial(_sum_over_row_group, batch_size=batch_size, job=job)
        results = _workers.map_unordered(executor, work, row_groups)
    at_first = "" if executor is None else "first row groups: "
    with closing(results), _workers.Progress(rows, progress, at_first) as advance:
        _, total = _sum_of(results, advance)
    if total is None:
        raise ValueError(f"{', '.join(map(_paths.printable, files))}: no samples")
    return total


def _sum_over_row_group(row_group: RowGroup, *, batch_size: int | None, job: Job) -> tuple[int, Any]:
    """The number of rows of one row group, and its batches' results, added: the task of an executor's worker."""
    return _sum_of(_results_of_batches([row_group], batch_size, job, use_threads=False))


def _sum_of(
    results: Iterable[tuple[int, Any]], advance: Callable[[int], object] = lambda rows: None
) -> tuple[int, Any]:
    """The sums of the numbers of rows and of the results that belong to them; None where there is no result.

    Calls ``advance`` with each number of rows.
    """
    rows, total = 0, None
    for done, result in results:
        advance(done)
        rows += done
        if result is not None:
            total = result if total is None else total + result
    return rows, total


def _results_of_batches(
    row_groups: Iterable[RowGroup], batch_size: int | None, job: Job, *, use_threads: bool
) -> Generator[tuple[int, Any]]:
    """Yield the number of rows and the result of each batch; the next one is read meanwhile, on another thread."""
    from . import _rollouts

    with closing(_workers.read_ahead(_rollouts.row_batches(row_groups, batch_size, use_threads))) as batches:
        for batch in batches:
            layout = batch.row_group.layout
            try:
                # On one thread: that keeps up with decoding, and more of them would wait for the decoding ones, in
                # 16 MiB batches 1.6 times the whole (flat columns, 2 cores).
                with serially():
                    result = job(_rollouts.arrays_of(batch.records, layout)) if batch.records.num_rows else None
            except ValueError as error:
                raise _at_first_bad_row(batch, job, error) from error
            yield batch.records.num_rows, result


def _at_first_bad_row(batch: RowBatch, job: Job, error: ValueError) -> ValueError:
    """The error of the first bad row alone, with where it is; or ``error``, which the whole batch raised.

    The row is found by halving; an index in its error's message counts from the beginning of the row.
    """
    from . import _rollouts

    layout = batch.row_group.layout
    low, high = 0, batch.records.num_rows
    while high - low > 1:
        middle = (low + high) // 2
        try:
            job(_rollouts.arrays_of(batch.records.slice(low, middle - low), layout))
            low = middle
        except ValueError:
            high = middle
    try:
        job(_rollouts.arrays_of(batch.records.slice(low, 1), layout))
    except ValueError as alone:
        return ValueError(f"{batch.row_group}, row {batch.first_row + low}: {alone}{layout.renamed}")
    return ValueError(f"{batch.row_group}, rows from {batch.first_row}: {error}{layout.renamed}")

"""The objective over rollouts in files, larger than memory or on many machines: `evaluate` and `sweep`.

First the two functions; then what is computed of one batch; then how batches are taken in turns with reading, and row
groups are spread over an executor. (A third of the file is what the two functions promise.)
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from . import _workers
from ._checks import Array, flag
from ._kernels.blocks import BLOCK
from ._kernels.threads import serially
from .loss import grpo_loss
from .objective import grid_of, grpo_stats, grpo_sweep
from .stats import Stats, Sweep
from .terms import BETA, EPSILON, K3, KL, Clip, Options

if TYPE_CHECKING:
    from ._plan import Columns, Form, Paths, RowGroup
    from ._rollouts import RowBatch

#: What is computed of a batch; None if there is nothing in it.
Job: TypeAlias = Callable[[dict[str, Array]], Any]


def evaluate(
    paths: "Paths",
    *,
    columns: "Columns | None" = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    **options: Any,
) -> Stats:
    """The objective and every diagnostic over Parquet or Arrow IPC files of any size, in bounded memory.

    A row is a sequence if its columns hold lists (of one length within the row), and otherwise one sample or token.

    Parameters
    ----------
    paths : str, bytes, path, or an iterable of them
        Files, or globs of files. No file twice.
    columns : mapping of argument to column, or None
        Where the files call a column otherwise than the argument of `grpo_stats` or `grpo_loss`. With None as the
        column, ``old_logps`` (then all is on-policy), ``mask`` and ``rollout_is_weights`` are left out. The files hold
        either probabilities (``rhos, A, pi_theta_old, pi_theta_ref``) or log-probabilities (``logps, old_logps,
        advantages, ref_logps`` and, if there are such columns, ``mask, rollout_is_weights``); where they hold both,
        those named here are taken. Beside lists, ``advantages`` and ``rollout_is_weights`` are lists, too, or one
        number for each sequence. A mask may be a list of columns, which are multiplied. A column that must be a mask by
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
    **options
        Of probabilities ``epsilon``, ``beta`` and ``importance_weighted``; with ``beta=0`` their last two columns are
        not read. Of log-probabilities ``surrogate``, ``kl``, ``importance_sampling_level``, ``aggregation`` and
        ``normalizer``; without a ``kl``, ``ref_logps`` is not read. Flat ones have no sequences: token level,
        ``"token-mean"`` or ``"token-sum"``.

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
    preparation = partial(_evaluation, options=options)
    stats: Stats = _sum_over_files(paths, columns, batch_size, executor, progress, preparation)
    return stats


def sweep(
    paths: "Paths",
    *,
    epsilons: ArrayLike,
    betas: ArrayLike,
    columns: "Columns | None" = None,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """The objective for every ε × β over files, from one read of the data.

    Parameters
    ----------
    paths, columns, batch_size, executor, progress
        As in `evaluate`.
    epsilons, betas : (E,), (B,) array-like, or a single number
        As in `grpo_sweep`.
    **options
        Of probabilities ``importance_weighted``. Of log-probabilities, which are clipped at token level: ``kl``, a KL
        term without its β (K1, K2 or K3, the default; ``functools.partial(K3, importance_weighted=False)``),
        ``aggregation`` and ``normalizer``.

    Returns
    -------
    Sweep
        Its ``objective[e, b]`` is that of `evaluate` with ``epsilons[e]`` and ``betas[b]``, to the bit.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError, PermissionError, ImportError
        As `evaluate`.
    """
    grid = grid_of(epsilons, betas)
    preparation = partial(_sweeping, grid=grid, options=options)
    result: Sweep = _sum_over_files(paths, columns, batch_size, executor, progress, preparation)
    return result


# --- what is computed of a batch --------------------------------------------------------------------------------------
#: The arguments that only a KL term needs.
_PI, _REF = {"pi_theta_old", "pi_theta_ref"}, {"ref_logps"}


class _Work(NamedTuple):
    """A job, and what it needs to know of the files."""

    job: Job
    unread: set[str]  # the arguments whose columns it does not need
    options: Options | None  # of log-probabilities


def _evaluation(form: "Form", *, options: dict[str, Any]) -> _Work:
    """What `evaluate` computes, or the error for an option that is not one of that form."""
    from ._plan import Form

    if form is Form.PROBABILITIES:
        _refuse_others(options, "probability", ("epsilon", "beta", "importance_weighted"))
        clip = Clip(options.get("epsilon", EPSILON))
        k3 = K3(options.get("beta", BETA), options.get("importance_weighted", True))
        return _Work(partial(_stats_of_samples, epsilon=clip.epsilon, k3=k3), set() if k3.beta else _PI, None)
    _refuse_others(options, "log-probability", Options._fields)
    checked = Options(**options)
    return _Work(partial(_stats_of_tokens, options=checked), set() if checked.kl else _REF, checked)


def _sweeping(form: "Form", *, grid: tuple[tuple[float, ...], ...], options: dict[str, Any]) -> _Work:
    """What `sweep` computes, likewise."""
    from ._plan import Form

    with_kl = any(grid[1])
    if form is Form.PROBABILITIES:
        _refuse_others(options, "probability", ("importance_weighted",))
        weighted = flag("importance_weighted", options.get("importance_weighted", True))
        job = partial(_sweep_of_samples, grid=grid, importance_weighted=weighted)
        return _Work(job, set() if with_kl else _PI, None)
    _refuse_others(options, "log-probability", ("kl", "aggregation", "normalizer"))
    term: Callable[[float], KL] = options.get("kl", K3)
    if not callable(term):
        raise TypeError(f"kl must be K1, K2, K3 or a function of β that returns one, got {term!r}")
    checked = Options(**options | {"kl": term(1.0) if with_kl else None})
    return _Work(partial(_sweep_of_tokens, grid=grid, options=checked), set() if with_kl else _REF, checked)


def _refuse_others(options: Mapping[str, Any], kind: str, allowed: tuple[str, ...]) -> None:
    """Raise the TypeError for the first option that is not allowed, if any."""
    for name in options:
        if name not in allowed:
            raise TypeError(f"options of {kind} columns are {', '.join(allowed)}; got {name}")


def _stats_of_samples(arrays: dict[str, Array], *, epsilon: float, k3: K3) -> Stats | None:
    samples = _samples_of(arrays)
    return grpo_stats(*samples, epsilon, **k3._asdict()) if samples[0].size else None


def _sweep_of_samples(
    arrays: dict[str, Array], *, grid: tuple[tuple[float, ...], ...], importance_weighted: bool
) -> Sweep | None:
    samples = _samples_of(arrays)
    return grpo_sweep(*samples, *grid, importance_weighted=importance_weighted) if samples[0].size else None


def _samples_of(arrays: dict[str, Array]) -> tuple[Array, Array, Any, Any]:
    """The arguments of `grpo_stats`, None for probabilities that were not read."""
    return arrays["rhos"], arrays["A"], arrays.get("pi_theta_old"), arrays.get("pi_theta_ref")


def _stats_of_tokens(arrays: dict[str, Array], *, options: Options) -> Stats:
    return _stats_by_options(arrays, [options])[0]


def _sweep_of_tokens(arrays: dict[str, Array], *, grid: Any, options: Options) -> Sweep:
    by_epsilon = [options._replace(surrogate=Clip(epsilon), kl=None) for epsilon in grid[0]]
    by_epsilon[0] = by_epsilon[0]._replace(kl=options.kl)  # the KL term is the same for every ε
    results = _stats_by_options(arrays, by_epsilon)
    first = results[0]
    return Sweep(
        grid=grid,
        options=first.options,
        tokens=first.tokens,
        sequence_count=first.sequence_count,
        surrogate_numerators=tuple(stats.numerator.surrogate for stats in results),
        kl_numerator=first.numerator.kl,
        kl_sum=first.sums.kl,
        clipped_low=tuple(stats.clipped.low for stats in results),
        clipped_high=tuple(stats.clipped.high for stats in results),
    )


def _stats_by_options(arrays: dict[str, Array], several: Iterable[Options]) -> list[Stats]:
    """The Stats of a batch of tokens under each of several options."""
    size, flat = arrays["logps"].size, "cu_seqlens" not in arrays
    if flat:  # blocks as sequences, so that a mask does not move them, wherever a batch begins
        arrays = arrays | {"cu_seqlens": np.append(np.arange(0, size, BLOCK, dtype=np.int64), size)}
    batch: dict[str, Any] = {"old_logps": None, **arrays}
    results = [grpo_loss(**batch, **options._asdict()).stats for options in several]
    return [replace(stats, sequence_count=None) for stats in results] if flat else results


# --- how it is spread over time and machines --------------------------------------------------------------------------
def _sum_over_files(
    paths: "Paths",
    columns: "Columns | None",
    batch_size: int | None,
    executor: Executor | None,
    progress: bool,
    preparation: Callable[["Form"], _Work],
) -> Any:
    """The results of all batches, added; the common arguments of `evaluate` and `sweep` are theirs.

    ``preparation`` is `_evaluation` or `_sweeping`. Whatever can be checked without reading rows is checked first.
    """
    from . import _formats, _plan

    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be an int of at least 1, or None, got {batch_size!r}")
    if executor is not None and not hasattr(executor, "submit"):
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {executor!r}")
    files = _plan.find(paths)
    form = _plan.form_of(files, columns)
    job, unread, options = preparation(form)
    rows_are_sequences, row_groups, rows = _plan.plan(files, form, unread, columns)
    if options and not rows_are_sequences:
        _refuse_sequences(_formats.printable(row_groups[0].path), options)
    if executor is None:
        results = _results_of_batches(row_groups, batch_size, job, use_threads=True)
    else:
        work = partial(_sum_over_row_group, batch_size=batch_size, job=job)
        results = _workers.map_unordered(executor, work, row_groups)
    with closing(results), _workers.Progress(rows, progress) as advance:
        _, total = _sum_of(results, advance)
    if total is None:
        raise ValueError(f"{', '.join(map(_formats.printable, files))}: no samples")
    return total


def _refuse_sequences(name: str, options: Options) -> None:
    if options.importance_sampling_level != "token" or options.aggregation not in ("token-mean", "token-sum"):
        raise ValueError(
            f"{name}: the columns are flat, which does not say where sequences begin: importance_sampling_level must "
            f"be 'token' and aggregation 'token-mean' or 'token-sum', got {options.importance_sampling_level!r} and "
            f"{options.aggregation!r}. For the others, store each sequence as a list"
        )


def _sum_over_row_group(row_group: "RowGroup", *, batch_size: int | None, job: Job) -> tuple[int, Any]:
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
    row_groups: Iterable["RowGroup"], batch_size: int | None, job: Job, *, use_threads: bool
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


def _at_first_bad_row(batch: "RowBatch", job: Job, error: ValueError) -> ValueError:
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

"""The results of all batches of files, added: batches in turns with reading, row groups spread over an executor.

What is computed of one batch is a `Task`: here are the common ones, which hand its arrays to a job of `_jobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from . import _paths, _workers
from ._columns import Columns, Form, with_sampler
from ._jobs import Job, Work, evaluation, refuse_sequences
from ._kernels.threads import serially
from ._paths import Paths
from ._sources import Source, Table

if TYPE_CHECKING:
    from ._plan import Beside, RowGroup
    from ._rollouts import RowBatch

#: What is computed of a batch, which `+=` adds; None if there is nothing in it.
Task: TypeAlias = Callable[["RowBatch"], Any]


class Reading(NamedTuple):
    """The arguments that `evaluate`, `sweep` and all others over files have in common."""

    paths: Paths
    columns: Columns | None
    batch_size: int | None = None
    executor: Executor | None = None
    progress: bool = False
    filesystem: Any = None

    def checked(self) -> list[Source]:
        """The files and tables; an error for an argument that is wrong, whatever they hold."""
        if self.batch_size is not None and (type(self.batch_size) is not int or self.batch_size < 1):
            raise ValueError(f"batch_size must be an int of at least 1, or None, got {self.batch_size!r}")
        if isinstance(self.executor, type) or (self.executor is not None and not hasattr(self.executor, "submit")):
            raise TypeError(f"executor must be a concurrent.futures.Executor, got {self.executor!r}")
        return _paths.find(self.paths, self.filesystem)


def summed(reading: Reading, by: str | None, preparation: Callable[[Form], Work]) -> Any:
    """The sum over all rows, or a dict of those over the rows of each value of the column ``by``."""
    if by is None:
        return sum_over_files(reading, preparation)
    if not isinstance(by, str):
        raise TypeError(f"by must be the name of a column, got {by!r}")
    from ._plan import Beside  # which needs pyarrow

    def task_of(job: Job) -> Task:
        return partial(of_each_value, job=job, key=by)

    return sum_over_files(reading, preparation, Beside(key=by), task_of).in_order()


def evaluated(
    reading: Reading,
    by: str | None,
    options: dict[str, Any],
    beside: Callable[[Form, Work], Work] = lambda form, work: work,
) -> Any:
    """What `evaluate` finds with those of its options that are given; ``beside`` may add to the work."""
    if options.get("rollout_correction") is not None:
        reading = reading._replace(columns=with_sampler(reading.columns))
    return summed(reading, by, lambda form: beside(form, evaluation(form, options=options)))


def sum_over_files(
    reading: Reading,
    preparation: Callable[[Form], Work],
    beside: Beside | None = None,
    task_of: Callable[[Job], Task] | None = None,
) -> Any:
    """The results of all batches, added.

    ``preparation`` is `evaluation`, `sweeping` or another that makes the job; ``task_of`` makes a task of it, which is
    to compute it of a batch as a whole unless told otherwise. Whatever can be checked without reading rows is first.
    """
    from . import _plan  # which needs pyarrow

    sources = reading.checked()
    form = _plan.form_of(sources, reading.columns)
    job, unread, options, optional = preparation(form)
    beside = (beside or _plan.Beside())._replace(optional=optional)
    plan = _plan.plan(sources, form, unread, reading.columns, beside)
    if options and not plan.rows_are_sequences:
        refuse_sequences(str(plan.row_groups[0].source), options)
    task = partial(of_a_whole, job=job) if task_of is None else task_of(job)
    if reading.executor is None:
        results = _results_of_batches(plan.row_groups, reading.batch_size, task, use_threads=True)
    else:
        work = partial(_sum_over_row_group, batch_size=reading.batch_size, task=task)
        pieces = (piece for row_group in plan.row_groups for piece in row_group.portable())
        results = _workers.map_unordered(reading.executor, work, pieces)
    at_first = "" if reading.executor is None else "first row groups: "
    with closing(results), _workers.Progress(plan.rows, reading.progress, at_first) as advance:
        _, total = _sum_of(results, advance)
    if total is None:
        streams = [source for source in sources if isinstance(source, Table) and source.rows is None]
        read = ": a stream gives its rows once, and may have been read already" if streams else ""
        raise ValueError(f"{', '.join(map(str, _in_short(sources)))}: no samples{read}")
    return total


def _in_short(sources: Sequence[Source]) -> Sequence[object]:
    return sources if len(sources) <= 10 else [*sources[:10], f"and {len(sources) - 10} more"]


def of_a_whole(batch: RowBatch, *, job: Job) -> Any:
    """What the job makes of all rows of a batch."""
    return job(batch.arrays())


def of_each_value(batch: RowBatch, *, job: Job, key: str) -> Any:
    """What the job makes of the rows of each value of the column, or hive partition, of that name."""
    from ._keys import ByValue, by_value
    from ._rollouts import arrays_of, rows_of

    layout = batch.row_group.layout
    records, parts = batch.records, [(dict(batch.row_group.partitions).get(key), 0, batch.records.num_rows)]
    if key in layout.beside:
        records, parts = by_value(records, key)
    arrays = arrays_of(records, layout)
    results = ((value, job(rows_of(arrays, start, stop))) for value, start, stop in parts)
    return ByValue({value: result for value, result in results if result is not None}) or None


def _sum_over_row_group(row_group: RowGroup, *, batch_size: int | None, task: Task) -> tuple[int, Any]:
    """The number of rows of one row group, and its batches' results, added: the task of an executor's worker."""
    return _sum_of(_results_of_batches([row_group], batch_size, task, use_threads=False))


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
        if result is None:
            continue
        if total is None:
            total = result
        else:
            total += result
    return rows, total


def _results_of_batches(
    row_groups: Iterable[RowGroup], batch_size: int | None, task: Task, *, use_threads: bool
) -> Generator[tuple[int, Any]]:
    """Yield the number of rows and the result of each batch; the next one is read meanwhile, on another thread."""
    from . import _rollouts

    with closing(_workers.read_ahead(_rollouts.row_batches(row_groups, batch_size, use_threads))) as batches:
        for batch in batches:
            try:
                # On one thread: that keeps up with decoding, and more of them would wait for the decoding ones, in
                # 16 MiB batches 1.6 times the whole (flat columns, 2 cores).
                with serially():
                    result = task(batch) if batch.records.num_rows else None
            except ValueError as error:
                raise _at_first_bad_row(batch, task, error) from error
            yield batch.records.num_rows, result


def _at_first_bad_row(batch: RowBatch, task: Task, error: ValueError) -> ValueError:
    """The error of the first bad row alone, with where it is; or ``error``, which the whole batch raised.

    The row is found by halving; an index in its error's message counts from the beginning of the row.
    """
    renamed = batch.row_group.layout.renamed
    low, high = 0, batch.records.num_rows
    while high - low > 1:
        middle = (low + high) // 2
        try:
            task(batch.part(low, middle - low))
            low = middle
        except ValueError:
            high = middle
    try:
        task(batch.part(low, 1))
    except ValueError as alone:
        return ValueError(f"{batch.where(low)}: {alone}{renamed}")
    return ValueError(f"{batch.where(0).replace(', row ', ', rows from ')}: {error}{renamed}")

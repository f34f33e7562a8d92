"""How work is spread over time and machines: reading ahead, an executor's workers, a bar that shows how far it is."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

from ._kernels.notices import watched_by

S = TypeVar("S")
T = TypeVar("T")

#: Tasks handed to an executor at a time: more than most clusters have threads, few enough to list and to cancel.
_IN_FLIGHT = 1024


def read_ahead(items: Iterator[T]) -> Generator[T]:
    """Yield ``items``, none of which may be None; while one is in use, another thread makes the next.

    Closing the generator waits for the one that is being made.
    """
    with ThreadPoolExecutor(1, "grpo_fast-reader") as reader:
        upcoming = reader.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = reader.submit(next, items, None)
            yield item


def map_unordered(executor: Executor, work: Callable[[S], T], items: Iterable[S]) -> Generator[T]:
    """Yield ``work(item)`` for all items, in the order in which the executor completes them.

    When one of them raises, which is passed on, or the generator is closed, what has not begun is cancelled.
    """
    waiting = iter(items)
    pending: set[Future[T]] = set()
    try:
        while True:
            pending |= {executor.submit(work, item) for item in islice(waiting, _IN_FLIGHT - len(pending))}
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in pending:
            future.cancel()


class Progress:
    """A context in which a bar on stderr shows how many of ``rows`` are done, if ``shown``, and says while it compiles.

    Entering it gives the function to call with the number of rows that have been done since the last call. The time of
    compiling is left out of the rate, and so of the time that is still to come. ``at_first`` is what the bar says until
    the first rows are done.
    """

    def __init__(self, rows: int | None, shown: bool, at_first: str = "") -> None:
        self._bar: Any = None
        self._stack = ExitStack()
        if shown:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("progress needs tqdm: pip install 'grpo_fast[data]'") from error
            self._bar = tqdm(total=rows, unit=" rows", unit_scale=True, desc=at_first or None)

    def __enter__(self) -> Callable[[int], object]:
        if self._bar is None:
            return lambda rows: None
        self._stack.enter_context(watched_by(self._compiling))
        self._stack.callback(self._bar.close)
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _advance(self, rows: int) -> None:
        if self._bar.desc:
            self._bar.set_description_str("", refresh=False)
        self._bar.update(rows)

    def _compiling(self, begins: bool) -> None:
        self._bar.set_description_str("compiling: " if begins else "")
        if not begins:
            self._bar.unpause()  # its clock goes on from here

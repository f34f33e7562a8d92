"""What is told of the machine: warnings, of each subject one in a process; and that kernels are being compiled.

Each kernel that is compiled (not loaded from disk) is an INFO record of the logger ``grpo_fast``. Whoever watches, as a
progress bar does, is called; where nobody watches, a terminal or a notebook is told once, after a second of it. What
goes wrong with a notice is nothing to the call that compiles: it is dropped.
"""

import functools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

logger = logging.getLogger("grpo_fast")

#: Seconds of compiling, all in all, after which a terminal is told.
_PATIENCE = 1.0
_LINE = "grpo_fast: compiling for this CPU, once, which takes some seconds (beforehand: grpo-fast compile)"

_warned: set[str] = set()
_told = False  # whether `_LINE` was written
_watchers: list[Callable[[bool], object]] = []
_depth = 0  # kernels being compiled: one, and those that it calls; only who has the compiler's lock changes it
_spent = 0.0  # seconds of compiling in this process


def warn_once(subject: str, message: str) -> None:
    """Give a RuntimeWarning, unless one was given on the subject."""
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def kernel_name(function: Callable[..., Any]) -> str:
    """The name of a kernel, for people and in names of files: its module's in this folder, and its own."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


def announced(name: str, compile_one: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same work of compiling the kernel of that name, and tells of it.

    The seconds in its record are those of the kernels it calls, too, which have records of their own.
    """

    @functools.wraps(compile_one)
    def announce(*arguments: Any) -> Any:
        global _depth, _spent
        begin = time.perf_counter()
        _depth += 1
        try:
            if _depth == 1:
                _call_watchers(True)
            result = compile_one(*arguments)
        finally:
            _depth -= 1
            seconds = time.perf_counter() - begin
            if _depth == 0:
                _spent += seconds
                _call_watchers(False)
        with suppress(Exception):
            logger.info("compiled %s in %.2f s", name, seconds)
        if _spent > _PATIENCE:  # by now, on a thread that did not wait in `patient_result`
            _tell_once()
        return result

    return announce


def is_compiling() -> bool:
    """Whether a kernel is being compiled, on whatever thread."""
    return _depth > 0


def patient_result(future: "Future[Any]") -> Any:
    """The result of a future that may have to compile something first; if that takes long, the user is told."""
    while not _told:
        try:
            return future.result(max(_PATIENCE - _spent, 0.1))
        except TimeoutError:
            if future.done():  # since then; or it is the work's own
                break
        if _depth:
            _tell_once()
            break
    return future.result()


@contextmanager
def watched_by(watcher: Callable[[bool], object]) -> Iterator[None]:
    """A context in which ``watcher`` is called with True when compiling begins, on whatever thread, and False after.

    It is for the watcher to tell the user then.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def untold() -> AbstractContextManager[None]:
    """A context in which no terminal is told: the caller has said it."""
    return watched_by(lambda _: None)


def never_tell() -> None:
    """Tell no terminal in this process from now on: another one, whose worker it is, speaks to the user."""
    global _told
    _told = True


def _call_watchers(compiling: bool) -> None:
    for watcher in tuple(_watchers):
        with suppress(Exception):
            watcher(compiling)


def _tell_once() -> None:
    """Write the line to a terminal or notebook, unless someone watches, or it was written."""
    global _told
    if _told or _watchers or not _somebody_reads():
        return
    _told = True
    with suppress(Exception):  # such as an OSError, where the terminal is gone
        print(_LINE, file=sys.stderr, flush=True)


def _somebody_reads() -> bool:
    """Whether stderr is a terminal, or the output of a notebook."""
    try:
        shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        return hasattr(shell, "kernel") or sys.stderr.isatty()
    except Exception:  # there is no stderr, or it is closed
        return False

"""On how many threads a call computes: on all, or on the one it has, with the same bits, when others are in the way.

Numba's threading layers must not be entered twice: two threads inside parallel regions at once abort the process on the
workqueue layer, and a forked child that starts a parallel region under GNU OpenMP is killed. So one parallel region at
a time, and none in a forked child; a second call meanwhile runs on the thread it has.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numba
from numba.core.compiler_lock import global_compiler_lock

from .notices import warn_once

#: Fewer tokens or samples are not worth sharing: waking the threads takes about 10 µs.
WORTH_SHARING = 1 << 16

#: The calls that are in a parallel region, or about to be; only the first may.
_inside: dict[object, None] = {}
_thread = threading.local()


def _numba_threads_are_running() -> bool:
    """Whether Numba has started its threads."""
    return getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False)


def _forked_before() -> bool:
    """Whether this process was forked from one that ran Numba's threads, before this package was imported."""
    if not _numba_threads_are_running():
        return False
    try:
        begun = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, AttributeError):  # not Linux, and only there does Numba use GNU OpenMP
        return False
    # A forked process is younger than the modules it came with, of which one that Numba imports knows its age: by far,
    # as Numba takes longer to import than a tenth of a second. (This may be wrong if the clock was set
    # meanwhile; and a forked process that started Numba's threads on its own before is serial without need.)
    return logging.LogRecord("", 0, "", 0, "", (), None).relativeCreated / 1000 > age + 0.1


_forked = _forked_before()


def _before_fork() -> None:
    """Wait until no thread is compiling: it would never let go of Numba's lock in the child.

    Python forks whatever is raised here, and only reports it; so Ctrl-C must not end the waiting.
    """
    interrupt = None
    _thread.waits = not global_compiler_lock.is_locked()  # by this thread
    while not global_compiler_lock.is_locked():
        try:
            global_compiler_lock.acquire()
        except BaseException as error:  # of a signal's handler
            interrupt = error
    if interrupt:
        raise interrupt


def _after_fork() -> None:
    if _thread.waits:
        global_compiler_lock.release()


def _after_fork_in_child() -> None:
    global _forked
    _forked = True
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


#: Whether Numba could not start its threads.
_without_threads = False


def _start_threads() -> None:
    """Start Numba's threads, from a thread of its own; where Numba cannot, warn, and compute on one from then on.

    With GNU OpenMP, that sets the number of threads for all parallel regions that the starting thread will ever enter,
    and they may be PyTorch's.
    """
    problems = []

    def start() -> None:
        try:
            numba.get_num_threads()
        except Exception as error:  # such as a layer that is not installed
            problems.append(error)

    starter = threading.Thread(target=start, name="grpo_fast-starter")
    try:
        starter.start()
        starter.join()
    except RuntimeError as error:  # there can be no more threads, or the interpreter ends
        problems.append(error)
    if problems:
        global _without_threads
        _without_threads = True
        reason = " ".join(str(problems[0]).split())
        warn_once("threads", f"grpo_fast computes on one thread, as Numba cannot start more: {reason}")


_ALONE = nullcontext(1)


def tasks(items: int) -> AbstractContextManager[int]:
    """A context for work on so many items; gives the number of tasks to cut it into. More than one may be parallel."""
    if items < WORTH_SHARING or _forked or _without_threads or getattr(_thread, "serial", False):
        return _ALONE  # of which a small call has less to wait for
    return _shared()


@contextmanager
def _shared() -> Iterator[int]:
    # Ctrl-C can come after any call. Nothing is called between `try` and being inside, nor between `finally` and not
    # being so: a lock's `acquire` would be left behind, and all later calls would be serial. (Where Ctrl-C comes
    # between the `with` statement and here, they are until its exception is dropped, and this generator with it.)
    me = object()
    try:
        _inside[me] = None
        if [*_inside][0] is me:  # noqa: RUF015 - another thread could change it between iter(…) and next(…)
            if not _numba_threads_are_running():
                _start_threads()
            yield 1 if _without_threads else numba.get_num_threads()
        else:
            del _inside[me]
            yield 1
    finally:
        _inside.pop(me, None)


@contextmanager
def serially() -> Iterator[None]:
    """A context in which this thread does not share its work: it is one of many that work side by side."""
    try:
        _thread.serial = True
        yield
    finally:
        _thread.serial = False

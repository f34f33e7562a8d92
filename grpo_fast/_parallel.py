"""Which driver runs: the parallel one, or the serial one with the same bits when someone else is in the way.

Numba's threading layers must not be entered twice: two threads inside parallel regions at once abort the process on the
workqueue layer, and a forked child that starts a parallel region under GNU OpenMP is killed. So one parallel region at
a time, and none in a forked child; who comes second runs on the thread it has.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numba
from numba.core.compiler_lock import global_compiler_lock

#: Fewer tokens or samples are not worth sharing: waking the threads takes about 10 µs.
WORTH_SHARING = 1 << 16

#: Who is, or is about to be, in a parallel region; only the first may.
_inside: dict[object, None] = {}
_here = threading.local()


def _forked_before() -> bool:
    """Whether this process was forked off one in which Numba's threads run, but not this package."""
    if not getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False):
        return False
    try:
        begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, AttributeError):  # not Linux, and only there does Numba use GNU OpenMP
        return False
    # A forked process is younger than the modules it came with, of which one that Numba imports knows its age: by far,
    # as Numba takes longer to import than a tenth of a second. (If the clock was set meanwhile, this may be wrong.)
    return logging.makeLogRecord({}).relativeCreated / 1000 > age + 0.1


_forked = _forked_before()


def _after_fork() -> None:
    global _forked
    _forked = True
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # Whoever forks waits until no thread is compiling: it would never let go of Numba's lock in the child, where the
    # first call of a kernel would wait for it.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=_after_fork,
    )


@contextmanager
def tasks(items: int) -> Iterator[int]:
    """Into how many tasks to cut the work of the ``with`` block; more than one means that it may be parallel."""
    if items < WORTH_SHARING or _forked or getattr(_here, "serial", False):
        yield 1
        return
    # Ctrl-C can come after any call. Nothing is called between `try` and being inside, nor between `finally` and not
    # being so: a lock's `acquire` would be left behind, and all later calls would be serial.
    me = object()
    try:
        _inside[me] = None
        first, *_ = _inside
        if first is me:
            yield numba.get_num_threads()
        else:
            del _inside[me]
            yield 1
    finally:
        _inside.pop(me, None)


@contextmanager
def serially() -> Iterator[None]:
    """Keep this thread from sharing its work within the ``with`` block: it is one of many that work side by side."""
    try:
        _here.serial = True
        yield
    finally:
        _here.serial = False

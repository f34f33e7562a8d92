"""Which driver runs: the parallel one, or the serial one with the same bits when someone else is in the way.

Numba's threading layers must not be entered twice: two threads inside parallel regions at once abort the process on the
workqueue layer, and a forked child that starts a parallel region under GNU OpenMP is killed. So one parallel region at
a time, and none in a forked child; who comes second runs on the thread it has.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba

#: Fewer tokens or samples are not worth sharing: waking the threads takes about 10 µs.
WORTH_SHARING = 1 << 16

_region = threading.Lock()
_here = threading.local()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def tasks(items: int) -> Iterator[int]:
    """Into how many tasks to cut the work of the ``with`` block; more than one means that it may be parallel."""
    if items < WORTH_SHARING or _forked or getattr(_here, "serial", False) or not _region.acquire(blocking=False):
        yield 1
        return
    try:
        yield numba.get_num_threads()
    finally:
        _region.release()


@contextmanager
def serially() -> Iterator[None]:
    """Keep this thread from sharing its work within the ``with`` block: it is one of many that work side by side."""
    _here.serial = True
    try:
        yield
    finally:
        _here.serial = False

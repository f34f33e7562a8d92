"""Which driver runs: the parallel one, or the serial one with the same bits when someone else is in the way.

Numba's threading layers must not be entered twice: two threads inside parallel regions at once abort the process on the
workqueue layer, and a forked child that starts a parallel region under GNU OpenMP is killed. So one parallel region at
a time, and none in a forked child; who comes second runs on the thread it has.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba

_region = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(serial: Callable[..., Any], parallel: Callable[..., Any], args: Sequence[Any], items: int, worth: int) -> Any:
    """Call ``parallel(*args, tasks)``, or ``serial(*args, 1)`` if there are fewer than ``worth`` items to share out."""
    if items >= worth and not _forked and _region.acquire(blocking=False):
        try:
            tasks = numba.get_num_threads()
            if tasks > 1:
                return parallel(*args, tasks)
        finally:
            _region.release()
    return serial(*args, 1)

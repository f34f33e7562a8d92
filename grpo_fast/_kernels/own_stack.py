"""Running a function on a stack of its own, as the compiler needs it: LLVM in one of 64 KiB ends the process.

How large the stacks of new threads are is the host's (`threading.stack_size`), for all of them and only to be read by
being set; so the thread is started by the system's library, with a size that is its own.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

#: As the main thread has it nearly everywhere. It is address space; memory is what is used of it.
_STACK_BYTES = 8 << 20

_ATTRIBUTES_BYTES = 256  # a pthread_attr_t has 56 on 64-bit Linux, 64 on macOS

_START = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def on_own_stack(work: Callable[[], Any]) -> Any:
    """The result of ``work()``, on a new thread that this one waits for; signals do not interrupt the waiting.

    It runs on this thread where a new one cannot be had: on Windows, or with too little memory.
    """
    if os.name != "posix":
        return work()
    future: Future[Any] = Future()

    @_START
    def run(_: Any) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    system = ctypes.CDLL(None)  # lets go of the interpreter's lock while it is called
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    thread = ctypes.c_void_p()
    system.pthread_attr_init(attributes)
    system.pthread_attr_setstacksize(attributes, ctypes.c_size_t(_STACK_BYTES))
    failed = system.pthread_create(ctypes.byref(thread), attributes, run, None)
    system.pthread_attr_destroy(attributes)
    if failed:
        return work()
    system.pthread_join(thread, None)
    return future.result()

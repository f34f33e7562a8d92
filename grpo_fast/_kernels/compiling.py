"""How the kernels are compiled: functions of inner loops are `inlined`, those that are called are `compiled`.

Where the types of its arguments pick the formula of an inlined function, it is `inlined_by_type`.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import overload

from . import cache

#: No reference counts: those of arrays in a tuple LLVM does not see through, and threads fight for them.
_INLINED = {"forceinline": True, "error_model": "numpy", "_nrt": False}

#: The decorator of every function that is part of an inner loop: always inlined by LLVM, never cached on its own.
inlined = numba.njit(**_INLINED)


def inlined_by_type(formula_for: Callable[..., Any]) -> Any:
    """The decorator of an inlined function of which the types of the arguments pick the formula.

    What is decorated gets these types, while a kernel is compiled, and returns the function that is inlined for them.
    """

    @functools.wraps(formula_for)
    def called(*_: Any) -> Any:
        raise TypeError(f"{formula_for.__name__} is known inside kernels only")

    overload(called, jit_options=_INLINED)(formula_for)
    return called


def compiled(function: Any = None, *, parallel: bool = False, allocates: bool = True) -> Any:
    """The decorator of every function that is called from Python or too large to inline: compiled once per machine.

    One that does not allocate arrays, nor calls what does, is spared reference counts.
    """
    if function is None:
        return functools.partial(compiled, parallel=parallel, allocates=allocates)
    if numba.config.DISABLE_JIT:
        return _refuse
    # forceinline would be inherited from an inlined function that calls this one.
    options = {"nogil": True, "error_model": "numpy", "parallel": parallel, "forceinline": False, "_nrt": allocates}
    dispatcher = numba.njit(**options)(function)
    dispatcher.compile = _undisturbed(dispatcher.compile)
    cache.keep(dispatcher)
    return dispatcher


def _undisturbed(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same on another thread, if called on the main one, which alone Python interrupts to handle signals.

    Not while the main thread itself compiles something, of which this is a part: the other would wait for its lock.

    An exception in the middle of Numba's and LLVM's affairs, such as Ctrl-C, can leave the process to a crash (a double
    free) or a deadlock. Here only the waiting is interrupted; what is compiled will be there for the next call.
    """

    @functools.wraps(work)
    def elsewhere(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() or global_compiler_lock.is_locked():
            return work(*arguments)
        compiler = ThreadPoolExecutor(1, "grpo_fast-compiler")
        try:
            future = compiler.submit(work, *arguments)
        except RuntimeError:  # the interpreter ends, and starts no more threads
            return work(*arguments)
        try:
            return future.result()
        finally:
            compiler.shutdown(wait=False)

    return elsewhere


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "grpo_fast has no interpreted kernels: unset NUMBA_DISABLE_JIT, or use the plain NumPy of grpo_fast.reference"
    )

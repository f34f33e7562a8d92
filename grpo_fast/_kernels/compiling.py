"""How kernels are compiled, by decorators.

`inlined` functions are parts of inner loops, `subroutine` ones of kernels; `compiled` ones are called from Python. Of
an inlined function, `inlined_by_type` picks the formula by the types of its arguments.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
from numba.core import config, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering
from numba.extending import overload

from . import cache
from .notices import announced, kernel_name, patient_result, warn_once
from .own_stack import on_own_stack

#: Without reference counts (_nrt), since LLVM cannot remove those of arrays in a tuple, and threads contend for them;
#: and without what only callers in Python and C need, which is a third of the time that compiling takes.
_INLINED = {
    "forceinline": True,
    "error_model": "numpy",
    "_nrt": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]  # numba has no types
    """What the compiler makes of a function that is only a part of others: code for LLVM, to be linked into theirs.

    Numba would optimise it, and make machine code of it, on each of the levels of calls, of which the last one does.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):  # type: ignore[misc]
    _name = "grpo_fast_part_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        # Numba finds a function by what Python would call: a built-in one, another for each. Called, this one raises a
        # KeyError. (Nor has a part an environment of its own, which only objects of Python would need.)
        handle: Any = {}.__getitem__
        state.targetctx.insert_user_function(handle, state["cr"].fndesc, [state.library])
        state["cr"] = state["cr"]._replace(cfunc=handle)
        return True


class _PartCompiler(Compiler):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            parts = [(_PartLowering if step is NativeLowering else step, name) for step, name in pipeline.passes]
            pipeline.passes = parts
            pipeline.finalize()
        return list(pipelines)


_INLINED["pipeline_class"] = _PartCompiler

#: The decorator of every function that is part of an inner loop: always inlined by LLVM, never cached on its own. A
#: branch on None is left out before its types are looked at only if it is about an argument, not about `batch.grad`. It
#: must not return arrays that it was given: its caller, if that counts references, would free them once too often.
inlined = numba.njit(**_INLINED)


def subroutine(function: Any = None, *, allocates: bool = True) -> Any:
    """The decorator of every function that only kernels call, and that is too large to inline, or has many callers.

    A function that neither allocates arrays nor calls one that does (``allocates=False``) is compiled without reference
    counts.
    """
    if function is None:
        return functools.partial(subroutine, allocates=allocates)
    return numba.njit(**_INLINED | {"forceinline": False, "_nrt": allocates})(function)


def inlined_by_type(formula_for: Callable[..., Any], *, strict: bool = True) -> Any:
    """The decorator of an inlined function whose formula the types of its arguments pick.

    While a kernel is compiled, the decorated function is given the Numba types of the arguments, by their names, and
    returns the function to inline for them, which has the same parameters.
    """

    @functools.wraps(formula_for)
    def called(*_: Any) -> Any:
        raise TypeError(f"{formula_for.__name__} is known inside kernels only")

    overload(called, jit_options=_INLINED, strict=strict)(formula_for)
    return called


def inlined_or_none(function: Callable[..., Any]) -> Any:
    """The decorator of an inlined function that returns None where its first argument is None.

    A branch would make its result something that may be None, for all that follows.
    """

    def pick(*arguments: Any) -> Callable[..., Any]:
        return _nothing if arguments[0] is types.none else function

    return inlined_by_type(functools.wraps(function)(pick), strict=False)


def _nothing(*_: Any) -> None:
    return None


def compiled(function: Any = None, *, parallel: bool = False) -> Any:
    """The decorator of every function that is called from Python.

    The machine code is made on the first call with new types, and kept on disk. Without a just-in-time compiler
    (NUMBA_DISABLE_JIT) a call raises a RuntimeError.

    To Python it must return numbers, arrays and plain tuples of them. For a NamedTuple, Numba calls its class, and if
    that raises, as Ctrl-C can make it, ends the process (Numba 0.68).
    """
    if function is None:
        return functools.partial(compiled, parallel=parallel)
    if numba.config.DISABLE_JIT:
        return _raise_without_compiler
    # forceinline would be inherited from an inlined function that calls this one.
    options = {
        "nogil": True,
        "error_model": "numpy",
        "parallel": parallel,
        "forceinline": False,
        "no_cfunc_wrapper": True,
    }
    dispatcher = numba.njit(**options)(function)
    dispatcher.compile = _safe_from_host(_with_threads_as_they_are(dispatcher.compile))
    # Called by the above for what is in no cache.
    dispatcher._compiler.compile = announced(kernel_name(function), dispatcher._compiler.compile)
    cache.use_disk_cache(dispatcher)
    return dispatcher


def _safe_from_host(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same ``work`` of compiling on a stack of its own, and never on the main thread.

    Only the main thread is interrupted by signals. An exception such as Ctrl-C in the middle of Numba and LLVM can end
    in a crash (a double free) or a deadlock; here it interrupts only the waiting, and what is compiled is there for the
    next call. At the interpreter's end, the thread between the main one and the compiler's is waited for.

    Where a thread is already compiling something of which this is a part, it stays there: another one would wait for
    the compiler's lock forever. (No lock may be taken here: interrupted between taking it and being inside, the main
    thread would keep it.)
    """

    @functools.wraps(work)
    def elsewhere(*arguments: Any) -> Any:
        on_this = functools.partial(work, *arguments)
        if global_compiler_lock.is_locked():  # by this thread
            return on_this()
        if threading.current_thread() is not threading.main_thread():
            return on_own_stack(on_this)
        compiler = ThreadPoolExecutor(1, "grpo_fast-compiler")
        try:
            future = compiler.submit(on_own_stack, on_this)
        except RuntimeError:  # the interpreter ends, and starts no more threads
            return on_this()
        try:
            return patient_result(future)
        finally:
            compiler.shutdown(wait=False)

    return elsewhere


def _with_threads_as_they_are(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same ``work`` of compiling, with a warning where Numba refuses it because of threads.

    It looks at its environment variables whenever it compiles, and raises if the number of threads is another one than
    that with which they were started. They go on as they are, and so does everything else of this process.
    """

    @functools.wraps(work)
    def compile_anyway(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except RuntimeError as error:
            if "NUMBA_NUM_THREADS" not in str(error):
                raise
        warn_once(
            "number of threads",
            "NUMBA_NUM_THREADS was changed after Numba had started its threads, and no longer has an effect on "
            f"grpo_fast: there are {config.NUMBA_NUM_THREADS}",
        )
        settings = config._env_reloader
        with global_compiler_lock:
            settings.update = lambda: None
            try:
                return work(*arguments)
            finally:
                del settings.update

    return compile_anyway


def _raise_without_compiler(*_: Any) -> None:
    raise RuntimeError(
        "grpo_fast has no interpreted kernels: unset NUMBA_DISABLE_JIT, or use the plain NumPy of grpo_fast.reference"
    )

"""Running the tasks of a kernel: the only one on the thread that calls, or many on all threads, from one text.

A kernel is called from Python through a compiled function of its own, its *entry*, whose last line is ``return
run(kernel, arguments, room)``. For one task there is no room, and the kernel runs there and then. For many the entry
writes the arguments into the room and returns an address, and `perform` has the tasks done by the one function that is
compiled for threads: once for all kernels, which a parallel loop around each of them would make two seconds longer to
compile.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .compiling import compiled, inlined

#: Bytes for the arguments of a kernel; a batch with all its arrays takes some 700.
_ROOM = 2048
_NO_ROOM = np.empty(0, np.uint8)


def perform(entry: Any, arguments: tuple[Any, ...], tasks: int) -> None:
    """Call a kernel's entry with these arguments, and have so many tasks done before returning."""
    if tasks == 1:
        entry(*arguments, _NO_ROOM)
        return
    room = np.empty(_ROOM, np.uint8)
    address = entry(*arguments, room)
    failed = np.zeros(tasks, np.int64)
    _on_threads(address, room, failed)
    if failed.any():
        raise MemoryError("there was no memory for a thread's own arrays")


@inlined
def run(kernel, arguments, room):
    """``kernel(0, *arguments)``; or, if there is room, leave the arguments there and return the address of a task."""
    if len(room) == 0:
        kernel(0, *arguments)
        return 0
    return _handed_over(kernel, arguments, room)


@intrinsic
def _handed_over(typingctx, kernel, arguments, room):
    """Write the arguments into the room; return the address of a function of a task's number and the room's address.

    It is a function as Numba makes them, part of the entry, and lives as long as that.
    """
    signature = kernel.get_call_type(typingctx, (types.intp, *arguments.types), {})

    def codegen(context, builder, sig, args):
        kind = context.get_value_type(arguments)
        if context.get_abi_sizeof(kind) > _ROOM:
            raise TypeError(f"the arguments of {kernel} take more than {_ROOM} bytes")
        place = context.make_array(room)(context, builder, args[2]).data
        builder.store(
            _borrowed(context, builder, arguments, args[1]), builder.bitcast(place, kind.as_pointer()), align=1
        )

        task = ir.Function(builder.module, _task_type(context), f"{builder.function.name}.task")
        task.linkage = "internal"
        *_, number, address = task.args
        inside = ir.IRBuilder(task.append_basic_block())
        left = inside.load(inside.inttoptr(address, kind.as_pointer()), align=1)
        call = context.get_function(kernel, signature)
        call(inside, (number, *cgutils.unpack_tuple(inside, left)))
        context.call_conv.return_value(inside, context.get_dummy_value())
        return builder.ptrtoint(task, context.get_value_type(types.intp))

    return types.intp(kernel, arguments, room), codegen


def _borrowed(context, builder, kind, value):
    """The value with all its arrays as ones that nobody counts references to: Python, that called, keeps them.

    What counts them for the entry is gone when that returns.
    """
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for i, part in enumerate(kind.types):
            item = _borrowed(context, builder, part, builder.extract_value(value, i))
            value = builder.insert_value(value, item, i)
    return value


def _task_type(context):
    return context.call_conv.get_function_type(types.none, (types.intp, types.intp))


@intrinsic
def _call(typingctx, address, task, room):
    """Call what `_handed_over` returned; return whether it raised something, which can only be for want of memory."""

    def codegen(context, builder, sig, args):
        function_type = _task_type(context)
        function = builder.inttoptr(args[0], function_type.as_pointer())
        unused = [cgutils.alloca_once(builder, kind.pointee) for kind in function_type.args[:2]]
        place = builder.ptrtoint(context.make_array(room)(context, builder, args[2]).data, args[1].type)
        status = builder.call(function, [*unused, args[1], place])
        return builder.icmp_signed("!=", status, ir.Constant(status.type, 0))

    return types.boolean(types.intp, types.intp, room), codegen


@compiled(parallel=True)
def _on_threads(address, room, failed):
    for task in numba.prange(len(failed)):
        failed[task] = _call(address, task, room)

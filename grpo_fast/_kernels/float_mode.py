"""The processor's floating-point mode, which belongs to the host: kernels put the ordinary one in its place and go.

Rounding, what becomes of subnormal numbers, and which exceptions end the process are settings of each thread, which
other libraries change (a flush to zero, as `torch.set_flush_denormal` or a library built with -ffast-math sets it) and
new threads inherit. With them, the same tiny numbers would give other sums on one thread than on many. So every kernel
that computes with floats, and each task of a parallel loop, does so between `begin_ordinary_floats` and
`end_ordinary_floats`; those that only add integers do not need it.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .compiling import inlined

_WORD = ir.IntType(32)
_MODE = ir.IntType(64)
_ORDINARY_MXCSR = 0x1F80  # rounds to nearest, keeps subnormal numbers, masks all exceptions


@intrinsic
def read_float_mode(typingctx):
    """The mode of this thread: MXCSR on x86, FPCR on Arm; 0 where neither is known."""

    def codegen(context, builder, sig, args):
        if _is_x86(builder):
            place = cgutils.alloca_once(builder, _WORD)
            _call(builder, "llvm.x86.sse.stmxcsr", builder.bitcast(place, cgutils.voidptr_t))
            return builder.zext(builder.load(place), _MODE)
        if _is_arm(builder):
            return _call(builder, "llvm.aarch64.get.fpcr", returns=_MODE)
        return ir.Constant(_MODE, 0)

    return types.uint64(), codegen


@intrinsic
def write_float_mode(typingctx, mode):
    """Set the mode of this thread, given as `read_float_mode` does; no access to memory is moved across."""

    def codegen(context, builder, sig, args):
        _stay_in_order(builder)
        if _is_x86(builder):
            place = cgutils.alloca_once(builder, _WORD)
            builder.store(builder.trunc(args[0], _WORD), place)
            _call(builder, "llvm.x86.sse.ldmxcsr", builder.bitcast(place, cgutils.voidptr_t))
        elif _is_arm(builder):
            _call(builder, "llvm.aarch64.set.fpcr", args[0])
        _stay_in_order(builder)
        return context.get_dummy_value()

    return types.none(types.uint64), codegen


@intrinsic
def _ordinary(typingctx):
    """The mode in which programs start."""

    def codegen(context, builder, sig, args):
        return ir.Constant(_MODE, _ORDINARY_MXCSR if _is_x86(builder) else 0)

    return types.uint64(), codegen


def _is_x86(builder):
    return builder.module.triple.startswith(("x86_64", "i686", "i386"))


def _is_arm(builder):
    return builder.module.triple.startswith(("aarch64", "arm64"))


def _call(builder, name, *args, returns=ir.VoidType()):  # noqa: B008 - a type, which is never changed
    """Call one of LLVM's functions that stand for an instruction."""
    function_type = ir.FunctionType(returns, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _stay_in_order(builder):
    """No instruction, but accesses to memory stay on the side on which they are."""
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


@inlined
def begin_ordinary_floats():
    """Set the ordinary mode on this thread, and return the one before, for `end_ordinary_floats`.

    Of arithmetic, only what has read memory in between or is written there is sure to be done in between.
    """
    before = read_float_mode()
    write_float_mode(_ordinary())
    return before


@inlined
def end_ordinary_floats(before):
    """Set the mode that was before, with its record of past exceptions, too."""
    write_float_mode(before)

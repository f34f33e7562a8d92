"""What a host may have set in its process: with each of it a call gives the same bits, and leaves it as it is."""

import os
import platform
import threading
from contextlib import contextmanager

import numba
import numpy as np
from interpreter import someone_else_computes

from grpo_fast._kernels.float_mode import read_float_mode, write_float_mode

# Flags of MXCSR and FPCR.
FLUSH = {"x86_64": 0x8040, "AMD64": 0x8040, "aarch64": 1 << 24, "arm64": 1 << 24}.get(platform.machine(), 0)
UPWARD = {"x86_64": 0x4000, "AMD64": 0x4000, "aarch64": 1 << 22, "arm64": 1 << 22}.get(platform.machine(), 0)


@numba.njit
def read_mode():
    return read_float_mode()


@numba.njit
def write_mode(mode):
    write_float_mode(np.uint64(mode))


@contextmanager
def float_mode(flags):
    """With flags set in the processor's floating-point mode of this thread."""
    before = read_mode()
    write_mode(before | flags)
    try:
        yield
        assert read_mode() & flags == flags
    finally:
        write_mode(before)


@contextmanager
def errors_raised():
    with np.errstate(all="raise"):
        yield
        assert set(np.geterr().values()) == {"raise"}


@contextmanager
def one_thread():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


@contextmanager
def small_stacks():
    before = threading.stack_size(64 << 10)
    try:
        yield
    finally:
        assert threading.stack_size(before) == 64 << 10


@contextmanager
def environment():
    """With environment variables that Numba does not look at any more."""
    before = os.environ.get("NUMBA_NUM_THREADS")
    os.environ["NUMBA_NUM_THREADS"] = "1"
    try:
        yield
        assert os.environ["NUMBA_NUM_THREADS"] == "1"
    finally:
        os.environ.pop("NUMBA_NUM_THREADS")
        if before is not None:
            os.environ["NUMBA_NUM_THREADS"] = before


@contextmanager
def torch_defaults():
    """With another default dtype and device, and one thread; nothing is set without PyTorch."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(1)
    try:
        with torch.device("meta"):
            yield
        assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.bfloat16, 1)
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])


HOSTS = {
    "floating-point errors raised": errors_raised,
    "subnormal numbers flushed": lambda: float_mode(FLUSH),
    "rounding upward": lambda: float_mode(UPWARD),
    "one thread of Numba's": one_thread,
    "small stacks": small_stacks,
    "another number of threads": environment,
    "torch's defaults": torch_defaults,
    "another thread in a parallel region": someone_else_computes,
}

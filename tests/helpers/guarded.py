"""Arrays beside memory that nobody may touch: who reads or writes a byte too far, dies of SIGSEGV (POSIX)."""

import ctypes
import mmap

import numpy as np

_PROT_NONE = 0


def guarded(x, at_the_end=True):
    """A copy that ends where an inaccessible page begins, or begins where one ends."""
    pages = -(-max(x.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = begin + (pages if at_the_end else 0)
    libc = ctypes.CDLL(None)  # not on Windows, where these tests are skipped
    assert libc.mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, _PROT_NONE) == 0
    offset = pages - x.nbytes if at_the_end else mmap.PAGESIZE
    array = np.frombuffer(memory, x.dtype, x.size, offset).reshape(x.shape)
    array[...] = x
    return array

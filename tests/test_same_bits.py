"""The same bits: any number of threads, any driver, wherever the arrays lie; for CPUs see test_recorded_bits.py."""

import numba
import numpy as np
import pytest
from interpreter import someone_else_computes
from samples import DTYPES, samples

from grpo_fast import BLOCK, grpo_objective, grpo_stats, grpo_sweep
from grpo_fast._kernels.threads import WORTH_SHARING

MANY = WORTH_SHARING + 5 * BLOCK + 13


def results(*arrays):
    """All that there is, for comparison with ==."""

    def found(**option):
        yield grpo_objective(*arrays, **option)
        yield grpo_stats(*arrays, **option)
        yield grpo_sweep(*arrays, [0.1, 0.2], [0, 0.1], **option)

    return [*found(), *found(importance_weighted=False), grpo_objective(*arrays, beta=0)]


# --- threads and drivers ----------------------------------------------------------------------------------------------
@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
def test_one_thread_or_two():
    arrays = samples(MANY)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = results(*arrays)
        numba.set_num_threads(2)
        assert results(*arrays) == alone
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 40])
def test_serial_or_cut_into_tasks(dtype, tasks, monkeypatch):
    arrays = samples(MANY, dtype)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 1)
    expected = results(*arrays)
    monkeypatch.setattr(numba, "get_num_threads", lambda: tasks)
    assert results(*arrays) == expected


def test_while_someone_else_is_in_a_parallel_region():
    arrays = samples(MANY)
    alone = results(*arrays)
    with someone_else_computes():
        assert results(*arrays) == alone


# --- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 70, BLOCK + 77, MANY])
@pytest.mark.parametrize("offset", [0, 1, 7, 8, 60, 64])  # bytes; not always whole elements
def test_wherever_the_arrays_start(dtype, n, offset):
    arrays = samples(n, dtype)
    moved = []
    for k, x in enumerate(arrays):
        start = offset * (k + 1)
        memory = np.zeros(x.nbytes + start, np.uint8)
        memory[start:] = x.view(np.uint8)
        moved.append(memory[start:].view(dtype))
    assert grpo_stats(*moved) == grpo_stats(*arrays)
    assert grpo_objective(*moved) == grpo_objective(*arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_or_file(dtype, mode, tmp_path):
    arrays = samples(MANY, dtype)
    mapped = []
    for k, x in enumerate(arrays):
        x.tofile(tmp_path / str(k))
        mapped.append(np.memmap(tmp_path / str(k), dtype, mode))
    assert grpo_stats(*mapped) == grpo_stats(*arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 5, 100, BLOCK - 1])
def test_a_sample_at_the_limits_does_not_change_the_others(dtype, at):
    # Its block is computed in the careful way. What it adds is lost in rounding, as is what it stands in for.
    rho, a, old, ref = arrays = samples(2 * BLOCK, dtype)
    rho[at], a[at], old[at], ref[at] = 1, 0, 1, 1
    before = grpo_objective(*arrays), grpo_stats(*arrays).sums[:2]
    rho[at] = np.finfo(dtype).tiny
    ref[at] = rho[at]
    assert (grpo_objective(*arrays), grpo_stats(*arrays).sums[:2]) == before
    ref[at] *= 2
    assert grpo_objective(*arrays) == before[0]

"""Counts and offsets have 64 bits, also where NumPy's own choice of integers has 32: on Windows, before NumPy 2."""

import functools
import sys

import numba
import numpy as np
import pytest

from grpo_fast import Reject, _shares, grpo_loss, loss, reference, rollout_correction
from grpo_fast._kernels import rollout, sequence_level, token_level
from grpo_fast._kernels.sums import empty_accumulators
from grpo_fast._kernels.tokens import Batch
from grpo_fast._loss_inputs import Inputs, bounds_of

FAR = 1 << 33  # tokens: beyond 32 bits
CHOOSING = "arange", "array", "cumsum", "full", "ones", "prod", "sum"  # functions that choose, unless told a dtype


class Numpy32:
    """NumPy as it would choose: where int64 was not asked for, int32, if the numbers fit."""

    def __getattr__(self, name):
        function = getattr(np, name)
        if name not in CHOOSING:
            return function

        @functools.wraps(function)
        def called(*arguments, **options):
            result = function(*arguments, **options)
            asked = "dtype" in options or any(isinstance(x, (type, np.dtype)) for x in arguments)
            given = any(getattr(x, "dtype", None) == np.int64 for x in arguments)
            if asked or given or result.dtype != np.int64 or np.any(np.abs(result) > np.iinfo(np.int32).max):
                return result
            return result.astype(np.int32)

        return called


@pytest.fixture(autouse=True)
def as_on_windows(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("grpo_fast.") and "._kernels" not in name and getattr(module, "np", None) is np:
            monkeypatch.setattr(module, "np", Numpy32())
    assert loss.np.arange(3).dtype == reference.np.cumsum(np.ones(3, bool)).dtype == np.int32


def batch(bounds):
    """As many tokens as the bounds say, none of which takes memory."""
    logps = np.broadcast_to(0.0, int(bounds[-1]))
    return Batch(logps, None, logps, None, None, None, None, None, bounds, True, True, True)


# --- more tokens than 32 bits count -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(FAR,), (4, FAR // 4), (1 << 20, FAR >> 20)])
def test_bounds_of_many_tokens(shape):
    bounds = bounds_of(shape, None)
    assert bounds.dtype == np.int64
    assert bounds[-1] == FAR
    assert (bounds[1:] > bounds[:-1]).all()


def test_ranges_of_many_tokens():
    bounds = bounds_of((1 << 20, FAR >> 20), None)
    ranges, _, long = _shares.ranges_of(batch(bounds), 2)
    assert not long
    assert ranges.dtype == np.int64
    assert sorted(ranges[:, 0].tolist()) == [0, *sorted(ranges[:, 1].tolist())[:-1]]
    sizes = bounds[ranges[:, 1]] - bounds[ranges[:, 0]]
    assert (sizes == FAR // len(ranges)).all()


@pytest.mark.parametrize("tasks", [2, 7])
def test_one_sequence_of_many_tokens_is_shared_out(tasks):
    spans = loss._spans(batch(bounds_of((FAR,), None)), 0, tasks, empty_accumulators(1))
    assert [column.dtype for column in spans] == [np.int64] * 4
    assert spans.start[0] == 0
    assert spans.stop[-1] == FAR
    assert (spans.start[1:] == spans.stop[:-1]).all()
    assert (spans.stop - spans.start > FAR // (tasks + 1)).all()
    assert (spans.tokens == FAR).all()


# --- the same numbers, by the same machine code -----------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_and_offsets(shape, masked):
    logps = np.zeros(shape)
    mask = np.ones(shape, bool) if masked else None
    inputs = Inputs.of(logps, None, np.zeros(shape), None, mask, None, None, None, True)
    assert inputs.batch.bounds.dtype == np.int64
    tokens = reference._Tokens.of(logps, mask, None)
    assert tokens.lengths.dtype == tokens.counts.dtype == np.int64


def test_offsets_of_lists(monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from grpo_fast import _rollouts  # which wants pyarrow

    monkeypatch.setattr(_rollouts, "np", Numpy32())
    rows = [[0.0, 1.0], [2.0, 3.0]]
    for kind in (pyarrow.list_(pyarrow.float64()), pyarrow.list_(pyarrow.float64(), 2)):
        values, bounds = _rollouts._values_and_bounds(pyarrow.array(rows, kind))
        assert bounds.dtype == np.int64
        assert bounds.tolist() == [0, 2, 4]
        assert len(values) == 4


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_nothing_is_compiled_for_other_integers(level, tasks, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = [70_001, *[1000] * 80]  # one that is shared out, and enough to be dealt
    n = sum(lengths)
    arguments = rng.normal(0, 0.1, n), rng.normal(0, 0.1, n), rng.normal(size=len(lengths))
    options = {"cu_seqlens": np.append(0, np.cumsum(lengths)), "importance_sampling_level": level}
    monkeypatch.setattr(numba, "get_num_threads", lambda: tasks)
    with monkeypatch.context() as elsewhere:
        for module in (loss, _shares, sys.modules[Inputs.__module__]):
            elsewhere.setattr(module, "np", np)
        expected = grpo_loss(*arguments, **options)
    kernels = [x for module in (token_level, sequence_level) for x in vars(module).values() if hasattr(x, "signatures")]
    before = [list(kernel.signatures) for kernel in kernels]
    assert grpo_loss(*arguments, **options).stats == expected.stats
    assert [list(kernel.signatures) for kernel in kernels] == before


@pytest.mark.parametrize("tasks", [1, 3])
def test_nothing_of_corrections_is_either(tasks, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = [70_001, *[1000] * 80]
    n = sum(lengths)
    arrays = rng.normal(0, 0.1, n), rng.normal(0, 0.1, n)
    options = {"cu_seqlens": np.append(0, np.cumsum(lengths)), "reject": Reject("ratio", "geometric", 0.999)}
    monkeypatch.setattr(numba, "get_num_threads", lambda: tasks)
    with monkeypatch.context() as elsewhere:
        for module in (_shares, *(sys.modules[f.__module__] for f in (Inputs, rollout_correction))):
            elsewhere.setattr(module, "np", np)
        expected = rollout_correction(*arrays, **options)
    kernels = [x for x in vars(rollout).values() if hasattr(x, "signatures")]
    before = [list(kernel.signatures) for kernel in kernels]
    assert rollout_correction(*arrays, **options).stats == expected.stats
    assert [list(kernel.signatures) for kernel in kernels] == before

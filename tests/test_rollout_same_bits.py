"""Weights of a sequence, and what it adds to the statistics, are the same bits in whichever batch it stands."""

import itertools

import numba
import numpy as np
import pytest
from hosts import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import someone_else_computes
from samples import DTYPES

from grpo_fast import BLOCK, Reject, rollout_correction

#: Nothing, and the ends of vectors and of blocks.
LENGTHS = np.array([9001, 0, 1, 7, 8, 9, 16, 17, 127, 128, 129, 255, 0, 4095, 4096, 4097, 33])
#: Enough for several threads, and one that is shared out among them.
MANY = np.array([70_003, 5, 3 * BLOCK + 1, 0, 66_000, *LENGTHS])
CASES = {
    "token": {"reject": [Reject("ratio", "token", 0.5, 1.6), Reject("k3", "seq_max", upper=0.35)]},
    "token, none rejected": {"lower": 0.9},
    "sequence": {"level": "sequence", "mode": "mask", "reject": [Reject("k2", "token", upper=0.4)]},
    "geometric": {"level": "geometric", "reject": [Reject("ratio", "geometric", 0.9, 1.1)]},
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_case = pytest.mark.parametrize("case", CASES)


def tokens_of(lengths, dtype):
    """log π_old, log π_rollout and which tokens count, of sequences strung together; holes are not at their ends."""
    n, some = int(lengths.sum()), lengths > 0
    rng = np.random.default_rng(n)
    old = rng.uniform(-3, 0, n)
    rollout = old + rng.normal(0, 0.2, n) + np.repeat(rng.normal(0, 0.1, lengths.size), lengths)
    rollout[rng.random(n) < 0.05] = np.nan
    keep, ends = rng.random(n) < 0.9, np.cumsum(lengths)[some]
    keep[ends - 1] = keep[ends - lengths[some]] = True
    return old.astype(dtype), rollout.astype(dtype), keep


def bits_of(lengths, dtype, options, before=0, after=0, order=None, width=None):
    """The statistics and, of each sequence, the bytes of weights and mask.

    Sequences are packed in that order, each with so many masked tokens before and after it, or in rows of a ``width``.
    """
    old, rollout, keep = tokens_of(lengths, dtype)
    order = range(lengths.size) if order is None else order
    starts = np.cumsum(lengths) - lengths
    garbage = np.array([np.nan, np.inf, -np.inf, np.finfo(dtype).max], dtype)
    behind = {i: after if width is None else width - before - lengths[i] for i in order}
    ends = np.cumsum([before + lengths[i] + behind[i] for i in order])

    def laid_out(x, fill):
        parts = ((np.resize(fill, before), x[starts[i] :][: lengths[i]], np.resize(fill, behind[i])) for i in order)
        rows = [np.concatenate(part) for part in parts]
        return np.concatenate(rows) if width is None else np.stack(rows)

    arguments = {"mask": laid_out(keep, np.array([False]))} | options
    if width is None:
        arguments["cu_seqlens"] = np.append(0, ends)
    result = rollout_correction(laid_out(old, garbage), laid_out(rollout, garbage), **arguments)
    found = {}
    for i, end in zip(order, ends, strict=True):
        place = np.s_[end - behind[i] - lengths[i] : end - behind[i]]
        counts = keep[starts[i] : starts[i] + lengths[i]]
        weights, mask = result.weights.reshape(-1)[place], result.mask.reshape(-1)[place]
        assert not weights[~mask].any()
        assert not mask[~counts].any()
        found[i] = weights.tobytes(), mask.tobytes()
    return result.stats, [found[i] for i in sorted(found)]


# --- batches ----------------------------------------------------------------------------------------------------------
@every_dtype
@every_case
def test_any_padding(case, dtype):
    expected = bits_of(LENGTHS, dtype, CASES[case])
    stats = expected[0]
    assert stats.counts.missing
    if CASES[case].get("reject"):
        assert 0 < stats.rejected_tokens < 1
    for before, after in ((0, 9), (13, 0), (3, 4)):
        assert bits_of(LENGTHS, dtype, CASES[case], before, after) == expected
    for before in (0, 5, 16):
        assert bits_of(LENGTHS, dtype, CASES[case], before, width=9020) == expected


@every_dtype
@every_case
@given(order=st.permutations(range(LENGTHS.size)), cuts=st.sets(st.integers(1, LENGTHS.size - 1)))
@settings(max_examples=10, deadline=None)
def test_any_order_and_any_micro_batches(case, dtype, order, cuts):
    stats, bits = bits_of(LENGTHS, dtype, CASES[case])
    edges = [0, *sorted(cuts), len(order)]
    parts = [bits_of(LENGTHS, dtype, CASES[case], order=order[i:j]) for i, j in itertools.pairwise(edges)]
    assert sum(part[0] for part in parts) == stats
    found = {}
    for (_, some), (i, j) in zip(parts, itertools.pairwise(edges), strict=True):
        found |= dict(zip(sorted(order[i:j]), some, strict=True))
    assert [found[i] for i in range(LENGTHS.size)] == bits


def test_different_options_do_not_add():
    x = np.zeros(3)
    stats = rollout_correction(x, x).stats
    for name, option in (("level", {"level": "geometric"}), ("upper", {"upper": 3}), ("mode", {"mode": "mask"})):
        with pytest.raises(ValueError, match=f"RolloutStats of different {name} cannot be added"):
            stats + rollout_correction(x, x, **option).stats
    with pytest.raises(ValueError, match="RolloutStats of different reject cannot be added"):
        stats + rollout_correction(x, x, reject=Reject("ratio", "token", 0.5)).stats
    with pytest.raises(TypeError):
        stats + 1


@every_dtype
def test_the_way_of_a_run_does_not_show(dtype):
    # A run is computed in the way that its farthest log-ratio calls for; that is not seen in its other tokens.
    n = 20 * 128 + 5
    rng = np.random.default_rng(1)
    old = rng.uniform(-3, 0, n).astype(dtype)
    rollout = (old + rng.uniform(-0.3, 0.3, n)).astype(dtype)
    found = []
    for farthest in (0.1, 0.5, 30.0, 500.0, -500.0, 1e30):
        moved = rollout.copy()
        moved[::50] = old[::50] - dtype(farthest)
        found.append(np.delete(rollout_correction(old, moved, mode="raw").weights, np.s_[::50]).tobytes())
    assert set(found) == {found[0]}


@every_dtype
def test_no_mask_or_ones(dtype):
    old, rollout, _ = tokens_of(LENGTHS, dtype)
    cuts = {"cu_seqlens": np.append(0, np.cumsum(LENGTHS))}
    for options in CASES.values():
        expected = rollout_correction(old, rollout, **cuts, **options)
        for kind in ("?", "i1", "f4"):
            found = rollout_correction(old, rollout, mask=np.ones(old.size, kind), **cuts, **options)
            assert found.weights.tobytes() == expected.weights.tobytes()
            assert found.mask.tobytes() == expected.mask.tobytes()
            assert found.stats == expected.stats


# --- threads and memory -----------------------------------------------------------------------------------------------
@every_dtype
@every_case
def test_any_number_of_threads(case, dtype, monkeypatch):
    monkeypatch.setattr(numba, "get_num_threads", lambda: 1)
    expected = bits_of(MANY, dtype, CASES[case])
    for tasks in (2, 3, 7, 40):
        monkeypatch.setattr(numba, "get_num_threads", lambda tasks=tasks: tasks)
        assert bits_of(MANY, dtype, CASES[case]) == expected
        assert bits_of(MANY, dtype, CASES[case], before=3) == expected


def test_while_someone_else_is_in_a_parallel_region():
    expected = bits_of(MANY, np.float64, CASES["token"])
    with someone_else_computes():
        assert bits_of(MANY, np.float64, CASES["token"]) == expected


@every_dtype
@pytest.mark.parametrize("offset", [1, 8, 60])  # bytes; not always whole elements
def test_wherever_the_arrays_start(dtype, offset):
    old, rollout, keep = tokens_of(LENGTHS, dtype)
    moved = []
    for k, x in enumerate((old, rollout, keep)):
        memory = np.zeros(x.nbytes + offset * (k + 1), np.uint8)
        memory[offset * (k + 1) :] = x.view(np.uint8)
        moved.append(memory[offset * (k + 1) :].view(x.dtype))
    for options in CASES.values():
        found, expected = (rollout_correction(a, b, mask=m, **options) for a, b, m in (moved, (old, rollout, keep)))
        assert found.weights.tobytes() == expected.weights.tobytes()
        assert found.stats == expected.stats
        doubled = [np.repeat(x, 2)[::2] for x in (old, rollout, keep)]
        assert rollout_correction(*doubled[:2], mask=doubled[2], **options).stats == expected.stats


@every_dtype
def test_arguments_are_left_as_they_are(dtype):
    old, rollout, keep = tokens_of(LENGTHS, dtype)
    before = [x.tobytes() for x in (old, rollout, keep)]
    for x in (old, rollout, keep):
        x.flags.writeable = False
    result = rollout_correction(old, rollout, mask=keep, reject=Reject("ratio", "token", 0.9))
    assert [x.tobytes() for x in (old, rollout, keep)] == before
    result.weights[:] = result.mask[:] = 0  # are the caller's own
    assert [x.tobytes() for x in (old, rollout, keep)] == before


@every_dtype
@pytest.mark.parametrize("host", HOSTS)
def test_whatever_the_host_has_set(host, dtype):
    old, rollout, keep = tokens_of(LENGTHS, dtype)
    # The mean to divide by is rounded by Python, as the host wants it rounded.
    options = CASES["token, none rejected"] | {"normalize": host != "rounding upward"}
    expected = rollout_correction(old, rollout, mask=keep, **options)
    with HOSTS[host]():
        found = rollout_correction(old, rollout, mask=keep, **options)
    assert found.weights.tobytes() == expected.weights.tobytes()
    assert found.stats == expected.stats

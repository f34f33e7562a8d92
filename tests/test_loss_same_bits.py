"""A sequence adds the same bits in whichever batch it stands: layout, order, cut, memory, driver, threads."""

import itertools
import math
from functools import cache

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import someone_else_computes
from samples import DTYPES

from grpo_fast import CISPO, K2, K3, SAPO, Clip, grpo_loss, reference
from grpo_fast._kernels.tokens import Batch
from grpo_fast._shares import ranges_of

#: Nothing, and the ends of vectors and of blocks.
LENGTHS = (9001, 0, 1, 7, 8, 9, 16, 17, 127, 128, 129, 255, 256, 257, 0, 4095, 4096, 4097, 33)
OPTIONS = {  # of three kernels a dtype; whatever else a test calls for is to be compiled, too
    "clip": {"surrogate": Clip(0.2, 0.28, 3), "kl": K3(0.04)},
    "sapo": {"surrogate": SAPO(), "kl": K2(0.1, False), "importance_sampling_level": "sequence"},
    "sapo, weighted": {"surrogate": SAPO(), "kl": K2(0.1, True), "importance_sampling_level": "sequence"},
    "cispo": {"surrogate": CISPO()},
}
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_case = pytest.mark.parametrize("case", OPTIONS)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


# --- sequences, and how they can be laid out --------------------------------------------------------------------------
@cache
def batch_of(lengths, case, dtype, holes=0.1):
    """The lengths of sequences, the mask of all their tokens and the arrays; holes in the mask are not at its ends."""
    lengths = np.array(lengths)
    n, some = int(lengths.sum()), lengths > 0
    rng = np.random.default_rng([n, lengths.size])
    old = rng.uniform(-3, 0, n)
    logps = old + rng.normal(0, 0.3, n) + np.repeat(rng.normal(0, 0.3, lengths.size), lengths)
    arrays = {"logps": logps, "old_logps": old, "advantages": rng.normal(size=n) * (rng.random(n) < 0.9)}
    arrays["rollout_is_weights"] = rng.uniform(0, 2, n)
    if "kl" in OPTIONS[case]:
        arrays["ref_logps"] = logps + rng.normal(0, 0.3, n)
    ends = np.cumsum(lengths)[some]
    per_sequence = "advantages" if case == "clip" else "rollout_is_weights"
    values, arrays[per_sequence] = arrays[per_sequence], np.full(lengths.size, np.nan)  # NaN where there is no token
    arrays[per_sequence][some] = values[ends - 1]
    mask = rng.random(n) >= holes
    mask[ends - 1] = mask[ends - lengths[some]] = True
    return lengths, mask, {name: x.astype(dtype) for name, x in arrays.items()}


def garbage(dtype):
    form = np.finfo(dtype)
    return np.array([np.nan, np.inf, -np.inf, form.max, -form.max, form.smallest_subnormal], dtype)


#: The room for sequences of n tokens, how many masked tokens are before them, and the number of dimensions.
LAYOUTS = {
    "padded right": lambda n, rng: (0 * n + n.max() + 3, 0 * n, 2),
    "padded left": lambda n, rng: (0 * n + n.max() + 3, n.max() + 3 - n, 2),
    "padded anywhere": lambda n, rng: (0 * n + n.max() + 3, rng.integers(0, n.max() + 4 - n), 2),
    "packed": lambda n, rng: (n, 0 * n, 1),
    "packed among masked": lambda n, rng: (n + rng.integers(8, 30, n.shape), rng.integers(0, 9, n.shape), 1),
    "plain": lambda n, rng: (n, 0 * n, 0),
    "plain among masked": lambda n, rng: (n + 9, rng.integers(0, 9, n.shape), 0),
}


def results(batch, options, layout="packed", chosen=None, seed=0, fill=garbage, each=np.asarray, into=lambda x: True):
    """Loss, Stats and the gradient's bytes for each of the chosen sequences, laid out in this order.

    Masked places hold ``fill``; ``each`` is done to every array, and ``into(logps)`` is where the gradient goes.
    """
    lengths, mask, arrays = batch
    chosen = np.arange(lengths.size) if chosen is None else np.array(chosen)
    n = lengths[chosen]
    room, before, ndim = LAYOUTS[layout](n, np.random.default_rng(seed))
    cu_seqlens = np.append(0, np.cumsum(room))
    size, shape = cu_seqlens[-1], (n.size, -1) if ndim == 2 else -1

    # Unmasked token here[k] of the batch stands there[k] and belongs to sequence whose[k] of the chosen ones.
    whose = np.repeat(np.arange(n.size), n)
    place = np.arange(whose.size) - (np.cumsum(n) - n)[whose]
    here = (np.cumsum(lengths)[chosen] - n)[whose] + place
    there = (cu_seqlens[:-1] + before)[whose] + place
    here, there, whose = (x[mask[here]] for x in (here, there, whose))

    arguments = {"mask": np.zeros(size, bool)}
    arguments["mask"][there] = True
    for name, x in arrays.items():
        arguments[name] = x[chosen] if x.size == lengths.size else np.resize(fill(x.dtype), size)
        if x.size == mask.size:
            arguments[name][there] = x[here]
    arguments = {name: each(x.reshape(shape) if x.size == size else x) for name, x in arguments.items()}
    if ndim == 1:
        arguments["cu_seqlens"] = each(cu_seqlens)

    result = grpo_loss(**arguments | {"grad": into(arguments["logps"])} | options)
    gradient = result.grad.reshape(-1)
    assert not np.delete(gradient, there).any()
    assert result.stats.loss == result.loss
    cuts = np.searchsorted(whose, np.arange(n.size + 1))
    return result.loss, result.stats, [gradient[there[i:j]].tobytes() for i, j in itertools.pairwise(cuts)]


# --- batches ----------------------------------------------------------------------------------------------------------
@every_dtype
@every_case
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "plain" not in name])
def test_any_layout(layout, case, dtype):
    batch = batch_of(LENGTHS, case, dtype)
    expected = results(batch, OPTIONS[case])
    assert 0 < abs(expected[0]) < math.inf
    for seed in range(2):
        assert results(batch, OPTIONS[case], layout, seed=seed) == expected


@every_dtype
def test_no_mask_or_ones_of_any_kind(dtype):
    batch = batch_of(LENGTHS, "clip", dtype, holes=0)
    expected = results(batch, OPTIONS["clip"])
    assert results(batch, OPTIONS["clip"] | {"mask": None}) == expected
    for kind in ("?", "i1", "u8", "f4", "f8"):
        same = results(batch, OPTIONS["clip"], each=lambda x, kind=kind: x.astype(kind) if x.dtype == bool else x)
        assert same == expected


@every_dtype
@pytest.mark.parametrize("case", ["clip", "cispo"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_way_of_a_run_does_not_show(masked, case, dtype):
    # A run is computed in the way that its farthest log-ratio calls for; that is not seen in its other tokens.
    n = 20 * 128 + 5
    rng = np.random.default_rng(1)
    old = rng.uniform(-3, 0, n)
    others = {"advantages": [1.5], "mask": rng.random(n) < 0.8 if masked else None} | OPTIONS[case]
    others |= {"aggregation": "token-sum", "grad": True}
    logps = old + rng.uniform(-0.3, 0.3, n)
    if "kl" in OPTIONS[case]:
        others["ref_logps"] = (logps + rng.uniform(-0.3, 0.3, n)).astype(dtype)
    gradients = []
    for farthest in (0.1, 0.5, 30.0, 500.0, -500.0):
        moved = old.astype(dtype)
        moved[::50] = logps.astype(dtype)[::50] - dtype(farthest)
        gradient = grpo_loss(logps.astype(dtype), moved, **others).grad
        gradients.append(np.delete(gradient, np.s_[::50]))
    for gradient in gradients[1:]:
        assert np.array_equal(gradient, gradients[0])


@every_dtype
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_sum_depends_on_what_is_not_in_it(level, dtype):
    # One policy term overflows, or its sum; one l is far beyond what the far way takes. Neither is seen in other sums.
    n = 300
    rng = np.random.default_rng(4)
    old = rng.uniform(-3, 0, n)
    logps, ref = (old + rng.normal(0, 0.2, (2, n))).astype(dtype)
    old, A = old.astype(dtype), rng.normal(size=n).astype(dtype)
    old[0] = logps[0] - dtype(0.25)
    options = {"importance_sampling_level": level, "aggregation": "token-sum"}
    huge = A.copy()
    huge[0] = np.finfo(dtype).max * dtype(0.9)
    found = [
        grpo_loss(logps, old, a, ref, surrogate=Clip(epsilon), kl=K3(0.1), **options).stats.sums
        for a, epsilon in ((A, 0.1), (huge, 0.1), (huge, 0.5))
    ]
    for sums in found[1:]:
        assert sums._replace(surrogate=None) == found[0]._replace(surrogate=None)
    ref[3] -= 60
    with_, without = (grpo_loss(logps, old, A, ref, kl=kl, **options).stats.sums for kl in (K3(0.1), None))
    if level == "sequence":
        assert with_._replace(kl=None) == without._replace(kl=None)


@every_dtype
@pytest.mark.parametrize("surrogate", [Clip(0.2, math.inf), CISPO(math.inf), SAPO()], ids=str)
def test_an_infinite_ratio_of_a_sequence(surrogate, dtype):
    for a in (1.0, -1.0):
        arrays = [np.array(x, dtype) for x in ([0.0, 0.0], [-2000.0, -2000.0], [a])]
        found = grpo_loss(*arrays, surrogate=surrogate, importance_sampling_level="sequence", grad=True)
        expected = reference.grpo_loss(*arrays, surrogate=surrogate, importance_sampling_level="sequence", grad=True)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert str(found.grad.tolist()) == str(expected.grad.tolist())


def test_ratios_that_float32_cannot_add():
    logps, old = np.full(32, -1.0, np.float32), np.full(32, -1.0, np.float32)
    logps[[0, 16]] = -2e38
    for level in ("token", "sequence"):
        stats = grpo_loss(logps, old, [1.0], importance_sampling_level=level).stats
        assert stats.approx_kl == pytest.approx(4e38 / 32, rel=1e-6)


@every_dtype
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_factor_beyond_the_format_is_no_nan_where_the_slope_is_0(level, dtype):
    tiny = float(np.finfo(dtype).tiny) / 16
    options = {"importance_sampling_level": level, "normalizer": tiny, "aggregation": "token-sum", "grad": True}
    result = grpo_loss(np.zeros(20, dtype), np.zeros(20, dtype), np.zeros(1, dtype), **options)
    assert (result.loss, result.grad.any()) == (0, False)


@every_dtype
def test_with_or_without_the_gradient(dtype):
    _, mask, arrays = batch_of(LENGTHS, "clip", dtype)
    arguments = arrays | {"mask": mask, "cu_seqlens": np.append(0, np.cumsum(LENGTHS))} | OPTIONS["clip"]
    with_, without = grpo_loss(**arguments, grad=True), grpo_loss(**arguments)
    assert (without.loss, without.grad, without.stats) == (with_.loss, None, with_.stats)


@every_dtype
@every_case
@every_aggregation
def test_one_by_one(aggregation, case, dtype):
    batch = batch_of(LENGTHS, case, dtype)
    for normalizer in (None, 700.0):
        options = OPTIONS[case] | {"aggregation": aggregation, "normalizer": normalizer}
        loss, stats, gradient = results(batch, options, "padded right")
        alone = [results(batch, options, "plain" if n else "plain among masked", [i]) for i, n in enumerate(LENGTHS)]
        total = sum(part[1] for part in alone)
        assert total == stats
        assert total.loss == loss
        if normalizer or aggregation == "token-sum":
            assert [part[2][0] for part in alone] == gradient


@every_dtype
@every_case
@given(order=st.permutations(range(len(LENGTHS))), seed=st.integers(0, 99))
@settings(max_examples=7)
def test_any_order(case, dtype, order, seed):
    batch = batch_of(LENGTHS, case, dtype)
    loss, stats, gradient = results(batch, OPTIONS[case])
    for layout in ("packed", "packed among masked"):
        assert results(batch, OPTIONS[case], layout, order, seed) == (loss, stats, [gradient[i] for i in order])


@every_dtype
@every_case
@every_aggregation
@given(
    order=st.permutations(range(len(LENGTHS))),
    cuts=st.sets(st.integers(1, len(LENGTHS) - 1)),
    grouping=st.randoms(use_true_random=False),
)
@settings(max_examples=3)
def test_any_micro_batches(aggregation, case, dtype, order, cuts, grouping):
    # Padded ones: if 0 and 2 tokens were packed, two advantages would be one per token.
    groups = [order[i:j] for i, j in itertools.pairwise([0, *sorted(cuts), len(order)])]
    batch = batch_of(LENGTHS, case, dtype)
    for normalizer in (None, 700.0):
        options = OPTIONS[case] | {"aggregation": aggregation, "normalizer": normalizer}
        loss, stats, gradient = results(batch, options)
        parts = [results(batch, options, "padded anywhere", group, seed) for seed, group in enumerate(groups)]
        losses, totals = [part[0] for part in parts], [part[1] for part in parts]
        while len(totals) > 1:  # add any two neighbours: any grouping
            i = grouping.randrange(len(totals) - 1)
            totals[i : i + 2] = [totals[i] + totals[i + 1]]
        assert totals == [stats]
        assert totals[0].loss == loss
        if normalizer:
            assert [g for part in parts for g in part[2]] == [gradient[i] for i in order]
            # Exact sums of policy and KL terms are rounded, divided, multiplied with β and subtracted: at most 2 eps of
            # either for the parts together, and for the whole. No token weighs more than 1/normalizer.
            penalty = options["kl"].beta * stats.kl * stats.tokens / normalizer if "kl" in options else 0
            assert abs(math.fsum(losses) - loss) <= 8 * np.finfo(float).eps * (sum(map(abs, losses)) + penalty)


@every_dtype
@every_case
@pytest.mark.parametrize("layout", ["packed among masked", "padded anywhere"])
def test_what_masked_places_hold(layout, case, dtype):
    batch = batch_of(LENGTHS, case, dtype)
    expected = results(batch, OPTIONS[case], layout, fill=lambda dtype: np.zeros(1, dtype))
    for fill in (garbage, lambda dtype: dtype.type(np.nan), lambda dtype: dtype.type(-np.inf)):
        assert results(batch, OPTIONS[case], layout, fill=fill) == expected


# --- memory -----------------------------------------------------------------------------------------------------------
def at_offset(x, offset):
    """A copy that begins so many bytes after the beginning of its memory: not always at a whole element."""
    moved = np.zeros(x.nbytes + offset, np.uint8)[offset:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


@every_dtype
@every_case
@pytest.mark.parametrize("layout", ["packed", "padded left"])
def test_wherever_the_arrays_lie(layout, case, dtype, tmp_path):
    numbers = itertools.count()

    def read_only(x):
        x.flags.writeable = False
        return x

    def mapped(x):
        path = tmp_path / str(next(numbers))
        x.tofile(path)
        return np.memmap(path, x.dtype, "r", shape=x.shape)

    batch = batch_of(LENGTHS[1:15], case, dtype)
    expected = results(batch, OPTIONS[case], layout)
    for way in (
        *(lambda x, k=k: at_offset(x, k * (next(numbers) % 7)) for k in (1, 4, 8, 60, 64)),
        read_only,
        mapped,
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: x[::-1].copy()[::-1],
    ):
        assert results(batch, OPTIONS[case], layout, each=way) == expected
    for make in (
        lambda x: at_offset(np.full(x.shape, 7, dtype), 3),
        lambda x: np.full((*x.shape, 2), np.nan, dtype)[..., 1],
        lambda x: np.full(x.shape, np.nan, dtype)[::-1],
        lambda x: np.full(x.shape, np.nan, dtype, order="F"),
    ):
        assert results(batch, OPTIONS[case], layout, into=make) == expected


# --- threads and drivers ----------------------------------------------------------------------------------------------
SHORT = tuple(np.random.default_rng(0).integers(1, 60, 10_000).tolist())
LARGE = [  # enough to be shared out; of one sequence, of many, of both
    ("plain", (300_000,)),
    ("padded right", (300_000,)),
    ("packed", SHORT),
    ("padded left", SHORT),
    ("packed", (*SHORT[:2000], 90_000, *SHORT[2000:4000], 66_000)),
    ("padded anywhere", (17, 5, 70_000, 33, 0, 4097)),
]
large = pytest.mark.parametrize(("layout", "lengths"), LARGE, ids=lambda x: x if isinstance(x, str) else len(x))
both_levels = pytest.mark.parametrize("case", ["clip", "sapo, weighted"])


@every_dtype
@both_levels
@large
def test_serial_or_cut_into_tasks(layout, lengths, case, dtype, monkeypatch):
    batch, asked = batch_of(lengths, case, dtype), []
    with someone_else_computes():
        expected = results(batch, OPTIONS[case])
        assert results(batch, OPTIONS[case], layout) == expected
    for tasks in (1, 2, 3, 7, 40):
        monkeypatch.setattr(numba, "get_num_threads", lambda tasks=tasks: asked.append(tasks) or tasks)
        assert results(batch, OPTIONS[case], layout) == expected
    assert set(asked) == {1, 2, 3, 7, 40}


@pytest.mark.parametrize("tasks", [2, 3, 16])
@pytest.mark.parametrize("lengths", [[5000] * 16, [5000] * 48, [1] * 70_000, range(1, 600), [1, 9] * 9000], ids=len)
def test_every_task_has_its_share(lengths, tasks):
    n = np.array(lengths)
    batch = Batch(*[np.zeros(n.sum())] * 8, np.append(0, np.cumsum(n)), True, True, True)
    ranges, _, long = ranges_of(batch, tasks)
    shares = [sum(n[a:b].sum() for a, b in ranges[task::tasks]) for task in range(tasks)]
    assert not long
    assert sum(shares) == n.sum()
    assert max(shares) <= 1.2 * n.sum() / tasks + n.max()  # a sequence is not cut


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
@both_levels
@large
def test_one_thread_or_two(layout, lengths, case):
    batch = batch_of(lengths, case, np.float32)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = results(batch, OPTIONS[case], layout)
        numba.set_num_threads(2)
        for _ in range(3):
            assert results(batch, OPTIONS[case], layout) == alone
    finally:
        numba.set_num_threads(before)


# --- what does not add ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "other",
    [
        *({"surrogate": clip} for clip in (Clip(0.2, 0.28), Clip(0.1, 0.28, 3), Clip(0.2, 0.2, 3))),
        *({"kl": kl} for kl in (None, K3(0.05), K3(0.04, False), K2(0.04))),  # K2: the same numbers
        {"importance_sampling_level": "sequence"},
        *({"aggregation": name} for name in AGGREGATIONS if name != "token-mean"),
        *({"normalizer": number} for number in (None, 9)),
    ],
    ids=str,
)
def test_stats_of_different_options_do_not_add(other):
    names = ("logps", "old_logps", "advantages", "ref_logps", "rollout_is_weights", "mask")
    arguments = {name: [1.0, 1.0] for name in names} | OPTIONS["clip"]
    arguments |= {"aggregation": "token-mean", "normalizer": 7.0, "grad": True}
    stats, different = grpo_loss(**arguments).stats, grpo_loss(**arguments | other).stats
    assert stats != different
    assert stats + stats == grpo_loss(**arguments).stats + stats
    for a, b in ((stats, different), (different, stats)):
        with pytest.raises(ValueError, match="different"):
            a + b

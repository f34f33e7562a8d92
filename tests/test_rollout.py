"""`rollout_correction` and the two masks: published values, the reference on anything, what is missing or overflows."""

import math
import pickle

import numpy as np
import pytest
from corrections import REJECTS, calls, compare, stats_of
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import python
from numpy.testing import assert_allclose, assert_array_equal
from samples import DTYPES

from grpo_fast import K3, Reject, grpo_loss, high_entropy_mask, off_policy_sequence_mask, reference, rollout_correction
from grpo_fast._kernels import rollout as kernels
from grpo_fast.rollout_stats import ROLLOUT_KEYS

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
ZEROS = np.zeros((2, 3))
BOTH = pytest.mark.parametrize("call", [rollout_correction, reference.rollout_correction], ids=["kernel", "reference"])


# --- known values -----------------------------------------------------------------------------------------------------
@BOTH
def test_bands_of_a_sequence(call):
    log_r = np.array([[0.1, -0.1, 0], [0.5, 0.5, 0.5]])
    result = call(log_r, ZEROS, reject=Reject("ratio", "geometric", 0.9, 1.1))
    assert_array_equal(result.mask, [[True] * 3, [False] * 3])
    assert_array_equal(result.weights[1], 0)
    product = call(np.array([[0.1, 0.1, 0.1], [1, 1, 1]]), ZEROS, reject=[Reject("ratio", "sequence", 0.5, 2)])
    assert_array_equal(product.mask, [[True] * 3, [False] * 3])


@BOTH
def test_truncate_and_mask(call):
    assert_allclose(call(np.log([0.1, 10]), [0, 0], upper=2).weights, [0.1, 2])
    assert_allclose(call(np.log([0.1, 10]), [0, 0], mode="mask").weights, [0.1, 0])
    assert_allclose(call(np.log([0.1, 10]), [0, 0], mode="raw").weights, [0.1, 10])
    assert_allclose(call(np.log([0.1, 10]), [0, 0], lower=0.5).weights, [0.5, 2])
    for level in ("token", "sequence", "geometric"):
        assert call([1000.0], [0.0], level=level).weights == 2
        assert call([1000.0], [0.0], level=level, mode="mask").weights == 0
        assert call([1000.0], [0.0], level=level, mode="raw").weights == math.inf


@BOTH
def test_k2_and_k3(call):
    # r − 1 − log r of log r = ½ is .1487, of −½ .1065
    k3 = [stats_of(call([x], [0.0]))["k3"] for x in (0.5, -0.5)]
    assert_allclose(k3, [0.148721, 0.106531], atol=1e-6)
    log_r = [[0, 1, 0], [2, 0, 0]]
    result = call(log_r, ZEROS, mask=[[1, 1, 1], [1, 0, 0]], reject=Reject("k2", "seq_mean", upper=0.5))
    assert_array_equal(result.mask, [[True] * 3, [False] * 3])
    kept = call([0.5, -0.5], [0.0, 0.0], reject=Reject("k3", "token", 0.12, 0.15)).mask
    assert_array_equal(kept, [True, False])


@BOTH
def test_what_is_exactly_at_a_bound_is_kept(call):
    for level in ("token", "sequence", "geometric", "seq_min", "seq_max"):
        assert call([-1.0], [-1.0], reject=Reject("ratio", level, 1, 1)).mask.all()
    assert call([1.0], [0.0], reject=Reject("k2", "seq_sum", 0.5, 0.5)).mask.all()
    assert_array_equal(call([0.0], [0.0], mode="mask", lower=1, upper=1).weights, [1])


@BOTH
def test_levels_and_their_means(call):
    # log r of 1, 1 and of 2: products e², e²; geometric means e, e²; bounded at 5
    log_r, mask = [[1, 1], [2, 7]], [[1, 1], [1, 0]]
    e = math.e
    product = call(log_r, np.zeros((2, 2)), mask=mask, level="sequence", upper=5)
    assert_allclose(product.weights, [[5, 5], [5, 0]])
    geometric = call(log_r, np.zeros((2, 2)), mask=mask, level="geometric", upper=5)
    assert_allclose(geometric.weights, [[e, e], [5, 0]])
    stats = stats_of(geometric)
    assert_allclose([stats["raw_mean"], stats["mean"]], [(e + e**2) / 2, (2 * e + 5) / 3])
    assert_allclose([stats["fraction_high"], stats["fraction_low"]], [1 / 2, 0])
    assert_allclose(stats["ess"], (2 * e + 5) ** 2 / (3 * (2 * e**2 + 25)))
    normalized = call(log_r, np.zeros((2, 2)), mask=mask, level="geometric", upper=5, normalize=True)
    assert_allclose(normalized.weights, geometric.weights / ((e + 5) / 2))
    assert stats_of(normalized) == stats
    by_token = call(log_r, np.zeros((2, 2)), mask=mask, normalize=True)
    assert_allclose(by_token.weights[np.array(mask) == 1].mean(), 1)


@BOTH
def test_diagnostics_by_hand(call):
    p, q = np.array([[0.5, 0.25], [0.1, 0.3]]), np.array([[0.4, 0.5], [0.1, math.nan]])
    stats = stats_of(call(np.log(p), np.log(q)))
    r = np.array([1.25, 0.5, 1, 1])  # the last is missing
    assert_allclose(stats["k1"], -np.log(r).mean())
    assert_allclose(stats["k3"], (r - 1 - np.log(r)).mean())
    assert_allclose(stats["chi2_token"], (r * r).mean() - 1)
    assert_allclose(stats["chi2_sequence"], ((1.25 * 0.5) ** 2 + 1) / 2 - 1)
    assert_allclose(stats["train_ppl"], ((0.5 * 0.25) ** -0.5 + 10) / 2)
    assert_allclose(stats["rollout_ppl"], ((0.4 * 0.5) ** -0.5 + 10) / 2)
    assert_allclose(stats["ppl_ratio"], ((0.4 * 0.5 / 0.5 / 0.25) ** 0.5 + 1) / 2)
    assert_allclose(stats["prob_diff"], (0.1 + 0.25 + 0) / 3)
    assert (stats["tokens"], stats["sequences"], stats["missing"]) == (4, 2, 1)


def test_the_off_policy_mask_by_hand():
    mask = [[1, 1, 0, 0]]
    zeros = np.zeros((1, 4))
    for logps, expected in (([-2, -2, -1e4, 1e4], 0), ([-0.5, -0.5, -1e4, 1e4], 1), ([-1, -1, 0, 0], 1)):
        found = off_policy_sequence_mask([logps], zeros, [-1.0], 1.0, mask=mask)
        assert_array_equal(found, [[expected, expected, 0, 0]])
    assert_array_equal(off_policy_sequence_mask([[-9.0]], [[0.0]], [0.0], 1.0), [[1]])
    found = off_policy_sequence_mask([-2.0, -2.0, -2.0], [0.0, math.nan, 0.0], [-1, -1], 1.0, cu_seqlens=[0, 2, 3])
    assert_array_equal(found, [1, 1, 0])  # the missing one counts 0: the mean is 1
    assert_array_equal(off_policy_sequence_mask(np.zeros((2, 0)), np.zeros((2, 0)), [1, -1], 0), np.zeros((2, 0)))


def test_the_entropy_mask_by_hand():
    assert_array_equal(high_entropy_mask([1.0, 2.0, 3.0, 4.0], 0.5), [0, 0, 1, 1])  # of which the quantile is 2.5
    assert_array_equal(high_entropy_mask([[1.0, 5.0], [2.0, 3.0]], 0.5, mask=[[1, 0], [1, 1]]), [[0, 0], [1, 1]])
    assert_array_equal(high_entropy_mask([2.0, 2.0], 0.3), [1, 1])
    assert_array_equal(high_entropy_mask([2.0, math.nan], 1.0, mask=[0, 0]), [0, 0])
    assert high_entropy_mask(np.array([1, 2], np.float32), 0).dtype == np.float32


# --- the reference ----------------------------------------------------------------------------------------------------
@given(calls())
@settings(deadline=None, max_examples=200)
def test_is_the_reference(arguments):
    found = rollout_correction(**arguments)
    assert found.weights.dtype == arguments["old_logps"].dtype
    compare(found, arguments)


# --- extremes ---------------------------------------------------------------------------------------------------------
EXTREMES = [0.0, -1e-300, -0.5, -90.0, -800.0, -1e4, 1e4, -1e38, 1e38, 3e38, -3e38, math.nan]


@given(
    st.lists(
        st.tuples(st.sampled_from(EXTREMES[:-1]), st.sampled_from(EXTREMES), st.booleans()), min_size=1, max_size=40
    ),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.sampled_from(["truncate", "mask", "raw"]),
    st.lists(REJECTS, max_size=2),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 5e269]),
)
@settings(deadline=None)
def test_overflow_is_infinite_and_never_nan(tokens, level, mode, rejects, dtype, scale):
    old, rollout, mask = (np.array(x) for x in zip(*tokens, strict=True))
    if dtype == np.float64:
        old, rollout = old * scale, rollout * scale
    options = {"level": level, "mode": mode, "reject": [Reject(*which, upper=2) for which in rejects]}
    result = rollout_correction(old.astype(dtype), rollout.astype(dtype), mask=mask, normalize=True, **options)
    assert not np.isnan(result.weights).any()
    assert not result.weights[~result.mask].any()
    known = (mask & ~np.isnan(rollout)).any()
    for name, value in stats_of(result).items():
        if name == "ess" or (mode == "raw" and "fraction" in name) or not mask.any():
            continue
        if known or name not in ("train_ppl", "rollout_ppl", "ppl_ratio", "prob_diff"):
            assert not math.isnan(value), name


@every_dtype
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_what_is_infinite_as_a_weight_is_so_in_its_extremes(level, dtype):
    arrays = np.array([-1.0, -1.0], dtype), np.array([-201.0, -1.5], dtype)
    for options in ({"mode": "raw"}, {}):
        found = rollout_correction(*arrays, level=level, **options).stats
        expected = reference.rollout_correction(*arrays, level=level, **options)[2]
        for name in ("raw_min", "raw_max", "raw_mean", "max"):
            assert getattr(found, name) == pytest.approx(expected[name], rel=1e-5), name


@every_dtype
def test_infinity_times_nothing_is_nothing(dtype):
    old, rollout = np.array([[500.0, 0.0], [0.0, 0.0]], dtype), np.zeros((2, 2), dtype)
    for level in ("token", "sequence"):
        result = rollout_correction(
            old, rollout, level=level, mode="raw", upper=None, reject=Reject("k3", "seq_max", upper=10)
        )
        assert_array_equal(result.weights, [[0, 0], [1, 1]])
        assert result.stats.mean == 0.5
        assert result.stats.rejected_sequences == 0.5


@every_dtype
def test_a_sequence_of_many_small_ratios_is_their_product(dtype):
    # The product of 40,000 ratios is not the sum of their exponentials, and Σ log r does not drown in float32.
    log_r = np.full(40_000, 1e-4, dtype)
    result = rollout_correction(log_r, np.zeros_like(log_r), level="sequence", upper=100)
    exact = math.exp(40_000 * float(dtype(1e-4)))
    # 512 terms a lane, 8 lanes, 10 blocks are added to 4, each addition rounded: by as much e to the sum may be off.
    assert_allclose(result.weights, exact, rtol=4 * np.finfo(dtype).eps + 530 * 4 * 2**-53)
    assert_allclose(result.stats.raw_mean, exact, rtol=1e-12)


# --- what is missing, what is masked ----------------------------------------------------------------------------------
@every_dtype
def test_what_is_missing_has_ratio_1(dtype):
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(3, 50)).astype(dtype)
    rollout = old + rng.normal(0, 0.1, old.shape).astype(dtype)
    gone = rng.random(old.shape) < 0.3
    gone[2] = True
    filled = rollout_correction(old, np.where(gone, old, rollout), level="geometric")
    found = rollout_correction(old, np.where(gone, np.nan, rollout).astype(dtype), level="geometric")
    assert_array_equal(found.weights, filled.weights)
    assert found.stats.missing == gone.sum()
    assert found.stats.k1 == filled.stats.k1
    there = rollout_correction(old, rollout, mask=~gone)
    for name in ("train_ppl", "rollout_ppl", "ppl_ratio", "prob_diff"):
        assert_allclose(getattr(found.stats, name), getattr(there.stats, name), rtol=1e-5)


def test_nothing_at_all():
    for shape, options in (((0, 4), {}), ((2, 0), {}), ((0,), {"cu_seqlens": [0, 0]}), ((3,), {"mask": [0, 0, 0]})):
        logps = np.full(shape, np.nan)
        for call in (rollout_correction, reference.rollout_correction):
            result = call(logps, logps, normalize=True, reject=Reject("ratio", "token", 0.5), **options)
            assert (result.weights.shape, result.weights.any(), result.mask.any()) == (shape, False, False)
            stats = stats_of(result)
            assert stats["tokens"] == stats["missing"] == 0
            assert math.isnan(stats["mean"])
            assert math.isnan(stats["ess"])


def test_the_weights_and_the_mask_go_into_the_loss():
    rng = np.random.default_rng(0)
    old, mask = -rng.exponential(size=(4, 9)), rng.random((4, 9)) < 0.8
    rollout, logps = old + rng.normal(0, 0.3, old.shape), old + rng.normal(0, 0.1, old.shape)
    correction = rollout_correction(old, rollout, mask=mask, reject=Reject("ratio", "geometric", 0.9, 1.1))
    assert 0 < correction.stats.rejected_sequences < 1
    options = {"advantages": [1, -1, 2, 0.5], "ref_logps": old, "kl": K3(0.1), "rollout_is_weights": correction.weights}
    weighted = grpo_loss(logps, old, mask=mask, **options)
    fewer = grpo_loss(logps, old, mask=correction.mask, **options)
    assert (weighted.stats.tokens, fewer.stats.tokens) == (mask.sum(), correction.mask.sum())
    assert weighted.loss != fewer.loss


@pytest.mark.parametrize("kind", ["e", "f"])
def test_halves_compute_in_float32(kind):
    old = -np.arange(6.0).astype(kind)
    result = rollout_correction(old, old + old.dtype.type(0.5))
    assert result.weights.dtype == np.float32
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    assert rollout_correction(old.astype(ml_dtypes.bfloat16), old).weights.dtype == np.float32


# --- how it is told ---------------------------------------------------------------------------------------------------
def test_it_prints_as_a_table_whose_keys_depend_on_the_options_alone():
    old, rollout = np.log([[0.5, 0.25], [0.1, 0.3]]), np.log([[0.4, 0.5], [0.1, 0.3]])
    result = rollout_correction(old, rollout)
    *lines, last = repr(result).splitlines()
    told = {key: float(value) for key, value in map(str.split, lines)}
    assert told == pytest.approx(result.stats.as_dict(), rel=1e-8)
    assert last.split() == ["weights", "float64", "(2,", "2)"]
    assert str(result.stats) == repr(result).rpartition("\n")[0]
    assert set(result.stats.as_dict()) == set(ROLLOUT_KEYS)
    assert {key: getattr(result.stats, name) for key, name in ROLLOUT_KEYS.items()} == result.stats.as_dict()
    raw = rollout_correction(old, rollout, mode="raw").stats.as_dict()
    assert set(ROLLOUT_KEYS) - set(raw) == {"rollout/fraction_low", "rollout/fraction_high"}
    nothing = rollout_correction(old, rollout, mask=np.zeros((2, 2))).stats.as_dict()
    assert set(nothing) == set(ROLLOUT_KEYS)
    assert math.isnan(nothing["rollout/mean"])
    assert nothing["rollout/sequences"] == 2


def test_options_print_as_they_are_called():
    assert str(Reject("ratio", "seq_min", 1e-4)) == "Reject(statistic='ratio', level='seq_min', lower=0.0001)"
    assert str(Reject("k3", "token", upper=2)) == "Reject(statistic='k3', level='token', upper=2.0)"
    for reject in (Reject("ratio", "seq_min", 1e-4), Reject("k2", "seq_sum", 1, 3)):
        assert eval(str(reject)) == reject
        assert pickle.loads(pickle.dumps(reject)) == reject
    stats = rollout_correction([0.0], [0.0], lower=3, upper=5, reject=Reject("ratio", "token", 0.5)).stats
    assert str(stats.options).startswith("RolloutOptions(level='token', mode='truncate', lower=3.0, upper=5.0, reject=")
    assert pickle.loads(pickle.dumps(stats)) == stats


@every_dtype
def test_numbers_are_of_one_kernel(dtype):
    x = np.zeros((2, 3), dtype)
    options = [{"level": level, "mode": mode} for level in ("sequence", "geometric") for mode in ("mask", "raw")]
    options += [{"level": "sequence"} | bounds for bounds in ({"lower": 1, "upper": 3}, {"upper": math.inf})]
    rejects = [Reject("k3", "seq_max", upper=3), [Reject("k2", "seq_sum", 0, 1), Reject("ratio", "seq_min", 1)]]
    rollout_correction(x, x, **options[0])
    rollout_correction(x, x, **options[0], reject=rejects[0])
    compiled = len(kernels.rollout.signatures)
    for each in options:
        rollout_correction(x, x, **each)
        for reject in rejects:
            rollout_correction(x, x, **each, reject=reject)
    assert len(kernels.rollout.signatures) == compiled


@pytest.mark.slow
def test_compiled_beforehand(tmp_path):
    script = """
import itertools, logging, sys
import numpy as np
from grpo_fast import Reject, _warm_up, rollout_correction
_warm_up._compile_rollout_correction("float32")
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
rejects = (), Reject("k3", "seq_sum", upper=1), [Reject("k2", "token", 0, 1), Reject("ratio", "seq_max", 0)]
for lengths, masked in itertools.product(((3, 5), (40_000, 40_000), (100_000, 7)), (True, False)):
    n = sum(lengths)
    x = np.full(n, -1, "f4")
    cuts, mask = np.append(0, np.cumsum(lengths)), np.ones(n) if masked else None
    for level, reject in itertools.product(("token", "sequence", "geometric"), rejects):
        rollout_correction(x, x, mask=mask, cu_seqlens=cuts, level=level, mode="mask", reject=reject, normalize=n < 10)
"""
    assert python(script, NUMBA_CACHE_DIR=str(tmp_path)) == ""

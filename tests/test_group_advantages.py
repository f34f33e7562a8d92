"""Advantages are relative to the group, whichever way the groups are told, and never made of rounding."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from grpo_fast.advantages import group_advantages

SCALES = st.sampled_from(["group", "batch", "none"])
REWARDS = st.floats(-100, 100).map(lambda x: round(x, 3))
GROUPS = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.lists(REWARDS, min_size=size, max_size=size), min_size=1, max_size=5)
)


# --- values -----------------------------------------------------------------------------------------------------------
def test_by_hand():
    # mean 2, deviations −1, 0, 1, sample std 1, population std √(2/3)
    assert_allclose(group_advantages([[1, 2, 3]]), [[-1 / 1.0001, 0, 1 / 1.0001]])
    assert_allclose(group_advantages([[1, 2, 3]], ddof=0, eps=0), [[-math.sqrt(1.5), 0, math.sqrt(1.5)]])
    assert_allclose(group_advantages([[1, 2, 3]], scale="none"), [[-1, 0, 1]])
    assert_allclose(group_advantages([[1, 2, 3]], scale="none", leave_one_out=True), [[1 - 2.5, 0, 3 - 1.5]])
    # rewards 0, 2, 5, 5 have mean 3, squared deviations 9 + 1 + 4 + 4, sample std √6
    assert_allclose(group_advantages([0, 2, 5, 5], 2, scale="batch", eps=0), np.array([-1, 1, 0, 0]) / math.sqrt(6))


def test_verl_float32_rewards_are_not_normalised_into_noise():
    rewards = np.array([1, 1.00001, 2, 2.00001], dtype=np.float32)
    exact = [float(x) for x in rewards]
    expected = [
        (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4)
        for group in (exact[:2], exact[2:])
        for r in group
    ]
    advantages = group_advantages(rewards, 2)
    assert advantages.dtype == np.float32
    assert_allclose(advantages, expected, rtol=1e-6)
    assert_allclose(np.abs(advantages), 0.0467, atol=2e-4)


@given(GROUPS, SCALES, st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-6, 1e-4, 0.5]))
def test_is_the_formula_in_exact_arithmetic(groups, scale, ddof, eps):
    def std(values):
        if len(values) <= ddof:
            return 0.0
        return math.sqrt(statistics.variance(values) if ddof else statistics.pvariance(values))

    exact = [[Fraction(r) for r in group] for group in groups]
    batch = std([r for group in exact for r in group])
    expected = []
    for group in exact:
        spread = {"group": std(group) + eps, "batch": batch + eps, "none": 1.0}[scale]
        deviations = [float(r - sum(group) / len(group)) for r in group]
        expected.append([d / spread if d else 0.0 for d in deviations])
    assert_allclose(group_advantages(groups, scale=scale, ddof=ddof, eps=eps), expected, rtol=1e-9, atol=1e-9)


def test_rewards_that_only_an_exact_difference_tells_apart():
    big = 2.0**52  # to which a third of one cannot be added
    expected = np.array([-4, -1, 5]) / 3 / math.sqrt(7 / 3)
    for scale in ("group", "batch"):
        assert_allclose(group_advantages([big, big + 1, big + 3], 3, scale=scale, eps=0), expected)


def test_defaults_are_those_of_trl():
    rewards = [[0.0, 1e-4], [3.0, 3.0]]
    assert_array_equal(
        group_advantages(rewards),
        group_advantages(rewards, scale="group", leave_one_out=False, ddof=1, eps=1e-4),
    )


# --- properties -------------------------------------------------------------------------------------------------------
@given(GROUPS, SCALES)
def test_rows_runs_and_ids_say_the_same(groups, scale):
    rewards = np.array(groups)
    rows = group_advantages(rewards, scale=scale)
    assert rows.shape == rewards.shape
    size, ids = rewards.shape[1], np.repeat([f"prompt {i}" for i in range(len(rewards))], rewards.shape[1])
    assert_array_equal(group_advantages(rewards.ravel(), size, scale=scale), rows.ravel())
    assert_array_equal(group_advantages(rewards.ravel(), group_ids=ids, scale=scale), rows.ravel())
    assert_array_equal(group_advantages(rewards.ravel(), group_ids=ids.astype(object), scale=scale), rows.ravel())


@given(st.lists(st.tuples(st.integers(-3, 3), REWARDS), min_size=1, max_size=20), SCALES, st.randoms())
def test_the_order_of_samples_does_not_matter(samples, scale, random):
    shuffled = random.sample(range(len(samples)), len(samples))
    ids, rewards = (np.array(column) for column in zip(*samples, strict=True))
    there = group_advantages(rewards[shuffled], group_ids=ids[shuffled], scale=scale)
    assert_allclose(there, group_advantages(rewards, group_ids=ids, scale=scale)[shuffled], rtol=1e-9, atol=1e-9)


@given(GROUPS, SCALES)
def test_a_group_sums_to_zero(groups, scale):
    assert_allclose(group_advantages(groups, scale=scale).sum(axis=1), 0, atol=1e-8)


@given(st.floats(-1e90, 1e90), st.integers(1, 9), SCALES, st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-4]))
def test_equal_rewards_give_exactly_zero(reward, size, scale, ddof, eps):
    assert_array_equal(group_advantages([[reward] * size], scale=scale, ddof=ddof, eps=eps), 0)


@given(st.lists(REWARDS, min_size=1, max_size=9), SCALES)
def test_groups_of_one_give_exactly_zero(rewards, scale):
    assert_array_equal(group_advantages(rewards, 1, scale=scale), 0)
    assert_array_equal(group_advantages(rewards[:1], 1, scale=scale, ddof=0), 0)
    assert_array_equal(group_advantages(rewards, 1, scale="none", leave_one_out=True), 0)


@given(GROUPS.filter(lambda groups: len(groups[0]) > 1))
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(groups):
    rewards = np.array(groups)
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    assert_allclose(group_advantages(groups, scale="none", leave_one_out=True), rewards - others, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_keeps_a_float_dtype(dtype):
    assert group_advantages(np.array([[1, 0]], dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint64])
def test_counts_and_verdicts_become_float64(dtype):
    advantages = group_advantages(np.array([[1, 0]], dtype), eps=0)
    assert advantages.dtype == np.float64
    assert_allclose(advantages, [[math.sqrt(0.5), -math.sqrt(0.5)]])


def test_leaves_the_rewards_alone():
    rewards = np.array([[1.0, 2.0]])
    rewards.setflags(write=False)
    assert not np.shares_memory(group_advantages(rewards, scale="none"), rewards)


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rewards", "options", "error", "message"),
    [
        ([1, 2], {}, ValueError, r"rewards must be 2-D .* got shape \(2,\), group_size=None, group_ids not given"),
        ([[1, 2]], {"group_size": 2}, ValueError, "rewards must be 2-D"),
        ([[1, 2]], {"group_ids": [[0, 0]]}, ValueError, "rewards must be 2-D"),
        (
            [1, 2],
            {"group_size": 2, "group_ids": [0, 0]},
            ValueError,
            "exactly one of group_size and .*=2, group_ids given",
        ),
        (1.0, {"group_size": 1}, ValueError, r"got shape \(\)"),
        ([1, math.nan], {"group_size": 2}, ValueError, r"rewards must be finite .* got nan at index \(1,\)"),
        ([[1, 2], [3, -math.inf]], {}, ValueError, r"got -inf at index \(1, 1\)"),
        ([1, 1e101], {"group_size": 2}, ValueError, r"below 1e\+100, got 1e\+101 at index \(1,\)"),
        ([1, 1e100], {"group_size": 2}, ValueError, r"below 1e\+100, got 1e\+100 at index \(1,\)"),
        (np.ma.masked_array([1, 2], [0, 1]), {"group_size": 2}, TypeError, "rewards must be a plain array"),
        ([[1, 2], [3]], {}, TypeError, "rewards must be an array of real numbers, got a ragged"),
        (["1"], {"group_size": 1}, TypeError, "rewards must be numbers or bools, got <U1"),
        ([1, 2, 3], {"group_size": 2}, ValueError, "group_size must be .* divide the number of rewards 3, got 2"),
        ([1, 2], {"group_size": 0}, ValueError, "group_size must be at least 1"),
        ([1, 2], {"group_size": 2.0}, TypeError, "group_size must be an int, got 2.0"),
        ([1, 2], {"group_size": True}, TypeError, "group_size must be an int, got True"),
        ([1, 2], {"group_ids": [0]}, ValueError, r"group_ids must have the shape of rewards \(2,\), got \(1,\)"),
        ([1, 2], {"group_ids": np.ma.masked_array([0, 0], [0, 1])}, TypeError, "group_ids must be a plain array"),
        ([1, 2], {"group_ids": [[0], [0, 1]]}, TypeError, "group_ids must be an array of ints or strings"),
        ([1, 2], {"group_ids": [0.5, 0.5]}, TypeError, "group_ids must be ints or strings, got float64"),
        ([1, 2], {"group_ids": ["a", None]}, TypeError, "group_ids must be all ints or all strings"),
        (
            [1, 2],
            {"group_size": 2, "scale": "std"},
            ValueError,
            "scale must be one of 'group', 'batch', 'mean', 'none', got 'std'",
        ),
        (
            [1, 2],
            {"group_size": 2, "leave_one_out": True, "scale": "batch"},
            ValueError,
            "leave_one_out must be False unless scale='none' or 'group', got True with 'batch'",
        ),
        (
            [1, 2],
            {"group_size": 2, "leave_one_out": True, "lengths": [1, 1]},
            ValueError,
            "leave_one_out must be False with lengths",
        ),
        ([1, 2], {"group_size": 2, "lengths": [1]}, ValueError, r"lengths must have the shape of rewards \(2,\)"),
        ([1, 2], {"group_size": 2, "lengths": [1, -1]}, ValueError, r"lengths must be in \[0, inf\), got -1 at"),
        ([1, 2], {"group_size": 2, "lengths": ["1", "2"]}, TypeError, "lengths must be numbers of tokens"),
        ([1, 2], {"group_size": 2, "missing": "ignore"}, ValueError, "missing must be one of 'raise', 'skip'"),
        ([1, math.nan], {"group_size": 2}, ValueError, r"at index \(1,\): missing='skip' leaves NaN out"),
        ([1, math.inf], {"group_size": 2, "missing": "skip"}, ValueError, "rewards must be finite .* got inf"),
        (
            [[3, 1], [1, -1]],
            {"scale": "mean", "eps": 0},
            ValueError,
            r"rewards must have a mean \+ eps above 0 in each group with scale='mean', got 0.0 \+ 0.0 in the group of "
            r"index \(1, 0\)",
        ),
        ([1, 2], {"group_size": 2, "leave_one_out": 1}, TypeError, "leave_one_out must be True or False, got 1"),
        ([1, 2], {"group_size": 2, "ddof": 2}, ValueError, "ddof must be a number that is 0 or 1, got 2"),
        ([1, 2], {"group_size": 2, "eps": -1}, ValueError, r"eps must be a number in \[0, inf\), got -1"),
        ([1, 2], {"group_size": 2, "eps": math.nan}, ValueError, r"eps must be a number in \[0, inf\), got nan"),
    ],
)
def test_refuses(rewards, options, error, message):
    with pytest.raises(error, match=message):
        group_advantages(rewards, **options)

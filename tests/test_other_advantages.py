"""Other baselines, divisors and rewards than GRPO's: MaxRL, OPO, leave one out, missing rewards, GDPO, whitening."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from grpo_fast import gdpo_advantages, group_advantages, whiten

REWARDS = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=9)
OR_MISSING = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)) | st.just(math.nan), min_size=1, max_size=9)
DDOF = st.sampled_from([0, 1])


def std(values, ddof):
    if len(values) <= ddof:
        return 0.0
    return statistics.stdev(values) if ddof else statistics.pstdev(values)


# --- known values -----------------------------------------------------------------------------------------------------
def test_maxrl_by_hand():
    assert_allclose(group_advantages([[9, 12]], scale="mean", eps=0), [[-1.5 / 10.5, 1.5 / 10.5]])
    assert_allclose(group_advantages([[0, 1, 0, 0]], scale="mean"), np.array([[-0.25, 0.75, -0.25, -0.25]]) / 0.2501)
    assert_array_equal(group_advantages([[0, 0], [1, 1]], scale="mean"), 0)


def test_rloo_by_hand():
    rewards, ids = [6, 3, 9, 12, 1], [7, 7, 2, 2, 5]
    expected = [3, -3, -3, 3, 0]
    for scale in ("none", "group"):  # groups of two or fewer are not divided
        assert_allclose(group_advantages(rewards, group_ids=ids, scale=scale, leave_one_out=True), expected)


def test_opo_by_hand():
    # (10·1 + 30·0)/40 = 1/4; the other group has no token
    found = group_advantages([[1, 0], [5, 7]], lengths=[[10, 30], [0, 0]], scale="none")
    assert_allclose(found, [[0.75, -0.25], [0, 0]])
    divided = group_advantages([[1, 0]], lengths=[[10, 30]], eps=0)
    assert_allclose(divided, np.array([[0.75, -0.25]]) / math.sqrt(0.5))


def test_gdpo_by_hand():
    # Both rewards are normalised to ∓√½; so the first response has 0, and the second 2√½, before whitening.
    rewards = [[0, 10], [1, 0], [5, 5], [5, 5]]
    one = math.sqrt(0.5)
    before = np.array([-one + 2 * one, one - 2 * one, 0, 0])
    expected = (before - before.mean()) / statistics.stdev(before)
    assert_allclose(gdpo_advantages(rewards, [1, 2], group_size=2, eps=0), expected)


def test_whitening_by_hand():
    # mean 2, unbiased variance 1
    advantages, mask = [[1, 2, math.nan], [3, math.inf, 7]], [[1, 1, 0], [1, 0, 0]]
    one = 1 / math.sqrt(1 + 1e-8)
    assert_allclose(whiten(advantages, mask), [[-one, 0, 0], [one, 0, 0]], rtol=1e-15)
    assert_array_equal(whiten([5.0, 6.0], [1, 0]), 0)
    assert_array_equal(whiten([5.0, 5.0, 5.0]), 0)
    assert_allclose(whiten(np.array([1.0, 3.0], np.float32)), [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-6)


# --- the formulas -----------------------------------------------------------------------------------------------------
@given(REWARDS, DDOF, st.sampled_from([1e-4, 0.5]))
def test_leave_one_out_is_by_the_others_alone(rewards, ddof, eps):
    expected = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        a = r - statistics.fmean(others) if others else 0.0
        expected.append(a / (std(others, ddof) + eps) if len(others) > 1 else a)
    found = group_advantages([rewards], leave_one_out=True, ddof=ddof, eps=eps)
    assert_allclose(found, [expected], rtol=1e-8, atol=1e-8)


def test_others_that_are_equal_have_no_spread_whoever_is_left_out():
    rewards = np.array([[0.1, 0.1, 0.1, 1e6], [3.0, 3.0, -7.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    found = group_advantages(rewards, leave_one_out=True)
    assert_allclose(found[0, 3], (1e6 - 0.1) / 1e-4, rtol=1e-12)  # rounding would have made a spread of 0.01
    assert_allclose(found[1, 2], -10 / 1e-4, rtol=1e-12)
    assert_allclose(found[2, 3], 2 / 1.0001)


def test_a_far_reward_does_not_swallow_the_spread_of_the_others():
    found = group_advantages([[1e-200, 0, -1e-200, 1.0]], leave_one_out=True, eps=0)
    assert_allclose(found[0, 3], 1e200)


@given(OR_MISSING, st.sampled_from(["group", "batch", "none"]), st.booleans(), DDOF)
def test_what_is_missing_is_as_if_it_were_not_there(rewards, scale, leave_one_out, ddof):
    leave_one_out = leave_one_out and scale != "batch"
    options = {"scale": scale, "leave_one_out": leave_one_out, "ddof": ddof}
    there = np.array([r for r in rewards if not math.isnan(r)])
    ids = np.arange(len(rewards)) % 2
    keep = ~np.isnan(rewards)
    found = group_advantages(rewards, group_ids=ids, missing="skip", **options)
    assert_array_equal(found[~keep], 0)
    if there.size:
        assert_array_equal(found[keep], group_advantages(there, group_ids=ids[keep], **options))


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 50)), min_size=1, max_size=9))
def test_lengths_weigh_the_baseline(pairs):
    rewards, lengths = map(np.array, zip(*pairs, strict=True))
    found = group_advantages([rewards], lengths=[lengths], scale="none")
    expected = rewards - np.average(rewards, weights=lengths) if lengths.any() else np.zeros(len(rewards))
    assert_allclose(found, [expected], atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_gdpo_is_its_formula(groups, size, kinds, seed, with_missing):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(groups * size, kinds)).round(2)
    if with_missing:
        rewards[rng.random(rewards.shape) < 0.3] = math.nan
    weights = rng.normal(size=kinds)
    total = np.zeros(len(rewards))
    for k in range(kinds):
        part = group_advantages(rewards[:, k], size, missing="skip")
        total += weights[k] * part
    scored = ~np.isnan(rewards).all(axis=1)
    x = total[scored]
    expected = np.zeros(len(rewards))
    if x.size:
        expected[scored] = (x - x.mean()) / (std(x.tolist(), 1) + 1e-4)
    assert_allclose(gdpo_advantages(rewards, weights, group_size=size), expected, atol=1e-9)
    ids = np.repeat(np.arange(groups), size)
    assert_array_equal(
        gdpo_advantages(rewards, weights, group_ids=ids), gdpo_advantages(rewards, weights, group_size=size)
    )


def test_gdpo_is_that_of_trl():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    rng = np.random.default_rng(0)
    rewards, weights = rng.normal(size=(12, 3)), np.array([1.0, 0.5, 2.0])
    grouped = torch.from_numpy(rewards).view(-1, 4, 3)
    normalised = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    x = (normalised.view(-1, 3) * torch.from_numpy(weights)).sum(1)
    assert_allclose(gdpo_advantages(rewards, weights, group_size=4), (x - x.mean()) / (x.std() + 1e-4))


# --- tensors ----------------------------------------------------------------------------------------------------------
def test_tensors_in_tensors_out():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for found in (
            group_advantages(rewards.to(dtype)),
            whiten(rewards.to(dtype)),
            gdpo_advantages(rewards.to(dtype).T, group_size=3),
        ):
            assert torch.is_tensor(found)
            assert found.dtype is (torch.float32 if dtype is torch.bfloat16 else dtype)
    assert group_advantages(torch.tensor([[1, 0]])).dtype is torch.float64
    assert torch.equal(group_advantages(rewards), torch.from_numpy(group_advantages(rewards.numpy())))
    assert torch.is_tensor(whiten(rewards, torch.tensor([[True, True, False]])))


def test_large_ones_that_are_allowed_are_not_lost():
    half = math.sqrt(0.5)
    assert_allclose(whiten([9e99, -9e99]), [half, -half])
    assert_array_equal(whiten([9e99, math.inf, -9e99], [1, 0, 1]), whiten([9e99, 0, -9e99], [1, 0, 1]))
    assert_allclose(gdpo_advantages([[1.0], [0.0]], [9e99], group_size=2), [half, -half])


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gdpo_advantages([1.0, 2.0], group_size=2), ValueError, r"rewards must be \(N, K\), K rewards"),
        (lambda: gdpo_advantages([[1.0], [2.0]]), ValueError, "group_size must be given, or else group_ids, got"),
        (
            lambda: gdpo_advantages([[1.0], [2.0]], group_size=2, group_ids=[0, 0]),
            ValueError,
            "exactly one of group_size and group_ids must be given, got group_size=2, group_ids given",
        ),
        (lambda: gdpo_advantages([[1.0], [math.inf]], group_size=2), ValueError, r"got inf at index \(1, 0\)"),
        (lambda: gdpo_advantages([[1.0]], [1, 2], group_size=1), ValueError, "weights must be 1 finite numbers"),
        (lambda: gdpo_advantages([[1.0]], [math.nan], group_size=1), ValueError, "weights must be 1 finite numbers"),
        (lambda: gdpo_advantages([[1.0]], group_size=1, eps=-1), ValueError, r"eps must be a number in \[0, inf\)"),
        (
            lambda: whiten([1.0, math.nan]),
            ValueError,
            r"advantages must be finite and below 1e\+100 in magnitude where it is not masked, got advantages\[1",
        ),
        (lambda: whiten([0.0, -1e300]), ValueError, r"below 1e\+100 in magnitude .* got advantages\[1\] = -1e\+300"),
        (
            lambda: gdpo_advantages([[1.0, 0.0], [0.0, 0.0]], [1e308, 1.0], group_size=2),
            ValueError,
            r"weights must be 2 finite numbers below 1e\+100 in magnitude, one for each reward, got \[1e\+308",
        ),
        (lambda: whiten([1.0, 2.0], [1]), ValueError, r"mask must have shape \(2,\) as advantages, got \(1,\)"),
        (lambda: whiten([1.0, 2.0], [1, 2]), ValueError, "mask must hold bools or 0/1"),
        (lambda: whiten(["a"]), TypeError, "advantages must hold real numbers"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()

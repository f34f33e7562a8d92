"""`prompt_mean_weights`: a mean over prompts of means over tokens, of any number of prompts, none included."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from grpo_fast import Unclipped, grpo_loss, prompt_mean_weights


def test_the_loss_is_a_mean_over_prompts():
    rng = np.random.default_rng(0)
    mask = np.arange(5) < rng.integers(0, 6, (6, 1))
    A = rng.normal(size=(6, 5))
    weights = prompt_mean_weights(mask, 3)
    found = grpo_loss(
        np.zeros((6, 5)),
        None,
        A,
        mask=mask,
        surrogate=Unclipped(),
        aggregation="token-sum",
        loss_weights=weights,
    )
    assert_allclose(found.loss, -np.mean([A[:3][mask[:3]].mean(), A[3:][mask[3:]].mean()]))
    assert_array_equal(prompt_mean_weights(mask, group_ids=list("aaabbb")), weights)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask": np.zeros((0, 3)), "group_size": 1},
        {"mask": np.zeros((0, 3), bool), "group_ids": []},
        {"cu_seqlens": [0], "group_size": 2},
        {"mask": np.zeros((0, 3)), "group_size": 1, "prompts": 4},
    ],
)
def test_of_no_sequence_there_are_none(arguments):
    found = prompt_mean_weights(**arguments)
    assert (found.shape, found.dtype) == ((0,), np.float64)

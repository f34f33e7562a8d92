"""Sums are exact, and rounded once: in kernels and in Python to the same bits, whatever is added."""

import copy
import pickle
import random

import numba
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grpo_fast import K3, grpo_loss, grpo_stats
from grpo_fast._kernels import exact


@numba.njit
def rounded_sum(values, row):
    for x in values:
        exact.add(row, x)
    exact.carry(row)
    return exact.rounded(row)


def check(values):
    row = np.zeros(exact.ROW, np.int64)
    found = rounded_sum(np.array(values, float), row)
    expected = float(exact.Exact.of_limbs(row[None])[0])
    assert found.hex() == expected.hex()  # "nan", too


@given(st.lists(st.floats(), max_size=6))
def test_any_sum(values):
    check(values)


def test_sums_at_the_edges_of_formats_and_between_two_numbers():
    draw = random.Random(0)
    fractions = [0, 1, 1 << 52, (1 << 53) - 1]
    for _ in range(20_000):
        fraction, exponent = draw.choice([*fractions, draw.getrandbits(53)]), draw.randint(-1074, 970)
        x = fraction * 2.0 ** max(exponent, -1022) * 2.0 ** min(exponent + 1022, 0)
        half = x * 2.0**-53 * draw.choice([1, -1, 0.5, 1.5, 3])
        check([x, half, draw.choice([5e-324, -5e-324, 0]), draw.choice([0, -x, 1.7e308, 2.0**1023])])


def test_stats_are_the_same_before_and_after_their_sums_are_asked_for():
    logps = np.linspace(-2, -1, 12).reshape(3, 4)

    def stats():
        return grpo_loss(logps, logps - 0.1, [1.0, -1.0, 0.5], logps + 0.1, kl=K3(0.1)).stats

    asked = stats()
    assert asked.loss.hex() == stats().loss.hex()
    assert asked.sums.ratio
    assert asked.loss.hex() == stats().loss.hex()
    for same in (stats(), copy.copy(stats()), copy.deepcopy(stats()), pickle.loads(pickle.dumps(stats()))):
        assert same == asked
        assert hash(same) == hash(asked)
        assert same.loss == asked.loss
    assert stats() + stats() == asked + asked
    assert not hasattr(stats(), "sum")


def test_stats_of_samples_too():
    four = np.random.default_rng(0).uniform(0.5, 1, (4, 100))
    assert pickle.loads(pickle.dumps(grpo_stats(*four))) == grpo_stats(*four)

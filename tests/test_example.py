"""The worked example comes out, and the identities that hold for any numbers."""

import inspect

import numpy as np
import pytest
from conftest import DTYPES, LANES, samples

from grpo_fast import BLOCK, Clip, grpo_loss, grpo_objective, grpo_stats, grpo_sweep, reference

EXAMPLE = [1.2, 0.8, 1.1], [1.0, 1.0, 1.0], [0.9, 1.1, 1.0], [1.0, 0.5, 1.5]
VALUE = 1.032769698529581  # by mpmath
LENGTHS = [1, 7, 300, BLOCK, BLOCK + 1, 20 * BLOCK + 3]


def test_worked_example():
    # Ten or so operations of which each is rounded by at most 2⁻⁵³ of about 1.
    assert grpo_objective(*EXAMPLE, epsilon=0.2, beta=0.01) == pytest.approx(VALUE, rel=0, abs=10 * 2**-53)
    assert grpo_objective(*EXAMPLE) == grpo_objective(*EXAMPLE, 0.2, 0.01)  # the defaults
    assert round(grpo_objective(*np.float32(EXAMPLE)), 5) == 1.03277


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_moved_gives_the_mean_advantage(n, dtype):
    _, _, old, _ = samples(n, dtype)
    a = np.random.default_rng(n).integers(-1000, 1000, n).astype(dtype)  # whole numbers, whose sums are exact
    assert grpo_objective(np.ones(n, dtype), a, old, old, beta=1.0) == a.mean(dtype=np.float64)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_beta_weighs_the_kl_term(n, dtype):
    arrays = samples(n, dtype)
    stats = grpo_stats(*arrays)
    assert stats.kl > 0
    assert grpo_objective(*arrays, beta=0) == stats.surrogate
    for beta in (0.01, 3.0):
        assert grpo_objective(*arrays, beta=beta) == stats.surrogate - beta * stats.kl


@pytest.mark.parametrize("garbage", [None, object(), "π", [1, 2], [[1, 2], [3]], [np.nan] * 300], ids=type)
def test_without_beta_the_probabilities_are_not_looked_at(garbage):
    rho, a, old, ref = samples(300)
    expected = grpo_objective(rho, a, old, ref, beta=0)
    assert grpo_objective(rho, a, garbage, garbage, beta=0) == expected
    assert grpo_sweep(rho, a, garbage, garbage, 0.2, [0, 0.0]).objective.tolist() == [[expected, expected]]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_samples_does_not_matter_but_for_rounding(n, dtype):
    rho, a, *_ = arrays = np.array(samples(n, dtype))
    shuffled = np.random.default_rng(0).permutation(arrays, axis=1)
    size = np.mean(np.maximum(rho, 0.8) * abs(a)) + 0.01 * grpo_stats(*arrays).kl  # no less than the mean |term|
    # Sums of RUN = 16 terms in float32; of all others, in a lane and over the lanes, in float64. Twice, once each side.
    rounding = 17 * 2**-24 if dtype is np.float32 else 0
    rounding += (BLOCK / LANES[dtype] + LANES[dtype]) * 2**-53
    assert abs(grpo_objective(*shuffled) - grpo_objective(*arrays)) <= 2 * rounding * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_pass_through(dtype):
    rho, a, old, ref = samples(300, dtype)
    value = grpo_objective(rho, a, old, ref, beta=0.25)
    assert grpo_objective(rho, 8 * a, old, ref, beta=2) == 8 * value
    assert grpo_objective(rho, a, old / 1024, ref / 1024, beta=0.25) == value  # probabilities need no normalisation


def test_defaults():
    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    for function in (grpo_objective, grpo_loss):
        assert defaults(function) == defaults(getattr(reference, function.__name__))
    for function in (grpo_objective, grpo_stats):
        assert defaults(function) | {"epsilon": 0.2, "beta": 0.01} == defaults(function)
    assert defaults(grpo_loss)["surrogate"] == Clip(0.2)

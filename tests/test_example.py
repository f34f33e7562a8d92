"""The worked example comes out, and the identities that hold for any numbers."""

import inspect

import numpy as np
import pytest
from samples import DTYPES, LANES, samples

from grpo_fast import BLOCK, K3, Clip, grpo_loss, grpo_objective, grpo_stats, grpo_sweep, reference

EXAMPLE = [1.2, 0.8, 1.1], [1.0, 1.0, 1.0], [0.9, 1.1, 1.0], [1.0, 0.5, 1.5]
VALUE = 1.032769698529581  # by mpmath
UNWEIGHTED = 1.0327004532345785  # likewise, with the KL term of DeepSeekMath
LENGTHS = [1, 7, 300, BLOCK, BLOCK + 1, 20 * BLOCK + 3]


def test_worked_example():
    # Ten or so operations of which each is rounded by at most 2⁻⁵³ of about 1.
    assert grpo_objective(*EXAMPLE, epsilon=0.2, beta=0.01) == pytest.approx(VALUE, rel=0, abs=10 * 2**-53)
    assert grpo_objective(*EXAMPLE) == grpo_objective(*EXAMPLE, 0.2, 0.01)  # the defaults
    assert round(grpo_objective(*np.float32(EXAMPLE)), 5) == 1.03277
    assert grpo_objective(*EXAMPLE, importance_weighted=True) == grpo_objective(*EXAMPLE)


def test_worked_example_without_the_ratio_in_the_kl_term():
    for function in (grpo_objective, reference.grpo_objective):
        found = function(*EXAMPLE, importance_weighted=False)
        assert found == pytest.approx(UNWEIGHTED, rel=0, abs=10 * 2**-53)
    assert grpo_stats(*EXAMPLE, importance_weighted=False).objective == grpo_objective(
        *EXAMPLE, importance_weighted=False
    )


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_nothing_moved_gives_the_mean_advantage(n, dtype, weighted):
    _, _, old, _ = samples(n, dtype)
    a = np.random.default_rng(n).integers(-1000, 1000, n).astype(dtype)  # whole numbers, whose sums are exact
    arrays = np.ones(n, dtype), a, old, old
    assert grpo_objective(*arrays, beta=1.0, importance_weighted=weighted) == a.mean(dtype=np.float64)
    assert grpo_stats(*arrays, importance_weighted=weighted).kl == 0
    assert grpo_sweep(*arrays, 0.2, 1.0, importance_weighted=weighted).kl == 0


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_beta_weighs_the_kl_term(n, dtype, weighted):
    arrays, option = samples(n, dtype), {"importance_weighted": weighted}
    stats = grpo_stats(*arrays, **option)
    assert stats.kl > 0
    assert grpo_objective(*arrays, beta=0) == stats.surrogate
    for beta in (0.01, 3.0):
        assert grpo_objective(*arrays, beta=beta, **option) == stats.surrogate - beta * stats.kl


# --- whose KL term ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drift", [0.01, 2.0])
def test_on_policy_there_is_no_difference(n, dtype, drift):
    _, a, old, _ = samples(n, dtype)
    arrays = np.ones(n, dtype), a, old, old * np.random.default_rng(n).lognormal(0, drift, n).astype(dtype)
    weighted, unweighted = (grpo_stats(*arrays, importance_weighted=value) for value in (True, False))
    assert weighted.sums == unweighted.sums
    assert weighted.kl > 0


@pytest.mark.parametrize("n", [1, 70, BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_ratio_the_kl_term_is_of_both_policies_alone(n, dtype):
    # What π_old is, and so ρ, does not matter. Near 1, r is reduced to the same bits in the fast and the careful way.
    rho, a, old, ref = samples(n, dtype, drift=0.05)
    expected = grpo_stats(rho, a, old, ref, importance_weighted=False).sums.kl
    for exponent in (-100, -90, -5, 5, 90, 100) if dtype is np.float32 else (-1000, -900, -5, 5, 900, 1000):
        power = dtype(2.0**exponent)
        moved = rho * power, a / 8, old / power, ref
        assert grpo_stats(*moved, importance_weighted=False).sums.kl == expected
        assert grpo_stats(*moved).sums.kl != expected


@pytest.mark.parametrize("rho", [2.0**-1000, 2.0**-30, 0.5, 1.0, 4.0, 2.0**30, 2.0**900])
@pytest.mark.parametrize("r", [2.0**-1022, 2.0**-500, 0.25, 1.0, 1.25, 2.0**500, 2.0**1020])
def test_the_kl_term_at_its_extremes(rho, r):
    pi_old = 2.0**-20 / rho
    ref = r * (rho * pi_old)
    kl = grpo_stats([rho], [1.0], [pi_old], [ref], importance_weighted=False).kl
    assert kl == pytest.approx(r - 1 - np.log(r), rel=1e-14)
    assert grpo_objective([rho], [0.0], [pi_old], [ref], beta=1, importance_weighted=False) == -kl
    assert grpo_sweep([rho], [0.0], [pi_old], [ref], 0.1, 1, importance_weighted=False).kl == kl
    assert (kl == 0) == (r == 1)


@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_loss_of_log_probabilities_and_that_its_gradient(weighted):
    rho, a, old, ref = samples(50)
    rho = np.where(np.abs(np.abs(rho - 1) - 0.2) < 0.01, 1.0, rho)  # away from the kinks
    kl = K3(0.5, importance_weighted=weighted)
    loss = grpo_loss(np.log(rho * old), np.log(old), a, np.log(ref), kl=kl, aggregation="token-mean", grad=True)

    def objective(log_rho, function=grpo_objective):
        return function(np.exp(log_rho), a, old, ref, 0.2, 0.5, importance_weighted=weighted)

    for function in (grpo_objective, reference.grpo_objective):
        assert objective(np.log(rho), function) == pytest.approx(-loss.loss, rel=1e-12)
        steps = 1e-5 * np.eye(rho.size)
        slopes = [
            (objective(np.log(rho) + step, function) - objective(np.log(rho) - step, function)) / 2e-5 for step in steps
        ]
        np.testing.assert_allclose(slopes, -loss.grad, rtol=1e-6, atol=1e-9)


# --- identities -------------------------------------------------------------------------------------------------------


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
    for function in (grpo_objective, grpo_stats, grpo_sweep):
        assert defaults(function)["importance_weighted"] is K3(0.01).importance_weighted is True
    assert defaults(grpo_loss)["surrogate"] == Clip(0.2)

"""The fast loss, gradient and diagnostics are the reference's: every option, every pair of options, any data."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from combinations import (
    ARRAYS,
    COMBINATIONS,
    F4,
    F8,
    LEVELS,
    MEAN,
    SEQ,
    SEQ_MEAN,
    SEQ_SUM,
    SUM,
    TOKEN,
    Row,
    batch,
    textbook,
)
from comparison import compare, same
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from grpo_fast import CISPO, K1, K2, K3, SAPO, Clip, grpo_loss, reference


# --- the combinations -------------------------------------------------------------------------------------------------
def test_the_table_holds_every_pair_of_choices_and_needs_few_kernels():
    columns = [set(column) for column in zip(*COMBINATIONS, strict=True)]
    assert [len(column) for column in columns] == [4, 7, 2, 2, 4, 2, 3, 4, 2, 2, 3, 1]
    for a, b in itertools.combinations(range(len(columns)), 2):
        assert {(row[a], row[b]) for row in COMBINATIONS} == set(itertools.product(columns[a], columns[b]))
    # On-policy nothing is clipped, so each policy term is also seen off-policy at each level in each dtype.
    off_policy = {(type(row.surrogate), row.level, row.dtype) for row in COMBINATIONS if not row.on_policy}
    assert off_policy == set(itertools.product([Clip, CISPO, SAPO], LEVELS, [F8, F4]))
    kernels = [(type(row.surrogate), type(row.kl), row.level, row.dtype) for row in COMBINATIONS]
    given = [(row.on_policy, row.layout in ("padded", "holes"), row.weights, row.grad) for row in COMBINATIONS]
    given = [(old, mask, weights is None, grad is False) for old, mask, weights, grad in given]
    assert len(set(zip(kernels, given, strict=True))) <= 30


# --- the comparison ---------------------------------------------------------------------------------------------------
def check(arguments, grad=True, oracle=F8):
    """Compare all there is with the reference on the same values, which computes in the dtype told."""
    place = np.full_like(arguments["logps"], np.nan) if grad == "array" else grad
    result = grpo_loss(**arguments, grad=place)
    compare(result, arguments, oracle)
    assert grad is not False or result.grad is None
    assert grad is not True or result.grad is not None
    assert grad != "array" or result.grad is place


@pytest.mark.parametrize("row", COMBINATIONS, ids=COMBINATIONS.index)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    long=st.sampled_from([0, 0, 0, 0, 255, 700, 4095, 4096, 4097]),
    drift=st.sampled_from([1e-7, 1e-3, 0.1, 0.3, 2]),  # with 0.1, tokens are clipped in the near way, too
    ref_drift=st.sampled_from([1e-7, 1e-3, 0.1, 0.3, 2]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20)
def test_is_the_reference(row, lengths, long, drift, ref_drift, seed):
    check(batch(row, [*lengths, long], drift, ref_drift, seed), row.grad)


# --- the gradient -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [row for row in COMBINATIONS if row.dtype is F8 and row.grad], ids=COMBINATIONS.index)
@np.errstate(invalid="ignore")  # among the garbage
def test_gradient_is_the_slope_of_the_loss(row):
    arguments = batch(row, [3, 0, 5, 1])
    logps = arguments["logps"]
    base = logps if row.on_policy else arguments["old_logps"]

    def slope(old=lambda moved: base, **changes):
        def loss(moved):
            return reference.grpo_loss(**(arguments | {"logps": moved, "old_logps": old(moved)} | changes)).loss

        steps = 1e-6 * np.eye(logps.size).reshape(logps.size, *logps.shape)
        return np.array([(loss(logps + h) - loss(logps - h)) / 2e-6 for h in steps]).reshape(logps.shape)

    if not isinstance(row.surrogate, CISPO):
        expected = slope()
    else:  # its weight is held constant: so is ρ when the old log-probabilities move along
        policy = slope(lambda moved: base + (moved - logps), kl=None)
        expected = policy + slope(advantages=np.zeros_like(arguments["advantages"]))
    assert_allclose(grpo_loss(**arguments, grad=True).grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("aggregation", [SEQ_MEAN, MEAN])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kl", [K3(0.3), K3(0.3, False)], ids=str)
@pytest.mark.parametrize("surrogate", [Clip(0.1, 0.3, 1.8), CISPO(1.2, 0.8), SAPO(1.0, 1.3)], ids=str)
def test_is_what_autograd_makes_of_the_textbook_formula(surrogate, kl, level, aggregation):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    mask = (np.arange(9) < [[9], [4], [0], [7]]) & (rng.random((4, 9)) < 0.8)
    old, A = rng.uniform(-3, 0, mask.shape), rng.normal(size=mask.shape)
    logps = old + 0.4 * rng.normal(size=mask.shape)
    ref, weights = logps + 0.8 * rng.normal(size=mask.shape), rng.uniform(0, 2, mask.shape)

    arrays = {"logps": logps, "old_logps": old, "advantages": A, "ref_logps": ref}
    arrays |= {"mask": mask, "rollout_is_weights": weights}
    options = {"surrogate": surrogate, "kl": kl, "importance_sampling_level": level, "aggregation": aggregation}
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    tensors["logps"].requires_grad_()
    expected = textbook(**tensors, **options)
    expected.backward()
    result = grpo_loss(**arrays, grad=True, **options)
    assert result.loss == pytest.approx(expected.item(), rel=1e-12)
    assert_allclose(result.grad, tensors["logps"].grad.numpy(), rtol=1e-12, atol=1e-12)


# --- a few tokens; with every argument given, for which there are kernels already -------------------------------------
def few(logps, old, advantages, ref=None, *, dtype=F8, **options):
    """``grpo_loss`` with its gradient, summed; unless told otherwise with a KL term of 0."""
    logps, old, advantages, ref = (np.array(x, dtype) for x in (logps, old, advantages, logps if ref is None else ref))
    ones = {"mask": np.ones_like(logps), "rollout_is_weights": np.ones_like(logps)}
    options = {"kl": K2(0.0), "aggregation": SUM, "grad": True} | ones | options
    return grpo_loss(logps, old, advantages, ref, **options)


@pytest.mark.parametrize(("dtype", "level"), [(F8, TOKEN), (F8, SEQ), (F4, TOKEN)])
def test_gradient_is_the_stated_one_at_the_kinks(dtype, level):
    def at(log_ratio, advantage, surrogate):
        options = {"surrogate": surrogate, "dtype": dtype, "importance_sampling_level": level}
        return few([log_ratio], [0.0], [advantage], **options)

    def grad_and_clipped(*arguments):
        stats, grad = (result := at(*arguments)).stats, result.grad
        return -grad[0], stats.clip_ratio_low + 2 * stats.clip_ratio_high + 4 * stats.clip_ratio_delta

    # The ratios as the kernel's exp makes them. x − 1 and 1 − x are exact for x in [½, 2], so a bound can be put on the
    # ratio itself, or just inside of it.
    high, low = at(0.25, 0.0, Clip()).stats.ratio_max, at(-0.25, 0.0, Clip()).stats.ratio_max
    inside_high, inside_low = (float(np.nextafter(dtype(x), dtype(1))) for x in (high, low))
    assert grad_and_clipped(0.25, 1.0, Clip(0.2, high - 1)) == (high, 0)
    assert grad_and_clipped(0.25, 1.0, Clip(0.2, inside_high - 1)) == (0, 2)
    assert grad_and_clipped(-0.25, -1.0, Clip(1 - low)) == (-low, 0)
    assert grad_and_clipped(-0.25, -1.0, Clip(1 - inside_low)) == (0, 1)
    assert grad_and_clipped(0.25, -1.0, Clip(0.2, delta=high)) == (-high, 0)
    assert grad_and_clipped(0.25, -1.0, Clip(0.2, delta=inside_high)) == (0, 4)
    for A, option in itertools.product([2.0, -2.0], [Clip(0), Clip(0, 0, 1.5)]):
        assert grad_and_clipped(0.0, A, option) == (A, 0)
    assert grad_and_clipped(0.25, 0.0, Clip()) == grad_and_clipped(-0.25, 0.0, Clip()) == (0, 0)


# --- published values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("advantages", "loss"), [([0.3, 0.2, 0.1], -0.171177843), ([-0.3, -0.2, -0.1], 0.193333333)])
def test_rlax_clipped_surrogate(advantages, loss):
    assert few([0.0, 0.0, -2.0], [0.0] * 3, advantages, aggregation=MEAN).loss == pytest.approx(loss, abs=5e-10)


@pytest.mark.parametrize(
    ("kl", "values"),
    [(K1(1), [-1, 14, 29]), (K2(1), [0.5, 98, 420.5]), (K3(1), [0.7182818, 13.0000008, 28])],
)
def test_nemo_rl_kl_estimators(kl, values):
    for ref, value in zip([0.0, -15.0, -30.0], values, strict=True):
        assert few([-1.0], [-1.0], [0.0], [ref], kl=kl).stats.kl == pytest.approx(value, abs=5e-8)


@pytest.mark.parametrize(("aggregation", "loss"), [(MEAN, 0.36), (SEQ_MEAN, 0.325), (SEQ_SUM, 0.9)])
def test_tunix_aggregation(aggregation, loss):
    token_losses = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])  # on-policy, where a token's loss is −A
    logps, mask = np.zeros((2, 3)), np.array([[1, 1, 0], [1, 1, 1]])
    assert few(logps, logps, -token_losses, mask=mask, aggregation=aggregation).loss == pytest.approx(loss)
    nothing = few(logps, logps, -token_losses, mask=0 * mask, aggregation=aggregation)
    assert nothing.loss == 0
    assert not nothing.grad.any()


# --- small and large --------------------------------------------------------------------------------------------------
def test_kl_in_float32_is_right_however_small_it_is():
    plain = []  # errors of the formula as it stands
    for steps in [1, 2, 3, 7, 40, 1000, 9999, 123456, 3000001]:
        for l in (steps * 2.0**-23, -steps * 2.0**-23):  # which is exactly the difference −1.5 + l − (−1.5)

            def at(kl, l=l):
                result = few([-1.5 + l], [-1.5 + l], [0.0], [-1.5], kl=kl, dtype=F4)
                return result.stats.kl, result.grad[0]

            k3, slope = float(mpmath.expm1(-l) + l), -math.expm1(-l)
            value, grad = at(K3(1, False))
            assert abs(value - k3) <= 4 * np.spacing(F4(k3))
            assert abs(grad - slope) <= 4 * np.spacing(F4(abs(slope)))
            assert at(K3(1)) == (value, l)
            value, grad = at(K2(1, False))
            assert abs(value - l * l / 2) <= np.spacing(F4(l * l / 2))
            assert grad == l
            plain.append(abs((F4(math.exp(-l)) + F4(l) - 1) / k3 - 1))
    assert max(plain) > 0.1


FAR = [  # surrogate, classes of kl, level, dtype
    *itertools.product([Clip(), Clip(0.2, 0.3, 3)], [(K1, K2, K3)], LEVELS, [F8]),
    *itertools.product([CISPO(), CISPO(math.inf), SAPO(1, 2)], [(K3,)], LEVELS, [F8]),
    (Clip(), (K2, K3), TOKEN, F4),
]


@pytest.mark.parametrize("n", [1, 17, 300, 4100])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", [Clip(), SAPO(1, 2), CISPO()], ids=str)
def test_sums_of_the_largest_float32(surrogate, level, n):
    # Each term is a float32; the sum of sixteen of them is not.
    rng = np.random.default_rng(n)
    large = np.finfo(F4).max / 8
    logps = rng.uniform(-1, 0, n).astype(F4)
    A = (rng.uniform(0.5, 1, n) * large).astype(F4)
    far = {"old_logps": logps - large / 4, "ref_logps": logps + large}  # overflow in ρ
    near = {"old_logps": logps - rng.uniform(-0.1, 0.1, n).astype(F4), "ref_logps": logps}
    steep = {"old_logps": logps - 80, "ref_logps": logps - 2}  # ρ is e^80, and ρ·k nearly as large as there is
    cases = itertools.product([far.values(), near.values(), steep.values()], [K1(1.0), K2(0.0)], [A, np.zeros_like(A)])
    for (old, ref), kl, advantages in cases:
        if level == SEQ and old is steep["old_logps"]:
            continue
        options = {"kl": kl, "surrogate": surrogate, "importance_sampling_level": level, "aggregation": SUM}
        arrays = [logps, old, advantages, ref]
        stats = grpo_loss(*arrays, mask=np.ones(n), rollout_is_weights=np.ones(n, F4), **options).stats
        terms = reference.grpo_loss(*arrays, **options).stats  # in float32, whose sums are float64
        for name in ("objective", "surrogate", "kl", "ratio_mean", "approx_kl"):
            assert same(getattr(stats, name), terms[name], 1e-4 * abs(terms[name])), (
                name,
                getattr(stats, name),
                terms[name],
            )


@pytest.mark.parametrize(("surrogate", "kls", "level", "dtype"), FAR, ids=map(str, range(len(FAR))))
def test_far_away_from_the_other_policies(surrogate, kls, level, dtype):
    # The oracle in the same dtype overflows at the same place. A subnormal ρ is left out: an ulp is a part of it.
    sizes = [1, 650, 699, 701, 710, 2000] if dtype is F8 else [1, 79, 81, 87, 90, 300]
    tiny = math.log(np.finfo(dtype).tiny)
    far = [(x, l) for d in sizes for x in (-d, 0, d) for l in (-d, 0, d) if x > tiny or x < 1.2 * tiny]
    signs = [(-1, 1, 0.1), (1, 1, 0.1), (0, 1, 0.1), (-1, 0, 0.1), (-1, 1, 0)]  # A, rollout weight, β
    for (log_ratio, l), (A, w, beta), K, weighted in itertools.product(far, signs, kls, (True, False)):
        values = [-500, -500 - log_ratio, A, -500 - l, w]
        arrays = {name: np.array([x], dtype) for name, x in zip(ARRAYS[:5], values, strict=True)}
        options = {"surrogate": surrogate, "kl": K(beta, weighted), "importance_sampling_level": level}
        rest = {"mask": np.ones(1), "cu_seqlens": None, "aggregation": SUM, "normalizer": None, "loss_weights": None}
        check(arrays | options | rest, oracle=dtype)


# --- the place for the gradient ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", LEVELS)
def test_asking_for_the_gradient_changes_no_bit(level):
    row = Row(Clip(0.1, 0.3, 1.8), K3(0.3), level, F8, "padded", TOKEN, SEQ, SEQ_MEAN, None, False, True)
    arguments = batch(row, [5, 4097, 0, 700])
    without, result = grpo_loss(**arguments), grpo_loss(**arguments, grad=True)
    assert without.grad is None
    assert result.loss == without.loss
    assert result.stats == without.stats
    rows, width = result.grad.shape
    everywhere = np.full((2 * rows, 3 * width), np.nan)
    for place in (np.full((rows, width), np.nan), np.full((width, rows), np.nan).T, everywhere[::2, 1::3]):
        again = grpo_loss(**arguments, grad=place)
        assert again.grad is place
        assert_array_equal(place, result.grad)
        assert again.stats == without.stats
    assert np.isnan(everywhere).sum() == everywhere.size - result.grad.size

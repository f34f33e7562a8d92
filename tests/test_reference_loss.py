"""The reference is right: values others published, values by hand, its gradient against its own value, every kink."""

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from grpo_fast.reference import grpo_loss, k3, kl_term, surrogate_term, times
from grpo_fast.terms import CISPO, GMPO, K1, K2, K3, SAPO, TV, Clip

INF = math.inf
SURROGATES = [Clip(), Clip(0.1, 0.3, 1.8), SAPO(), SAPO(2.0, 0.7), CISPO(), CISPO(1.2, 0.8)]
KLS = [None, *(K(0.3, weighted) for K in (K1, K2, K3) for weighted in (False, True))]
LEVELS = ["token", "sequence"]
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]
MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)  # ragged, and one sequence without a token


def batch(seed=0):
    """Log-probabilities far enough from on-policy that every clip of SURROGATES is reached and none is touched."""
    rng = np.random.default_rng(seed)
    old = rng.uniform(-3, 0, MASK.shape)
    logps = old + rng.choice([-0.9, -0.3, 0.05, 0.4, 0.9], MASK.shape) + rng.uniform(-0.02, 0.02, MASK.shape)
    return {
        "logps": logps,
        "old_logps": old,
        "advantages": rng.normal(size=MASK.shape),
        "ref_logps": logps + rng.normal(0, 0.8, MASK.shape),
    }


def options(kl, number):
    """The rest of the options, going round with the number of the case."""
    per_sequence = np.array([0.5, 1.0, 2.0])
    return {
        "mask": MASK,
        "kl": kl,
        "aggregation": AGGREGATIONS[number % 4],
        "normalizer": [None, 3.7][number % 2],
        "rollout_is_weights": [None, per_sequence, np.tile(per_sequence, (4, 1)).T ** MASK.cumsum(axis=1)][number % 3],
    }


# --- published values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("advantages", "loss"), [([0.3, 0.2, 0.1], -0.171177843), ([-0.3, -0.2, -0.1], 0.193333333)])
def test_rlax_clipped_surrogate(advantages, loss):
    assert grpo_loss([0.0, 0.0, -2.0], [0.0] * 3, advantages, surrogate=Clip(0.2)).loss == pytest.approx(
        loss, abs=5e-10
    )


@pytest.mark.parametrize(
    ("kl", "values"),
    [(K1(1), [-1, 14, 29]), (K2(1), [0.5, 98, 420.5]), (K3(1), [0.7182818, 13.0000008, 28])],
)
def test_nemo_rl_kl_estimators(kl, values):
    for ref, value in zip([0.0, -15.0, -30.0], values, strict=True):
        assert grpo_loss([-1.0], None, [0.0], [ref], kl=kl).stats["kl"] == pytest.approx(value, abs=5e-8)


@pytest.mark.parametrize(
    ("aggregation", "loss"), [("token-mean", 0.36), ("seq-mean-token-mean", 0.325), ("seq-mean-token-sum", 0.9)]
)
def test_tunix_aggregation(aggregation, loss):
    token_losses = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])  # on-policy, where a token's loss is −A
    logps, mask = np.zeros((2, 3)), np.array([[1, 1, 0], [1, 1, 1]])
    assert grpo_loss(logps, None, -token_losses, mask=mask, aggregation=aggregation).loss == pytest.approx(loss)
    nothing = grpo_loss(logps, None, -token_losses, mask=0 * mask, aggregation=aggregation, grad=True)
    assert nothing.loss == 0
    assert not nothing.grad.any()


# --- values by hand ---------------------------------------------------------------------------------------------------
def test_sapo_by_hand():
    # at ρ = 1 the gate is σ(0) = ½: s = 2A/τ, ∂s/∂log ρ = A; A = 0 belongs to tau_neg and costs nothing
    result = grpo_loss([0.0] * 3, None, [3.0, -3.0, 0.0], surrogate=SAPO(1, 2), aggregation="token-sum", grad=True)
    assert result.loss == -(6 - 3)
    assert_array_equal(result.grad, [-3, 3, 0])
    # ρ = 3, τ = 2: σ(4)
    gate = 1 / (1 + math.exp(-4))
    result = grpo_loss([math.log(3)], [0.0], [-1.0], surrogate=SAPO(1, 2), grad=True)
    assert result.loss == pytest.approx(2 * gate)
    assert result.grad == pytest.approx(4 * gate * (1 - gate) * 3)


def test_cispo_by_hand():
    # ρ = 8, 2, ½ with weights in [1, 5]
    logps = np.log([0.8, 0.2, 0.05])
    old = np.log([0.1, 0.1, 0.1])
    result = grpo_loss(logps, old, [1.0, 1.0, -1.0], surrogate=CISPO(5, 1), aggregation="token-sum", grad=True)
    assert result.loss == pytest.approx(-(5 * logps[0] + 2 * logps[1] - logps[2]))
    assert_allclose(result.grad, [-5, -2, 1])


def test_sequence_level_by_hand():
    # log-ratios 0.1, 0.3 | masked | 0.2: ρ₀ = e^0.2 for both of its tokens, ρ₁ = e^0.2; l = ln 2 everywhere
    logps = np.array([[-1.0, -1.0, 9.0], [-1.0, 9.0, 9.0]])
    old = np.array([[-1.1, -1.3, 0.0], [-1.2, 0.0, 0.0]])
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    A, ref, rho = [[1.0, 2.0, 0.0], [-1.0, 0.0, 0.0]], logps - math.log(2), math.exp(0.2)
    common = {"mask": mask, "importance_sampling_level": "sequence", "aggregation": "token-sum", "grad": True}
    result = grpo_loss(logps, old, A, surrogate=Clip(0.5), **common)
    assert result.loss == pytest.approx(-rho * (1 + 2 - 1))
    assert_allclose(result.grad, rho * np.array([[-1.5, -1.5, 0], [1, 0, 0]]))
    weighted = grpo_loss(logps, old, 0 * mask, ref, kl=K1(1), **common)
    own = mask * np.exp(logps - old)  # the token's own ratio
    assert weighted.loss == pytest.approx(own.sum() * math.log(2))
    assert_allclose(weighted.grad, own * (math.log(2) + 1))
    weighted = grpo_loss(logps, old, 0 * mask, ref, kl=K1(1, "sequence"), **common)
    assert weighted.loss == pytest.approx(rho * 3 * math.log(2))
    assert_allclose(weighted.grad, mask * rho * (math.log(2) + 1))


def test_diagnostics_by_hand():
    ratios = np.array([0.5, 0.5, 1.0, 1.5, 1.5, 4.0, 4.0, 1.0])
    A = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    stats = grpo_loss(np.log(ratios), np.zeros(8), A, np.log(ratios) - 1, surrogate=Clip(0.2, 0.4, 3), kl=K2(0.5)).stats
    expected = {
        "clip_ratio_low": 1 / 8,
        "clip_ratio_high": 2 / 8,
        "clip_ratio_region": 3 / 8,
        "clip_ratio_delta": 1 / 8,
        "cispo_clip_ratio": math.nan,
        "trust_region_ratio": math.nan,
        "ratio_mean": 14 / 8,
        "ratio_min": 0.5,
        "ratio_max": 4.0,
        "ess": 14**2 / (8 * 39),
        "approx_kl": -np.log(ratios).mean(),
        "surrogate": (0.5 - 0.8 + 1 + 1.4 - 1.5 + 1.4 - 3 + 0) / 8,
        "kl": ratios.mean() / 2,  # k2 = ½, weighted
        "tokens": 8,
        "sequences": 1,
    }
    expected["objective"] = expected["surrogate"] - 0.5 * expected["kl"]
    expected["loss"] = -expected["objective"]
    assert stats == pytest.approx(expected, nan_ok=True)
    cispo = grpo_loss(np.log(ratios), np.zeros(8), A, surrogate=CISPO(1.2)).stats
    assert cispo["cispo_clip_ratio"] == 2 / 8
    assert {name for name, value in cispo.items() if math.isnan(value)} == {
        "kl", "clip_ratio_low", "clip_ratio_high", "clip_ratio_region", "clip_ratio_delta", "trust_region_ratio"
    }  # fmt: skip


# --- the gradient -----------------------------------------------------------------------------------------------------
CASES = [(number, *case) for number, case in enumerate(itertools.product(SURROGATES, KLS, LEVELS))]
every_case = pytest.mark.parametrize(("number", "surrogate", "kl", "level"), CASES, ids=str)


@every_case
def test_gradient_is_the_slope_of_the_loss(number, surrogate, kl, level):
    arrays = batch(seed=number)
    rest = options(kl, number) | {"importance_sampling_level": level}

    def loss(logps, surrogate=surrogate, frozen_weight=False):
        # CISPO's weight is held constant: so is ρ when the old log-probabilities move along
        old = arrays["old_logps"] + (logps - arrays["logps"] if frozen_weight else 0)
        return grpo_loss(logps, old, A, arrays["ref_logps"], surrogate=surrogate, **rest).loss

    def slope(loss):
        h = 1e-6 * np.eye(MASK.size).reshape(MASK.size, *MASK.shape)
        return np.array([(loss(arrays["logps"] + e) - loss(arrays["logps"] - e)) / 2e-6 for e in h]).reshape(MASK.shape)

    A = arrays["advantages"] if number % 5 else arrays["advantages"][:, 0]
    grad = grpo_loss(**(arrays | {"advantages": A}), surrogate=surrogate, grad=True, **rest).grad
    if not isinstance(surrogate, CISPO):
        assert_allclose(grad, slope(loss), rtol=1e-6, atol=1e-8)
    else:
        rest["kl"] = None
        expected = slope(lambda logps: loss(logps, frozen_weight=True))
        rest["kl"], A = kl, np.zeros(len(MASK))
        assert_allclose(grad, expected + slope(loss), rtol=1e-6, atol=1e-8)
    assert not grad[~MASK].any()


def test_gradient_is_the_stated_one_at_the_kinks():
    def grad(log_ratio, advantage, surrogate):
        return -grpo_loss([log_ratio], [0.0], [advantage], surrogate=surrogate, grad=True).grad[0]

    # x − 1 and 1 − x are exact for x in [½, 2], so a bound can be put on the ratio itself, or just inside of it
    high, low = np.exp([0.25, -0.25])
    inside_high, inside_low = np.nextafter([high, low], 1)
    assert grad(0.25, 1.0, Clip(0.2, high - 1)) == high
    assert grad(0.25, 1.0, Clip(0.2, inside_high - 1)) == 0
    assert grad(-0.25, -1.0, Clip(1 - low)) == -low
    assert grad(-0.25, -1.0, Clip(1 - inside_low)) == 0
    assert grad(0.25, -1.0, Clip(0.2, delta=high)) == -high
    assert grad(0.25, -1.0, Clip(0.2, delta=inside_high)) == 0
    assert grad(0.0, 2.0, Clip(0)) == grad(0.0, 2.0, Clip(0, 0, 1.5)) == 2
    assert grad(0.25, 0.0, Clip()) == grad(-0.25, 0.0, Clip()) == 0


def test_on_policy_has_the_gradient_of_the_ratio():
    arrays = batch()
    for _, surrogate, kl, level in CASES:
        rest = {"surrogate": surrogate, "kl": kl, "importance_sampling_level": level, "mask": MASK, "grad": True}
        there = grpo_loss(**(arrays | {"old_logps": arrays["logps"]}), **rest)
        here = grpo_loss(**(arrays | {"old_logps": None}), **rest)
        assert here.loss == there.loss
        assert here.grad.any()
        assert_array_equal(here.grad, there.grad)


# --- layouts, masks, micro-batches ------------------------------------------------------------------------------------
@every_case
def test_layout_and_masked_garbage_change_no_bit(number, surrogate, kl, level):
    arrays, rest = batch(), options(kl, number) | {"surrogate": surrogate, "importance_sampling_level": level}
    expected = grpo_loss(**arrays, **rest, grad=True)

    garbage = np.resize([np.nan, np.inf, -np.inf, 1e308], MASK.shape)
    dirty = grpo_loss(**{name: np.where(MASK, x, garbage) for name, x in arrays.items()}, **rest, grad=True)
    assert dirty.loss == expected.loss
    assert_array_equal(dirty.grad, expected.grad)
    assert dirty.stats == pytest.approx(expected.stats, rel=0, nan_ok=True)

    per_token = np.ndim(rest["rollout_is_weights"]) == 2
    weights = {"rollout_is_weights": rest["rollout_is_weights"][MASK]} if per_token else {}
    packing = {"mask": None, "cu_seqlens": np.append(0, np.cumsum(MASK.sum(axis=1)))}
    packed = grpo_loss(**{name: x[MASK] for name, x in arrays.items()}, **(rest | packing | weights), grad=True)
    assert packed.loss == expected.loss
    assert_array_equal(packed.grad, expected.grad[MASK])
    assert packed.stats == pytest.approx(expected.stats, rel=0, nan_ok=True)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_under_one_normalizer(aggregation):
    arrays, rest = batch(), {"kl": K3(0.1), "aggregation": aggregation, "normalizer": 11.0, "grad": True}
    whole = grpo_loss(**arrays, mask=MASK, **rest)
    parts = [grpo_loss(**{k: x[i : i + 1] for k, x in arrays.items()}, mask=MASK[i : i + 1], **rest) for i in range(3)]
    assert math.fsum(part.loss for part in parts) == pytest.approx(whole.loss)
    assert_array_equal(np.concatenate([part.grad for part in parts]), whole.grad)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_normalizer_replaces_the_denominator(aggregation):
    arrays = batch() | {"mask": MASK, "aggregation": aggregation}
    denominator = {"token-mean": MASK.sum(), "token-sum": 1}.get(aggregation, len(MASK))
    assert grpo_loss(**arrays, normalizer=denominator).loss == grpo_loss(**arrays).loss
    assert grpo_loss(**arrays, normalizer=10).loss == pytest.approx(grpo_loss(**arrays).loss * denominator / 10)


@pytest.mark.parametrize("level", LEVELS)
def test_float32_computes_in_float32(level):
    arrays = batch()
    single = {name: x.astype(np.float32) for name, x in arrays.items()}
    rest = {"kl": K3(0.1), "surrogate": SAPO(), "importance_sampling_level": level, "grad": True}
    expected, result = grpo_loss(**arrays, **rest), grpo_loss(**single, **rest)
    assert result.grad.dtype == np.float32
    assert_allclose(result.grad, expected.grad, rtol=1e-5, atol=1e-7)
    assert 0 < abs(result.loss / expected.loss - 1) < 1e-5


@every_case
def test_no_option_leaves_the_dtype(number, surrogate, kl, level):
    rho = A = logp = np.ones(3, np.float32)
    parts = [*surrogate_term(surrogate, rho, A, logp), *([] if kl is None else kl_term(kl, rho, rho, logp))]
    assert {part.dtype for part in parts} == {np.dtype(np.float32)}


def test_a_bound_is_rounded_once_to_float32():
    ratio = np.exp(np.float32(0.2))
    bound = Clip(0.1, float(ratio) - 1 - 1e-9)  # below the ratio in float64, on it in float32
    stats = grpo_loss(np.float32([0.2]), [0.0], [1.0], surrogate=bound).stats
    assert stats["ratio_max"] == float(ratio)
    assert stats["clip_ratio_high"] == 0
    assert grpo_loss([math.log(ratio)], [0.0], [1.0], surrogate=bound).stats["clip_ratio_high"] == 1


# --- extremes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("surrogate", "advantage", "loss", "grad"),
    [
        (Clip(0.2, 0.3), 2.0, -2.6, 0),
        (Clip(0.2, 0.3), 0.0, 0, 0),
        (Clip(0.2, 0.3), -2.0, INF, INF),
        (Clip(0.2, 0.3, 3), 2.0, -2.6, 0),
        (Clip(0.2, 0.3, 3), 0.0, 0, 0),
        (Clip(0.2, 0.3, 3), -2.0, 6, 0),
        (CISPO(5), 2.0, 10, -10),
        (CISPO(5), 0.0, 0, 0),
        (CISPO(INF), 0.0, 0, 0),
        (SAPO(1, 2), 2.0, -8, 0),
        (SAPO(1, 2), 0.0, 0, 0),
        (SAPO(1, 2), -2.0, 4, 0),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_a_ratio_that_overflows(surrogate, advantage, loss, grad, level):
    rest = {"surrogate": surrogate, "importance_sampling_level": level, "grad": True}
    result = grpo_loss([-1.0], [-2000.0], [advantage], **rest)
    assert result.stats["ratio_max"] == INF
    assert result.loss == pytest.approx(loss)
    assert result.grad == pytest.approx(grad)
    off = grpo_loss([-1.0], [-2000.0], [advantage], rollout_is_weights=[0.0], **rest)
    assert off.loss == 0
    assert off.grad == 0


@pytest.mark.parametrize("level", LEVELS)
def test_a_kl_that_overflows(level):
    def at(logp, old, ref, kl):
        rest = {"kl": kl, "importance_sampling_level": level, "grad": True}
        result = grpo_loss([logp], [old], [0.0], [ref], **rest)
        return result.loss, result.grad[0]

    assert at(-2000.0, -2000.0, -1.0, K3(0.1, False)) == (INF, -INF)
    assert at(-2000.0, -2000.0, -1.0, K3(0.0, False)) == (0, 0)
    assert at(-2000.0, -1.0, -1.0, K3(0.1)) == (0, 0)  # ρ = 0: the token is switched off
    assert at(-1.0, -2000.0, -1.0, K3(0.1)) == (0, 0)  # l = 0
    assert at(-1.0, -2000.0, -2.0, K2(0.1)) == (INF, INF)
    assert at(-1.0, -2000.0, 0.0, K1(0.1))[0] == -INF


def test_nothing_left_gives_no_diagnostics():
    stats = grpo_loss(np.full((2, 2), np.nan), None, [1.0, 1.0], mask=np.zeros((2, 2))).stats
    zeros = {"tokens": 0, "sequences": 2, "objective": 0, "loss": 0}
    assert {name: value for name, value in stats.items() if not math.isnan(value)} == zeros


@given(st.floats(1e-140, 30) | st.floats(-30, -1e-140))
def test_k3_has_no_cancellation(l):
    with localcontext() as context:
        context.prec = 400
        exact = (-Decimal(l)).exp() + Decimal(l) - 1
        error = abs(Decimal(float(k3(np.array(l)))) - exact)
        assert error <= 3 * Decimal(math.ulp(float(exact)))


@given(*2 * [st.sampled_from([0.0, -0.0, INF, -INF]) | st.floats(-1e9, 1e9)])
def test_a_product_with_zero_is_zero(a, b):
    with np.errstate(invalid="ignore"):
        assert times(np.array(a), np.array(b)) == (a * b if a and b else 0)


# --- bad input --------------------------------------------------------------------------------------------------------
LOGPS = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logps": np.zeros((1, 1, 1))}, ValueError, r"got shape \(1, 1, 1\)"),
        ({"old_logps": np.zeros(2)}, ValueError, r"old_logps must have shape \(2, 3\) as logps, got \(2,\)"),
        (
            {"advantages": np.zeros(3)},
            ValueError,
            r"advantages .* \(2, 3\) as logps or \(2,\), one per sequence, got \(3,\)",
        ),
        ({"advantages": None}, ValueError, "advantages must be given"),
        ({"rollout_is_weights": 1.0}, ValueError, r"rollout_is_weights must .* got \(1,\)"),
        ({"mask": [1, 0]}, ValueError, r"mask must have shape \(2, 3\) as logps, got \(2,\)"),
        ({"mask": np.full((2, 3), 0.5)}, ValueError, "mask must hold bools or 0/1, got .*0.5"),
        ({"kl": K3(0.1)}, ValueError, "ref_logps must be given"),
        ({"kl": 0.1, "ref_logps": LOGPS}, TypeError, "kl must be a K1, K2, K3 or None, got 0.1"),
        (
            {"surrogate": (0.2, 0.2, 3.0)},
            TypeError,
            "surrogate must be a Clip, CISPO, SAPO, Unclipped, VESPO or GMPO, got",
        ),
        (
            {"importance_sampling_level": "word"},
            ValueError,
            "must be one of 'token', 'sequence', 'sequence_token', got 'word'",
        ),
        (
            {"importance_sampling_level": "sequence_token", "trust_region": TV(0.1)},
            ValueError,
            "trust_region must be a Band or None at importance_sampling_level='sequence_token'",
        ),
        (
            {"kl": K3(0.1, "sequence"), "ref_logps": LOGPS},
            ValueError,
            "must be 'sequence' with importance_weighted='sequence' in the KL term, got 'token'",
        ),
        ({"surrogate": GMPO()}, ValueError, "must be 'sequence' with a GMPO, which is of whole sequences; got 'token'"),
        (
            {"surrogate": GMPO(), "importance_sampling_level": "sequence", "advantages": LOGPS},
            ValueError,
            r"advantages must be one per sequence, \(2,\), with a GMPO, got one per token, \(2, 3\)",
        ),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of 'token-mean', .* got 'mean'"),
        ({"normalizer": 0}, ValueError, r"normalizer must be above 0 where a token counts, got 0"),
        ({"cu_seqlens": [0, 6]}, ValueError, "cu_seqlens must be 1-D ints beside 1-D logps"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        grpo_loss(**({"logps": LOGPS, "old_logps": None, "advantages": [1.0, 2.0]} | changes))


def test_of_gmpo_a_sequence_of_one_token_has_its_advantage_either_way():
    options = {"surrogate": GMPO(), "importance_sampling_level": "sequence"}
    for advantages in ([1.0, 2.0], [[1.0], [2.0]]):
        assert grpo_loss([[-1.0], [-2.0]], None, advantages, **options).loss == -1.5


@pytest.mark.parametrize("bounds", [[0], [1, 6], [0, 5], [0, 4, 3, 6], [0, -1, 6]])
def test_refuses_sequence_bounds_that_do_not_cover_the_tokens(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6, the size of logps"):
        grpo_loss(np.zeros(6), None, np.zeros(6), cu_seqlens=bounds)

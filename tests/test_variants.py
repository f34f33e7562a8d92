"""What trainers compute beside the paper's loss: other levels, surrogates of sequences, KL gradients, loss weights.

Beside the reference by properties, and the reference beside autograd of what they stand for; then what others have
published, or what is right by hand.
"""

import itertools
import math

import numpy as np
import pytest
from combinations import ARRAYS, MEAN, SEQ, SEQ_MEAN, SEQ_TOKEN, SUM, TOKEN, VARIANTS, batch
from comparison import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from samples import DTYPES
from test_trust_region import far_from_bounds

from grpo_fast import (
    CISPO,
    GMPO,
    K1,
    K2,
    K3,
    SAPO,
    VESPO,
    Band,
    Clip,
    Unclipped,
    grpo_loss,
    reference,
)
from grpo_fast.terms import Options

LOSSES = pytest.mark.parametrize("loss", [grpo_loss, reference.grpo_loss], ids=["kernel", "reference"])


# --- beside the reference ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("trust_region", "row"), VARIANTS, ids=range(len(VARIANTS)))
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    long=st.sampled_from([0, 0, 255, 700, 4097]),
    drift=st.sampled_from([1e-3, 0.1, 0.5, 2]),
    ref_drift=st.sampled_from([1e-7, 1e-2, 0.5, 3]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20)
def test_is_the_reference(trust_region, row, lengths, long, drift, ref_drift, seed):
    arguments = batch(row, [*lengths, long], drift, ref_drift, seed)
    if trust_region is not None:
        arguments = far_from_bounds(arguments, trust_region, row.level)
    grad = np.empty_like(arguments["logps"]) if row.grad == "array" else row.grad
    compare(grpo_loss(**arguments, grad=grad), arguments)


@pytest.mark.parametrize(("trust_region", "row"), VARIANTS, ids=range(len(VARIANTS)))
def test_ratios_beyond_the_format(trust_region, row):
    # ρ is 0, ∞ or neither, k3 ∞; u, w and A may be 0: nothing becomes a NaN but ∞ − ∞, and both say where.
    arguments = batch(row, [16] * 30, seed=5) | {"trust_region": trust_region, "aggregation": SUM, "normalizer": None}
    rng = np.random.default_rng(5)
    shape, kind = arguments["logps"].shape, row.dtype
    extremes = {"logps": [-1.0, -2000.0, -0.5], "old_logps": [-1.0, -2000.0, -1.5], "ref_logps": [-1.0, -2000.0, -0.6]}
    for name, values in extremes.items():  # the same for eight tokens, so that those of a sequence overflow together
        if arguments[name] is not None:
            arguments[name] = np.resize(np.repeat(rng.choice(values, 200), 8), shape).astype(kind)
    if row.kl == K1(0.3, "sequence"):  # k of one sign: Σ k·ρ is ∞ − ∞ where ρ·Σ k, which the kernel computes, is not
        arguments["ref_logps"] = np.minimum(arguments["ref_logps"], arguments["logps"])
    result = grpo_loss(**arguments, grad=bool(row.grad))
    with np.errstate(all="ignore"):
        expected = reference.grpo_loss(**arguments, grad=bool(row.grad))
    for found, value in ((result.loss, expected.loss), (result.grad, expected.grad)):
        if value is not None:
            assert_allclose(found, value, rtol=1e-3 if kind is np.float32 else 1e-9)


# --- beside autograd --------------------------------------------------------------------------------------------------
def masked_mean(x, mask):
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "kl", [None, K3(0.3), K3(0.3, False, "score"), K1(0.3, False, "k2"), K2(0.3, "sequence")], ids=str
)
@pytest.mark.parametrize(
    ("surrogate", "level"),
    [
        *itertools.product([Clip(0.2), CISPO(1.2, 0.8), SAPO(), Unclipped()], [TOKEN, SEQ, SEQ_TOKEN]),
        (VESPO(), SEQ),
        (GMPO(0.2, 0.3), SEQ),
    ],
    ids=str,
)
def test_is_what_autograd_makes_of_the_formula(surrogate, level, kl):
    torch = pytest.importorskip("torch")
    if kl == K2(0.3, "sequence") and level != SEQ:
        pytest.skip("is of sequences")
    rng = np.random.default_rng(3)
    old = rng.uniform(-3, -0.1, (4, 9))
    logps, ref = old + 0.3 * rng.normal(size=old.shape), old + 0.3 * rng.normal(size=old.shape)
    mask = rng.random(old.shape) < 0.8
    A = rng.normal(size=(4, 1)) if isinstance(surrogate, GMPO) else rng.normal(size=old.shape)
    w, u = rng.lognormal(size=old.shape), rng.lognormal(size=old.shape)
    logp, before, keep = torch.tensor(logps, requires_grad=True), torch.tensor(old), torch.tensor(mask)
    advantage = torch.tensor(A)
    log_ratio = logp - before
    own = torch.exp(log_ratio)
    ratio = own if level == TOKEN else torch.exp(masked_mean(log_ratio, keep)).expand_as(own)
    if level == SEQ_TOKEN:  # GSPO-token: sg[s]·π/sg[π]
        ratio = ratio.detach() * torch.exp(logp - logp.detach())
    match surrogate:
        case Unclipped():
            s = ratio * advantage
        case Clip():
            s = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        case CISPO():
            s = ratio.clamp(0.8, 1.2).detach() * advantage * logp
        case VESPO():
            log_w = (log_ratio.clamp(-20, 20) * keep).sum(1, keepdim=True).clamp(math.log(1e-8), 20)
            gain = torch.exp(3 + 2 * log_w - 3 * log_w.exp())
            cost = torch.exp(2 + 3 * log_w - 2 * log_w.exp())
            s = torch.where(advantage >= 0, gain, cost).detach() * advantage * logp
        case GMPO():
            up, down = log_ratio.clamp(max=0.3), log_ratio.clamp(min=-0.2)
            s = torch.exp(masked_mean(torch.where(advantage > 0, up, down), keep)).expand_as(own) * advantage
        case _:
            tau = torch.where(advantage > 0, torch.tensor(1.0, dtype=torch.float64), 1.05)
            s = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    loss = -(torch.tensor(w * u) * s * keep).sum()
    if kl is not None:
        l = logp - torch.tensor(ref)
        k = l if isinstance(kl, K1) else l * l / 2 if isinstance(kl, K2) else torch.exp(-l) + l - 1
        if kl.importance_weighted:
            k = (ratio if kl.importance_weighted == "sequence" else own) * k
        elif kl.gradient == "score":  # the value of k, the gradient of ρ·k
            k = k.detach() + own * k - (own * k).detach()
        elif kl.gradient == "k2":
            k = k.detach() + l * l / 2 - (l * l / 2).detach()
        loss = loss + kl.beta * (torch.tensor(u) * k * keep).sum()
    loss.backward()
    options = {"surrogate": surrogate, "importance_sampling_level": level, "kl": kl, "aggregation": SUM, "grad": True}
    options |= {"mask": mask, "rollout_is_weights": w, "loss_weights": u}
    result = reference.grpo_loss(logps, old, A, ref, **options)  # as are the kernels, by the properties above
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_allclose(result.grad, logp.grad.numpy(), rtol=1e-11, atol=1e-12)


# --- published, and by hand -------------------------------------------------------------------------------------------
def few(loss, logps, advantages, **options):
    """Of log-ratios as they are given, with the gradient."""
    return loss(np.array(logps), np.zeros(np.shape(logps)), np.array(advantages), **options, grad=True)


@LOSSES
def test_gspo_token(loss):
    options = {"importance_sampling_level": SEQ_TOKEN, "aggregation": MEAN}
    result = few(loss, [0.3, -0.1], [1.0], **options, surrogate=Clip(0.2))
    assert result.loss == pytest.approx(-math.exp(0.1))
    assert_allclose(result.grad, [-math.exp(0.1) / 2] * 2)
    result = few(loss, [1.0, -1.0], [1.0], **options)
    assert (result.loss, result.grad.tolist()) == (-1, [-0.5, -0.5])
    stats = result.stats if isinstance(result.stats, dict) else {"clip_ratio_region": result.stats.clip_ratio_region}
    assert stats["clip_ratio_region"] == 0
    assert few(loss, [0.1, 5.0], [1.0], mask=[1, 0], **options).loss == pytest.approx(-math.exp(0.1))
    # Each token its own A, and its own weight.
    result = few(loss, [0.1, 0.1], [1.0, -2.0], **options, rollout_is_weights=[3.0, 1.0], surrogate=Unclipped())
    assert_allclose(result.grad, [-3 * math.exp(0.1) / 2, math.exp(0.1)])


@LOSSES
def test_vespo(loss):
    # log ρ [.1, .1] beside the policy that was trained on, and log r [.2, −.1] between that and the sampler.
    options = {"importance_sampling_level": SEQ, "surrogate": VESPO(), "aggregation": SUM}
    for a, phi in ((1.0, 0.637898294), (-1.0, 1.22174771)):
        result = few(loss, [0.3, 0.0], [a], **options)
        assert_allclose(result.grad, [-phi * a] * 2, rtol=1e-8)
        assert result.loss == pytest.approx(-phi * a * 0.3, rel=1e-8)
    assert_allclose(few(loss, [0.0, 0.0], [1.0], **options).grad, [-1, -1])  # φ(1) = 1
    for far in (3000.0, -3000.0):  # φ is clipped, not infinite
        assert_allclose(few(loss, [far, 0.0], [1.0], **options).grad, [0, 0], atol=1e-13)


@LOSSES
def test_gmpo(loss):
    options = {"importance_sampling_level": SEQ, "surrogate": GMPO(0.4)}
    result = few(loss, [[0.1, -0.2, 0.5, -0.6]], [-2.0], **options)
    assert result.loss == pytest.approx(2)
    assert_allclose(result.grad, [[0.5, 0.5, 0.5, 0]])
    stats = result.stats if isinstance(result.stats, dict) else result.stats.as_dict()
    low, high = (stats.get(f"clip_ratio_{x}", stats.get(f"clip_ratio/{x}_mean")) for x in ("low", "high"))
    assert (low, high) == (0.25, 0)
    at_the_bound = few(loss, [[0.4, -0.4]], [1.0], **options)
    assert_allclose(at_the_bound.grad, [[-0.5, -0.5]])  # kept
    assert few(loss, [[5.0, 5.0]], [0.0], **options).loss == 0


@LOSSES
def test_cispo_with_both_bounds(loss):
    logps = np.array([-1, -2, -0.3, -1.2, -0.7])
    old = logps - [-2, -0.5, 0, 0.3, 1.5]
    A = np.array([1, -2, 0.5, 3, -1])
    result = loss(logps, old, A, surrogate=CISPO(1.28, 0.8), aggregation=MEAN, grad=True)
    assert result.loss == pytest.approx(0.2924)
    assert_allclose(result.grad, [-0.16, 0.32, -0.1, -0.768, 0.256])


@LOSSES
@pytest.mark.parametrize("level", [TOKEN, SEQ, SEQ_TOKEN])
def test_gradients_of_the_kl_term(loss, level):
    l, log_ratio = np.array([0.5, -0.2]), np.array([0.3, -0.1])
    k3 = np.exp(-l) + l - 1

    def term(kl):
        options = {"kl": kl, "aggregation": SUM, "grad": True, "importance_sampling_level": level}
        return loss(log_ratio, np.zeros(2), np.zeros(2), log_ratio - l, **options)

    rho = np.exp(log_ratio)
    for kl, value, slope in (
        (K3(1.0, False, "k2"), k3, l),
        (K3(1.0, False, "score"), k3, rho * l),
        (K1(1.0, False, "score"), l, rho * (1 + l)),
        (K3(1.0), rho * k3, rho * l),
        (K2(1.0, False, "own"), l * l / 2, l),
    ):
        result = term(kl)
        assert result.loss == pytest.approx(value.sum(), rel=1e-12), kl
        assert_allclose(result.grad, slope, rtol=1e-12, err_msg=str(kl))


@LOSSES
def test_the_ratio_of_the_sequence_in_the_kl_term(loss):
    # As TRL up to 1.16 has it: ρ = e^0.1 for both, and the gradient of ρ at each.
    l, log_ratio = np.array([0.5, -0.2]), np.array([0.3, -0.1])
    k3, rho = np.exp(-l) + l - 1, math.exp(0.1)
    options = {"kl": K3(1.0, "sequence"), "aggregation": SUM, "grad": True, "importance_sampling_level": SEQ}
    result = loss(log_ratio, np.zeros(2), np.zeros(2), log_ratio - l, **options)
    assert result.loss == pytest.approx(rho * k3.sum())
    assert_allclose(result.grad, rho * k3.sum() / 2 - rho * np.expm1(-l))


# --- loss weights -----------------------------------------------------------------------------------------------------
@LOSSES
@pytest.mark.parametrize("level", [TOKEN, SEQ, SEQ_TOKEN])
def test_loss_weights_scale_both_terms_and_no_denominator(loss, level):
    rng = np.random.default_rng(2)
    old, ref, A = rng.uniform(-3, 0, (3, 5)), rng.uniform(-3, 0, (3, 5)), rng.normal(size=3)
    logps, options = old + 0.1 * rng.normal(size=old.shape), {"kl": K3(0.3), "importance_sampling_level": level}
    for aggregation in (MEAN, SEQ_MEAN):
        common = options | {"aggregation": aggregation, "grad": True}
        plain = loss(logps, old, A, ref, **common)
        twice = loss(logps, old, A, ref, loss_weights=np.full(3, 2.0), **common)
        assert twice.loss == pytest.approx(2 * plain.loss, rel=1e-12)
        assert_allclose(twice.grad, 2 * plain.grad, rtol=1e-12)
        for name in ("surrogate", "kl", "tokens", "ratio_mean"):
            found = [r.stats[name] if isinstance(r.stats, dict) else getattr(r.stats, name) for r in (plain, twice)]
            assert found[0] == found[1]
        one = loss(logps, old, A, ref, loss_weights=[0, 1, 0], **common)
        assert not one.grad[[0, 2]].any()
        assert_allclose(one.grad[1], plain.grad[1], rtol=1e-12)


@pytest.mark.parametrize("level", [TOKEN, SEQ])
def test_stats_with_and_without_loss_weights_add(level):
    arrays = np.array([[-1.0, -2.0]]), np.array([[-1.1, -1.9]]), np.array([1.0])
    options = {"aggregation": SUM, "importance_sampling_level": level}
    plain, weighted = grpo_loss(*arrays, **options).stats, grpo_loss(*arrays, loss_weights=[0.5], **options).stats
    assert (plain + weighted).objective == pytest.approx(1.5 * plain.objective)
    assert (plain + weighted).surrogate == plain.surrogate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [TOKEN, SEQ])
@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_a_loss_weight_is_finite_and_not_negative(level, bad, dtype):
    old = np.full((3, 40), -1.0, dtype)
    for shape, at in (((3, 40), (1, 7)), ((3,), (1,))):
        weights = np.ones(shape, dtype)
        weights[at] = bad
        where = ", ".join(map(str, at))
        options = {"importance_sampling_level": level, "grad": True}
        with pytest.raises(
            ValueError, match=rf"loss_weights must be finite and at least 0 .* got loss_weights\[{where}\]"
        ):
            grpo_loss(old, old, np.ones(3), loss_weights=weights, **options)
        mask = np.ones((3, 40))
        mask[1] = 0
        assert grpo_loss(old, old, np.ones(3), loss_weights=weights, mask=mask, **options).loss < 0


# --- what is the same, and what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("trust_region", "row"), [(region, row) for region, row in VARIANTS if row.layout in ("packed", "holes")], ids=str
)
def test_a_sequence_adds_the_same_bits_anywhere(trust_region, row):
    lengths = [5, 700, 1, 129, 4100, 70_000]
    arguments = batch(row, lengths, seed=1) | {"aggregation": SUM, "normalizer": None, "trust_region": trust_region}
    bounds, grad = arguments["cu_seqlens"], bool(row.grad)
    together = grpo_loss(**arguments, grad=grad)

    def alone(i):
        """The arguments of one sequence."""
        token, sequence = slice(bounds[i], bounds[i + 1]), slice(i, i + 1)
        arrays = {name: x for name in (*ARRAYS, "mask") if (x := arguments[name]) is not None}
        parts = {name: x[token] if len(x) == bounds[-1] else x[sequence] for name, x in arrays.items()}
        return arguments | parts | {"cu_seqlens": [0, lengths[i]]}

    apart = [grpo_loss(**alone(i), grad=grad) for i in range(len(lengths))]
    assert sum(part.stats for part in apart) == together.stats
    if grad:
        assert np.concatenate([part.grad for part in apart]).tolist() == together.grad.tolist()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Options(VESPO()), ValueError, "importance_sampling_level must be 'sequence' with a VESPO"),
        (lambda: Options(GMPO(), None, SEQ_TOKEN), ValueError, "must be 'sequence' with a GMPO.* got 'sequence_token'"),
        (lambda: Options(kl=K3(1, "sequence")), ValueError, "must be 'sequence' with importance_weighted='sequence'"),
        (lambda: K3(1, "seq"), TypeError, "importance_weighted must be True, False or 'sequence', got 'seq'"),
        (lambda: K3(1, gradient="score"), ValueError, "gradient must be 'own' unless importance_weighted=False"),
        (lambda: K3(1, False, "k3"), ValueError, "gradient must be one of 'own', 'score', 'k2', got 'k3'"),
        (lambda: VESPO(-1), ValueError, r"k_pos must be a number in \[0, inf\)"),
        (lambda: GMPO(-1), ValueError, r"epsilon must be a number in \[0, inf\]"),
        (lambda: GMPO(0.4, "x"), TypeError, "epsilon_high must be a number"),
        (lambda: Options(trust_region=Band(0, 1), surrogate=VESPO()), ValueError, "VESPO"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_of_gmpo_an_advantage_is_one_per_sequence():
    options = {"surrogate": GMPO(), "importance_sampling_level": SEQ}
    with pytest.raises(ValueError, match=r"advantages must be one per sequence, \(1,\), with a GMPO, .*\(1, 2\)"):
        grpo_loss([[-1.0, -1.0]], None, [[1.0, 1.0]], **options)
    assert grpo_loss([[-1.0], [-2.0]], None, [[1.0], [2.0]], **options).loss == -1.5  # one token each: either

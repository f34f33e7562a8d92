"""The trust region drops the policy term of the tokens that it says, in the kernels as in the reference, and no others.

What is dropped is decided at bounds, on either side of which two ways to compute may disagree by rounding: so tokens
within 10⁻⁴ of one are moved on-policy first, and bounds themselves are tested with numbers that are exact.
"""

import itertools
import math

import numpy as np
import pytest
from combinations import BAND, F8, MEAN, REGIONS, SEQ, SUM, TOKEN, batch
from comparison import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from samples import DTYPES

from grpo_fast import CISPO, K3, SAPO, TV, Band, BinaryKL, Clip, Unclipped, grpo_loss, reference
from grpo_fast.terms import Options


# --- beside the reference ---------------------------------------------------------------------------------------------
def far_from_bounds(arguments, trust_region, level):
    """The arguments, with tokens that are near a bound of the trust region on-policy."""
    logps, old = (arguments[name].astype(F8) for name in ("logps", "old_logps"))
    with np.errstate(all="ignore"):
        if isinstance(trust_region, TV):
            moved = np.abs(np.exp(np.minimum(logps, 0)) - np.exp(np.minimum(old, 0)))
            bounds = [trust_region.delta, trust_region.delta_low]
        elif isinstance(trust_region, BinaryKL):
            p, q = np.exp(np.minimum(old, 0)), np.exp(np.minimum(logps, 0))
            moved = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
            bounds = [trust_region.delta, trust_region.delta_low]
        else:
            moved, bounds = np.exp(logps - old), [BAND.ratio_min, BAND.ratio_max]
    if level == TOKEN:
        near = np.isclose(moved[..., None], bounds, rtol=1e-3, atol=1e-6).any(axis=-1)
        near |= np.minimum(logps, old) > -1e-3  # 1 − π has lost digits there
        arguments = arguments | {"logps": np.where(near, arguments["old_logps"], arguments["logps"])}
    return arguments | {"trust_region": trust_region}


@pytest.mark.parametrize(("trust_region", "row"), REGIONS, ids=range(len(REGIONS)))
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    long=st.sampled_from([0, 0, 255, 700, 4097]),
    drift=st.sampled_from([1e-3, 0.1, 0.5, 2]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15)
def test_is_the_reference(trust_region, row, lengths, long, drift, seed):
    arguments = far_from_bounds(batch(row, [*lengths, long], drift, 0.5, seed), trust_region, row.level)
    grad = np.empty_like(arguments["logps"]) if row.grad == "array" else row.grad
    compare(grpo_loss(**arguments, grad=grad), arguments)


@pytest.mark.parametrize("level", [TOKEN, SEQ])
@pytest.mark.parametrize("trust_region", [TV(0.1, 0.05), BinaryKL(0.02, 0.01), BAND], ids=str)
@pytest.mark.parametrize("surrogate", [Unclipped(), Clip(0.2), CISPO(1.2), SAPO()], ids=str)
def test_is_what_autograd_makes_of_a_detached_mask(surrogate, trust_region, level):
    torch = pytest.importorskip("torch")
    if level == SEQ and trust_region != BAND:
        pytest.skip("of single tokens")
    rng = np.random.default_rng(3)
    old = rng.uniform(-3, -0.1, (4, 9))
    logps, A = old + 0.5 * rng.normal(size=old.shape), rng.normal(size=(4, 1))
    logp, before, advantage = torch.tensor(logps, requires_grad=True), torch.tensor(old), torch.tensor(A)
    log_ratio = logp - before
    ratio = torch.exp(log_ratio if level == TOKEN else log_ratio.mean(1, keepdim=True).expand_as(log_ratio))
    match surrogate:
        case Unclipped():
            s = ratio * advantage
        case Clip():
            s = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        case CISPO():
            s = ratio.clamp(0, 1.2).detach() * advantage * logp
        case _:
            tau = torch.where(advantage > 0, torch.tensor(1.0, dtype=torch.float64), 1.05)
            s = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    new, was = logp.detach().exp(), before.exp()
    match trust_region:
        case TV(up, down):
            drop = ((advantage > 0) & (new - was > up)) | ((advantage < 0) & (new - was < -down))
        case BinaryKL(up, down):
            divergence = was * (before - logp.detach()) + (1 - was) * torch.log((1 - was) / (1 - new))
            drop = ((advantage > 0) & (new > was) & (divergence > up)) | (
                (advantage < 0) & (new < was) & (divergence > down)
            )
        case _:
            drop = (ratio < 0.5) | (ratio > 1.6)
    assert 0 < drop.double().mean() < 1 or level == SEQ
    loss = -(s * ~drop.expand_as(s)).sum()
    loss.backward()
    options = {"surrogate": surrogate, "trust_region": trust_region, "importance_sampling_level": level}
    result = grpo_loss(logps, old, A, aggregation="token-sum", grad=True, **options)
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_allclose(result.grad, logp.grad.numpy(), rtol=1e-12, atol=1e-12)
    assert result.stats.trust_region_ratio == drop.expand_as(s).double().mean()


# --- runs in which all are kept ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.2])
def test_tv_just_within_and_beyond_its_bound(delta, sign, dtype):
    # Whole runs whose ratios alone show that all are kept are computed without the region: up to the last that may.
    was = np.linspace(delta + 0.01, 1, 700) if sign < 0 else np.linspace(0.01, 0.99 - delta, 700)
    for part in (1 - 1e-3, 1 + 1e-3):
        logps, old = (np.log(x).astype(dtype) for x in (was + sign * delta * part, was))
        found = grpo_loss(logps, old, [sign], surrogate=Unclipped(), trust_region=TV(delta)).stats
        assert found.trust_region_ratio == (part > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drift", [0.05, 0.2, 1.0])
def test_a_region_that_drops_nothing_changes_no_bit(drift, dtype):
    rng = np.random.default_rng(0)
    old = rng.uniform(-3, 0, (9, 700)).astype(dtype)
    logps, ref = ((old + drift * rng.normal(size=old.shape)).astype(dtype) for _ in range(2))
    arrays = logps, old, rng.normal(size=9).astype(dtype), ref
    options = {"surrogate": Unclipped(), "kl": K3(0.1), "grad": True}
    result, without = grpo_loss(*arrays, **options, trust_region=TV(1.0)), grpo_loss(*arrays, **options)
    assert result.loss == without.loss
    assert result.grad.tolist() == without.grad.tolist()
    assert result.stats.trust_region_ratio == 0


# --- values by hand ---------------------------------------------------------------------------------------------------
LOSSES = pytest.mark.parametrize("loss", [grpo_loss, reference.grpo_loss], ids=["kernel", "reference"])


def ratio_dropped(result):
    stats = result.stats
    return stats["trust_region_ratio"] if isinstance(stats, dict) else stats.trust_region_ratio


def few(loss, logps, old, advantages, trust_region, **options):
    options = {"surrogate": Unclipped(), "aggregation": SUM, "grad": True} | options
    return loss(np.array(logps), np.array(old), np.array(advantages), trust_region=trust_region, **options)


@LOSSES
def test_tv_keeps_what_is_at_its_bound(loss):
    half, one = math.log(0.5), 0.0
    assert math.exp(half) == 0.5
    for old, new, a, dropped in [(half, one, 1.0, 0), (one, half, -1.0, 0), (half, one, -1.0, 0), (one, half, 1.0, 0)]:
        assert ratio_dropped(few(loss, [new], [old], [a], TV(0.5))) == dropped
    for bound in (TV(0.499), TV(0.499, 1)):
        result = few(loss, [one], [half], [1.0], bound)
        assert (result.loss, result.grad.tolist(), ratio_dropped(result)) == (0, [0], 1)
    assert ratio_dropped(few(loss, [half], [one], [-1.0], TV(1, 0.499))) == 1
    assert ratio_dropped(few(loss, [half], [one], [-1.0], TV(0.499, 1))) == 0


@LOSSES
def test_binary_kl_of_small_moves_drops_nothing(loss):
    result = few(loss, [-1.01, -0.99], [-1.0, -1.0], [1.0, -1.0], BinaryKL(0.5))
    assert ratio_dropped(result) == 0
    assert ratio_dropped(few(loss, [-0.1, -3.0], [-3.0, -0.1], [1.0, -1.0], BinaryKL(0.5))) == 1
    assert ratio_dropped(few(loss, [-0.1, -3.0], [-3.0, -0.1], [-1.0, 1.0], BinaryKL(0.0))) == 0  # against A


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_kl_at_its_ends(loss, dtype):
    # π = 1, where 1 − π is 0 and the divergence ∞ or 0; and π = 0.
    new, old = np.array([0.0, 0.0, -1.0, -1000.0, -1.0], dtype), np.array([0.0, -1.0, 0.0, -1.0, -1000.0], dtype)
    for a, dropped in ((1.0, [0, 1, 0, 0, 1]), (-1.0, [0, 0, 1, 1, 0])):
        surrogate = CISPO()  # whose gradient is not 0 where it is kept
        options = {"surrogate": surrogate, "aggregation": SUM, "grad": True, "trust_region": BinaryKL(0.1)}
        result = loss(new, old, np.full(5, a, dtype), **options)
        assert ratio_dropped(result) == np.mean(dropped)
        assert (result.grad[np.array(dropped) == 1] == 0).all()


@LOSSES
@pytest.mark.parametrize("level", [TOKEN, SEQ])
def test_a_band_keeps_its_bounds_and_asks_for_no_sign(loss, level):
    doubled = [math.log(2.0)]
    for a in (1.0, -1.0):
        for band, dropped in ((Band(0.5, 2), 0), (Band(0, 1.999), 1), (Band(2, math.inf), 0), (Band(2.001, 3), 1)):
            result = few(loss, doubled, [0.0], [a], band, importance_sampling_level=level)
            assert ratio_dropped(result) == dropped
            assert result.loss == (0 if dropped else -2 * a)
    zero = few(loss, doubled, [0.0], [0.0], Band(0, 1), importance_sampling_level=level)
    assert ratio_dropped(zero) == 0  # A = 0 is neither dropped nor counted


@LOSSES
def test_on_policy_only_a_band_without_1_drops(loss):
    for region, dropped in ((TV(0), 0), (BinaryKL(0), 0), (Band(0.5, 2), 0), (Band(1, 1), 0), (Band(1.1, 2), 1)):
        options = {"surrogate": Unclipped(), "trust_region": region}
        assert ratio_dropped(loss(np.array([-1.0, -2.0]), None, np.array([1.0, -1.0]), **options)) == dropped


@LOSSES
def test_the_kl_term_and_the_denominators_stay(loss):
    logps, old, ref, A = [-0.1, -1.0], [-3.0, -1.0], [-0.2, -1.5], [1.0, 1.0]
    kept, dropped = (
        loss(np.array(logps), np.array(old), np.array(A), np.array(ref), kl=K3(0.5, False), surrogate=Unclipped(),
             aggregation=MEAN, trust_region=region, grad=True)
        for region in (None, TV(0.2))
    )  # fmt: skip
    k = np.exp([-0.1, -0.5]) - 1 - np.array([-0.1, -0.5])
    assert kept.loss == pytest.approx(-(math.exp(2.9) + 1) / 2 + 0.5 * k.mean(), rel=1e-14)
    assert dropped.loss == pytest.approx(-1 / 2 + 0.5 * k.mean(), rel=1e-14)
    assert dropped.grad[0] == pytest.approx(0.5 * -np.expm1(-0.1) / 2, rel=1e-12)
    assert dropped.grad[1] == kept.grad[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trust_region", [TV(0.2), BinaryKL(0.1), BAND], ids=str)
def test_an_infinite_ratio_that_is_dropped_costs_nothing(trust_region, dtype):
    new, old = np.array([0.0, -1.0], dtype), np.array([-2000.0, -1.0], dtype)
    for a in (1.0, -1.0):
        options = {"surrogate": Unclipped(), "aggregation": SUM, "grad": True, "trust_region": trust_region}
        result = grpo_loss(new, old, np.full(2, a, dtype), **options)
        expected = reference.grpo_loss(new, old, np.full(2, a, dtype), **options)
        assert (result.loss, result.grad.tolist()) == (expected.loss, expected.grad.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["advantages", "rollout_is_weights", "logps", "old_logps"])
def test_what_is_dropped_is_checked_too(name, bad, dtype):
    n = 300
    arrays = {"logps": np.full(n, -0.1, dtype), "old_logps": np.full(n, -0.3, dtype)}  # each is dropped by TV(0)
    arrays |= {"advantages": np.ones(n, dtype), "rollout_is_weights": np.ones(n, dtype)}
    options = {"trust_region": TV(0), "surrogate": Unclipped(), "aggregation": SUM, "grad": True}
    assert grpo_loss(**arrays, **options).stats.trust_region_ratio == 1
    arrays[name][77] = bad
    with pytest.raises(ValueError, match=rf"{name} must be finite where it is not masked, got {name}\[77\]"):
        grpo_loss(**arrays, **options)


# --- what is the same, and what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("trust_region", "level"), [(TV(0.1), TOKEN), (Band(0.99, 1.01), SEQ)], ids=["TV", "Band"])
def test_a_sequence_adds_the_same_bits_anywhere(trust_region, level, dtype):
    rng = np.random.default_rng(1)
    lengths = [5, 700, 1, 129, 4100]
    bounds = np.append(0, np.cumsum(lengths))
    old = rng.uniform(-3, 0, bounds[-1]).astype(dtype)
    logps, A = (old + rng.normal(0, 0.3, old.size)).astype(dtype), rng.normal(size=len(lengths)).astype(dtype)
    options = {"trust_region": trust_region, "importance_sampling_level": level, "surrogate": Unclipped()}
    options |= {"aggregation": SUM, "grad": True}
    together = grpo_loss(logps, old, A, cu_seqlens=bounds, **options)
    parts = [slice(*pair) for pair in itertools.pairwise(bounds.tolist())]
    alone = [grpo_loss(logps[p], old[p], A[i : i + 1], **options) for i, p in enumerate(parts)]
    assert sum(part.stats for part in alone) == together.stats
    assert np.concatenate([part.grad for part in alone]).tolist() == together.grad.tolist()
    assert 0 < together.stats.trust_region_ratio < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TV(1.5), r"delta must be a number in \[0, 1\], got 1.5"),
        (lambda: TV(0.1, -1), r"delta_low must be a number in \[0, 1\], got -1"),
        (lambda: BinaryKL(math.inf), r"delta must be a number in \[0, inf\), got inf"),
        (lambda: Band(2, 1), r"ratio_max must be a number in \[ratio_min = 2.0, inf\], got 1"),
        (lambda: Band(-1, 1), "ratio_min must be"),
        (lambda: Options(trust_region=TV(0.2), importance_sampling_level="sequence"), "TV is of single tokens"),
        (lambda: Options(trust_region=BinaryKL(0.2), importance_sampling_level="sequence"), "of single tokens"),
    ],
)
def test_bad_regions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [0.2, TV, "tv", Clip()])
def test_what_is_no_region_is_refused(value):
    with pytest.raises(TypeError, match="trust_region must be a TV, BinaryKL, Band or None, got"):
        grpo_loss([-1.0], [-1.0], [1.0], trust_region=value)


def test_stats_of_different_regions_do_not_add():
    a, b = (grpo_loss([-1.0], [-1.0], [1.0], trust_region=region).stats for region in (TV(0.1), TV(0.2)))
    with pytest.raises(ValueError, match="different trust_region cannot be added"):
        a + b
    assert "trust_region_ratio" in a.as_dict()
    assert "trust_region_ratio" not in grpo_loss([-1.0], [-1.0], [1.0]).stats.as_dict()

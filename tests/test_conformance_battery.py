"""The battery sees what it promises to see: each of its cases, value and gradient, down to rounding and no further."""

import math
import re

import numpy as np
import pytest

from grpo_fast import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped, reference
from grpo_fast.conformance import check, comparing, identify
from grpo_fast.conformance.calling import Loss, batch
from grpo_fast.conformance.cases import cases

EPS = np.finfo(float).eps
DUAL = {"surrogate": Clip(0.2, 0.28, 3.0), "kl": K3(0.04), "aggregation": "token-mean"}
VARIOUS = [
    DUAL,
    {"surrogate": CISPO(2.0, 0.5), "kl": K2(0.04, False, "score"), "aggregation": "seq-mean-token-mean"},
    {"surrogate": SAPO(1.0, 1.05), "trust_region": Band(0.5, 2.0), "aggregation": "token-sum", "normalizer": 64.0},
    {"surrogate": Clip(0.1), "importance_sampling_level": "sequence", "kl": K1(0.04, "sequence")},
    {"surrogate": GMPO(0.4, 0.3), "importance_sampling_level": "sequence"},
    {"surrogate": VESPO(), "importance_sampling_level": "sequence"},
]


def right(**options):
    """A loss in NumPy that is `grpo_loss` with these options."""

    def loss(logps, old_logps, advantages, ref_logps, mask):
        result = reference.grpo_loss(logps, old_logps, advantages, ref_logps, mask=mask, grad=True, **options)
        return result.loss, result.grad

    return loss


def battery(options):
    return list(cases(options, Loss(right(**options)), True))


# --- which cases there are --------------------------------------------------------------------------------------------
def test_every_kind_of_input_is_there():
    found = battery(DUAL)
    names = [case.name for case in found]
    for words in (
        "one token",
        "padding: right",
        "padding: left",
        "padding: holes",
        "rows permuted",
        "a copy with more padding",
        "a micro-batch of it",
        "a sequence without a token",
        "no token at all",
        "advantages one per token",
        "a row with A = 0",
        "many rows",
        "many tokens in a row",
        "A = 0",
        "tiny log-ratios",
        "a tiny KL",
        "log ρ = 80",
        "log ρ = -80",
        "improbable tokens",
        "−inf in all where masked",
        *(f"{name} = {value} where masked" for name in ("logps", "old_logps", "ref_logps") for value in ("nan", "inf")),
        *(f"a tie at log ρ = {math.log(ratio):.6g}" for ratio in (0.8, 1.28, 3.0)),
    ):
        assert words in names, words
    assert max(case.at.logps.shape[0] for case in found) >= 65
    assert max(case.at.logps.shape[1] for case in found) >= 130
    ranges = [np.abs(c.at.logps - c.at.ref_logps)[c.at.mask].max(initial=0) for c in found if c.name == "a tiny KL"]
    assert min(ranges) < 2e-7
    assert sum(name == "a micro-batch of it" for name in names) > 1


@pytest.mark.parametrize(
    ("options", "ratios"),
    [
        ({"surrogate": SAPO(1.0, 1.05), "trust_region": Band(0.5, 2.0)}, (0.5, 2.0)),
        ({"surrogate": CISPO(5.0, 0.7)}, (0.7, 5.0)),
        ({"surrogate": GMPO(0.4, 0.3), "importance_sampling_level": "sequence"}, (math.exp(-0.4), math.exp(0.3))),
    ],
)
def test_every_bound_of_the_ratio_is_a_tie(options, ratios):
    names = {case.name for case in battery(options) if case.kind == "tie"}
    assert names == {f"a tie at log ρ = {math.log(ratio):.6g}" for ratio in ratios}


@pytest.mark.parametrize("options", VARIOUS, ids=lambda options: type(options.get("surrogate")).__name__)
def test_what_is_right_agrees_in_every_case(options):
    loss = Loss(right(**options))
    assert [case.name for case in battery(options) if comparing.compare(loss, options, case)] == []


# --- how much is too much ---------------------------------------------------------------------------------------------
def off_by(options, case, units, of):
    """The right loss, off by so many of the bounds, in the value or in the gradient of one unmasked token."""
    size, rows = comparing.sizes(options, comparing._finite(case.at), ("mask", "old_logps"))
    exact = right(**options)

    def loss(**arrays):
        value, grad = exact(**arrays)
        if of == "loss":
            return value + units * 32 * EPS * size, grad
        if grad.shape == rows.shape:  # else it is the first call, which finds out how it is to be called
            place = tuple(np.argwhere(case.at.mask)[0])
            grad[place] += units * 32 * EPS * rows[place]
        return value, grad

    return lambda logps, old_logps, advantages, ref_logps, mask: loss(
        logps=logps, old_logps=old_logps, advantages=advantages, ref_logps=ref_logps, mask=mask
    )


@pytest.mark.parametrize("of", ["loss", "gradient"])
@pytest.mark.parametrize("options", VARIOUS, ids=lambda options: type(options.get("surrogate")).__name__)
def test_a_difference_of_three_bounds_is_seen_in_every_case_and_a_third_in_none(options, of):
    for case in battery(options):
        size, _ = comparing.sizes(options, comparing._finite(case.at), ("mask", "old_logps"))
        if not size or (case.kind == "tie" and of == "gradient"):  # there may be nothing to be off by
            continue
        seen = comparing.compare(Loss(off_by(options, case, 3, of)), options, case)
        assert seen is not None, case.name
        assert seen.where == of
        assert comparing.compare(Loss(off_by(options, case, 1 / 3, of)), options, case) is None, case.name


def test_at_a_tie_the_gradient_lies_between_those_beside_it():
    looked_at = 0
    for case in (case for case in battery(DUAL) if case.kind == "tie"):
        beside = [
            comparing.expected(DUAL, case.at._replace(logps=case.at.logps + d), ("old_logps", "mask"))[1].item()
            for d in (-1e-9, 1e-9)
        ]
        if np.isclose(*beside, rtol=1e-3):
            continue
        looked_at += 1
        for factor, is_wrong in ((0.0, False), (0.5, False), (1.0, False), (-0.1, True), (1.1, True)):

            def loss(logps, old_logps, advantages, ref_logps, mask, factor=factor):
                value, _ = right(**DUAL)(logps, old_logps, advantages, ref_logps, mask)
                free = right(**DUAL | {"surrogate": Unclipped(), "kl": None})
                _, slope = free(logps, old_logps, advantages, ref_logps, mask)
                _, of_kl = right(**DUAL)(logps, old_logps, 0 * advantages, ref_logps, mask)
                return value, of_kl + factor * slope

            found = comparing.compare(Loss(loss), DUAL, case)
            assert (found is not None) == is_wrong, (case.name, factor)
    assert looked_at == 3


def test_the_sizes_are_those_of_the_terms():
    """Of one token by hand: (|s| + |∂s/∂logp|)·(1 + (|log ρ| + |log π_θ|)/32), SAPO's and VESPO's larger."""
    at = batch([[-1.0]], [[-1.5]], [2.0])
    takes = ("old_logps", "mask")
    rho = math.exp(0.5)
    rounded = 1 + (0.5 + 1.0) / 32
    of_clip = comparing.sizes({"surrogate": Unclipped()}, at, takes)
    assert of_clip[0] == pytest.approx(2 * 2 * rho * rounded)
    assert of_clip[1] == pytest.approx(of_clip[0])
    s, slope, *_ = reference.surrogate_term(SAPO(1.0, 1.0), np.array([rho]), np.array([2.0]), np.array([-1.0]))
    of_sapo = comparing.sizes({"surrogate": SAPO(1.0, 1.0)}, at, takes)
    assert of_sapo[0] == pytest.approx(float(abs(s[0]) + abs(slope[0])) * rounded * (1 + rho))
    far = batch([[-1.0]], [[-1.0]], [0.0], [[-3.0]])
    of_kl = comparing.sizes({"surrogate": Unclipped(), "kl": K3(0.5)}, far, takes)
    assert of_kl[0] == pytest.approx(0.5 * (math.exp(-2) + 4 + 2 + 1))


def test_in_float32_the_inputs_are_rounded_too():
    at = batch([[-3.0, -100.0]], [[-1.5, 0.0]], [2.0], [[-2.0, -7.0]], [[1, 0]])

    def single(logps, old_logps, advantages, ref_logps, mask):
        value, grad = right(**DUAL)(logps, old_logps, advantages, ref_logps, mask)
        return np.float32(value), grad

    assert comparing._inputs(Loss(single), at) == 4.0  # 1 + the largest that counts
    assert comparing._inputs(Loss(right(**DUAL)), at) == 1.0


def test_a_normalizer_may_be_a_function_of_the_mask():
    def tokens(mask):
        return float(max(np.count_nonzero(mask), 1))

    asked = {"surrogate": Clip(0.2), "aggregation": "token-sum"}
    loss = right(surrogate=Clip(0.2), aggregation="token-mean")
    assert check(loss, normalizer=tokens, **asked).ok
    assert not check(loss, normalizer=lambda mask: 2 * tokens(mask), **asked).ok


# --- options as far as they go ----------------------------------------------------------------------------------------
INFINITY = math.inf
SEQUENCE = {"importance_sampling_level": "sequence"}
EDGES = [
    {"surrogate": CISPO(90.0)},
    {"surrogate": Clip(0.2, 0.28, delta=90.0)},
    {"surrogate": Clip(0.2, 53.6)},
    {"surrogate": Clip(0.0, 0.2)},
    {"surrogate": Clip(0.0)},
    {"surrogate": CISPO(5.0, 2.0)},
    {"surrogate": CISPO(0.28)},
    {"surrogate": VESPO(2.0, 0.0, 3.0, 2.0)} | SEQUENCE,
    {"surrogate": VESPO(0.0, 1.0, 0.0, 1.0)} | SEQUENCE,
    {"surrogate": GMPO(3.0)} | SEQUENCE,
    {"surrogate": GMPO(1.999)} | SEQUENCE,
    {"surrogate": Unclipped(), "trust_region": TV(0.99)},
    {"surrogate": Unclipped(), "trust_region": TV(0.0)},
    {"surrogate": Unclipped(), "trust_region": BinaryKL(5.0)},
    {"surrogate": Clip(0.2), "trust_region": BinaryKL(5.0, 0.03)},
    {"surrogate": Unclipped(), "trust_region": Band(1.0, INFINITY)},
]


@pytest.mark.parametrize("options", EDGES, ids=lambda options: " ".join(map(str, options.values())))
def test_options_at_their_limits_are_identified(options):
    report = identify(right(aggregation="token-mean", **options))
    assert report.ok, report
    assert not report.findings
    assert report.options == options | {"aggregation": "token-mean"}


@pytest.mark.parametrize("kl", [K1(0.04), K2(0.04), K3(0.04), K1(0.04, False), K2(0.04, False), K3(0.04, False)])
def test_on_policy_the_weight_of_the_kl_is_in_its_gradient(kl):
    def loss(logps, advantages, ref_logps, mask):
        result = reference.grpo_loss(logps, None, advantages, ref_logps, mask=mask, grad=True, kl=kl)
        return result.loss, result.grad

    report = identify(loss)
    assert report.ok, report
    assert report.options["kl"] == kl


def test_what_grpo_loss_refuses_is_told_as_such():
    """A trust region of tokens with the ratio of a sequence: each is an option, both are not."""

    def loss(logps, old_logps, advantages, mask):
        mask = mask > 0
        counts = np.maximum(mask.sum(1, keepdims=True), 1)
        x = ((logps - old_logps) * mask).sum(1, keepdims=True) / counts
        A = advantages[:, None]
        moved = np.exp(logps) - np.exp(old_logps)
        keep = ~((A > 0) & (moved > 0.2) | (A < 0) & (moved < -0.2)) & mask
        kept = (np.exp(x) * A * keep / counts).sum(1, keepdims=True) / len(mask)
        return -kept.sum(), -(kept / counts * mask)

    report = identify(loss)
    assert not report.ok
    assert report.differs
    assert report.options is None
    assert re.search("grpo_loss refuses what it computes", report.differs[-1].what)
    assert report.parts["trust_region"] == TV(0.2)

"""`identify` names what a loss computes, and what is wrong with it; `check` holds it to what it should compute."""

import importlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import python

from grpo_fast import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped, reference
from grpo_fast.__main__ import main
from grpo_fast.conformance import check, identify
from grpo_fast.terms import Options

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from planted import PLANTED  # noqa: E402 - they need torch
from planted_means import padded_width  # noqa: E402 - as it does
from planted_policy import squared  # noqa: E402 - as it does
from right_losses import EXACT, RIGHT, dapo, gspo  # noqa: E402 - as it does

DEFAULTS = Options()._asdict()


def as_called(options):
    return DEFAULTS | options


# --- what is right ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in ("grpo", "gspo") else pytest.mark.slow) for x in RIGHT]
)
def test_a_loss_without_a_defect_is_identified(name):
    loss, options = RIGHT[name]
    report = identify(loss)
    assert report.ok, report
    assert as_called(report.options) == as_called(options)


def numbers(low, high, digits=3):
    return st.integers(int(low * 10**digits), int(high * 10**digits)).map(lambda n: n / 10**digits)


def built(kind, *values):
    """An option with these values, and its defaults for the others, which `st.builds` would draw for some."""
    return st.tuples(*values).map(lambda given: kind(*given))


@st.composite
def options(draw):
    """Random options of `grpo_loss`, with numbers as people choose them."""
    level = draw(st.sampled_from(["token", "sequence", "sequence_token"]))
    surrogates = [
        built(Clip, numbers(0.001, 0.9), numbers(0.001, 0.8)),
        built(Clip, numbers(0.05, 0.4), numbers(0.05, 0.4), numbers(1.5, 6, 2)),
        built(CISPO, numbers(1.1, 8), numbers(0, 0.9)),
        built(CISPO, numbers(1.1, 8)),
        built(SAPO, numbers(0.3, 3), numbers(0.3, 3)),
        st.just(Unclipped()),
    ]
    if level == "sequence":
        surrogates += [
            built(VESPO, *[numbers(0.5, 4)] * 4),
            built(GMPO, numbers(0.1, 0.6), numbers(0.1, 0.6)),
        ]
    weightings = [(True, "own"), (False, "own"), (False, "score")] + [("sequence", "own")] * (level == "sequence")
    terms = [built(kind, numbers(0.001, 0.2), st.just(w), st.just(g)) for kind in (K1, K2, K3) for w, g in weightings]
    terms += [built(kind, numbers(0.001, 0.2), st.just(False), st.just("k2")) for kind in (K1, K3)]
    regions = [st.none(), built(Band, numbers(0.2, 0.8), numbers(1.3, 4))]
    if level == "token":
        regions += [built(kind, numbers(0.05, 0.6), numbers(0.05, 0.6)) for kind in (TV, BinaryKL)]
    aggregation, normalizer = draw(
        st.sampled_from(
            [
                ("token-mean", None),
                ("token-sum", None),
                ("token-sum", 1536.0),
                ("seq-mean-token-mean", None),
                ("seq-mean-token-mean", 64.0),
                ("seq-mean-token-sum", None),
            ]
        )
    )
    return {
        "surrogate": draw(st.one_of(surrogates)),
        "kl": draw(st.one_of(st.none(), *terms)),
        "trust_region": draw(st.one_of(regions)),
        "importance_sampling_level": level,
        "aggregation": aggregation,
        "normalizer": normalizer,
    }


@pytest.mark.parametrize("name", EXACT)
def test_numbers_that_are_not_short_are_no_fault(name):
    loss, options = EXACT[name]
    report = identify(loss)
    assert report.ok, report
    assert {finding.what for finding in report.findings} <= {"NaN or infinity at a masked position makes the loss NaN"}
    for field, value in options.items():
        found = report.options[field]
        if isinstance(value, tuple):  # up to the last digits of its numbers
            assert type(found) is type(value)
            rounded = [(float(f"{x:.6g}") if isinstance(x, float) else x) for x in (*found, *value)]
            assert rounded[: len(found)] == rounded[len(found) :]
        else:
            assert found == value
    report = check(loss, **options)
    assert {finding.what for finding in report.findings} <= {"NaN or infinity at a masked position makes the loss NaN"}


@pytest.mark.slow
@settings(max_examples=60)
@given(options=options())
def test_any_options_are_identified(options):
    """The numbers are those that were chosen, but where a trust region hides one."""

    def loss(logps, old_logps, advantages, ref_logps, mask):
        result = reference.grpo_loss(logps, old_logps, advantages, ref_logps, mask=mask, grad=True, **options)
        return result.loss, result.grad

    report = identify(loss)
    assert report.ok, report
    assert not report.findings
    assert report.disagreed == 0
    if isinstance(options["surrogate"], CISPO) and options["importance_sampling_level"] == "sequence_token":
        options = options | {"importance_sampling_level": "sequence"}  # its weight is held constant: they are one
    if options["trust_region"] is None:
        assert as_called(report.options) == options


@pytest.mark.parametrize("region", [None, Band(0.2, 1.3), Band(0.95, 1.2)])
def test_the_bounds_of_tokens_are_found_where_no_mean_reaches_them(region):
    options = {"surrogate": GMPO(0.1, 0.313), "trust_region": region, "importance_sampling_level": "sequence"}

    def loss(logps, old_logps, advantages, mask):
        result = reference.grpo_loss(logps, old_logps, advantages, mask=mask, grad=True, **options)
        return result.loss, result.grad

    report = identify(loss)
    assert report.ok, str(report)
    assert report.options["surrogate"] == options["surrogate"]
    assert report.options.get("trust_region") == region


# --- what is not ------------------------------------------------------------------------------------------------------
def test_a_loss_that_is_no_policy_gradient_is_told_what_it_is():
    report = identify(squared)
    whats = [finding.what for finding in report.differs]
    A = report.differs[0].example.advantages.item()
    assert f"A = {A:g} counts" in report.differs[0].amount
    assert whats[0] == "is not linear in the advantage"
    assert "a KL term to the old policy" in whats[1]
    assert len(whats) == 2


def test_what_has_no_name_is_reported_with_numbers():
    def odd(logps, old_logps, advantages, mask):
        ratio = (logps - old_logps).exp()
        return -((torch.tanh(ratio) * advantages[:, None]) * mask).sum() / mask.sum().clamp(min=1)

    (finding,) = identify(odd).differs
    assert "none that grpo_loss has" in finding.what
    assert f"1: {np.sinh(1) * np.cosh(1):.6g}, 1;" in finding.amount  # tanh ρ, in units of its slope at ρ = 1
    assert finding.example is not None


# --- check ------------------------------------------------------------------------------------------------------------
def test_check_passes_what_it_is_asked_for_and_says_what_differs():
    asked = {"surrogate": Clip(0.2, 0.28), "aggregation": "token-mean"}
    assert check(dapo, **asked).ok
    report = check(dapo, **asked | {"surrogate": Clip(0.21, 0.27), "kl": K3(0.04)})
    whats = [finding.what for finding in report.differs]
    assert whats[:2] == [
        "epsilon of the policy term is 0.2, not 0.21",
        "epsilon_high of the policy term is 0.28, not 0.27",
    ]
    assert whats[2].startswith("has no KL term")
    assert all(finding.example is not None and finding.amount for finding in report.differs)
    for finding, other in zip(report.differs, ({"epsilon": 0.2}, {"epsilon_high": 0.28}), strict=False):
        one, two = (
            reference.grpo_loss(
                *finding.example[:3], mask=finding.example.mask, surrogate=surrogate, aggregation="token-mean"
            )
            for surrogate in (Clip(0.21, 0.27), Clip(0.21, 0.27)._replace(**other))
        )
        assert abs(one.loss - two.loss) > 1e-3  # by this alone


def test_check_shows_a_gradient_that_alone_is_another():
    loss, options = RIGHT["gspo_token"]
    (finding,) = check(loss, **options | {"importance_sampling_level": "sequence"}).differs
    assert finding.what == "importance_sampling_level is 'sequence_token', not 'sequence'"
    assert finding.example is not None
    assert finding.amount.startswith("gradient ")


def test_one_cause_is_told_once():
    report = check(padded_width, surrogate=Clip(0.2), aggregation="seq-mean-token-mean")
    assert ["divides by the padded width" in finding.what for finding in report.differs] == [True]


def test_a_short_list_of_the_worst_first():
    report = check(dapo, surrogate=Clip(0.1), aggregation="token-mean")
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities)
    assert len({finding.what for finding in report.findings}) == len(report.findings)


def test_without_options_there_is_a_finding():
    for loss, _, _ in (PLANTED["random"], PLANTED["temperature"], PLANTED["no exp"]):
        report = identify(loss)
        assert report.options is None
        assert report.differs
        assert not report.ok


def test_the_smallest_input_shows_it():
    example = check(dapo, surrogate=Clip(0.1, 0.28), aggregation="token-mean").differs[0].example
    assert example.logps.shape == (1, 1)
    wanted = reference.grpo_loss(*example[:4], mask=example.mask, surrogate=Clip(0.1, 0.28), aggregation="token-mean")
    assert abs(dapo(*map(torch.tensor, (*example[:3], example.mask))).item() - wanted.loss) > 1e-3


def test_a_normalizer_for_all_micro_batches():
    (finding,) = check(dapo, surrogate=Clip(0.2, 0.28), aggregation="token-mean", normalizer=32.0).differs
    assert "micro-batches do not add" in finding.what


def test_a_floor_is_no_normalizer():
    report = check(PLANTED["floor"][0], surrogate=Clip(0.2), aggregation="token-sum", normalizer=64.0)
    assert not report.ok
    assert "is a floor" in report.differs[0].what
    assert check(RIGHT["dr_grpo"][0], surrogate=Clip(0.2), aggregation="token-sum", normalizer=1024.0).ok


def without_mask(aggregation, normalizer):
    """A right loss in NumPy that takes no mask."""

    def loss(logps, old_logps, advantages):
        options = {"aggregation": aggregation, "normalizer": normalizer}
        result = reference.grpo_loss(logps, old_logps, advantages, grad=True, **options)
        return result.loss, result.grad

    return loss


@pytest.mark.parametrize("aggregation", ["token-sum", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_a_constant_is_one_without_a_mask_too(aggregation):
    options = {"aggregation": aggregation, "normalizer": 64.0}
    report = check(without_mask(**options), **options)
    assert report.ok, report
    assert not report.findings


def test_a_floor_is_none_without_a_mask_either():
    def loss(logps, old_logps, advantages):
        return without_mask("token-sum", max(logps.size, 64))(logps, old_logps, advantages)

    (finding,) = check(loss, aggregation="token-sum", normalizer=64.0).differs
    assert "64 is a floor: with more tokens it is the number of tokens of the batch" in finding.what


def test_the_rounding_of_the_ratio_of_gspo_token_is_none_of_its_faults():
    """The ratio is that of x + log π_θ − log π_θ, whose rounding is relative to log π_θ."""
    loss, options = RIGHT["gspo_token"]

    def masked(mask, **arrays):
        arrays = {name: x if name == "advantages" else torch.where(mask > 0, x, 0) for name, x in arrays.items()}
        return loss(mask=mask, **arrays)

    def given(logps, old_logps, advantages, mask):
        return masked(mask, logps=logps, old_logps=old_logps, advantages=advantages)

    report = check(given, strict=True, **options)
    assert report.ok, report
    assert report.disagreed == 0


def test_the_fraction_beside_a_small_difference_is_one_of_it():
    def loss(logps, old_logps, advantages, mask):
        return dapo(logps, old_logps, advantages, mask) * (1 + 1e-9)

    (finding,) = [x for x in identify(loss).fragile if "some digits" in x.what]
    assert ", 1e−09 of it, " in finding.amount


def test_numbers_of_float32_are_read_as_they_were_meant():
    def constants(logps, old_logps, advantages, mask):
        A, ratio = advantages[:, None], (logps - old_logps).exp()
        s = torch.min(ratio * A, ratio.clamp(float(np.float32(0.8)), float(np.float32(1.2))) * A)
        return -(s * mask).sum() / mask.sum().clamp(min=1)

    def ratio(logps, old_logps, advantages, mask):
        return dapo((logps - old_logps).float(), 0 * old_logps.float(), advantages, mask)

    assert identify(constants).options["surrogate"] == Clip(0.2)
    report = identify(ratio)
    assert report.options["surrogate"] == Clip(0.2, 0.28)
    assert any("computed in float32" in note for note in report.notes)


def test_the_example_of_a_position_dropped_has_a_token_that_counts():
    loss, _, _ = PLANTED["first dropped"]
    (finding,) = identify(loss).differs
    assert "nan" not in finding.amount
    assert finding.example.mask[:, 1:].any()


@pytest.mark.parametrize("defect", ["value", "gradient"])
def test_a_difference_beyond_rounding_is_seen_in_value_and_gradient(defect):
    def loss(logps, old_logps, advantages, mask):
        result = reference.grpo_loss(logps, old_logps, advantages, mask=mask, grad=True)
        off = 1 + 1e-3
        return result.loss * (off if defect == "value" else 1), result.grad * (off if defect == "gradient" else 1)

    assert not check(loss).ok


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"check takes the options .*got 'epsilon'"):
        check(dapo, epsilon=0.2)
    with pytest.raises(TypeError, match="got 'log_probs': did you mean 'logps'"):
        identify(lambda log_probs, advantages: 0.0)
    with pytest.raises(TypeError, match="must return a scalar, got shape"):
        identify(lambda logps, advantages: torch.as_tensor(logps) * 1)
    with pytest.raises(ValueError, match="framework must be one of"):
        identify(dapo, framework="tensorflow")
    with pytest.raises(TypeError, match="bfloat16"):
        identify(lambda logps, advantages: (logps * advantages[:, None]).sum().bfloat16(), framework="torch")
    with pytest.raises(TypeError, match=r"ask for its \.ok"):
        bool(identify(gspo))


def test_the_line_says_how_often_the_loss_was_called(monkeypatch, capsys):
    calls = []

    def loss(logps, old_logps, advantages, mask):
        calls.append(None)
        return dapo(logps, old_logps, advantages, mask)

    def shown():
        return [int(x) for x in re.findall(r", (\d+) calls", capsys.readouterr().err)]

    # By its name the package has the function.
    monkeypatch.setattr(importlib.import_module("grpo_fast.conformance.progress"), "_EVERY", 0.0)
    for probe in (identify, lambda *given, **more: check(*given, surrogate=Clip(0.1), **more)):
        calls.clear()
        probe(loss, progress=True)
        counts = shown()
        assert counts == sorted(counts)
        assert 0 < counts[0] < len(calls) / 10
        assert len(calls) / 3 < counts[-1] <= len(calls)


# --- other frameworks -------------------------------------------------------------------------------------------------
def np_dapo(logps, old_logps, advantages, mask):
    ratio, A = np.exp(logps - old_logps), advantages[:, None]
    return -(np.minimum(ratio * A, np.clip(ratio, 0.8, 1.28) * A) * mask).sum() / max(mask.sum(), 1)


def test_numpy_without_a_gradient():
    report = identify(np_dapo)
    assert report.ok
    assert report.options == {"surrogate": Clip(0.2, 0.28), "aggregation": "token-mean"}
    assert any("no gradient" in note for note in report.notes)


def test_an_answer_in_float32():
    def single(logps, old_logps, advantages, mask):
        return dapo(logps.float(), old_logps.float(), advantages.float(), mask.float())

    report = identify(single)
    assert report.ok, report
    assert (report.dtype, report.options["surrogate"]) == ("float32", Clip(0.2, 0.28))


def test_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")

    def loss(logps, old_logps, advantages, mask):
        ratio, A = jax.numpy.exp(logps - old_logps), advantages[:, None]
        s = jax.numpy.minimum(ratio * A, jax.numpy.clip(ratio, 0.8, 1.28) * A)
        return -(s * mask).sum() / jax.numpy.maximum(mask.sum(), 1)

    report = identify(loss)
    assert report.ok, report
    assert report.options == {"surrogate": Clip(0.2, 0.28), "aggregation": "token-mean"}


def test_nothing_but_numpy_is_imported_for_a_loss_of_numpy():
    code = """if True:
        import sys
        import numpy as np
        from grpo_fast.conformance import identify
        def loss(logps, advantages): return -(logps * advantages[:, None]).mean()
        identify(loss, framework="numpy")
        print([name for name in ("torch", "jax") if name in sys.modules])
    """
    assert python(code).strip() == "[]"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def loss(logps, advantages, mask):\n    return -(logps * advantages[:, None] * mask).sum()\n"
    )
    assert main(["identify", "mine:loss"]) == 0
    assert "aggregation='token-sum'" in capsys.readouterr().out
    assert main(["identify", "mine.py:los"]) == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
    assert main(["identify", "mine"]) == 2
    assert "must be module:function" in capsys.readouterr().err


def test_the_exit_code_says_that_it_differs(capsys):
    import planted_means

    assert main(["identify", f"{planted_means.__file__}:padded_width"]) == 1
    assert "divides by the padded width" in capsys.readouterr().out


def test_a_report_is_a_page():
    text = str(identify(padded_width))
    assert max(map(len, text.splitlines())) <= 160
    assert "nearest to  grpo_loss(…, surrogate=Clip(epsilon=0.2)" in text
    assert re.fullmatch(r"NOT OK: \S+ \(torch, answers in float64\)", text.splitlines()[0])
    assert text.splitlines()[-1].startswith("1 differ, 1 fragile; ")


def test_the_examples_of_a_loss_with_swapped_arrays_are_as_it_is_called():
    def loss(logps, old_logps, advantages, ref_logps, mask):
        ratio, d = (logps - ref_logps).exp(), old_logps - logps
        s = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return ((-s - 0.04 * (d.exp() - d - 1)) * mask).sum() / mask.sum().clamp(min=1)

    of_arrays, of_sign = identify(loss).differs
    assert "are swapped" in of_arrays.what
    assert "sign of the KL term is reversed" in of_sign.what
    at = of_sign.example
    assert loss(*map(torch.tensor, (*at[:4], at.mask.astype(float)))).item() < -1e-3  # what is to be at least 0


def test_reports_are_equal_if_they_say_the_same():
    one, two = identify(padded_width), identify(padded_width)
    assert one == two
    assert one.findings[0] in two.findings
    assert not one.findings[0] != two.findings[0]  # noqa: SIM202 - that of tuples would compare arrays
    assert len({*one.findings, *two.findings}) == len(one.findings)
    assert one != identify(dapo)


def test_options_of_every_report_are_options():
    for name in ("grpo", "gspo"):
        Options(**identify(RIGHT[name][0]).options)

"""How a loss is called: its arguments by any name and in any form, its answer and its errors; and the command."""

import functools
import importlib
import json
import re
import warnings

import numpy as np
import pytest

from grpo_fast import Clip
from grpo_fast.__main__ import main
from grpo_fast.conformance import Normalizer, check, identify
from grpo_fast.conformance.calling import CallFailed, Loss, batch

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from right_losses import clipped, dapo, token_mean  # noqa: E402 - they need torch

DAPO = {"surrogate": Clip(0.2, 0.28), "aggregation": "token-mean"}


# --- names and forms --------------------------------------------------------------------------------------------------
def test_other_names_of_arguments():
    def loss(log_prob, old_log_prob, advantages, response_mask):
        return dapo(log_prob, old_log_prob, advantages, response_mask)

    names = {"logps": "log_prob", "old_logps": "old_log_prob", "mask": "response_mask"}
    report = identify(loss, names=names)
    assert report.ok, report
    assert report.options == DAPO
    assert check(loss, names=names, **DAPO).ok
    with pytest.raises(TypeError, match=r"got 'log_prob', 'old_log_prob', 'response_mask'; say what it calls them"):
        identify(loss)
    with pytest.raises(ValueError, match="names must give each argument one meaning, got 'a' twice"):
        identify(loss, names={"logps": "a", "ref_logps": "a"})
    with pytest.raises(TypeError, match="names must map logps"):
        identify(loss, names=["log_prob"])
    with pytest.raises(ValueError, match=r"a key of names must be one of .*'log_probs'"):
        identify(loss, names={"log_probs": "log_prob"})


@pytest.mark.parametrize("form", ["(B,)", "(B, T)", "(B, 1)"])
def test_every_form_of_advantages(form):
    def loss(logps, old_logps, advantages, mask):
        shape = {"(B,)": logps.shape[:1], "(B, T)": logps.shape, "(B, 1)": (len(logps), 1)}[form]
        assert tuple(advantages.shape) == tuple(shape)
        A = advantages[:, None] if form == "(B,)" else advantages
        return token_mean(clipped((logps - old_logps).exp(), A, 0.2, 0.28), mask)

    report = identify(loss)
    assert report.ok, report
    assert report.options == DAPO
    assert Loss(loss).form == form


def test_advantages_of_tokens_that_are_mixed_over_rows_are_a_note():
    def loss(logps, old_logps, advantages, mask):
        return token_mean(-(logps - old_logps).exp() * advantages[:, None], mask)

    report = identify(loss)
    assert report.ok, report
    assert any("mixed over rows" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["float64", "bool", "int64"])
def test_every_dtype_of_masks(dtype):
    def loss(logps, old_logps, advantages, mask):
        assert str(mask.dtype) == f"torch.{dtype}"
        return dapo(logps, old_logps, advantages, mask)

    assert identify(loss).options == DAPO
    assert Loss(loss).mask_dtype == dtype


def test_a_module_a_partial_and_torchscript():
    class Module(torch.nn.Module):
        def forward(self, logps, old_logps, advantages, mask, epsilon_high: float = 0.28):
            return token_mean(clipped((logps - old_logps).exp(), advantages, 0.2, epsilon_high), mask)

    module = Module()
    assert identify(module).options == DAPO
    assert identify(functools.partial(module, epsilon_high=0.2)).options["surrogate"] == Clip(0.2)
    with pytest.raises(TypeError, match="got the class Module: make an object of it"):
        identify(Module)
    with pytest.raises(TypeError, match="take it of an object, not of its class"):
        identify(Module.forward)

    def script(logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return -(logps * advantages.unsqueeze(1) * mask).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(script)
    assert identify(scripted).options["aggregation"] == "token-sum"


def test_what_cannot_be_called_is_told_with_all_reasons():
    def groups(logps, old_logps, advantages, mask):
        assert len(logps) % 4 == 0, "B must be a multiple of 4"
        return dapo(logps, old_logps, advantages, mask)

    with pytest.raises(
        TypeError, match=r"any number of sequences .* B must be a multiple of 4.*\(test_conformance_cal"
    ):
        identify(groups)

    def positional(logps, advantages, /):
        return 0.0

    with pytest.raises(TypeError, match="positional only"):
        identify(positional)


# --- answers ----------------------------------------------------------------------------------------------------------
def test_the_state_of_torch_does_not_matter():
    def state():
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()

    random_state = torch.random.get_rng_state()
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu")):
        with context:
            before = state()
            report = identify(dapo)
            assert state() == before
        assert report.ok, report
        assert report.options == DAPO
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_a_number_of_torch_is_the_sum_of_nothing():
    def loss(logps, old_logps, advantages, mask):
        return dapo(logps, old_logps, advantages, mask) if mask.sum() else 0.0

    report = identify(loss)
    assert report.ok, report
    assert not any("without a token" in finding.what for finding in report.findings)


@pytest.mark.parametrize("gradient", [lambda g: g.T, lambda g: g.ravel()])
def test_a_gradient_of_another_shape_is_an_error(gradient):
    def loss(logps, advantages):
        return -(logps * advantages[:, None]).sum(), gradient(-np.ones_like(logps) * advantages[:, None])

    with pytest.raises(TypeError, match=r"the gradient must be the second thing that is returned, of shape \(2, 3\)"):
        identify(loss)


def test_an_error_is_told_with_its_place():
    def loss(logps, old_logps, advantages, mask):
        if logps.shape == (2, 2):
            raise RuntimeError("too many")
        return dapo(logps, old_logps, advantages, mask)

    with pytest.raises(CallFailed, match=r"RuntimeError: too many \(test_conformance_calling.py, line \d+\)"):
        Loss(loss)(batch(np.full((2, 2), -1.0)))


@pytest.mark.parametrize(("limit", "severity"), [(25, "fragile"), (4, "differs")])
def test_an_error_far_from_1_leaves_the_rest_readable(limit, severity):
    def loss(logps, old_logps, advantages, mask):
        if ((logps - old_logps) * mask).abs().max() > limit:
            raise RuntimeError("too far")
        return dapo(logps, old_logps, advantages, mask)

    report = identify(loss)
    assert report.options == DAPO, report
    assert [x.severity for x in report.findings if "too far" in x.what] == [severity]


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (lambda x, A: torch.where(x > 1, x.exp() * float("nan"), x.exp()), "the gradient is NaN or infinite"),
        (lambda x, A: torch.where(A < 0, float("nan"), x.exp()), "is NaN or infinite .* advantage of -1"),
        (lambda x, A: x.exp() + 0 * (1 / A), "is NaN or infinite .* advantage of 0"),
    ],
)
def test_what_is_not_finite_is_told_as_such(spoilt, words):
    def loss(logps, old_logps, advantages, mask):
        A = advantages[:, None]
        return token_mean(-spoilt(logps - old_logps, A) * A, mask)

    (finding,) = identify(loss).differs
    assert re.search(words, finding.what), finding


def test_a_loss_that_raises_for_losses_is_not_told_as_one_of_masks():
    def loss(logps, old_logps, advantages, mask):
        if (advantages < 0).any():
            raise RuntimeError("only gains")
        return dapo(logps, old_logps, advantages, mask)

    whats = [finding.what for finding in check(loss, **DAPO).findings]
    assert any("only gains" in what for what in whats)
    assert not any("masked position" in what or "without a token" in what for what in whats)


def test_a_denominator_is_at_least_one():
    assert Normalizer(2.0, (("N", 1.0), ("B′", 1.0)))(np.zeros((2, 3))) == 2.0
    assert Normalizer(2.0, (("N", 1.0), ("max n", 2.0)))(np.array([[1, 1, 0], [1, 0, 0]])) == 2 * 3 * 4


def test_a_normalizer_that_is_a_function_is_to_be_called():
    def loss(logps, old_logps, advantages, mask):
        return (clipped((logps - old_logps).exp(), advantages) * mask).sum() / logps.numel()

    report = identify(loss)
    normalizer = report.options["normalizer"]
    assert normalizer(np.ones((2, 3))) == 6
    assert any("call it with the mask" in note for note in report.notes)
    from grpo_fast import grpo_loss

    with pytest.raises(TypeError, match=r"normalizer must be a number .*: call it for the number"):
        grpo_loss([[-1.0]], None, [1.0], **report.options)


# --- the report and the command ---------------------------------------------------------------------------------------
def test_a_report_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neighbour.py").write_text("SCALE = 2\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour import SCALE\n"
        "def loss(log_prob, advantages, mask):\n"
        "    return -SCALE * (log_prob * advantages[:, None] * mask).sum() / mask.sum().clip(1)\n"
    )
    monkeypatch.chdir("/")
    assert main(["identify", f"{tmp_path}/mine.py:loss", "--names", "logps=log_prob", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == "loss"
    assert not found["ok"]
    assert found["findings"][0]["what"] == "the loss is 2 times as large as the mean it is"
    assert found["options"]["surrogate"] == "CISPO(ratio_max=float('inf'))"
    importlib.sys.modules.pop("neighbour", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "import nothing_of_that_name\n",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ("def loss(:\n", "cannot be imported: SyntaxError"),
        ("open('/nowhere/at/all')\n", r"cannot be imported: FileNotFoundError"),
        ("raise ValueError('no')\n", "cannot be imported: ValueError: no (broken.py, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_bad_input(text, words, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(text)
    assert main(["identify", f"{tmp_path}/broken.py:loss"]) == 2
    assert words in capsys.readouterr().err


def test_arguments_of_the_command(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "def loss(logps, advantages):\n    return -(logps * advantages[:, None]).mean() * (logps == logps)[0, 0]\n"
    )
    assert main(["identify", f"{path}::loss", "--framework", "numpy"]) == 0
    assert "(numpy, answers in float64)" in capsys.readouterr().out
    assert main(["identify", f"{path}:loss", "--framework", "numpy", "--names", "logp=x"]) == 2
    assert "--names must be pairs such as logps=log_prob" in capsys.readouterr().err
    strict = tmp_path / "fragile.py"
    strict.write_text(
        "def loss(logps, advantages, mask):\n    return -(logps * advantages[:, None] * mask).sum() / mask.sum()\n"
    )
    assert main(["identify", f"{strict}:loss"]) == 0
    assert main(["identify", f"{strict}:loss", "--strict"]) == 1

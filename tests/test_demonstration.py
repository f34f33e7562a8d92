"""The demonstration on synthetic samples: what it prints, its exit codes, and that the module alone runs it."""

from functools import partial

import pytest
from interpreter import python

from grpo_fast import _demonstration, grpo_stats
from grpo_fast.__main__ import main
from grpo_fast._demonstration import synthetic_samples


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_demonstration, "side_by_side", partial(_demonstration.side_by_side, seconds=0))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_demonstration(dtype, quick, capsys):
    assert main(["demo", "--samples", "5000", "--dtype", dtype, "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    stats = grpo_stats(*synthetic_samples(5000, dtype, seed=7))
    assert out.startswith("grpo-fast demo, ")
    assert f"5,000 synthetic samples, {dtype}, epsilon 0.2, beta 0.01, seed 7\n" in out
    assert f"\n{stats}\n" in out
    assert f"\n{stats.objective:.15g}\n" in out
    assert out.endswith("by the NumPy reference in float64: they agree\n")
    assert err == ""


def test_a_demonstration_that_disagrees(quick, monkeypatch, capsys):
    monkeypatch.setattr(_demonstration, "grpo_objective", lambda *_: 0.5)
    assert main(["demo", "--samples", "5000"]) == 1
    assert "they DISAGREE" in capsys.readouterr().out


def test_alone_the_module_runs_it_and_says_so():
    script = (
        "import sys, runpy; sys.argv[1:] = {!r}; runpy.run_module('grpo_fast', run_name='__main__', alter_sys=True)"
    )
    for arguments in (["--samples", "1000"], ["demo", "--samples", "1000"]):
        assert python(script.format(arguments)).startswith("grpo-fast demo, ")
    assert "usage: grpo-fast" in python(script.format(["--help"]))

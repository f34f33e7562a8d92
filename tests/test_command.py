"""The command line, mostly over files: results on stdout, the bar on stderr, exit codes, nothing half-written."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from interpreter import python
from samples import samples

import grpo_fast.__main__
from grpo_fast import K2, K3, Clip, grpo_loss, grpo_stats
from grpo_fast.__main__ import main, synthetic_samples

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import PROBABILITIES, table, tokens, write  # noqa: E402


@pytest.fixture
def arrays():
    return tokens(30)


@pytest.fixture
def rollouts(arrays, tmp_path):
    return str(write(tmp_path / "rollouts.parquet", table(arrays)))


@pytest.fixture
def probabilities(tmp_path):
    arrays = dict(zip(PROBABILITIES, samples(1000), strict=True))
    return str(write(tmp_path / "samples.parquet", table(arrays))), arrays


def command(*arguments):
    """In a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = [sys.executable, "-m", "grpo_fast", *arguments]
    return subprocess.run(done, env=environment, capture_output=True, text=True, timeout=300, check=False)


def expected_of(arrays, epsilon, beta):
    return grpo_loss(**arrays, surrogate=Clip(epsilon), kl=K3(beta)).stats


def test_evaluate_in_processes(rollouts, arrays):
    done = command("evaluate", rollouts, "--beta", "0.04", "--json", "--workers", "2")
    assert done.returncode == 0, done.stderr
    expected = {name: None if np.isnan(x) else x for name, x in expected_of(arrays, 0.2, 0.04).as_dict().items()}
    assert json.loads(done.stdout) == expected
    assert "30.0/30.0" in done.stderr


def test_sweep_with_a_picture(rollouts, arrays, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    picture = tmp_path / "sweep.svg"
    grid = ["--epsilon", "0.1,0.2", "--beta", "0,0.04"]
    assert main(["sweep", rollouts, *grid, "--plot", str(picture), "--json", "--no-progress"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["objective"][1][1], err) == (expected_of(arrays, 0.2, 0.04).objective, "")
    assert "</svg>" in picture.read_text("utf-8")
    assert sorted(os.listdir(tmp_path)) == ["rollouts.parquet", "sweep.svg"]
    assert main(["sweep", rollouts, *grid]) == 0
    assert f"{expected_of(arrays, 0.1, 0.04).objective:.6g}" in capsys.readouterr().out


def test_evaluate_prints_what_stats_print(probabilities, capsys):
    path, arrays = probabilities
    assert main(["evaluate", path, "--epsilon", "0.1", "--beta", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{grpo_stats(**arrays, epsilon=0.1, beta=0.5)}\n"
    assert "1.00k/1.00k" in err


def test_the_defaults_are_those_of_the_functions(probabilities, capsys):
    path, arrays = probabilities
    assert main(["evaluate", path, "--no-progress"]) == 0
    assert capsys.readouterr().out == f"{grpo_stats(**arrays)}\n"


@pytest.mark.parametrize("form", ["probabilities", "tokens"])
def test_the_kl_term_without_the_ratio(form, rollouts, arrays, probabilities, capsys):
    path = rollouts
    expected = grpo_loss(**arrays, kl=K3(0.04, importance_weighted=False)).stats
    if form == "probabilities":
        path, arrays = probabilities
        expected = grpo_stats(**arrays, beta=0.04, importance_weighted=False)
    option = ["--no-importance-weighted", "--no-progress", "--json"]
    assert main(["evaluate", path, "--beta", "0.04", *option]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == expected.objective
    assert main(["sweep", path, "--epsilon", "0.2", "--beta", "0.04", *option]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["objective"], found["kl"]) == ([[expected.objective]], expected.kl)


def test_another_kl_term_without_the_ratio(rollouts, arrays, capsys):
    option = ["--kl", "k2", "--no-importance-weighted", "--beta", "0.04", "--no-progress", "--json"]
    expected = grpo_loss(**arrays, kl=K2(0.04, importance_weighted=False)).stats
    for subcommand in (["evaluate", rollouts], ["sweep", rollouts, "--epsilon", "0.2"]):
        assert main([*subcommand, *option]) == 0
        assert json.loads(capsys.readouterr().out)["kl"] == expected.kl


def test_options_of_tokens(rollouts, arrays, capsys):
    options = "--epsilon 0.1 --epsilon-high 0.3 --delta 4 --beta 0.04 --kl k3 --aggregation token-mean --normalizer 9"
    assert main(["evaluate", rollouts, *options.split(), "--batch-size", "7", "--no-progress"]) == 0
    surrogate = Clip(0.1, 0.3, 4)
    expected = grpo_loss(**arrays, surrogate=surrogate, kl=K3(0.04), aggregation="token-mean", normalizer=9).stats
    assert capsys.readouterr() == (f"{expected}\n", "")


def test_several_masks(tmp_path, capsys):
    arrays = tokens(40, optional=True)
    rows = table(arrays).rename_columns(["logps", "old_logps", "advantages", "ref_logps", "completion_mask", "weights"])
    rows = rows.append_column("tool_mask", rows["completion_mask"])
    path = str(write(tmp_path / "a.parquet", rows))
    assert main(["evaluate", path, "--no-progress"]) == 2
    assert "column 'completion_mask' looks like a mask and is not used" in capsys.readouterr().err
    both = ["--columns", "mask=completion_mask", "mask=tool_mask"]
    assert main(["evaluate", path, "--no-progress", "--json", *both]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == arrays["mask"].sum()
    only = [*both[:2], "mask="]
    assert main(["evaluate", path, "--beta", "0.04", "--no-progress", "--json", *only]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == arrays["mask"].sum()
    assert main(["evaluate", path, "--no-progress", *both[:2]]) == 2
    assert "column 'tool_mask' looks like a mask and is not used" in capsys.readouterr().err
    assert main(["evaluate", path, "--beta", "0.04", "--no-progress", "--json", "--columns", "mask="]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == arrays["mask"].size
    assert main(["evaluate", path, "--no-progress", "--columns", "logps=logps", "logps=old_logps"]) == 2
    assert "--columns names two columns for logps, got logps and old_logps" in capsys.readouterr().err


def test_columns(arrays, tmp_path, capsys):
    path = write(
        tmp_path / "rollouts.parquet", table(arrays).rename_columns(["policy", "old_logps", "advantages", "ref_logps"])
    )
    assert main(["evaluate", str(path), "--beta", "0.04", "--columns", "logps=policy", "--no-progress"]) == 0
    assert capsys.readouterr().out == f"{expected_of(arrays, 0.2, 0.04)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nothing.parquet"], "no such file: nothing.parquet"),
        (["evaluate", "FILE", "--epsilon", "-2"], "epsilon must be"),
        (["evaluate", "FILE", "--kl", "k3"], "--kl: not for probability columns"),
        (["evaluate", "FILE", "--columns", "A=B"], r"column 'B' (for A) is missing"),
        (["evaluate", "FILE", "--batch-size", "0"], "batch_size must be"),
        (["evaluate", "FILE", "--workers", "-1"], "--workers must be"),
        (["sweep", "FILE", "--plot", "out.txt"], "--plot must end in .png, .svg or .pdf, got out.txt"),
        (["sweep", "FILE", "--beta", "-1"], "beta must be"),
    ],
)
def test_bad_input_is_one_line(arguments, message, probabilities, capsys):
    assert main([probabilities[0] if word == "FILE" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("grpo-fast: error: ")
    assert (message in err, err.count("\n")) == (True, 1)


@pytest.mark.parametrize(
    "arguments",
    [["evaluate"], ["sweep", "x", "--epsilon", "a,b"], ["evaluate", "x", "--columns", "A"], ["--samples", "0"]],
)
def test_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_bad_file_among_good_ones_prints_no_result(probabilities, tmp_path):
    (tmp_path / "z.parquet").write_bytes(Path(probabilities[0]).read_bytes()[:-20])
    done = command("evaluate", str(tmp_path / "*.parquet"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("grpo-fast: error: ")
    assert "z.parquet: cannot be read" in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_nothing_half_written(error, probabilities, tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need pip install 'grpo_fast[plot]'")

    def half(self, path, **_):
        Path(path).write_text("<svg")
        raise error

    monkeypatch.setattr(figure.Figure, "savefig", half)
    picture = tmp_path / "sweep.svg"
    picture.write_text("of yesterday")
    code = main(["sweep", probabilities[0], "--plot", str(picture), "--no-progress"])
    out, err = capsys.readouterr()
    assert (code, out) == (130 if error is KeyboardInterrupt else 2, "")
    assert ("interrupted" if error is KeyboardInterrupt else "disk full") in err
    assert picture.read_text() == "of yesterday"
    assert sorted(os.listdir(tmp_path)) == ["samples.parquet", "sweep.svg"]


def test_ctrl_c_while_reading(probabilities, monkeypatch, capsys):
    import grpo_fast.files

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo_fast.files, "grpo_stats", interrupted)
    assert main(["evaluate", probabilities[0], "--no-progress"]) == 130
    assert capsys.readouterr() == ("", "grpo-fast: interrupted\n")


# --- the demonstration ------------------------------------------------------------------------------------------------
@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(grpo_fast.__main__, "side_by_side", partial(grpo_fast.__main__.side_by_side, seconds=0))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_demonstration(dtype, quick, capsys):
    assert main(["--samples", "5000", "--dtype", dtype, "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    stats = grpo_stats(*synthetic_samples(5000, dtype, seed=7))
    assert f"5,000 synthetic samples, {dtype}, epsilon 0.2, beta 0.01, seed 7\n" in out
    assert f"\n{stats}\n" in out
    assert f"\n{stats.objective:.15g}\n" in out
    assert out.endswith("by the NumPy reference in float64: they agree\n")
    assert err == ""


def test_a_demonstration_that_disagrees(quick, monkeypatch, capsys):
    monkeypatch.setattr(grpo_fast.__main__, "grpo_objective", lambda *_: 0.5)
    assert main(["--samples", "5000"]) == 1
    assert "they DISAGREE" in capsys.readouterr().out


def test_a_demonstration_of_bad_input(capsys):
    assert main(["--samples", "10", "--epsilon", "-2"]) == 2
    assert "grpo-fast: error: epsilon must be" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["evaluate", "--help"]])
def test_help_where_only_ascii_can_be_written(arguments):
    script = f"import sys; sys.argv[1:] = {arguments!r}; from grpo_fast.__main__ import main; main()"
    assert "usage: grpo-fast" in python(script, PYTHONIOENCODING="ascii")

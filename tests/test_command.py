"""The command line, mostly over files: results on stdout, the bar on stderr, exit codes, nothing half-written."""

import csv
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
from interpreter import python
from samples import samples

import grpo_fast
from grpo_fast import (
    CISPO,
    K2,
    K3,
    SAPO,
    TV,
    Band,
    BinaryKL,
    Clip,
    Unclipped,
    _command,
    _demonstration,
    _jobs,
    _parser,
    _words,
    evaluate,
    grpo_loss,
    grpo_stats,
)
from grpo_fast.__main__ import main
from grpo_fast._columns import ARGUMENTS
from grpo_fast.files import sweep, worst

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
import rollouts as made_up  # noqa: E402
from rollout_files import PROBABILITIES, table, tokens, write  # noqa: E402

BY_SEQUENCE = {"importance_sampling_level": "sequence"}


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


def exit_code_of(arguments):
    """That of the process."""
    try:
        return main(arguments)
    except SystemExit as ended:  # by argparse
        return ended.code


def expected_of(arrays, epsilon, beta):
    return grpo_loss(**arrays, surrogate=Clip(epsilon), kl=K3(beta)).stats


def test_evaluate_in_processes(rollouts, arrays):
    done = command("evaluate", rollouts, "--beta", "0.04", "--json", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected_of(arrays, 0.2, 0.04).as_dict()
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


@pytest.fixture
def run(tmp_path):
    """A run of three steps, and the arguments of each."""
    folder = tmp_path / "run"
    folder.mkdir()
    steps = {step: tokens(8, seed=step) for step in (1, 2, 10)}
    for step, arrays in steps.items():
        rows = table(arrays).append_column("step", pa.array([step] * 8))
        write(folder / f"{step}.parquet", rows)
    return str(folder), steps


def printed(capsys, *arguments):
    """What a subcommand prints."""
    assert main([*arguments, "--no-progress"]) == 0
    return capsys.readouterr().out


def test_by_is_a_row_for_each_value(run, capsys):
    folder, steps = run
    expected = {step: grpo_loss(**arrays, kl=K3(0.04)).stats for step, arrays in steps.items()}
    line = ["evaluate", folder, "--by", "step", "--beta", "0.04"]
    assert json.loads(printed(capsys, *line, "--json")) == [{"step": k} | x.as_dict() for k, x in expected.items()]
    rows = list(csv.DictReader(printed(capsys, *line, "--csv").splitlines()))
    assert [{name: float(x) for name, x in row.items()} for row in rows] == [
        {"step": k} | x.as_dict() for k, x in expected.items()
    ]
    head, *lines = printed(capsys, *line).splitlines()
    assert head.split()[:4] == ["step", "objective", "kl", "clipped"]
    assert [text.split()[:2] for text in lines] == [[str(k), f"{x.objective:.5g}"] for k, x in expected.items()]
    assert len({len(text) for text in (head, *lines)}) == 1
    assert printed(capsys, *line, "--csv", "--workers", "2") == printed(capsys, *line, "--csv")


def test_csv_of_one_result_and_of_sweeps(run, capsys):
    folder, steps = run
    (row,) = csv.DictReader(printed(capsys, "evaluate", folder, "--csv").splitlines())
    assert float(row["objective"]) == evaluate(folder).objective
    line = ["sweep", folder, "--epsilons", "0.1,0.2", "--betas", "0,0.04"]
    whole = sweep(folder, epsilons=[0.1, 0.2], betas=[0, 0.04])
    rows = list(csv.DictReader(printed(capsys, *line, "--csv").splitlines()))
    assert [float(row["objective"]) for row in rows] == whole.objective.ravel().tolist()
    assert [(row["epsilon"], row["beta"]) for row in rows[:2]] == [("0.1", "0.0"), ("0.1", "0.04")]
    rows = list(csv.DictReader(printed(capsys, *line, "--csv", "--by", "step").splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in steps for _ in range(4)]
    assert "step 10\n\n" in printed(capsys, *line, "--by", "step")
    assert len(json.loads(printed(capsys, *line, "--by", "step", "--json"))) == 3


def test_a_column_that_is_called_as_a_diagnostic(run, tmp_path, capsys):
    rows = table(run[1][1]).append_column("tokens", pa.array(["a"] * 8))
    path = str(write(tmp_path / "a.parquet", rows))
    (found,) = json.loads(printed(capsys, "evaluate", path, "--by", "tokens", "--json"))
    assert found["by tokens"] == "a"
    assert found["tokens"] == len(run[1][1]["logps"])


def test_a_run_with_a_picture(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    line = ["evaluate", run[0], "--by", "step", "--beta", "0.04", "--json"]
    picture = tmp_path / "run.svg"
    assert printed(capsys, *line, "--plot", str(picture)) == printed(capsys, *line)
    assert "</svg>" in picture.read_text("utf-8")
    assert printed(capsys, "evaluate", run[0], "--plot", str(picture)) == printed(capsys, "evaluate", run[0])


def test_a_corrected_run(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    made_up.write(tmp_path / "run", steps=2, rows=8, tokens=20)
    line = ["evaluate", str(tmp_path / "run"), "--by", "step", "--rollout-correction", "level=token"]
    plain = printed(capsys, *line)
    assert "sampler ess" in plain
    assert printed(capsys, *line, "--plot", str(tmp_path / "run.svg")) == plain
    assert "log π_old − log π_rollout" in (tmp_path / "run.svg").read_text("utf-8")


def test_a_run_without_the_sampler_cannot_be_corrected(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    line = ["evaluate", run[0], "--rollout-correction", "level=token"]
    for more in ([], ["--by", "step"], ["--plot", str(tmp_path / "run.svg")]):
        assert main([*line, *more])
        assert "column 'rollout_logps' is missing" in capsys.readouterr().err
    assert main([*line, "--columns", "rollout_is_weights=x", "--plot", str(tmp_path / "run.svg")])
    assert "must not name rollout_is_weights beside" in capsys.readouterr().err
    assert not (tmp_path / "run.svg").exists()


def test_worst(run, capsys):
    found = worst(run[0], n=3)
    line = ["worst", run[0], "-n", "3"]
    assert json.loads(printed(capsys, *line, "--json")) == [x.as_dict() for x in found]
    rows = list(csv.DictReader(printed(capsys, *line, "--csv", "--workers", "2").splitlines()))
    assert [(float(row["value"]), row["file"], int(row["row"])) for row in rows] == [x[:3] for x in found]
    head, *lines = printed(capsys, *line).splitlines()
    assert head.split() == ["log-ratio", "step", "token", "of", "row", "file"]
    assert [text.split()[-1] for text in lines] == [x.file for x in found]


def evaluated(capsys, *arguments):
    """What ``grpo-fast evaluate`` finds."""
    assert main(["evaluate", *arguments, "--no-progress", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_defaults_are_those_of_the_functions(rollouts, arrays, probabilities, capsys):
    assert evaluated(capsys, rollouts) == grpo_loss(**arrays).stats.as_dict()
    path, arrays = probabilities
    assert evaluated(capsys, path) == grpo_stats(**arrays).as_dict()
    assert main(["sweep", rollouts, "--no-progress", "--json"]) == 0
    assert "kl" not in json.loads(capsys.readouterr().out)
    assert main(["sweep", path, "--no-progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["betas"] == [0, 0.01]


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--surrogate cispo --ratio-max 5", {"surrogate": CISPO(5)}),
        ("--surrogate cispo --ratio-max 2 --ratio-min 0.5", {"surrogate": CISPO(2, 0.5)}),
        ("--surrogate sapo --tau-pos 2 --tau-neg 3", {"surrogate": SAPO(2, 3)}),
        ("--surrogate clip --epsilon-high 0.28", {"surrogate": Clip(0.2, 0.28)}),
        ("--surrogate unclipped --trust-region tv,0.1", {"surrogate": Unclipped(), "trust_region": TV(0.1)}),
        ("--trust-region binary-kl,0.02,0.01", {"trust_region": BinaryKL(0.02, 0.01)}),
        ("--level sequence --trust-region band,0.9,inf", {"trust_region": Band(0.9, math.inf), **BY_SEQUENCE}),
        ("--kl k3", {"kl": K3(0.01)}),
        ("--kl k3 --no-importance-weighted", {"kl": K3(0.01, False)}),
        ("--kl k3 --beta 0 --importance-weighted", {"kl": K3(0)}),
        ("--kl none --beta 0", {}),
        ("--beta 0", {}),
        ("--level sequence", {"importance_sampling_level": "sequence"}),
        ("--importance-sampling-level sequence", {"importance_sampling_level": "sequence"}),
        ("--aggregation token-sum --normalizer 7", {"aggregation": "token-sum", "normalizer": 7}),
    ],
)
def test_all_options_of_the_loss(line, options, rollouts, arrays, capsys):
    assert evaluated(capsys, rollouts, *line.split()) == grpo_loss(**arrays, **options).stats.as_dict()


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--epsilon-high 0.3 --delta 4", {"surrogate": Clip(0.1, 0.3, 4)}),
        ("--level sequence", {"importance_sampling_level": "sequence"}),
        ("--trust-region tv,0.1", {"trust_region": TV(0.1)}),
        ("--aggregation token-mean --normalizer 3", {"aggregation": "token-mean", "normalizer": 3}),
    ],
)
def test_what_is_the_same_over_the_grid(line, options, rollouts, arrays, capsys):
    grid = ["--epsilons", "0.1", "--betas", "0,0.04"]
    assert main(["sweep", rollouts, *grid, *line.split(), "--no-progress", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for beta, objective in zip((0, 0.04), found["objective"][0], strict=True):
        stats = grpo_loss(**arrays, **{"surrogate": Clip(0.1)} | options, kl=K3(beta) if beta else None).stats
        assert objective == stats.objective
        assert found["clip_ratio/high_mean"] == [stats.clip_ratio_high]


@pytest.mark.parametrize(
    "line",
    [
        "--columns logps=policy,ref_logps=base FILE",
        "--columns logps=policy --columns ref_logps=base FILE",
        "--columns logps=policy FILE --columns ref_logps=base",
        "FILE --beta 0.04 --columns logps=policy,ref_logps=base",
        "--columns=logps=policy,ref_logps=base FILE",
    ],
)
def test_columns_may_be_named_anywhere(line, arrays, tmp_path, capsys):
    renamed = table(arrays).rename_columns(["policy", "old_logps", "advantages", "base"])
    path = str(write(tmp_path / "rollouts.parquet", renamed))
    words = [path if word == "FILE" else word for word in line.split()]
    assert evaluated(capsys, *words, "--kl", "k3", "--beta", "0.04") == expected_of(arrays, 0.2, 0.04).as_dict()


def test_files_may_stand_between_options(arrays, tmp_path, capsys):
    one, two = (str(write(tmp_path / f"{name}.parquet", table(arrays))) for name in "ab")
    expected = grpo_loss(**arrays).stats
    assert evaluated(capsys, one, "--epsilon", "0.2", two) == (expected + expected).as_dict()


def test_names_that_begin_with_a_dash_or_have_a_comma(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["a,b", "old_logps", "advantages", "ref_logps"]
    write(Path("-a.parquet"), table(arrays).rename_columns(names))
    expected = grpo_loss(**arrays).stats.as_dict()
    assert main(["evaluate", "--no-progress", "--json", "--columns", r"logps=a\,b", "--", "-a.parquet"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_k3_of_probabilities_is_what_is_computed(probabilities, capsys):
    path, arrays = probabilities
    assert evaluated(capsys, path, "--kl", "k3") == grpo_stats(**arrays).as_dict()
    without = grpo_stats(arrays["rhos"], arrays["A"], None, None, beta=0).as_dict()
    assert evaluated(capsys, path, "--kl", "none", "--beta", "0") == without
    assert main(["sweep", path, "--kl", "k3", "--epsilon", "0.2", "--no-progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"][0][1] == grpo_stats(**arrays).objective


def test_without_tqdm_there_is_no_bar(rollouts, arrays, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["evaluate", rollouts]) == 0
    assert capsys.readouterr() == (f"{grpo_loss(**arrays).stats}\n", "")
    assert main(["sweep", rollouts, "--epsilon", "0.2"]) == 0
    with pytest.raises(ImportError, match=r"progress needs tqdm: pip install 'grpo_fast\[data\]'"):
        evaluate(rollouts, progress=True)


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
    both = ["--columns", "mask=completion_mask,mask=tool_mask"]
    assert main(["evaluate", path, "--no-progress", "--json", *both]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == arrays["mask"].sum()
    one = ["--columns", "mask=completion_mask"]
    assert evaluated(capsys, path, *one, "--columns", "mask=")["tokens"] == arrays["mask"].sum()
    assert main(["evaluate", path, "--no-progress", *one]) == 2
    message = "column 'tool_mask' looks like a mask and is not used: --columns mask=completion_mask,mask=tool_mask uses"
    assert message in capsys.readouterr().err
    assert evaluated(capsys, path, "--columns", "mask=")["tokens"] == arrays["mask"].size
    assert main(["evaluate", path, "--no-progress", "--columns", "logps=logps,logps=old_logps"]) == 2
    assert "--columns names logps twice, got logps=logps and logps=old_logps" in capsys.readouterr().err
    assert main(["evaluate", path, "--no-progress", "--columns", "old_logps=,old_logps="]) == 2
    assert "--columns names old_logps twice, got old_logps= and old_logps=" in capsys.readouterr().err


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
        (["evaluate", "FILE", "--epsilon", "-2"], "error: --epsilon must be a number in [0, inf], got -2.0"),
        (["evaluate", "FILE", "--kl", "k2"], "--kl k2: not for probability columns, whose KL term is k3"),
        (["sweep", "FILE", "--kl", "k1"], "--kl k1: not for probability columns, whose KL term is k3"),
        (["evaluate", "FILE", "--kl", "none"], "--kl none: probability columns have a KL term unless its weight is 0"),
        (["compile", "--no-importance-weighted"], "are about a KL term: add --kl"),
        (["evaluate", "RENAMED", "--beta", "0.1", "--columns", "logps=p,q,old_logps="], "got 'q'; a comma within a"),
        (["evaluate", "RENAMED", "--beta", "1", "--columns", "logps=p"], "--columns old_logps='o\\,ld_logps'"),
        (["evaluate", "TOKENS", "--kl", "k3", "--columns", "ref_logps="], "--columns ref_logps= leaves out what the"),
        (["evaluate", "FILE", "--surrogate", "sapo"], "--surrogate: not for probability columns"),
        (["evaluate", "FILE", "--columns", "A=B"], r"column 'B' (for A) is missing"),
        (["evaluate", "FILE", "--columns", "mask=m"], "--columns mask= ignores it"),
        (["evaluate", "FILE", "--batch-size", "0"], "--batch-size: must be a whole number, at least 1, got '0'"),
        (["evaluate", "FILE", "--workers", "-1"], "--workers: must be a whole number, at least 0, got '-1'"),
        (["evaluate", "FILE", "mask=m"], "no such file: mask=m; as a column it stands behind a comma, or --columns"),
        (["evaluate", "FOLDER"], "FOLDER is a directory without rollouts: no file in it ends in .parquet, .arrow,"),
        (["evaluate", "TOKENS", "--delta", "1"], "--delta must be a number above 1 + --epsilon-high = 1.2, got 1.0"),
        (["evaluate", "TOKENS", "--normalizer", "-1"], "error: --normalizer must be a number in [0, inf), got -1.0"),
        (["evaluate", "TOKENS", "--ratio-max", "2"], "--ratio-max is an option of --surrogate cispo, got --surrogate"),
        (["evaluate", "TOKENS", "--no-importance-weighted"], "are about a KL term: add --kl or --beta"),
        (["evaluate", "TOKENS", "--kl", "none", "--beta", "1"], "got --beta 1 with --kl none"),
        (["evaluate", "TOKENS", "--columns", "logps=lgps"], "if it is this one, --columns logps=logps"),
        (["evaluate", "TOKENS", "--columns", "old_logps=x"], "if there is none, --columns old_logps="),
        (
            ["evaluate", "FLAT"],
            "take --aggregation token-mean or --aggregation token-sum, at token level, got --import",
        ),
        (["evaluate", "BOTH"], "got both in logps, rhos: choose with, for example, --columns logps=logps"),
        (["evaluate", "JSON"], "is JSON, but not a line for each row: convert it with python -c 'import json, "),
        (["sweep", "FILE", "--plot", "a.svg", "--by", "step"], "--plot draws one sweep: leave out --by"),
        (["evaluate", "FILE", "--plot", "out.txt"], "--plot must end in .png, .svg or .pdf, got out.txt"),
        (
            ["evaluate", "FILE", "--plot", "FOLDER/a.svg"],
            "--plot draws probabilities over the values of a column alone",
        ),
        (["evaluate", "TOKENS", "--by", "stp"], "column 'stp' (for by) is missing"),
        (["worst", "FILE"], "worst is of files of log-probabilities"),
        (["worst", "FLAT"], "the columns are flat, which does not say where sequences begin: store"),
        (["worst", "TOKENS", "--rank", "mismatch"], "column 'rollout_logps' is missing"),
        (["worst", "TOKENS", "--show", "step,reward"], "column 'step' (for show) is missing"),
        (["sweep", "FILE", "--plot", "out.txt"], "--plot must end in .png, .svg or .pdf, got out.txt"),
        (["sweep", "FILE", "--plot", "missing/out.svg"], "--plot: there is no folder missing for out.svg"),
        (["sweep", "FILE", "--beta", "-1"], "error: --beta must be"),
        (["sweep", "FILE", "--epsilon-high", "1"], "--epsilon-high: not for probability columns"),
        (["evaluate", "TOKENS", "--normalizer", "0"], "--normalizer must be above 0, got 0"),
        (["sweep", "TOKENS", "--normalizer", "-1"], "error: --normalizer must be a number in [0, inf), got -1.0"),
        (["sweep", "TOKENS", "--no-importance-weighted"], "are about a KL term: add --kl or --beta"),
        (["sweep", "TOKENS", "--delta", "1.2"], "--delta must be a number above 1 + --epsilon-high = 1.2, got 1.2"),
        (["demo", "--epsilon", "-2"], "error: --epsilon must be a number in [0, inf], got -2.0"),
    ],
)
def test_bad_input_is_one_line_in_terms_of_the_shell(arguments, message, probabilities, rollouts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    files = {"FILE": probabilities[0], "TOKENS": rollouts, "FOLDER": str(tmp_path / "empty")}
    flat = pa.table({name: [-1.0, -2.0] for name in ("logps", "old_logps", "advantages")})
    both = pa.table({"logps": [-1.0], "rhos": [1.0]})
    for name, rows in (("FLAT", flat), ("BOTH", both)):
        files[name] = str(write(tmp_path / f"{name}.parquet", rows))
    renamed = pa.table({"p": [[-1.0]], "o,ld_logps": [[-1.0]], "advantages": [1.0]})
    files["RENAMED"] = str(write(tmp_path / "RENAMED.parquet", renamed))
    files["JSON"] = str(tmp_path / "a.json")
    Path(files["JSON"]).write_text('[{"logps": [-1.0]}]\n')
    arguments = [word.replace("FOLDER/", f"{tmp_path}/") for word in arguments]
    assert exit_code_of([files.get(word, word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    message = message.replace("FOLDER", files["FOLDER"])
    assert out == ""
    assert err.startswith("grpo-fast: error: ")
    assert (message in err, err.count("\n")) == (True, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate", "the following arguments are required: FILE (grpo-fast evaluate --help says more)"),
        ("evalute x", "compile, identify, demo, got 'evalute': did you mean 'evaluate'?"),
        ("evaluate x --epsilon-hihg 1", "unknown option --epsilon-hihg: did you mean '--epsilon-high'?"),
        (
            "evaluate x --eps 1",
            "unknown option --eps: did you mean '--epsilon'?",
        ),  # no abbreviations: they would change with every new option
        ("evaluate x --aggregation token_mean", "--aggregation: must be one of token-mean, "),
        ("evaluate x --aggregation token_mean", "got 'token_mean': did you mean 'token-mean'?"),
        ("evaluate x --columns A", "--columns: must be NAME=COLUMN, with commas between several, got 'A'"),
        ("evaluate x --columns logps=a,b", "--columns: must be NAME=COLUMN, with commas between several, got 'b'"),
        ("evaluate x --columns lgps=a", "got 'lgps': did you mean 'logps'?"),
        ("evaluate x --columns logps=,mask=m", "--columns: logps must be a column, got 'logps='"),
        ("sweep x --epsilon a,b", "must be numbers with commas between, got 'a,b'"),
        (
            "evaluate x --trust-region tvd,0.1",
            "must begin with one of tv, binary-kl, band, got 'tvd,0.1'",
        ),
        ("evaluate x --trust-region tv,2", "--trust-region: tv: delta must be a number in [0, 1], got 2"),
        ("evaluate x --trust-region band,1", "band: of other numbers than the help says, got 'band,1'"),
        ("demo --samples 0", "--samples: must be a whole number, at least 1, got '0'"),
        ("compile --dtype float16", "--dtype: must be one of float64, float32, got 'float16'"),
        ("--samples 9", "error: a subcommand comes first, as in grpo-fast demo --samples …"),
        ("--json evaluate f", "error: a subcommand comes first, as in grpo-fast evaluate --json …"),
        ("--betas=0 f", "error: a subcommand comes first, as in grpo-fast sweep --betas=0 …"),
        ("--nothing f", "--nothing; a subcommand comes first: evaluate, sweep, worst, compile, identify, demo"),
        ("compile x.parquet", "error: compile takes options alone, got x.parquet"),
        ("demo --seed 1 x.parquet", "error: demo takes options alone, got x.parquet"),
        ("evaluate --columns old_logps=a,b,c=d x", "got 'b'; a comma within a name is \\,"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_with_what_was_meant(line, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("grpo-fast: error: ")
    assert (message in err, err.count("\n")) == (True, 1)


def test_a_picture_that_cannot_be_is_refused_before_anything_is_read(monkeypatch, capsys):
    def read(*_, **__):
        raise AssertionError

    monkeypatch.setattr(_command, "sweep", read)
    monkeypatch.setattr(_command, "find_spec", lambda name: None)
    for path, message in (
        ("missing/a.svg", "there is no folder missing for a.svg"),
        ("a.svg", "pip install 'grpo_fast[plot]'"),
    ):
        assert main(["sweep", "x.parquet", "--plot", path]) == 2
        assert message in capsys.readouterr().err


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
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_jobs, "grpo_stats", interrupted)
    assert main(["evaluate", probabilities[0], "--no-progress"]) == 130
    assert capsys.readouterr() == ("", "grpo-fast: interrupted\n")


# --- help -------------------------------------------------------------------------------------------------------------
def test_alone_it_prints_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: grpo-fast SUBCOMMAND")
    assert all(f"\n    {name}" in out for name in ("evaluate", "sweep", "worst", "compile", "demo"))
    assert err == ""


@pytest.mark.parametrize("subcommand", ["evaluate", "sweep", "worst"])
def test_help_names_the_columns_and_shows_an_example(subcommand, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([subcommand, "--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^    .*\b{name}\b", out, re.M) for name in ARGUMENTS)
    examples = re.findall(r"^  (grpo-fast .*)$", out, re.M)
    assert examples
    for example in examples:  # they can be parsed
        assert _parser.parsed(shlex.split(example)[1:]).subcommand == subcommand


@pytest.mark.parametrize("arguments", [[], ["--help"], ["sweep", "--help"], ["evaluate", "--help"], ["--version"]])
def test_help_where_only_ascii_can_be_written(arguments):
    script = f"import sys; sys.argv[1:] = {arguments!r}; from grpo_fast.__main__ import main; main()"
    expected = grpo_fast.__version__ if "--version" in arguments else "usage: grpo-fast"
    assert expected in python(script, PYTHONIOENCODING="ascii")


def test_options_are_named_and_default_as_the_arguments(capsys):
    keywords = {
        "evaluate": set(inspect.signature(evaluate).parameters) - {"paths", "executor", "filesystem"},
        "sweep": set(inspect.signature(sweep).parameters) - {"paths", "executor", "filesystem"},
    }
    for subcommand, names in keywords.items():
        parsed = vars(_parser.parsed([subcommand, "x.parquet"]))
        assert names <= set(parsed)
        of_surrogates = {name for surrogate in _words.SURROGATES.values() for name in surrogate._fields}
        assert set(parsed) - names - of_surrogates <= {
            *("subcommand", "files", "workers", "json", "csv", "plot", "kl_gradient")
        }


def test_help_has_the_defaults_of_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"({x:g})" in out for x in (CISPO().ratio_max, CISPO().ratio_min, SAPO().tau_pos, SAPO().tau_neg))
    assert "in which infinity, and a mean over nothing, is null" in out


def test_an_option_before_a_subcommand_is_not_of_the_demonstration():
    done = command("--json", "evaluate", "x.parquet")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a subcommand comes first, as in grpo-fast evaluate --json" in done.stderr


# --- Ctrl-C, and whoever reads no more --------------------------------------------------------------------------------
@pytest.mark.parametrize("subcommand", ["evaluate", "sweep", "worst", "compile", "demo"])
def test_ctrl_c_is_one_line(subcommand, rollouts, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for module, name in ((_command, "evaluate"), (_command, "sweep"), (_command, "worst"), (_command, "steps")):
        monkeypatch.setattr(module, name, interrupted)
    monkeypatch.setattr(_demonstration, "synthetic_samples", interrupted)
    assert main([subcommand, *[rollouts] * (subcommand in ("evaluate", "sweep", "worst"))]) == 130
    assert capsys.readouterr().err == "grpo-fast: interrupted\n"


@pytest.mark.parametrize("error", [BrokenProcessPool("a process died"), RuntimeError("no compiler")])
def test_errors_of_what_it_runs_on_are_one_line(error, rollouts, monkeypatch, capsys):
    def raises(*_, **__):
        raise error

    monkeypatch.setattr(_command, "evaluate", raises)
    assert main(["evaluate", rollouts]) == 2
    assert capsys.readouterr().err == f"grpo-fast: error: {error}\n"


def test_without_a_compiler_it_is_one_line():
    script = "from grpo_fast.__main__ import main; print(main(['demo', '--samples', '9']))"
    assert python(script, NUMBA_DISABLE_JIT="1").splitlines()[-1].endswith("2")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as POSIX does")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_ends_the_process_while_it_compiles(workers, rollouts, tmp_path):
    cache = tmp_path / "cache"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NUMBA_CACHE_DIR": str(cache)}
    line = [sys.executable, "-m", "grpo_fast", "evaluate", rollouts, "--workers", workers]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background a shell has it ignored
    process = subprocess.Popen(line, env=environment, preexec_fn=heard, **pipes)
    said = ""
    while ("compiling" if workers == "0" else "first row groups") not in said:
        said += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("grpo-fast: interrupted\n")
    assert "Traceback" not in err
    assert not list(cache.rglob("*token_level.token_level.*"))  # nobody waited for it


def test_whoever_reads_no_more_is_no_error(rollouts):
    script = f"""
import os, sys
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
from grpo_fast.__main__ import main
print("code", main(["evaluate", {rollouts!r}, "--no-progress"]), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == "code 0\n"

"""``python tests/recorded.py`` says what it compares, as it goes, and what came of it."""

import json
import sys

import pytest
import recorded

CASES = {"objective near f8 5": 1.0, "objective near f4 5": 2.0, "stats far f8 5": 3.0}


@pytest.fixture
def script(monkeypatch):
    """Runs it with made-up cases, of which each computes a number; a wrong one for those that are named."""

    results = {case: {"loss": value} for case, value in CASES.items()}

    def run(*arguments, wrong=()):
        monkeypatch.setattr(recorded, "CASES", CASES)
        monkeypatch.setattr(recorded, "recording", lambda: {"results": results})
        monkeypatch.setattr(recorded, "computed", lambda case, *_: {"loss": 9.0 if case in wrong else CASES[case]})
        monkeypatch.setattr(sys, "argv", ["recorded.py", *arguments])
        recorded.main()

    return run


def test_all_the_same(script, capsys):
    script()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("objective near, 2 cases .. the same, ")
    assert second.startswith("stats far, 1 cases . the same, ")
    assert last.startswith("all the same: 3 cases in ")


def test_chosen_cases(script, capsys):
    script("stats", "sweep")
    assert capsys.readouterr().out.splitlines()[-1].startswith("all the same: 1 cases in ")
    with pytest.raises(SystemExit) as raised:
        script("nonsense")
    assert raised.value.code == 2


def test_differences_are_told(script, capsys):
    with pytest.raises(SystemExit, match="NOT the same: 2 results differ"):  # a text is exit code 1
        script(wrong=["objective near f4 5", "stats far f8 5"])
    printed = capsys.readouterr().out
    assert "objective near, 2 cases .. 1 DIFFERENT, " in printed
    assert "objective near f4 5: loss is 9.0, recorded is 2.0\nstats far f8 5: loss is 9.0, recorded is 3.0" in printed
    assert "all the same" not in printed


def test_some_of_many_differences_are_told(script, capsys, monkeypatch):
    monkeypatch.setattr(recorded, "SHOWN", 1)
    with pytest.raises(SystemExit, match="3 results differ"):
        script(wrong=CASES)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "objective near f8 5: loss is 9.0, recorded is 1.0",
        "… and 2 more",
    ]


def test_stopping_at_the_first(script, capsys):
    with pytest.raises(SystemExit, match="1 results differ"):
        script("--first", wrong=CASES)
    assert "objective near f4 5" not in capsys.readouterr().out


def test_writing(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "PATH", tmp_path / "recorded.json")
    script("--write", wrong=["stats far f8 5"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("recorded 3 cases in ")
    assert '"loss": 9.0' in (tmp_path / "recorded.json").read_text(encoding="utf-8")


def test_writing_some_leaves_the_others(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "PATH", tmp_path / "recorded.json")
    script("--write", "stats", wrong=CASES)
    assert capsys.readouterr().out.splitlines()[-1].startswith("recorded 1 cases in ")
    written = json.loads((tmp_path / "recorded.json").read_text(encoding="utf-8"))["results"]
    assert {case: found["loss"] for case, found in written.items()} == CASES | {"stats far f8 5": 9.0}

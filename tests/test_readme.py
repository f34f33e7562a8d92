"""The README's code runs, and its commands are the ones that CI runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from grpo_fast.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


OF_FILES = [block for block in BLOCKS if "rollouts.parquet" in block]  # these need an extra
COMMANDS = re.findall(r"^grpo-fast (.*)", README, re.MULTILINE)


def test_examples(capsys):
    names: dict[str, object] = {}  # one session from top to bottom, as a reader would type it
    for block in BLOCKS:
        if block not in OF_FILES:
            exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("1.0327696985")


def test_examples_with_files(tmp_path, monkeypatch, capsys):
    for name in ("pyarrow", "tqdm", "matplotlib"):
        pytest.importorskip(name, reason="this section needs pip install 'grpo_fast[data,plot]'")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    monkeypatch.chdir(tmp_path)
    importlib.import_module("rollouts").write("rollouts.parquet", rows=100)
    for command in COMMANDS:
        assert main(shlex.split(command)) == 0
    for block in OF_FILES:
        exec(compile("from grpo_fast import *\n" + block, "README.md", "exec"), {})
    assert "clip_ratio/low_mean" in capsys.readouterr().out
    assert Path("sweep.svg").exists()


def test_there_are_examples():
    assert len(BLOCKS) >= 2
    assert OF_FILES
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("command", ["-m grpo_fast", "-m pytest"])
def test_commands_need_only_python3(command):
    lines = [line for line in README.splitlines() if line.startswith("python3 ") and line.endswith(command)]
    assert len(lines) == 1
    assert lines[0].startswith("python3 -m venv .venv && .venv/bin/pip install ")

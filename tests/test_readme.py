"""The README's code runs, and its commands are the ones that CI runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_examples(capsys):
    names: dict[str, object] = {}  # one session from top to bottom, as a reader would type it
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("1.0327696985")


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("command", ["-m grpo_fast", "-m pytest"])
def test_commands_need_only_python3(command):
    lines = [line for line in README.splitlines() if line.startswith("python3 ") and line.endswith(command)]
    assert len(lines) == 1
    assert lines[0].startswith("python3 -m venv .venv && .venv/bin/pip install ")

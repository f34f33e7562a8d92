"""The README's code runs, and its commands are the ones that CI runs."""

import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo_fast.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^grpo-fast (.*)", README, re.MULTILINE)
EXTRAS = ("torch", "trl")  # what a block may import beside the package
OF_FILES = [block for block in BLOCKS if "rollouts.parquet" in block]  # these need other extras


def needs(block):
    return [name for name in EXTRAS if re.search(rf"^(from|import) {name}\b", block, re.MULTILINE)]


def skip_without(*packages):
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")


def run(*extras):
    """Run the blocks that need no more than these extras; what is defined then."""
    names: dict[str, object] = {}  # one session from top to bottom, as a reader would type it
    for block in BLOCKS:
        if set(needs(block)) <= set(extras) and block not in OF_FILES:
            exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.filterwarnings("default")  # a package's own about its imports are not ours
@pytest.mark.parametrize("extras", [(), ("torch",), ("torch", "trl")], ids=lambda extras: ", ".join(extras) or "none")
def test_examples(capsys, extras):
    skip_without(*extras)
    assert extras == () or any(extras[-1] in needs(block) for block in BLOCKS)
    run(*extras)
    assert capsys.readouterr().out.startswith("1.0327696985")


def test_examples_with_files(tmp_path, monkeypatch, capsys):
    skip_without("pyarrow", "tqdm", "matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
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

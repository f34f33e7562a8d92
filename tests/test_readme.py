"""The code of README and guide runs, as do their commands, which are those that CI runs; no page is too long."""

import importlib
import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo_fast.__main__ import main

ROOT = Path(__file__).parent.parent
pages = pytest.mark.parametrize("page", ["README.md", "grpo_fast/README.md", "bench/README.md", "tests/README.md"])
README, GUIDE = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "grpo_fast/README.md"))
EXTRAS = ("torch", "trl")  # what a block may import beside the package


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)


def needs(block):
    return [name for name in EXTRAS if re.search(rf"^from (grpo_fast\.)?{name}\b|^import {name}\b", block, re.M)]


def is_of_files(block):
    return re.search(r'"(my_)?run"', block) is not None


def skip_without(*packages):
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")


def run(page, *extras):
    """Run the blocks that need no more than these extras, as a reader would type them: in one session."""
    names: dict[str, object] = {}
    for block in blocks(page):
        if set(needs(block)) <= set(extras) and not is_of_files(block):
            exec(compile(block, "README.md", "exec"), names)
            for name in re.findall(r"^def (test_\w+)\(\)", block, re.M):  # as pytest would
                names[name]()
    return names


@pytest.mark.filterwarnings("default")  # a package's own about its imports are not ours
@pytest.mark.parametrize("extras", [(), ("torch",), ("torch", "trl")], ids=lambda extras: ", ".join(extras) or "none")
def test_examples(capsys, extras):
    skip_without(*extras)
    assert extras == () or any(extras[-1] in needs(block) for block in blocks(README))
    run(README, *extras)
    printed = capsys.readouterr().out
    assert "\n1.0327696985" in printed
    shown = [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if not language]
    assert shown
    for output in shown:  # to the last digit
        assert output in printed


def test_examples_of_the_guide():
    run(GUIDE)


@pytest.mark.parametrize("page", [README, GUIDE], ids=["README", "guide"])
def test_examples_with_files(page, tmp_path, monkeypatch, capsys):
    skip_without("pyarrow", "tqdm", "matplotlib")
    monkeypatch.chdir(tmp_path)
    importlib.import_module("rollouts").write("run", steps=3, rows=32, tokens=50)
    for command in re.findall(r"^grpo-fast (.*)", page, re.M):
        assert main(shlex.split(command)) == 0
    of_files = [block for block in blocks(page) if is_of_files(block)]
    assert of_files
    names = run(page)
    for block in of_files:
        exec(compile(block, "README.md", "exec"), names)
    if page is README:
        assert "clipped low" in capsys.readouterr().out
        assert {"sweep.svg", "run.svg"} <= set(os.listdir())


@pytest.mark.parametrize("command", ["python -m grpo_fast", "python -m pytest"])
def test_commands_need_only_python3(command):
    lines = [line for line in README.splitlines() if line.startswith("python3 ") and f"&& {command}" in line]
    assert len(lines) == 1
    assert lines[0].startswith("python3 -m venv .venv && . .venv/bin/activate && pip install ")


def test_it_can_be_read_in_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 120


@pages
def test_no_line_but_of_a_table_is_too_long(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pages
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target

"""Every script says with --help what it does, and how long that takes."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("bench", "tests")
    for path in sorted((ROOT / folder).glob("*.py"))
    if not path.name.startswith("test_") and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]
NEEDS = {
    "training": ["torch"],
    "others": ["torch"],
    "rollouts": ["pyarrow"],
    "accuracy": ["mpmath"],
    "polynomials": ["mpmath"],
}


def test_there_are_scripts():
    assert len(SCRIPTS) >= 9


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_help(path, monkeypatch, capsys):
    for package in NEEDS.get(path.stem, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(path.stem).main()
    printed = capsys.readouterr().out
    assert raised.value.code == 0
    assert f"python {path}" in printed
    assert re.search(r"\b(seconds?|minutes?|hours?|days)\b", printed), "how long does it take?"
    assert max(map(len, printed.splitlines())) <= 120

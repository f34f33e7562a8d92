"""Types are those that users need: mypy --strict passes their scripts and the pages' examples; help shows names."""

import pydoc
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest
from test_readme import GUIDE, README, blocks, needs, skip_without

import grpo_fast
from grpo_fast import files

ROOT = Path(__file__).parent.parent


def check(path, **environment):
    """Run mypy --strict over a script as a user would have it, outside of this repository."""
    skip_without("mypy")
    options = ["--strict", "--config-file=", f"--cache-dir={path.parent}", "--follow-imports=silent"]
    options.append("--untyped-calls-exclude=torch")  # its own `backward` has no types
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(path)],
        env={"PATH": "", "MYPYPATH": str(ROOT), **environment},
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_users_script(tmp_path):
    script = tmp_path / "user.py"
    script.write_text((ROOT / "tests" / "typed_user.py").read_text(encoding="utf-8"), encoding="utf-8")
    check(script)


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, GUIDE], ids=["README", "guide"])
def test_the_examples_of_the_pages(page, tmp_path):
    found = [block for block in blocks(page) if all(map(find_spec, needs(block)))]
    script = tmp_path / "page.py"
    script.write_text("\n".join(found), encoding="utf-8")
    check(script)


FUNCTIONS = [
    grpo_fast.grpo_loss,
    grpo_fast.grpo_objective,
    grpo_fast.grpo_stats,
    grpo_fast.grpo_sweep,
    grpo_fast.group_advantages,
    grpo_fast.evaluate,
    grpo_fast.warm_up,
    files.sweep,
    files.histogram,
    files.worst,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_help_begins_with_what_can_be_read(function):
    head = pydoc.plain(pydoc.render_doc(function)).split("\n\n")[1].splitlines()[0]
    assert head.startswith(f"{function.__name__}(")
    assert len(head) < 900
    for word in ("_SupportsArray", "_NestedSequence", "unknown", "Union["):
        assert word not in head


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_hints_can_be_had(function):
    assert {"return"} < set(get_type_hints(function))


def test_help_of_the_loss_names_array_like():
    text = pydoc.plain(pydoc.render_doc(grpo_fast.grpo_loss))
    assert "logps: 'ArrayLike', old_logps: 'ArrayLike | None'" in text
    assert "surrogate: 'Surrogate' = Clip(epsilon=0.2)" in text
    assert "``ref_logps`` may be given and is ignored" in " ".join(text.split())[:1200]

"""Python in a process of its own, and what another thread could be doing in this one."""

import os
import subprocess
import sys
from contextlib import contextmanager

from grpo_fast._kernels import threads


@contextmanager
def someone_else_computes():
    """As if another thread were in a parallel region."""
    other = object()
    threads._inside[other] = None
    try:
        yield
    finally:
        del threads._inside[other]


def python(script, timeout=300, inside=(), **environment):
    """Run a script in a fresh interpreter that sees what this one sees; its output, unless it fails."""
    done = subprocess.run(
        [*inside, sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout

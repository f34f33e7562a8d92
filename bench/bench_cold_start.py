"""Import and first call, each in a fresh process: beside importing Numba, with kernels already compiled."""

import subprocess
import sys

import pytest

CALL = "grpo_fast.grpo_objective([1.2], [1.0], [0.9], [1.0])"
SCRIPTS = {
    "import numba": "import numba",
    "import grpo_fast": "import grpo_fast",
    "import grpo_fast, first call": f"import grpo_fast; {CALL}",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_cold_start(benchmark, name):
    benchmark.group = "a fresh process, warm disk cache"
    command = [sys.executable, "-c", SCRIPTS[name]]
    subprocess.run(command, check=True)  # fills the cache
    benchmark.pedantic(subprocess.run, (command,), {"check": True}, rounds=7)

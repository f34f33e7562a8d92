"""What the target scripts share: the machine in one line, the rows of a Markdown table, and fresh processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np

import grpo_fast


def head(*versions: str) -> None:
    """Print the machine, the versions (and ``versions`` beside them), and the head of the table."""
    cpu = llvmlite.binding.get_host_cpu_name()
    known = (f"Python {platform.python_version()}", f"numba {numba.__version__}", f"numpy {np.__version__}")
    print(", ".join((cpu, f"{numba.get_num_threads()} threads", *known, *versions)) + "\n")
    print("| work | beside | target | measured |\n|---|---|---|---|")


def row(work: str, beside: str, target: str, measured: str) -> None:
    """Print one line of the table at once: a run takes minutes."""
    print(f"| {work} | {beside} | {target} | {measured} |", flush=True)


def fresh_process(script: str, **environment: str) -> float:
    """The number that a script prints, which finds this directory's modules and this ``grpo_fast``."""
    here = [str(Path(__file__).parent), str(Path(grpo_fast.__file__).parents[1])]
    script = f"import sys\nsys.path[:0] = {here!r}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    return float(done.stdout)


def extra_memory(before: str, call: str) -> str:
    """How much the peak of a fresh process grows during one call."""
    # VmHWM and not ru_maxrss, below which the child of a large process cannot fall. Making the arrays peaks higher than
    # computing with them, so the peak would hide what is looked for: reset it.
    kib = fresh_process(f"""
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
{before}
open("/proc/self/clear_refs", "w").write("5")
reset = peak()
{call}
print(peak() - reset)
""")
    return f"{kib / 1024:.1f} MiB"

"""Measured in a process of its own: what a script prints, and how much memory a call takes."""

import os
import subprocess
import sys
from pathlib import Path

import grpo_fast


def fresh_process(script: str, **environment: str) -> str:
    """What a script prints, which finds this directory's modules and this ``grpo_fast``."""
    here = [str(Path(__file__).parent), str(Path(grpo_fast.__file__).parents[1])]
    script = f"import sys\nsys.path[:0] = {here!r}\n{script}"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment).stdout


def extra_memory(before: str, call: str) -> float:
    """By how many MiB the peak of a fresh process grows during one call (Linux)."""
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
    return float(kib) / 1024

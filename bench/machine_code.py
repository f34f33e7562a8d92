"""What the kernels are made of: the instructions of the loops through which every sample goes.

``python bench/machine_code.py`` (a minute or two, which is compiling) prints, for this CPU, the other roof, that of
arithmetic, which holds for what fits into a cache. The kernels are compiled afresh, whatever lies in the cache: Numba
cannot show the machine code of what comes from there. tests/test_machine_code.py holds the counts for AVX2 against
those of the day on which speed was measured.

The loops are those that ask for memory ahead of its use; how often, the column of prefetches says, which tells an
unrolled loop from the one for its rest. A loop's name is that of the function of the kernel in which it stands, found
by the line numbers that the compiler notes beside each instruction (they change none of them); what it is made of, are
the functions that are inlined there. Near and far are the ways of r near 1 and of any r, careful that of numbers at
the limits of the format.
"""

import argparse
import ast
import json
import platform
import re
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import typeof
from pages import table
from processes import fresh_process

from grpo_fast import K3, Clip
from grpo_fast._kernels import sample_blocks
from grpo_fast._kernels.penalties import kl_for_kernels
from grpo_fast._kernels.sums import empty_accumulators
from grpo_fast._kernels.token_level import token_level
from grpo_fast._kernels.tokens import Batch, LossTerms

KERNELS = ("objective", "objective, unweighted", "loss")
#: The files whose functions are the steps of a kernel; those of others are what the steps are made of.
STEPS = ("sample_blocks.py", "samples.py", "token_level.py", "sequence_level.py")
#: What tells a way from the others: functions that are called there only.
WAYS = {"near": r".*_near(_\w+)?", "careful": r"\w+_of_any(_\w+)?|.*_carefully"}

UNITS = {
    "prefetches": r"prefetch\w+",
    "multiplications": r"vf\w*m\w*p[sd]|vmulp[sd]",
    "divisions": r"vdivp[sd]",
    "additions, comparisons": r"v(add|sub|min|max|cmp|blendv)p[sd]",
    "moves": r"vmov\w*",
}


class Loop(NamedTuple):
    """An innermost loop: the names of its instructions, and from which functions (of file and name) its lines are."""

    instructions: list[str]
    functions: list[tuple[str, str]]  # those that loop, and then the others; of each the most frequent first

    def name(self) -> str:
        """The step of the kernel in which it stands, and in which way."""
        steps = [name for file, name in self.functions if file in STEPS]
        called = [name for _, name in self.functions]
        ways = [way for way, names in WAYS.items() if any(re.fullmatch(names, name) for name in called)]
        if not ways and any(re.fullmatch("k3|reduce_ratio|reduce_exponent", name) for name in called):
            ways = ["far"]
        return ", ".join([(steps or ["?"])[0].lstrip("_").replace("_", " "), *ways])

    def made_of(self) -> str:
        """The functions that are inlined there, but for those that every loop has."""
        common = ("load_row", "store_row", "prefetch_ahead", "prefetch_if_given")
        return ", ".join(name.lstrip("_") for file, name in self.functions if file not in STEPS and name not in common)


# --- reading machine code ---------------------------------------------------------------------------------------------
def inner_loops(assembly: str) -> list[Loop]:
    """The loops of a listing that have no other in them."""
    lines = [line.split("#")[0].strip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"[.\w]+:", line)}
    jumps = [(labels.get(line.split()[-1], i), i) for i, line in enumerate(lines) if re.match(r"j\w+\s", line)]
    loops = [(first, last) for first, last in jumps if first < last]
    inner = [x for x in loops if not any(x[0] <= y[0] and y[1] <= x[1] and x != y for y in loops)]
    files = {number: path for number, *path in re.findall(r'^\s*\.file\s+(\d+)\s+"(.*?)"\s+"(.*?)"', assembly, re.M)}
    return [_loop(lines[first : last + 1], files) for first, last in inner]


def _loop(lines: list[str], files: dict[str, list[str]]) -> Loop:
    found: Counter[tuple[str, str, bool]] = Counter()
    for line in lines:
        place = re.match(r"\.loc\s+(\d+)\s+(\d+)", line)  # of the instructions that follow
        if place and place[1] in files and place[2] != "0":
            folder, file = files[place[1]]
            found[file, *_function_at(Path(folder, file), int(place[2]))] += 1
    instructions = [line.split()[0] for line in lines if re.match(r"[a-z]", line)]
    by_frequency = [function for function, _ in found.most_common()]
    return Loop(instructions, [(file, name) for file, name, _ in sorted(by_frequency, key=lambda it: not it[2])])


@cache
def _functions_of(path: Path) -> list[tuple[int, int, str, bool]]:
    """The functions in a file: their first and last line, their name, and whether they loop."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ()
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    loops = [any(isinstance(node, ast.For) for node in ast.walk(function)) for function in functions]
    return [(f.lineno, f.end_lineno or 0, f.name, loop) for f, loop in zip(functions, loops, strict=True)]


def _function_at(path: Path, line: int) -> tuple[str, bool]:
    """The name of the innermost function in which a line stands, and whether it loops."""
    around = [function for function in _functions_of(path) if function[0] <= line <= function[1]]
    return max(around)[2:] if around else ("?", False)


# --- compiling --------------------------------------------------------------------------------------------------------
def hot_loops(name: str, dtype: str) -> list[Loop]:
    """The loops of a kernel that ask for memory ahead of its use; none if this process has it from the cache.

    They are grpo_objective, with and without ρ in its KL term, and grpo_loss at token level with Clip, K3 and the
    gradient.
    """
    x = np.ones(4096, dtype)
    batch = Batch(x, x, x[:1], x, None, None, None, x.copy(), np.array([0, x.size]), False, False, False)
    terms = LossTerms(Clip(), None, *kl_for_kernels(K3(0.04)), 1.0, True, False)
    sequences, room = np.array([[0, 1]]), np.empty(0, np.uint8)
    kernel, arguments = {
        "objective": (sample_blocks.objective_block, (x, x, x, x, 0.8, 1.2)),
        "objective, unweighted": (sample_blocks.unweighted_block, (x, x, x, x, 0.8, 1.2)),
        "loss": (token_level, (*batch, *terms, None, sequences, x.size, empty_accumulators(1), room)),
    }[name]
    kernel.compile(tuple(map(typeof, arguments)))
    assembly = list(kernel.inspect_asm().values())[-1]
    return [loop for loop in inner_loops(assembly) if "prefetcht0" in loop.instructions]


def compiled_loops(names: tuple[str, ...], dtype: str, **environment: str) -> dict[str, list[Loop]]:
    """The hot loops of kernels, compiled in a process of its own, whose cache is empty, with line numbers."""
    script = (
        f"import json, machine_code\nprint(json.dumps({{n: machine_code.hot_loops(n, {dtype!r}) for n in {names}}}))"
    )
    with tempfile.TemporaryDirectory() as empty:
        environment |= {"NUMBA_CACHE_DIR": empty, "NUMBA_DEBUGINFO": "1", "PYTHONWARNINGS": "ignore"}
        found = json.loads(fresh_process(script, **environment))
    return {
        name: [Loop(instructions, [tuple(f) for f in places]) for instructions, places in loops]
        for name, loops in found.items()
    }


# --- the table --------------------------------------------------------------------------------------------------------
def row(kernel: str, loop: Loop) -> list[str]:
    """What a loop is, how many instructions it has, and what they occupy; the last is what is left."""
    counts = [sum(bool(re.fullmatch(unit, op)) for op in loop.instructions) for unit in UNITS.values()]
    numbers = [len(loop.instructions), *counts, len(loop.instructions) - sum(counts)]
    return [kernel, loop.name(), *map(str, numbers), loop.made_of()]


def main() -> None:
    """Print the loops of all kernels, or fail if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if platform.machine() not in ("x86_64", "AMD64"):
        raise SystemExit("only the instructions of x86-64 are known here")
    for dtype in ("float64", "float32"):
        print(f"compiling for {dtype} …", file=sys.stderr, flush=True)
        found = compiled_loops(KERNELS, dtype)
        rows = [row(f"{kernel}, {dtype}", loop) for kernel, loops in found.items() for loop in loops]
        if len({cells[0] for cells in rows}) < len(KERNELS):
            raise SystemExit("no loop that asks for memory was found in a kernel: this script no longer knows them")
        print(*table(["kernel", "loop", "instructions", *UNITS, "others", "made of"], rows), sep="\n")


if __name__ == "__main__":
    main()

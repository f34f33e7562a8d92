"""What the kernels are made of: the instructions of the loops through which every sample goes.

``python bench/machine_code.py`` prints, for this CPU, the other roof, that of arithmetic, which holds for what fits
into a cache. tests/test_machine_code.py holds the counts for AVX2 against those of the day on which speed was measured.
"""

import re
from typing import Any

import numpy as np
from numba import typeof

from grpo_fast import K3, Clip
from grpo_fast._kernels import sample_blocks, token_level
from grpo_fast._kernels.tokens import Batch, LossTerms


def inner_loops(assembly: str) -> list[list[str]]:
    """The names of the instructions of each loop that has no other in it."""
    lines = [line.split("#")[0].strip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"[.\w]+:", line)}
    jumps = [(labels.get(line.split()[-1], i), i) for i, line in enumerate(lines) if re.match(r"j\w+\s", line)]
    loops = [(first, last) for first, last in jumps if first < last]
    inner = [x for x in loops if not any(x[0] <= y[0] and y[1] <= x[1] and x != y for y in loops)]
    return [[line.split()[0] for line in lines[a : b + 1] if re.match(r"[a-z]", line)] for a, b in inner]


def hot_loops(kernel: Any, arguments: tuple[Any, ...]) -> list[list[str]]:
    """The loops of a kernel that ask for memory ahead of its use, compiled for these arguments."""
    kernel.compile(tuple(map(typeof, arguments)))
    return [loop for loop in inner_loops(list(kernel.inspect_asm().values())[-1]) if "prefetcht0" in loop]


def kernels(dtype: str) -> dict[str, list[list[str]]]:
    """The hot loops of grpo_objective with and without ρ in its KL term, and of grpo_loss with its gradient.

    The loss is that at token level, with Clip and K3.
    """
    x = np.ones(4096, dtype)
    batch = Batch(x, x, x[:1], x, None, None, x.copy(), np.array([0, x.size]), False, False)
    terms = LossTerms(Clip(), K3(0.04, importance_weighted=False), 1.0, True)
    return {
        "objective": hot_loops(sample_blocks.objective_block, (x, x, x, x, 0.8, 1.2)),
        "objective, unweighted": hot_loops(sample_blocks.unweighted_block, (x, x, x, x, 0.8, 1.2)),
        "loss": hot_loops(token_level.token_block, (batch, terms, 1.0, 0, 0, x.size, x.copy())),
    }


UNITS = {
    "multiplications": r"vf\w*m\w*p[sd]|vmulp[sd]",
    "divisions": r"vdivp[sd]",
    "additions, comparisons": r"v(add|sub|min|max|cmp|blendv)p[sd]",
    "moves": r"vmov\w*",
}


def main() -> None:
    """Print the loops, by what their instructions occupy; the last column is what is left."""
    print("One line for each loop; a loop over RUN vectors exists for near and for far ratios, and for ragged ends.\n")
    print(f"| kernel | instructions | {' | '.join(UNITS)} | others |\n|{'---|' * (len(UNITS) + 3)}")
    for dtype in ("float64", "float32"):
        for name, loops in kernels(dtype).items():
            for loop in loops:
                counts = [sum(bool(re.fullmatch(unit, op)) for op in loop) for unit in UNITS.values()]
                cells = [name + ", " + dtype, len(loop), *counts, len(loop) - sum(counts)]
                print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()

"""What no kernel is likely to beat in a cache: the same work in C, by hand, as one loop (the folder ``floor``).

It is compiled for AVX2 by ``cc``, or what the environment's CC names, into a temporary folder, when it is first needed.
``python bench/floors.py`` (some seconds) prints the instructions of its loops for 8 float64 or 16 float32 tokens, which
are two vectors, to be set beside those that bench/machine_code.py finds in the kernels.
"""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import llvmlite.binding
import numpy as np
from machine_code import UNITS, Loop, inner_loops, row
from numpy.typing import NDArray
from pages import table

from grpo_fast._kernels import elementary

SOURCE = Path(__file__).parent / "floor" / "floor.c"
# Nothing contracted: the FMAs are those of the text. Nothing unrolled: what a loop holds is of one vector.
OPTIONS = ("-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fno-unroll-loops")
FUNCTIONS = ("loss_near", "loss_far", "objective_near", "objective_far")
RUN_BYTES = 16 * 32  # of each array: so many at a time, and no rest

Arrays: TypeAlias = tuple[NDArray[Any], ...]


class LossSums(NamedTuple):
    """What the loss's loop finds of n tokens beside the gradient: sums; extremes of log ρ and of |l|; and counts."""

    policy: float
    kl: float
    ratio: float
    ratio_squared: float
    log_ratio: float
    least: float
    most: float
    farthest: float
    clipped_low: float
    clipped_high: float


# --- compiling --------------------------------------------------------------------------------------------------------
def compiler() -> str:
    """The path of the C compiler; an ImportError, in one line, where the floor cannot be compiled or cannot run."""
    name = os.environ.get("CC", "cc")
    if not (found := shutil.which(name)):
        raise ImportError(f"no C compiler ({name})")
    features = llvmlite.binding.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        raise ImportError("this CPU has no AVX2 and FMA")
    return found


@cache
def compiler_version() -> str:
    """Which compiler it is, and its version: the first line of what it says, without who has built it."""
    said = subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    first = re.sub(r"\s*\(.*?\)", "", said.splitlines()[0])
    return re.sub("^cc", "gcc", first) if "Free Software Foundation" in said else first


def constants(dtype: str) -> str:
    """The header with the numbers of the formulas, which are those of the kernels."""
    single = dtype == "float32"
    layout = elementary.FLOAT32 if single else elementary.FLOAT64
    arrays = {
        "REST_OF_EXP": elementary.REST_OF_EXP32 if single else elementary.REST_OF_EXP64,
        "TAIL": elementary.TAIL32 if single else elementary.TAIL64,
    }
    numbers = {
        "LN2": elementary.LN2,
        "LN2_HIGH": layout.ln2_high,
        "LN2_LOW": layout.ln2_low,
        "ROUNDER": layout.rounder,
        "ROOT2": elementary.ROOT2,
        "INTEGERS": layout.integers,
        "BIAS": layout.bias,
    }
    patterns = {"ONE": layout.one, "HALF": layout.half, "EXPONENT": layout.exponent}
    lines = [f"static const real {name}[] = {{{', '.join(map(float.hex, them))}}};" for name, them in arrays.items()]
    lines += [f"static const double {name} = {value.hex()};" for name, value in numbers.items()]
    lines += [f"static const uint64_t {name} = {value:#x};" for name, value in patterns.items()]
    return "\n".join(lines) + "\n"


def compile_to(output: Path, dtype: str, *options: str) -> None:
    """Compile the floor for a dtype into a file, with more options; an ImportError if that is not possible here."""
    (output.parent / "constants.h").write_text(constants(dtype), encoding="utf-8")
    single = ["-DSINGLE"] if dtype == "float32" else []
    command = [compiler(), *OPTIONS, *single, *options, f"-I{output.parent}", str(SOURCE), "-o", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise ImportError(f"{compiler_version()}: {errors[0]}")


@cache
def library(dtype: str) -> ctypes.CDLL:
    """The floor for a dtype, compiled and loaded; an ImportError, in one line, if that is not possible here."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "floor.so")
        compile_to(path, dtype, "-shared", "-fPIC")
        return ctypes.CDLL(str(path))


# --- calling ----------------------------------------------------------------------------------------------------------
def bind(name: str, arrays: Arrays, *numbers: float, out: Arrays) -> Callable[[], None]:
    """A call of one of the `FUNCTIONS` on contiguous arrays of one dtype and size, which are whole runs."""
    first = arrays[0]
    assert first.nbytes % RUN_BYTES == 0
    assert all(x.flags.c_contiguous and (x.dtype, x.size) == (first.dtype, first.size) for x in arrays)
    function = getattr(library(first.dtype.name), name)
    function.restype = None

    def pointers(several: Arrays) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(x.ctypes.data) for x in several]

    arguments = [ctypes.c_size_t(first.size), *pointers(arrays), *map(ctypes.c_double, numbers), *pointers(out)]

    def call(keep: Any = (arrays, out)) -> None:  # the arrays must live as long as their addresses
        function(*arguments)

    return call


def bind_loss(
    logps: NDArray[Any],
    old_logps: NDArray[Any],
    ref_logps: NDArray[Any],
    advantage: float,
    epsilon: float,
    beta: float,
    grad: NDArray[Any],
    way: str,
) -> Callable[[], NDArray[np.float64]]:
    """A call that writes ∂loss/∂logps of the mean over the tokens of one sequence, and returns `LossSums` as an array.

    ``way``: "near", for log-ratios up to ½ ln 2, or "far".
    """
    sums = np.empty(len(LossSums._fields))
    numbers = (advantage, epsilon, beta, -1 / logps.size)
    call = bind(f"loss_{way}", (logps, old_logps, ref_logps), *numbers, out=(grad, sums))

    def loss() -> NDArray[np.float64]:
        call()
        return sums

    return loss


def bind_objective(samples: Arrays, epsilon: float, beta: float, way: str) -> Callable[[], float]:
    """A call that returns the objective of samples ρ, A, π_old, π_ref; ``way``: "near", for ⅔ ≤ r ≤ 3⁄2, or "far"."""
    sums = np.empty(2)
    call = bind(f"objective_{way}", samples, epsilon, out=(sums,))

    def objective() -> float:
        call()
        return float(sums[0] - beta * sums[1]) / samples[0].size

    return objective


# --- counting ---------------------------------------------------------------------------------------------------------
@cache
def loops(dtype: str) -> dict[str, Loop]:
    """Of each of the `FUNCTIONS`, the loop through which every vector goes, twice: what two vectors take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "floor.s")
        compile_to(path, dtype, "-S")
        assembly = path.read_text(encoding="utf-8")
    found = {}
    for name in FUNCTIONS:
        body = re.split(rf"^\s*\.size\s+{name}\b", re.split(rf"^{name}:", assembly, flags=re.M)[1], flags=re.M)[0]
        found[name] = Loop(2 * max((loop.instructions for loop in inner_loops(body)), key=_multiplications), [])
    return found


def _multiplications(instructions: list[str]) -> int:
    return sum(bool(re.fullmatch(UNITS["multiplications"], name)) for name in instructions)


def main() -> None:
    """Print the loops of the floor, or say why there is none here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        print(f"{compiler_version()}, {' '.join(OPTIONS)}\n")
        rows = [
            [f"{name.replace('_', ', ')}, {dtype}", *row("", loop)[2:-1]]
            for dtype in ("float64", "float32")
            for name, loop in loops(dtype).items()
        ]
    except ImportError as reason:
        raise SystemExit(str(reason)) from None
    print(*table(["loop", "instructions", *UNITS, "others"], rows), sep="\n")


if __name__ == "__main__":
    main()

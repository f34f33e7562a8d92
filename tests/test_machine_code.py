"""The kernels are the machine code that they are meant to be: whatever the machine, they are compiled here for AVX2.

Speed itself is measured in bench/, but what it rests on can be counted: everything on whole vectors, nothing called,
and no more instructions in the loops than there were when their speed was measured.
"""

import json
import platform
from pathlib import Path

import pytest
from interpreter import python

BENCH = Path(__file__).parent.parent / "bench"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import json
from machine_code import kernels
loops = {{f"{{name}}, {{dtype}}": hot for dtype in ("float64", "float32") for name, hot in kernels(dtype).items()}}
print(json.dumps(loops))
"""
#: Instructions in the loops that ask for memory, as counted when their speed was measured (llvmlite 0.50).
COUNTED = {
    "objective, float64": 399,
    "objective, float32": 309,
    "objective, unweighted, float64": 397,
    "objective, unweighted, float32": 307,
    "loss, float64": 1244,
    "loss, float32": 1211,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="code for x86-64 CPUs"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    avx2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    return json.loads(python(SCRIPT, NUMBA_CACHE_DIR=str(tmp_path_factory.mktemp("cache")), **avx2))


@pytest.fixture(params=COUNTED)
def hot(request, kernels):
    """The loops through which every sample goes."""
    loops = kernels[request.param]
    assert len(loops) >= 5
    return request.param, loops


def test_nothing_is_called(hot):
    assert not [op for loop in hot[1] for op in loop if op.startswith("call")]


def test_all_arithmetic_is_on_whole_vectors(hot):
    arithmetic = [op for loop in hot[1] for op in loop if op.startswith(("vf", "vadd", "vsub", "vmul", "vdiv"))]
    assert len(arithmetic) > 50
    # float32 terms are added in float64 where they may overflow
    assert {op[-2:] for op in arithmetic} <= {"pd"} | ({"ps"} if "float32" in hot[0] else set())


def test_no_more_instructions_than_counted(hot):
    name, loops = hot
    assert sum(map(len, loops)) <= 1.2 * COUNTED[name]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_kl_term_without_the_ratio_takes_no_more_instructions(dtype, kernels):
    weighted, unweighted = (kernels[f"objective{how}, {dtype}"] for how in ("", ", unweighted"))
    assert sum(map(len, unweighted)) <= sum(map(len, weighted))

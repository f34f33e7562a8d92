"""The kernels are the machine code that they are meant to be: whatever the machine, they are compiled here for AVX2.

Speed itself is measured in bench/, but what it rests on can be counted: everything on whole vectors, nothing called,
and no more instructions in the loops than there were when their speed was measured.
"""

import platform
import re
import sys

import machine_code
import pytest
from machine_code import KERNELS, compiled_loops

#: Instructions in the loops that ask for memory, as counted when their speed was measured (llvmlite 0.50).
COUNTED = {
    "objective, float64": 399,
    "objective, float32": 309,
    "objective, unweighted, float64": 397,
    "objective, unweighted, float32": 307,
    "loss, float64": 1022,
    "loss, float32": 938,
}

AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="code for x86-64 CPUs"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache such as a user may have."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def kernels(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", folder)
        found = {dtype: compiled_loops(KERNELS, dtype, **AVX2) for dtype in ("float64", "float32")}
    return {f"{name}, {dtype}": loops for dtype, kernels in found.items() for name, loops in kernels.items()}


@pytest.fixture(params=COUNTED)
def hot(request, kernels):
    """The loops through which every sample goes."""
    loops = [loop.instructions for loop in kernels[request.param]]
    assert len(loops) >= 3
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
    assert sum(len(loop.instructions) for loop in unweighted) <= sum(len(loop.instructions) for loop in weighted)


def test_every_loop_has_a_name(kernels):
    for name, loops in kernels.items():
        names = [loop.name() for loop in loops]
        assert all(re.fullmatch(r"[a-z ]+(, (near|far|careful))?", loop) for loop in names), names
        ways = {loop.partition(", ")[2] for loop in names}
        assert ways >= ({"near", "far"} if name.startswith("objective") else {"near", "far", "careful"})


def test_a_warm_cache_does_not_matter(kernels, folder, monkeypatch):
    # The machine code of what comes from a cache cannot be shown: where the user's would hold it, another one is used.
    monkeypatch.setenv("NUMBA_CACHE_DIR", folder)
    assert compiled_loops(("objective",), "float32", **AVX2)["objective"] == kernels["objective, float32"]


def test_the_table(kernels, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["machine_code.py"])
    monkeypatch.setattr(
        machine_code, "compiled_loops", lambda names, dtype: {name: kernels[f"{name}, {dtype}"] for name in names}
    )
    machine_code.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + sum(map(len, kernels.values()))
    for row in rows:
        if row[2] != "instructions":
            assert int(row[2]) == sum(map(int, row[3:9])) > 0
            assert int(row[3]) > 0


def test_a_table_without_loops_is_an_error(kernels, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["machine_code.py"])
    monkeypatch.setattr(machine_code, "compiled_loops", lambda names, _: {name: [] for name in names})
    with pytest.raises(SystemExit, match="no loop that asks for memory was found"):
        machine_code.main()
    assert capsys.readouterr().out == ""

"""The loops in C beside which the kernels are measured: they find what the kernels find, and are on whole vectors."""

import sys

import floor_cases
import floors
import pytest
from machine_code import UNITS

DTYPES = ("float64", "float32")
TOKENS = 2048


@pytest.fixture(scope="module")
def floor():
    """The floor, if it can be compiled and run here."""
    try:
        return floor_cases.floor()
    except ImportError as reason:
        pytest.skip(f"no floor here: {reason}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", floor_cases.SPREAD)
@pytest.mark.parametrize("advantage", [1.0, -0.7, 0.0])
@pytest.mark.usefixtures("floor")
def test_the_loss(way, dtype, advantage):
    floor_cases.check("grpo_loss", way, floor_cases.tokens(TOKENS, way, dtype, advantage))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", floor_cases.SPREAD)
@pytest.mark.usefixtures("floor")
def test_the_objective(way, dtype):
    floor_cases.check("grpo_objective", way, floor_cases.samples(TOKENS, way, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", floor_cases.DATA)
@pytest.mark.usefixtures("floor")
def test_the_far_way_is_right_for_what_is_near_and_not_the_other_way_round(function, dtype):
    near, far = (floor_cases.DATA[function](TOKENS, way, dtype) for way in ("near", "far"))
    floor_cases.check(function, "far", near)
    with pytest.raises(AssertionError):
        floor_cases.check(function, "near", far)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("floor")
def test_its_loops_are_whole_vectors(dtype):
    loops = floors.loops(dtype)
    assert tuple(loops) == floors.FUNCTIONS
    for name, loop in loops.items():
        names = loop.instructions
        assert not [op for op in names if op.startswith("call")], name
        arithmetic = [op for op in names if op.startswith(("vf", "vadd", "vsub", "vmul", "vdiv"))]
        assert {op[-2:] for op in arithmetic} == {"pd" if dtype == "float64" else "ps"}, name
        assert 30 < len(names) < 250, name
    for function in ("loss", "objective"):
        assert len(loops[f"{function}_near"].instructions) < len(loops[f"{function}_far"].instructions)


def test_its_table(floor, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["floors.py"])
    floors.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 2 * len(floors.FUNCTIONS)
    for row in rows[1:]:
        assert int(row[1]) == sum(map(int, row[2:])) > 0
        assert len(row) == 3 + len(UNITS)


# --- where there is none ----------------------------------------------------------------------------------------------
@pytest.fixture
def elsewhere(monkeypatch):
    """A machine on which nothing was compiled yet."""
    for function in (floors.library, floors.loops, floors.compiler_version):
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in (floors.library, floors.loops, floors.compiler_version):
        function.cache_clear()


def test_without_a_compiler_it_is_missing(elsewhere, capsys):
    elsewhere.setenv("CC", "no-such-compiler")
    with pytest.raises(ImportError, match=r"no C compiler \(no-such-compiler\)"):
        floor_cases.floor()
    elsewhere.setattr(sys, "argv", ["floors.py"])
    with pytest.raises(SystemExit, match="no C compiler"):
        floors.main()
    assert capsys.readouterr().out == ""


def test_without_avx2_it_is_missing(elsewhere):
    elsewhere.setattr(floors.shutil, "which", lambda name: name)
    elsewhere.setattr(floors.llvmlite.binding, "get_host_cpu_features", lambda: {"avx2": False, "fma": True})
    with pytest.raises(ImportError, match="this CPU has no AVX2 and FMA"):
        floor_cases.floor()


def test_where_it_does_not_compile_the_reason_is_one_line(elsewhere, floor, tmp_path):
    (tmp_path / "floor.c").write_text("int wrong(void) { return missing; }\n", encoding="utf-8")
    elsewhere.setattr(floors, "SOURCE", tmp_path / "floor.c")
    with pytest.raises(ImportError, match=r"error: .*missing.*") as raised:
        floor_cases.floor()
    assert "\n" not in str(raised.value)

"""The tables and pictures of speed say what was measured: who is fastest, who is missing, and what is left out."""

import json
import os
import shutil
import subprocess
import sys
from statistics import median

import pytest
import report
import speed_tables
import targets
import timing
from pages import BENCH, GUIDE, README, ROOT, TESTS, places, write_between, write_section
from results import Cell, Results, noisy, row_of, spread, time_cell, times_longer

MACHINE = {
    "cpu": "made-up",
    "system": "Linux",
    "threads": 2,
    "python": "3.11.7",
    "versions": {"numpy": "2.4", "trl": None},
}
LARGE = speed_tables.LARGE


def steady(seconds):
    """Rounds that spread by 2%."""
    return [0.98 * seconds, seconds, 1.02 * seconds]


def restless(seconds):
    """Rounds that spread by 30%."""
    return [0.7 * seconds, seconds, 1.3 * seconds]


def saved(tmp_path, *rows):
    """What pytest-benchmark would have saved of rows (times, facts)."""
    path = tmp_path / "results.json"
    benchmarks = [{"extra_info": facts, "stats": {"data": times}} for times, facts in rows]
    path.write_text(json.dumps({"machine_info": {"grpo_fast": MACHINE}, "benchmarks": benchmarks}), encoding="utf-8")
    return Results([path])


def of_objective(n, ours, missing=(), **peers):
    """Rows of grpo_objective in float64: our times, and how many times longer each of the peers takes."""
    facts = {"work": "objective", "n": n, "dtype": "float64", "missing": dict(missing)}
    yield ours, facts | {"peer": "grpo_fast"}
    for peer, ratio in peers.items():
        yield [ratio * x for x in ours], facts | {"peer": peer.replace("_", " ")}


def of_loss(n, ours, in_place, dtype="float32", **peers):
    facts = {"work": "loss", "n": n, "kind": "full", "dtype": dtype, "level": "token", "missing": {}}
    yield ours, facts | {"peer": "grpo_fast"}
    yield in_place, facts | {"peer": "grpo_fast, in place"}
    for peer, ratio in peers.items():
        yield [ratio * x for x in ours], facts | {"peer": peer.replace("_", " ")}


def of_floor(function, dtype, per_token, **by_hand):
    """Rows of a function near 1: 5 µs a call and ``per_token`` seconds; if given, the C's 1 µs and its seconds."""
    facts = {"work": "floor", "function": function, "way": "near", "dtype": dtype, "cpu": "made-up", "missing": {}}
    for n in (4096, 16384):
        yield steady(5e-6 + n * per_token), facts | {"peer": "grpo_fast", "n": n}
        for seconds in by_hand.values():
            compiled = {"compiler": "cc 1.2", "instructions": 122}
            yield steady(1e-6 + n * seconds), facts | {"peer": "C floor", "n": n} | compiled


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def body(lines):
    """The rows of the tables among lines, by the first cell of each."""
    rows = [line for line in lines if line.startswith("|") and "---" not in line]
    return {cells(row)[0]: dict(zip(cells(rows[0]), cells(row), strict=True)) for row in rows[1:]}


# --- what a row says --------------------------------------------------------------------------------------------------
def test_the_spread_is_half_of_the_distance_between_the_quartiles():
    assert spread([1.0, 2.0, 3.0]) == 0.5
    assert spread([0.7]) == 0
    assert [noisy([1 - x, 1.0, 1 + x]) for x in (0.2, 0.204, 0.206, 0.3)] == [False, False, True, True]
    assert time_cell([0.9, 1.0, 1.1]).text == "1 s ± 10%"


def test_bold_is_the_least_of_those_that_compete():
    assert row_of([Cell("a", 1.0), Cell("b", 0.9), Cell("roof"), Cell("–")]) == ["a", "**b**", "roof", "–"]
    assert row_of([Cell("64", 64), Cell("64", 64), Cell("640", 640)]) == ["**64**", "**64**", "640"]
    assert row_of([Cell("–"), Cell("roof")]) == ["–", "roof"]


def test_our_time_is_bold_unless_a_peer_takes_less(tmp_path):
    found = saved(
        tmp_path,
        *of_objective(10, steady(1e-5), NumPy=3, Numba_loop=0.9),
        *of_objective(100, steady(1e-5), NumPy=3, Numba_loop=1.5),
    )
    rows = body(speed_tables.objective(found))
    assert (rows["10"]["grpo_fast"], rows["10"]["Numba loop"]) == ("10 µs ± 2%", "**0.9**")
    assert (rows["100"]["grpo_fast"], rows["100"]["Numba loop"]) == ("**10 µs ± 2%**", "1.5")
    assert rows["100"]["JAX"] == "–"
    assert sum(line.count("**") for line in speed_tables.objective(found)) == 4


def test_the_loss_has_one_fastest_among_both_ways_to_call_it_and_all_peers(tmp_path):
    found = saved(
        tmp_path,
        *of_loss(4096, steady(3e-4), steady(2e-4), Numba_loop=0.3),
        *of_loss(131072, steady(3e-4), steady(2e-4), Numba_loop=0.9),  # less than grad=True, more than grad=array
        *of_loss(LARGE, steady(3e-2), steady(4e-2), TRL=90),
    )
    rows = body(speed_tables.loss(found))
    bold = [[name for name, cell in row.items() if cell.startswith("**")] for row in rows.values()]
    assert bold == [["Numba loop"], ["grad=array"], ["grad=True"]]


def test_of_each_table_no_row_is_without_its_fastest(tmp_path):
    files = {"work": "files", "n": 10 << 20, "missing": {}}
    torch = {"work": "torch", "n": LARGE, "missing": {}}
    threads = {"work": "threads", "function": "grpo_loss", "dtype": "float64"}
    found = saved(
        tmp_path,
        (steady(0.2), files | {"peer": "grpo_fast"}),
        (steady(0.1), files | {"peer": "Polars"}),
        (steady(0.16), files | {"peer": "pyarrow, read only"}),
        (steady(0.02), torch | {"peer": "grpo_fast", "MiB": 64.1}),
        (steady(0.9), torch | {"peer": "torch eager", "MiB": 640.0}),
        (steady(0.4), threads | {"threads": 1}),
        (steady(0.3), threads | {"threads": 2}),
    )
    (row,) = body(speed_tables.files(found)).values()
    assert (row["grpo_fast"], row["Polars"]) == ("200 ms ± 2%", "**0.5**")
    assert row["of the speed of pyarrow merely reading"] == "0.80"  # a roof, which does not compete
    time, memory = body(speed_tables.torch(found)).values()
    assert (time["grpo_fast"], time["torch eager"]) == ("**20 ms ± 2%**", "45")
    assert (memory["grpo_fast"], memory["torch eager"]) == ("**64 MiB**", "640 MiB")
    (row,) = body(speed_tables.threads(found)).values()
    assert (row["1 thread"], row["2 threads"]) == ("400 ms ± 2%", "**1.33 (67%)**")


def test_what_a_call_takes_is_not_in_the_times_beside_the_floor(tmp_path):
    found = saved(
        tmp_path,
        *of_floor("grpo_loss", "float64", 4e-9, C=2e-9),
        *of_floor("grpo_loss", "float32", 1e-9, C=1e-9),
        *of_floor("grpo_objective", "float64", 2e-9),  # without a compiler
    )
    rows = body(speed_tables.floor(found))
    alike, alone = rows["`grpo_loss`, near, float32"], rows["`grpo_objective`, near, float64"]
    assert list(rows["`grpo_loss`, near, float64"].values())[1:] == ["4.00 ns ± 2%", "**2.00 ns ± 2%**", "2.00", "122"]
    assert alike["grpo_fast / C floor"] == "1.00"
    assert list(alone.values())[1:] == ["**2.00 ns ± 2%**", "–", "–", "–"]
    reached = {(row[0], row[1]): row[2:] for row in map(cells, targets.targets(found)) if "in cache" in row[0]}
    assert reached == {
        ("`grpo_loss(grad=array)`, in cache, near, float64", "C floor"): ["≤ 1.15×", "2.00×", "no"],
        ("`grpo_loss(grad=array)`, in cache, near, float32", "C floor"): ["≤ 1.15×", "1.00×", "yes"],
        ("`grpo_loss(grad=array)`, in cache, near, float32", "its time a token"): ["≤ 1.1 ns", "1.00 ns", "yes"],
    }
    assert list(speed_tables.floor(saved(tmp_path))) == []
    assert saved(tmp_path, *of_loss(4096, steady(1.0), steady(1.0))).slopes(work="loss", peer="grpo_fast") == []


# --- what is left out, and who is missing -----------------------------------------------------------------------------
def test_noisy_rows_are_left_out_and_named(tmp_path):
    found = saved(
        tmp_path,
        *of_objective(10, restless(1e-5), NumPy=3),
        *of_objective(100, steady(1e-5), NumPy=3),
        *of_loss(4096, steady(1e-4), restless(1e-4)),
    )
    lines = list(speed_tables.objective(found))
    assert list(body(lines)) == ["100"]
    assert "Left out, since their times spread by more than 20%: 10 (± 30%)." in lines
    lines = list(speed_tables.loss(found))
    assert not body([*lines, "| |"])  # all of it
    assert any("4,096, none masked, float32 (± 30%)" in line for line in lines)


def test_noisy_targets_are_left_out_and_named(tmp_path):
    ours = [1.0, 1.0, 1.0]
    facts = {"work": "objective", "dtype": "float64"}
    found = saved(
        tmp_path,
        *of_objective(20_000_000, ours, **{"read-only roof": 0.75}),
        (restless(1.5), facts | {"n": 20_000_000, "peer": "grpo_stats"}),
    )
    lines = list(targets.targets(found))
    (row,) = (cells(line) for line in lines if "roof" in line)
    assert row == ["`grpo_objective`, 20 M, float64", "read-only roof", "≥ 0.95", "0.75", "no"]
    assert "Left out, since they spread by more than 20%: `grpo_stats`, 20 M, float64 (`grpo_objective`)." in lines


@pytest.mark.parametrize(
    ("bound", "value", "met"),
    [("≥ 8×", 8, True), ("≥ 8×", 7.9, False), ("≤ 2 MiB", 2.1, False), ("≤ 0.1 s more", 0.07, True)],
)
def test_a_target_is_met_or_not(bound, value, met):
    target = targets.Target("work", "beside", bound, [value])
    assert target.met() == met
    assert target.row()[-1] == ("yes" if met else "no")


def test_who_is_missing_is_made_from_the_rows(tmp_path):
    others = {name: 2 for name in speed_tables.OBJECTIVE_PEERS if name not in ("grpo_fast", "JAX", "numexpr")}
    found = saved(tmp_path, *of_objective(10, steady(1e-5), {"JAX": "No module named 'jax'"}, **others))
    assert speed_tables.missing(found) == [
        "JAX is missing from grpo_objective: No module named 'jax'.",
        "numexpr is missing from grpo_objective: not measured.",
        *(
            f"Of {work} nothing was measured."
            for work in ("grpo_loss", "rollout_correction", "evaluate", "the torch operator", "what lies in a cache")
        ),
    ]


def test_nobody_is_missing_where_all_took_part(tmp_path):
    rows = [
        (steady(1.0), {"work": work, "n": 10, "dtype": "float64", "peer": peer, "missing": {}})
        for work, (_, peers) in speed_tables.PEERS.items()
        for peer in peers
    ]
    found = saved(tmp_path, *rows)
    assert speed_tables.missing(found) == ["All peers took part."]
    assert "All peers took part." in "\n".join(speed_tables.about(found))


# --- measuring --------------------------------------------------------------------------------------------------------
class Config:
    def __init__(self, **options):
        self.getoption = {"benchmark_disable": False, "benchmark_enable": False, "seconds": 1} | options
        self.getoption = self.getoption.__getitem__


@pytest.fixture
def measured(monkeypatch):
    """What the next measurements will be; the last one is repeated."""
    coming = []
    monkeypatch.setattr(timing, "_measure_once", lambda *_: coming.pop(0) if len(coming) > 1 else coming[0])
    return coming


@pytest.mark.parametrize(
    ("ours", "kept", "left"),
    [
        ([steady, restless, restless], 0, 2),  # steady at once: not again
        ([restless, steady, restless], 1, 1),
        ([restless, restless, steady], 2, 1),
    ],
)
def test_what_is_noisy_is_measured_again(measured, ours, kept, left):
    each = [{"grpo_fast": times(1.0), "peer": restless(float(i))} for i, times in enumerate(ours, start=1)]
    measured += each
    assert timing.measure(dict.fromkeys(each[0]), Config(), steady=["grpo_fast"]) is each[kept]
    assert len(measured) == left


def test_of_three_noisy_measurements_the_calmest_is_kept(measured):
    each = [{"a": [1 - x, 1.0, 1 + x], "b": steady(1.0)} for x in (0.5, 0.3, 0.4)]
    measured += [*each, {"a": steady(1.0), "b": steady(1.0)}]
    assert timing.measure(dict.fromkeys(each[0]), Config()) is each[1]
    assert len(measured) == 1  # three times is enough


def test_disabled_benchmarks_only_run():
    found = timing.measure({"nothing": lambda: None}, Config(benchmark_disable=True, seconds=1e9))
    assert len(found["nothing"]) == 3


TINY_SUITE = """
import pytest
from timing import clock, hand_over, measure

@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", ["sum", "sorted"])
def test_speed(benchmark, request, name):
    times = measure({"sum": lambda: sum(range(100)), "sorted": lambda: sorted(range(100))}, request.config)
    hand_over(benchmark, times, name, "a group", {"JAX": "no such module"}, work="tiny")
"""


def test_the_options_of_pytest_benchmark_work(tmp_path):
    # With the settings of this repository and what all suites have, but a suite that takes no time.
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    (tmp_path / "bench").mkdir()
    for name in ("pyproject.toml", "bench/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bench" / "bench_tiny.py").write_text(TINY_SUITE, encoding="utf-8")

    def suite(*options):
        environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")])}
        command = [sys.executable, "-m", "pytest", "bench", "--seconds=0.01", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    printed = suite("--benchmark-only", "--benchmark-autosave", "--benchmark-compare")  # with nothing, which is told
    assert "2 passed" in printed
    assert "benchmark 'a group': 2 tests" in printed
    assert "Can't compare" in printed
    printed = suite("-k", "sum", "--benchmark-compare", "--benchmark-json=results.json")
    assert "1 passed, 1 deselected" in printed
    assert "test_speed[sum] (NOW)" in printed
    found = Results([tmp_path / "results.json"])
    assert found.machine["threads"] >= 1
    (row,) = found.all(work="tiny", peer="sum")
    assert len(row["times"]) >= 3
    assert row["missing"] == {"JAX": "no such module"}
    assert "benchmark 'a group'" not in suite("--benchmark-disable")


# --- pages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [README, GUIDE, BENCH, TESTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_place_for_measured_numbers_is_empty(page):
    if not page.exists():
        pytest.skip("there is no such page")
    assert [name for name, text in places(page.read_text(encoding="utf-8")).items() if not text] == []


def test_there_is_a_place_for_every_table():
    for page, written in report.PLACES.items():
        assert set(written) <= set(places(page.read_text(encoding="utf-8")))
    assert {"accuracy", "soak"} <= set(places(TESTS.read_text(encoding="utf-8")))


def test_writing_between_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n", encoding="utf-8")
    write_between(page, "a", ["new", ""])
    assert page.read_text(encoding="utf-8") == "before\n<!-- a -->\n\nnew\n\n<!-- /a -->\nafter\n"
    for name, lines, why in (("b", ["new"], "has no <!-- b -->"), ("a", ["", ""], "nothing to write")):
        with pytest.raises(ValueError, match=why):
            write_between(page, name, lines)
    write_section(page, "b", "A heading", ["first"])
    write_section(page, "b", "A heading", ["second"])
    assert page.read_text(encoding="utf-8").endswith("\n\n## A heading\n\n<!-- b -->\n\nsecond\n\n<!-- /b -->\n")
    assert places(page.read_text(encoding="utf-8")) == {"a": "new", "b": "second"}


@pytest.mark.parametrize("text", ["<!-- a -->", "<!-- /a -->", "<!-- a --><!-- /a --><!-- a --><!-- /a -->"])
def test_markers_come_in_pairs(text):
    with pytest.raises(ValueError, match="markers open"):
        places(text)


def test_what_was_not_measured_stays_as_it_is(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- objective -->\nold\n<!-- /objective -->\n<!-- loss -->\nold\n<!-- /loss -->\n", "utf-8")
    monkeypatch.setattr(report, "HERE", tmp_path / "bench")
    monkeypatch.setattr(report, "PLACES", {page: {"objective": speed_tables.objective, "loss": speed_tables.loss}})
    monkeypatch.setattr(report, "PICTURES", {})
    report.write(saved(tmp_path, *of_objective(10, steady(1e-5))))
    written = places(page.read_text(encoding="utf-8"))
    assert "10 µs" in written["objective"]
    assert written["loss"] == "old"
    assert capsys.readouterr().out == "loss in README.md stays as it is: nothing of it was measured\n"


def test_the_readme_shows_lost_rows_too_and_its_lines_are_short(tmp_path):
    found = saved(
        tmp_path,
        *of_objective(20_000_000, steady(0.025), NumPy=100, JAX=5.5),
        *of_loss(LARGE, steady(0.03), steady(0.02), **{"torch.compile": 4, "Liger-Kernel": 6}),
        *of_loss(LARGE, restless(0.06), steady(0.04), "float64"),
        *of_loss(4096, steady(3e-4), steady(2e-4), Numba_loop=0.25),
    )
    lines = list(speed_tables.summary(found))
    rows = body(lines)
    assert len(rows) == 3
    assert rows["`grpo_loss`, 4096, float32"]["Numba loop"] == "**0.25**"
    assert rows["`grpo_loss`, 16.8 M, float32"]["grpo_fast"].startswith("**")
    assert "Left out, since their times spread by more than 20%: `grpo_loss`, 16.8 M, float64 (± 30%)." in lines
    assert max(map(len, lines)) <= 120
    head = cells(lines[0])
    known = {peer for _, peers in speed_tables.PEERS.values() for peer in peers}
    assert set(head[1:]) <= known
    assert list(speed_tables.summary(saved(tmp_path))) == []


# --- pictures ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    import pictures

    return pictures


def test_bars_are_labelled_with_time_and_ratio(pictures, tmp_path):
    found = saved(
        tmp_path,
        *of_loss(4096, steady(3e-4), steady(2e-4), Numba_loop=0.25),
        *of_loss(LARGE, steady(0.0324), steady(0.02), TRL=93, **{"torch.compile": 4.09}),
        ([0.02], {"work": "loss", "n": LARGE, "kind": "full", "dtype": "float32", "level": "token", "peer": "roof"}),
    )
    facts = pictures.largest_batch(found)
    assert facts["n"] == LARGE
    labels = {bar.peer: bar.label() for bar in pictures.bars(found, facts)}
    assert labels.pop("roof")
    assert labels == {
        "grpo_fast": "32.4 ms",
        "torch.compile": "133 ms, 4.1 × longer",
        "TRL": "3.01 s, 93 × longer",
    }
    assert pictures.draw_bars(found, tmp_path / "speed.svg")
    text = (tmp_path / "speed.svg").read_text(encoding="utf-8")
    assert all(label in text for label in labels.values())
    assert "grpo_fast, in place" not in text


def test_bars_are_of_a_steady_batch(pictures, tmp_path):
    single = of_loss(LARGE, restless(0.03), steady(0.02))
    found = saved(tmp_path, *single, *of_loss(LARGE, steady(0.06), steady(0.04), "float64"))
    assert pictures.largest_batch(found)["dtype"] == "float64"
    found = saved(tmp_path, *of_loss(LARGE, restless(0.03), steady(0.02)))
    assert not pictures.draw_bars(found, tmp_path / "speed.svg")
    assert not (tmp_path / "speed.svg").exists()


def test_times_over_sizes(pictures, tmp_path):
    found = saved(tmp_path, *of_objective(10, steady(1e-5), NumPy=3), *of_objective(100, steady(1e-5), NumPy=3))
    assert pictures.draw_sizes(found, tmp_path / "sizes.svg")
    assert "ns per sample" in (tmp_path / "sizes.svg").read_text(encoding="utf-8")
    assert not pictures.draw_sizes(saved(tmp_path), tmp_path / "none.svg")


def test_a_ratio_is_taken_round_by_round(tmp_path):
    facts = {"work": "objective", "n": 10, "dtype": "float64"}
    ours, theirs = [1.0, 10.0, 1.0], [2.0, 20.0, 20.0]
    found = saved(tmp_path, (ours, facts | {"peer": "grpo_fast"}), (theirs, facts | {"peer": "NumPy"}))
    assert found.ratio("NumPy", "grpo_fast", **facts) == 2 != median(theirs) / median(ours)
    assert found.ratio("JAX", "grpo_fast", **facts) is None
    assert [times_longer(x) for x in (0.2714, 99.6, 123.4)] == ["0.271", "99.6", "123"]

"""A run: by the value of a column beside the whole; JSON Lines beside reading them; writing beside pyarrow; memory.

``pytest bench/bench_runs.py`` (two minutes, and some GB of disk). Files lie in the page cache: no disk is measured.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import fresh_process
from timing import clock, hand_over, measure

from grpo_fast import K3, evaluate
from grpo_fast.files import RolloutWriter

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
import rollouts  # noqa: E402 - which needs pyarrow
from pyarrow import json as arrow_json  # noqa: E402 - as here
from pyarrow import parquet  # noqa: E402 - as here

BY = ("whole", "by step", "by prompt_id")
LINES = ("grpo_fast", "pyarrow, read only")
WRITERS = ("RolloutWriter", "pyarrow")
NAMES = ("logps", "old_logps", "ref_logps", "rollout_logps")
GIB = 1 << 30
ADDRESSES = 2 * GIB


@pytest.fixture(scope="module")
def run(quick, tmp_path_factory):
    """A run in a folder."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    rollouts.write(folder, steps=8 if quick else 256)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def by_value(run, request):
    calls = {
        "whole": lambda: evaluate(run, kl=K3(0.04)),
        "by step": lambda: evaluate(run, by="step", kl=K3(0.04)),
        "by prompt_id": lambda: evaluate(run, by="prompt_id", kl=K3(0.04)),
    }
    whole = calls["whole"]()
    assert all(sum(calls[name]().values()) == whole for name in BY[1:])
    return whole.tokens, measure(calls, request.config)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", BY)
def test_by(benchmark, by_value, name):
    n, times = by_value
    hand_over(benchmark, times, name, f"by the value of a column, {n:,} tokens", work="by", n=n)


@pytest.fixture(scope="module")
def lines(run, quick, request):
    """Some steps of the run as JSON Lines, and who reads them."""
    path = run.parent / "run.jsonl"
    needed = ["logps", "old_logps", "advantages"]
    with path.open("w") as file:
        for part in sorted(run.iterdir())[: 2 if quick else 16]:
            for row in parquet.read_table(part, columns=needed).to_pylist():
                file.write(json.dumps({name: _rounded(x) for name, x in row.items()}) + "\n")
    schema = pa.schema({name: pa.list_(pa.float64()) for name in needed[:2]} | {"advantages": pa.float64()})
    options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    calls = {
        "grpo_fast": lambda: evaluate(path).tokens,
        "pyarrow, read only": lambda: len(
            arrow_json.read_json(path, parse_options=options)["logps"].combine_chunks().values
        ),
    }
    tokens = {call() for call in calls.values()}
    assert len(tokens) == 1
    yield tokens.pop(), measure(calls, request.config)
    path.unlink()


def _rounded(x):
    """Numbers in as many digits as float32 has: what a logger writes."""
    return [float(f"{y:.8g}") for y in x] if isinstance(x, list) else x


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", LINES)
def test_json_lines(benchmark, lines, name):
    n, times = lines
    hand_over(benchmark, times, name, f"JSON Lines, {n:,} tokens", work="JSON Lines", n=n)


@pytest.fixture(scope="module")
def written(quick, request, tmp_path_factory):
    """A step, packed, by the writer and by pyarrow with the writer's settings."""
    folder = tmp_path_factory.mktemp("written")
    step = rollouts.step_of(1.0, 128 if quick else 4096, 400, np.random.default_rng(0))
    writer = RolloutWriter(folder / "run")

    def by_pyarrow() -> None:
        offsets = pa.array(step["cu_seqlens"].astype(np.int32))
        columns = {name: pa.ListArray.from_arrays(offsets, pa.array(step[name])) for name in NAMES}
        per_sequence = {"advantages": step["advantages"], "prompt_id": step["prompt_id"], **step["columns"]}
        columns |= {name: pa.array(x) for name, x in per_sequence.items()}
        columns |= {name: pa.array(np.zeros(len(step["advantages"]), np.int64)) for name in ("step", "rank")}
        settings = {"compression": "none", "use_dictionary": [], "write_statistics": False}
        parquet.write_table(pa.table(columns), folder / "by_hand.parquet", write_page_checksum=True, **settings)

    def by_writer() -> None:
        writer._files.clear()  # so that it is the same file again
        writer.write(step=0, **step)

    calls = {"RolloutWriter": by_writer, "pyarrow": by_pyarrow}
    for call in calls.values():
        call()
    sizes = [sum(path.stat().st_size for path in folder.rglob(name)) for name in ("step-*.parquet", "by_hand.parquet")]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
    yield len(step["logps"]), measure(calls, request.config)
    shutil.rmtree(folder)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", WRITERS)
def test_writing(benchmark, written, name):
    n, times = written
    hand_over(benchmark, times, name, f"writing a step, {n:,} tokens", work="writing", n=n)


READING = """
import resource, time
resource.setrlimit(resource.RLIMIT_AS, ({limit}, -1))
from grpo_fast import K3, evaluate
t = time.perf_counter()
tokens = evaluate({folder!r}, by="step", kl=K3(0.04)).popitem()[1].tokens
seconds = time.perf_counter() - t
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmPeak"))
print(seconds, peak, tokens)
"""


@pytest.mark.benchmark(timer=clock)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_address_space(benchmark, run, quick):
    """A folder of 10 GB, of which all but the files of a run are further names of these, in 2 GiB of addresses."""
    many = run.parent / "many"
    many.mkdir()
    files = sorted(run.iterdir())
    evaluate(files[0], kl=K3(0.04))  # compiled beforehand
    size, number = 0, 0
    while size < (GIB // 10 if quick else 10_000_000_000):
        file = files[number % len(files)]
        os.link(file, many / f"{number:06d}.parquet")
        size += Path(file).stat().st_size
        number += 1
    seconds, peak, _ = map(float, fresh_process(READING.format(folder=str(many), limit=ADDRESSES)).split())
    shutil.rmtree(many)
    facts = {"n": size, "GiB": peak * 1024 / GIB}
    hand_over(benchmark, {"evaluate": [seconds]}, "evaluate", "address space", work="address space", **facts)

"""Directories, file systems, JSON Lines, tables in memory, fields of structs: the bits of a file, or what to do."""

import bz2
import gzip
import io
import json
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from grpo_fast import evaluate, grpo_loss, grpo_stats
from grpo_fast.files import RolloutWriter, sweep, worst

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from pyarrow import fs  # noqa: E402
from rollout_files import FORMATS, GRID, OPTIONS, probabilities, refused, table, tokens, write  # noqa: E402

from grpo_fast import _json_lines  # noqa: E402

ARRAYS = tokens(40, optional=True)


@pytest.fixture(scope="module")
def expected():
    return grpo_loss(**ARRAYS, **OPTIONS).stats


# --- directories ------------------------------------------------------------------------------------------------------
def test_a_directory_is_its_files_and_those_below(expected, tmp_path):
    whole = table(ARRAYS)
    deep = tmp_path / "run" / "deep" / "er"
    deep.mkdir(parents=True)
    write(tmp_path / "run" / "b.parquet", whole[:10])
    write(tmp_path / "run" / "a.parquet", whole[10:25])
    write(deep / "c.parquet", whole[25:])
    for name in (".hidden.parquet", "_SUCCESS", "_metadata.parquet", "readme.md", "log.jsonl", "config.json"):
        (tmp_path / "run" / name).write_text("nothing of ours")
    (tmp_path / "run" / ".ipynb").mkdir()
    (tmp_path / "run" / ".ipynb" / "x.parquet").touch()
    for paths in (tmp_path / "run", str(tmp_path / "run") + "/", os.fsencode(tmp_path / "run"), str(tmp_path / "r*")):
        assert evaluate(paths, **OPTIONS) == expected
    refused("b.parquet is named twice", [tmp_path / "run", tmp_path / "run" / "b.parquet"])
    refused("deep/er is named twice|c.parquet is named twice", [tmp_path / "run", deep])


@pytest.mark.parametrize("name", ["a.arrow", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json"])
def test_of_a_directory_the_first_kind_is_read(name, tmp_path):
    if name.endswith("arrow"):
        write(tmp_path / name, table(ARRAYS))
    else:
        write_lines(tmp_path / name, table(ARRAYS).to_pylist())
    found = evaluate(tmp_path, **OPTIONS)
    write(tmp_path / "b.parquet", table(tokens(3)))
    (tmp_path / "x.json").write_text("{}")
    assert found.sequences == 40
    assert evaluate(tmp_path, **OPTIONS).sequences == 3


def test_an_empty_directory_says_what_it_looked_for(tmp_path):
    refused("is a directory without rollouts: no file in it ends in .parquet, .arrow, .jsonl, .json", tmp_path)


# --- file systems -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_system_of_pyarrow(suffix, expected, tmp_path):
    whole = table(ARRAYS).append_column("step", pa.array([1, 2] * 20))
    folder = tmp_path / "bucket" / "run" / "deep"
    folder.mkdir(parents=True)
    write(folder.parent / f"a.{suffix}", whole[:7], whole[7:20])
    write(folder / f"b.{suffix}", whole[20:])
    (folder.parent / "_x.parquet").touch()
    filesystem = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    for paths in ("run", "run/", [f"run/a.{suffix}", f"run/deep/b.{suffix}"], f"run/**/*.{suffix}"):
        assert evaluate(paths, filesystem=filesystem, **OPTIONS) == expected
    assert evaluate("run/?.*", filesystem=filesystem, **OPTIONS).sequences == 20
    by = evaluate("run", by="step", filesystem=filesystem, **OPTIONS)
    assert sum(by.values()) == expected
    assert sweep("run", filesystem=filesystem, **GRID) == sweep(tmp_path / "bucket", **GRID)
    with ThreadPoolExecutor(2) as executor:
        assert evaluate("run", filesystem=filesystem, executor=executor, **OPTIONS) == expected
    for path in ("nothing", "run/*.csv", "run/nothing.parquet"):
        refused("no such file: .* on subtree", path, filesystem=filesystem, error=FileNotFoundError)
    refused("named twice", ["run", f"run/a.{suffix}"], filesystem=filesystem)
    refused("filesystem must be one of pyarrow.fs, got 's3'", "run", filesystem="s3", error=TypeError)


@pytest.mark.slow
def test_a_file_system_goes_to_other_processes(expected, tmp_path):
    write(tmp_path / "a.parquet", table(ARRAYS))
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        assert evaluate("a.parquet", filesystem=filesystem, executor=executor, **OPTIONS) == expected
        assert evaluate(table(ARRAYS), executor=executor, **OPTIONS) == expected


def test_uris(expected, tmp_path):
    whole = table(ARRAYS)
    folder = tmp_path / "step=3"
    folder.mkdir()
    write(folder / "a.parquet", whole[:20])
    write(folder / "b.parquet", whole[20:])
    uri = f"file://{tmp_path.as_posix()}"
    for paths in (uri, f"{uri}/step=3", f"{uri}/*/*.parquet", [f"{uri}/step=3/a.parquet", folder / "b.parquet"]):
        assert evaluate(paths, **OPTIONS) == expected
    assert list(evaluate(uri, by="step", **OPTIONS)) == [3]
    refused("a.parquet is named twice", [f"{uri}/step=3/a.parquet", folder / "a.parquet"])
    refused("nosuch://x: pyarrow knows no such file system", "nosuch://x")
    refused("no such file: .*nothing", f"{uri}/nothing", error=FileNotFoundError)


def test_hive_partitions_on_a_file_system(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step={step}").mkdir()
        write(tmp_path / f"step={step}" / "a.parquet", table(tokens(3, seed=step)))
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert evaluate("", by="step", filesystem=filesystem, **OPTIONS) == evaluate(tmp_path, by="step", **OPTIONS)


# --- JSON Lines -------------------------------------------------------------------------------------------------------
def write_lines(path, rows):
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda x: pa.Codec("zstd").compress(x).to_pybytes()}
    path.write_bytes(pack.get(path.suffix, bytes)(text))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.bz2", "a.json", "whatever"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_json_lines_give_the_bits_of_arrays(name, batch_size, expected, tmp_path):
    path = write_lines(tmp_path / name, table(ARRAYS).to_pylist())
    assert evaluate(path, batch_size=batch_size, **OPTIONS) == expected
    assert sweep(path, **GRID) == sweep(write(tmp_path / "x.parquet", table(ARRAYS)), **GRID)
    with ThreadPoolExecutor(2) as executor:
        assert evaluate([path], executor=executor, **OPTIONS) == expected


@pytest.mark.parametrize("piece", [1, 100, 5000])
def test_pieces_of_any_size(piece, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(_json_lines, "_PIECE", piece)
    monkeypatch.setattr(_json_lines, "_FIRST_PIECE", piece)
    monkeypatch.setattr(_json_lines, "_AT_ONCE", 500)  # shorter than a line
    rows = table(ARRAYS).to_pylist()
    path = write_lines(tmp_path / "a.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes().replace(b"\n", b"\r\n\n")[:-3])  # and no end of line at last
    assert evaluate(path, **OPTIONS) == expected


def test_other_columns_and_types_on_the_way(tmp_path):
    rows = [
        {"text": "a", "logps": [-1], "old_logps": [-1, -2][:1], "advantages": 1, "step": 1, "more": {"x": 1}},
        {"logps": [], "old_logps": [], "advantages": 0.5, "step": 1, "new": [1]},
        {"logps": [-0.5, -1.5], "old_logps": [-0.25, -1], "advantages": -1, "step": None, "text": 3},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows[:1])
    with path.open("a") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows[1:]))
    whole = pa.table(
        {name: [row[name] for row in rows] for name in ("logps", "old_logps", "advantages")},
    )
    assert evaluate(path) == evaluate(write(tmp_path / "a.parquet", whole))
    assert {value: stats.sequences for value, stats in evaluate(path, by="step").items()} == {1: 2, None: 1}


def test_flat_json_lines(tmp_path):
    arrays = probabilities(9000)
    path = write_lines(tmp_path / "a.jsonl", table(arrays).to_pylist())
    assert evaluate(path) == grpo_stats(**arrays)


def test_a_bad_line_is_found(tmp_path):
    rows = table(tokens(9, longest=5)).to_pylist()
    row = next(i for i, x in enumerate(rows) if i > 3 and len(x["logps"]) > 2)
    rows[row]["logps"][2] = None
    path = write_lines(tmp_path / "a.jsonl", rows)
    for batch_size in (None, 2):
        message = rf"a.jsonl, row {row}: column 'logps' has a null in a list"
        refused(message, path, batch_size=batch_size, **OPTIONS)
    rows[row]["logps"][2] = float("nan")
    refused(rf"a.jsonl, row {row}: logps must be finite", write_lines(path, rows), **OPTIONS)
    path.write_text('{"logps": [1], "advantages": 1, "old_logps": [1]}\n{"logps": [1], \n')
    refused("a.jsonl.*: cannot be read: JSON parse error", path)
    path.write_text('{"logps": [1], "advantages": 1, "old_logps": [1]}\n{"logps": ["a"], "advantages": 1}\n')
    refused("a.jsonl.*column 'logps': cannot be read: JSON parse error", path)
    path.write_text("{}\n")
    refused("a.jsonl must have either", path)


def test_strings_that_look_like_dates_are_strings(tmp_path):
    rows = [
        {"logps": [-1], "old_logps": [-2], "advantages": 1, "run": run, "r": {"id": "2024-02-03T04:05:06Z"}}
        for run in ("2024-01-01", "2024-01-02", "2024-01-01")
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert {run: stats.sequences for run, stats in evaluate(path, by="run").items()} == {
        "2024-01-01": 2,
        "2024-01-02": 1,
    }
    assert list(evaluate(path, by="r.id")) == ["2024-02-03T04:05:06Z"]
    assert worst(path, show=["run", "r"], n=1)[0].shown == {"run": "2024-01-01", "r": rows[0]["r"]}


@pytest.mark.parametrize("blank", [b"", b"\n\n", b"\xef\xbb\xbf", b" " * 70 + b"\n"])
def test_files_without_a_line_count_as_nothing(blank, expected, tmp_path):
    whole = write_lines(tmp_path / "b.jsonl", table(ARRAYS).to_pylist())
    for name in ("a.jsonl", "c.NDJSON"):
        (tmp_path / name).write_bytes(blank)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(blank))
    assert evaluate([tmp_path / "a.jsonl", whole, tmp_path / "c.NDJSON"], **OPTIONS) == expected
    assert evaluate(tmp_path, **OPTIONS) == expected
    refused("a.jsonl: no rows", tmp_path / "a.jsonl", **OPTIONS)
    for name in ("a.txt", "a.jsonl.gz"):  # packed, nothing is something that was cut off
        (tmp_path / name).touch()
        refused(f"{name} is empty", tmp_path / name, **OPTIONS)


def test_lines_behind_many_blank_ones(expected, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", table(ARRAYS).to_pylist())
    path.write_bytes(b"\n" * 99 + path.read_bytes())
    assert evaluate(path, **OPTIONS) == expected


def test_what_is_not_asked_for_may_be_of_any_type(expected, tmp_path):
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]
    rows = [
        row | {"messages": messages[:: 1 - 2 * (i % 2)], "more": {"x": [1, {"y": "z"}, None], "step": i % 2}}
        for i, row in enumerate(table(ARRAYS).to_pylist())
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert evaluate(path, **OPTIONS) == expected
    by = evaluate(path, by="more.step", **OPTIONS)
    assert list(by) == [0, 1]
    assert sum(by.values()) == expected
    refused("column 'messages': cannot be read: .*content.* in row 0", path, call=worst, show=["messages"])


@pytest.mark.parametrize(("values", "kind"), [(["b", "a"], str), ([1, 0], int)])
def test_a_column_may_begin_with_many_nulls(values, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(_json_lines, "_FIRST_PIECE", 500)
    monkeypatch.setattr(_json_lines, "_PIECE", 1000)
    rows = table(tokens(30, longest=3)).to_pylist()
    for i, row in enumerate(rows):
        row |= {"name": None if i < 20 else values[i % 2], "r": {"name": None if i < 20 else values[i % 2]}}
    path = write_lines(tmp_path / "a.jsonl", rows)
    for by in ("name", "r.name"):
        found = evaluate(path, by=by, **OPTIONS)
        assert list(found) == [*sorted(values), None]
        assert {type(value) for value in found} == {kind, type(None)}
        assert found[None].sequences == 20
        assert sum(found.values()) == evaluate(path, **OPTIONS)


def test_a_key_that_is_an_int_here_and_a_string_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(_json_lines, "_FIRST_PIECE", 10)
    rows = [{"logps": [-1], "old_logps": [-2], "advantages": 1, "step": step} for step in (None, 1, None, "x")]
    paths = [write_lines(tmp_path / f"{i}.jsonl", rows[2 * i :][:2]) for i in range(2)]
    refused("by must be of one type in all files, got ints and strings", paths, by="step")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"logps": [-1], "old_logps": ["a"], "advantages": 1}', "changed from number to string in row 25$"),
        ('{"logps": [-1], "old_logps": [-1], ', "JSON parse error: .* in row 25$"),
        ('{"logps": [-1], "old_logps": [-1], "advantages": 1, "logps": []}', "was specified twice in row 25$"),
    ],
)
def test_rows_in_errors_are_those_of_the_file(line, message, monkeypatch, tmp_path):
    monkeypatch.setattr(_json_lines, "_AT_ONCE", 300)
    rows = [{"logps": [-1], "old_logps": [-1.5], "advantages": 1}] * 30
    path = write_lines(tmp_path / "a.jsonl", rows)
    lines = path.read_text().splitlines()
    lines[25] = line
    path.write_text("\n\n".join(lines))
    for piece in (100, 1000, 1 << 20):
        monkeypatch.setattr(_json_lines, "_FIRST_PIECE", 100)
        monkeypatch.setattr(_json_lines, "_PIECE", piece)
        refused(message, path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2"])
def test_what_was_cut_off_is_refused(name, tmp_path):
    path = write_lines(tmp_path / name, table(ARRAYS).to_pylist())
    path.write_bytes(path.read_bytes()[:-30])
    refused(f"{name}.*cannot be read", path, **OPTIONS)


# --- tables in memory -------------------------------------------------------------------------------------------------
def test_tables_of_pyarrow(expected, tmp_path):
    whole = table(ARRAYS)
    chunks = pa.concat_tables([whole[:7], whole[7:7], whole[7:]])
    for x in (whole, chunks, whole.to_batches()[0], whole.to_reader(), [chunks[:9], chunks[9:]]):
        assert evaluate(x, **OPTIONS) == expected
    for batch_size in (1, 13):
        assert evaluate(chunks, batch_size=batch_size, **OPTIONS) == expected
    assert sweep(chunks, **GRID) == sweep(write(tmp_path / "a.parquet", whole), **GRID)
    assert evaluate([whole[:9], write(tmp_path / "b.parquet", whole[9:])], **OPTIONS) == expected
    with ThreadPoolExecutor(2) as executor:
        assert evaluate(chunks, executor=executor, **OPTIONS) == expected
    keyed = chunks.append_column("step", pa.array([1, 2] * 20))
    assert sum(evaluate(keyed, by="step", **OPTIONS).values()) == expected


def test_a_stream_is_read_once_and_says_so(expected):
    keyed = table(ARRAYS).append_column("step", pa.array([1, 2] * 20))
    with ThreadPoolExecutor(1) as executor:
        for options in ({}, {"by": "step"}, {"executor": executor}):
            reader = keyed.to_reader()
            refused(
                "'x' .for logps. is missing", reader, columns={"logps": "x"}, **OPTIONS
            )  # nothing has been read of it
            evaluate(reader, **options, **OPTIONS)
            message = "^the RecordBatchReader of pyarrow was read already, and a stream gives its rows once"
            refused(message, reader, **OPTIONS)
            refused(message, [table(ARRAYS), reader], **OPTIONS)
    reader = keyed.to_reader()
    reader.read_all()  # not by us
    message = (
        "the RecordBatchReader of pyarrow: no samples: a stream gives its rows once, and may have been read already"
    )
    refused(message, reader, **OPTIONS)
    assert evaluate([keyed, keyed.schema.empty_table().to_reader()], **OPTIONS) == expected


def test_errors_name_the_table_and_the_row(tmp_path):
    rows = table(tokens(9, longest=5)).to_pydict()
    rows["advantages"][7] = None
    bad = pa.table(rows)
    message = "the Table of pyarrow, row 7: column 'advantages' has a null"
    refused(message, pa.concat_tables([bad[:5], bad[5:]]), **OPTIONS)
    with ThreadPoolExecutor(1) as executor:
        refused(message, pa.concat_tables([bad[:5], bad[5:]]), executor=executor, **OPTIONS)
    refused("the Table of pyarrow must have either", pa.table({"x": [1]}))
    refused("the Table of pyarrow: no rows", bad[:0])
    refused("the Int64Array of pyarrow, which has no columns|got an Int64Array", pa.array([1]), error=TypeError)


class Stream:
    """A table of a library that nobody here knows."""

    def __init__(self, inner):
        self._inner = inner

    def __arrow_c_stream__(self, requested_schema=None):
        return self._inner.__arrow_c_stream__(requested_schema)

    def __iter__(self):  # as of frames, whose columns these are
        raise AssertionError("nobody looks")


def test_whoever_has_a_stream_is_read(expected):
    assert evaluate(Stream(table(ARRAYS)), **OPTIONS) == expected
    assert evaluate([Stream(table(ARRAYS)[:9]), Stream(table(ARRAYS)[9:])], **OPTIONS) == expected


@pytest.mark.parametrize("package", ["pandas", "polars", "datasets"])
def test_frames(package, expected):
    pytest.importorskip(package)
    whole = table(ARRAYS, pa.list_)
    if package == "pandas":
        frame = whole.to_pandas()
    elif package == "polars":
        import polars

        frame = polars.from_arrow(whole)
    else:
        import datasets

        frame = datasets.Dataset(whole)
    assert evaluate(frame, **OPTIONS) == expected
    assert evaluate([frame], **OPTIONS) == expected


# --- fields of structs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [*FORMATS, "jsonl"])
def test_fields_of_structs(suffix, expected, tmp_path):
    whole = table(ARRAYS)
    names = ("logps", "old_logps", "ref_logps", "mask", "rollout_is_weights")
    inner = pa.StructArray.from_arrays([whole[name].combine_chunks() for name in names], list(names))
    nested = pa.table(
        {"r": inner, "extra": pa.array([{"step": k % 3, "adv": a} for k, a in enumerate(ARRAYS["advantages"])])}
    )
    path = tmp_path / f"a.{suffix}"
    path = write_lines(path, nested.to_pylist()) if suffix == "jsonl" else write(path, nested[:9], nested[9:])
    columns = {name: f"r.{name}" for name in names} | {"advantages": "extra.adv"}
    assert evaluate(path, columns=columns, **OPTIONS) == expected
    by = evaluate(path, columns=columns, by="extra.step", **OPTIONS)
    assert list(by) == [0, 1, 2]
    assert sum(by.values()) == expected
    without = {name: column for name, column in columns.items() if name != "mask"}
    refused("column 'r.mask' looks like a mask and is not used", path, columns=without, **OPTIONS)
    message = r"column 'r.logp' \(for logps\) is missing; .*; if it is this one, columns={'logps': 'r.logps'}"
    refused(message, path, columns=columns | {"logps": "r.logp"}, **OPTIONS)
    if suffix != "jsonl":
        missing = pa.array([None if k == 3 else x for k, x in enumerate(nested["r"].to_pylist())], nested["r"].type)
        path = write(path, nested.set_column(0, "r", missing))
        refused("row 3: column 'r.logps' has a null", path, columns=columns, **OPTIONS)


@pytest.mark.parametrize("nested", [False, True])
def test_lists_are_read_in_parts_wherever_they_stand(nested):
    from grpo_fast._arrow import in_parts

    column = pa.array([[-1.0]] * 100)
    records = pa.record_batch({"r": pa.StructArray.from_arrays([column], ["logps"])} if nested else {"logps": column})
    columns = ["r.logps" if nested else "logps"]
    assert [len(part) for part in in_parts(records, columns, 7)] == [7] * 14 + [2]


def test_structs_in_structs(tmp_path):
    rows = [{"a": {"b": {"logps": [-1.0], "old_logps": [-1.5]}, "c": 3}, "advantages": 2.0}]
    columns = {"logps": "a.b.logps", "old_logps": "a.b.old_logps"}
    found = evaluate(write(tmp_path / "a.parquet", pa.Table.from_pylist(rows)), columns=columns)
    assert found == grpo_loss([[-1.0]], [[-1.5]], [2.0]).stats
    assert evaluate(write_lines(tmp_path / "a.jsonl", rows), columns=columns) == found


# --- files of RolloutWriter -------------------------------------------------------------------------------------------
def test_steps_with_and_without_a_mask_are_one_run(tmp_path):
    writer = RolloutWriter(tmp_path)
    steps = [tokens(5, seed=1), tokens(5, seed=2, optional=True)]
    del steps[1]["rollout_is_weights"]
    for step, arrays in enumerate(steps):
        writer.write(step=step, **arrays)
    expected = {step: grpo_loss(**arrays, **OPTIONS).stats for step, arrays in enumerate(steps)}
    for columns in (None, {"logps": "logps", "mask": "mask"}):
        assert evaluate(tmp_path, by="step", columns=columns, **OPTIONS) == expected
    other = write(tmp_path / "other.parquet", table(steps[0]).append_column("step", pa.array([2] * 5)))
    refused("differs from", [other, *sorted(tmp_path.glob("step*"))], by="step", **OPTIONS)


def test_bytes_in_memory_say_how_they_become_a_file():
    refused("got a BytesIO: write it into a file", io.BytesIO(b"PAR1"), error=TypeError)
    assert np.isfinite(evaluate(table(ARRAYS), **OPTIONS).objective)

"""The sequences that stand out are those that a search over all of them finds, in whatever files and batches."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from grpo_fast.__main__ import main
from grpo_fast.files import Outlier, worst

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import FORMATS, lists, probabilities, refused, table, tokens, write  # noqa: E402


def searched(arrays, rollout, rank):
    """Value, token and number of tokens of each row that has any, the worst first, as a reader would do it."""
    found = []
    bounds = arrays["cu_seqlens"]
    keep = arrays.get("mask", np.ones(bounds[-1], bool))
    l = arrays["logps"] - arrays["ref_logps"]
    values = {
        "ratio": arrays["logps"] - arrays["old_logps"],
        "kl": np.exp(-l) - 1 + l,
        "mismatch": np.nan_to_num(arrays["old_logps"] - rollout),
    }[rank]
    for row, (i, j) in enumerate(pairwise(bounds)):
        x = np.where(keep[i:j], values[i:j], 0)
        if keep[i:j].any():
            token = int(np.abs(x).argmax())
            value = x.sum() / keep[i:j].sum() if rank == "kl" else x[token]
            found.append((value, row, token, int(keep[i:j].sum())))
    return sorted(found, key=lambda x: -abs(x[0]))


@pytest.mark.parametrize("suffix", [*FORMATS, "jsonl"])
@pytest.mark.parametrize("rank", ["ratio", "kl", "mismatch"])
def test_they_are_those_of_a_search(rank, suffix, tmp_path):
    arrays = tokens(60, optional=True)
    rollout = arrays["old_logps"] + np.random.default_rng(1).normal(0, 0.1, arrays["logps"].size)
    rollout[::3] = np.nan
    whole = table(arrays).append_column("prompt_id", pa.array([f"p{i}" for i in range(60)]))
    column = pa.array(rollout, from_pandas=suffix == "jsonl")  # of which NaN is none
    offsets = pa.array(arrays["cu_seqlens"], pa.int64())
    whole = whole.append_column("rollout_logps", pa.LargeListArray.from_arrays(offsets, column))
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in whole.to_pylist()))
    else:
        write(path, whole[:7], whole[7:40], whole[40:])
    found = worst(path, rank=rank, n=10)
    expected = searched(arrays, rollout, rank)[:10]
    assert [(x.row, x.token, x.tokens) for x in found] == [x[1:] for x in expected]
    assert [x.value for x in found] == pytest.approx([x[0] for x in expected], rel=1e-12 if rank == "kl" else 0, abs=0)
    assert [x.shown for x in found] == [{"prompt_id": f"p{x.row}"} for x in found]
    assert {x.file for x in found} == {str(path)}
    with ThreadPoolExecutor(2) as executor:
        assert worst([path], rank=rank, n=10, executor=executor, batch_size=7) == found
    assert worst(path, rank=rank, n=3, batch_size=1) == found[:3]
    assert len(worst(path, rank=rank, n=1000)) == len(searched(arrays, rollout, rank))


def test_equal_ones_are_in_order_of_file_and_row(tmp_path):
    rows = pa.table({"logps": [[-1.0]] * 3, "old_logps": [[-2.0]] * 3, "step": [7, 7, 7]})
    paths = [write(tmp_path / f"{name}.parquet", rows) for name in "ba"]
    found = worst(paths, n=4)
    assert [(x.file[-9:], x.row) for x in found] == [("a.parquet", i) for i in range(3)] + [("b.parquet", 0)]
    assert found[0] == Outlier(1.0, str(paths[1]), 0, 0, 1, {"step": 7})
    assert found[0].as_dict() == {
        **{"value": 1.0, "file": str(paths[1]), "row": 0, "token": 0, "tokens": 1},
        "step": 7,
    }


def test_what_is_shown(tmp_path):
    rows = pa.table({"logps": [[-1.0]], "old_logps": [[-2.0]], "reward": [0.5], "r": [{"id": "x"}]})
    path = write(tmp_path / "a.parquet", rows)
    assert worst(path)[0].shown == {}
    assert worst(path, show=["reward", "r.id"])[0].shown == {"reward": 0.5, "r.id": "x"}
    assert worst(rows)[0].file == "the Table of pyarrow"


def test_a_partition_is_shown_as_a_column_is(tmp_path):
    for step, rank in (("02", "a"), ("10", "7"), ("__HIVE_DEFAULT_PARTITION__", "b")):
        folder = tmp_path / f"step={step}" / f"rank={rank}"
        folder.mkdir(parents=True)
        rows = {"logps": [[-float(len(rank + step))]], "old_logps": [[0.0]], "reward": [0.5]}
        write(folder / "a.parquet", pa.table(rows | ({"prompt_id": ["x"]} if step == "02" else {})))
    by_step = {x.shown["step"]: x.shown for x in worst(tmp_path)}  # which is among those that are shown
    assert by_step == {2: {"step": 2, "prompt_id": "x"}, 10: {"step": 10}, None: {"step": None}}
    shown = [x.shown for x in worst(tmp_path, show=["rank", "reward", "step"])]
    assert [list(x) for x in shown] == [["rank", "reward", "step"]] * 3
    assert {(x["rank"], x["step"]) for x in shown} == {("a", 2), ("7", 10), ("b", None)}
    with ThreadPoolExecutor(2) as executor:
        assert [x.shown for x in worst(tmp_path, show=["rank", "reward", "step"], executor=executor)] == shown
    refused(
        "column 'rnk' .for show. is missing; .*, step, rank: did you mean 'rank'", tmp_path, call=worst, show=["rnk"]
    )
    rows = pa.table({"logps": [[-1.0]], "old_logps": [[-2.0]], "step": [3]})  # a column comes first
    assert worst(write(tmp_path / "step=02" / "b.parquet", rows), show=["step"])[0].shown == {"step": 3}


def test_columns_called_as_what_an_outlier_has_are_shown_too(tmp_path, capsys):
    names = ["token", "row", "file", "tokens", "value", "shown row", "step"]
    rows = pa.table({"logps": [[-1.0]], "old_logps": [[-2.0]]} | {name: [f"my {name}"] for name in names})
    path = write(tmp_path / "a.parquet", rows)
    (found,) = worst(path, show=names)
    own = {"value": 1.0, "file": str(path), "row": 0, "token": 0, "tokens": 1}
    assert found.as_dict() == own | {
        "shown token": "my token",
        "shown shown row": "my row",
        "shown file": "my file",
        "shown tokens": "my tokens",
        "shown value": "my value",
        "shown row": "my shown row",
        "step": "my step",
    }
    assert main(["worst", str(path), "--show", "token,row", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == own | {"shown token": "my token", "shown row": "my row"}
    main(["worst", str(path), "--show=token"])
    head = capsys.readouterr().out.split("\n")[0]
    assert head.split() == ["log-ratio", "shown", "token", "token", "of", "row", "file"]


def test_a_rank_says_what_it_needs(tmp_path, capsys):
    arrays = tokens(3)
    del arrays["ref_logps"]
    path = write(tmp_path / "a.parquet", table(arrays))
    for rank, column in (("kl", "ref_logps"), ("mismatch", "rollout_logps")):
        refused(f"column '{column}' is missing, which rank='{rank}' needs; it has logps", path, call=worst, rank=rank)
        none = {column: None}
        message = f"columns={{'{column}': None}} leaves out what rank='{rank}' needs: name the column"
        refused(message, path, call=worst, rank=rank, columns=none)
    assert main(["worst", str(path), "--rank", "kl"])
    assert "column 'ref_logps' is missing, which --rank kl needs" in capsys.readouterr().err


@pytest.mark.parametrize("where", [0, 1])
def test_shards_of_empty_lists_without_a_type(where, tmp_path):
    arrays = tokens(20, optional=True)
    arrays["rollout_logps"] = arrays["old_logps"] + 0.01 * np.arange(arrays["logps"].size)
    shards = [write(tmp_path / "a.parquet", table(arrays))]
    expected = worst(shards, rank="mismatch")
    column = pa.array([[]] * 3, pa.list_(pa.null()))
    nothing = pa.table({"logps": column, "old_logps": column})
    shards.insert(where, write(tmp_path / "nothing.parquet", nothing))
    assert worst(shards, rank="mismatch") == expected
    assert worst(nothing, rank="mismatch") == []


def test_a_null_in_place_of_a_list_is_missing_throughout():
    rows = {"logps": [[-1.0, -2.0], [-1.0]], "old_logps": [[-1.5, -2.5], [-1.25]], "rollout_logps": [None, [-2.0]]}
    found = worst(pa.table(rows), rank="mismatch")
    assert [(x.row, x.value) for x in found] == [(1, 0.75), (0, 0.0)]


def test_bad_input(tmp_path):
    path = write(tmp_path / "a.parquet", table(tokens(3)))
    refused("rank must be one of 'ratio', 'kl', 'mismatch', got 'kll'", path, call=worst, rank="kll")
    for n in (0, True, 1.5):
        refused("n must be an int of at least 1", path, call=worst, n=n)
    refused("show must be a sequence of names", path, call=worst, show="step", error=TypeError)
    refused("column 'rollout_logps' is missing", path, call=worst, rank="mismatch")
    refused("columns must map", path, call=worst, rank="mismatch", columns=[1], error=TypeError)
    samples = write(tmp_path / "b.parquet", table(probabilities(5)))
    refused("worst is of files of log-probabilities", samples, call=worst)
    arrays = tokens(3)
    arrays["logps"][0] = np.inf
    refused(r"row 0: logps must be finite", write(tmp_path / "c.parquet", table(arrays)), call=worst)
    del arrays["ref_logps"]
    refused("column 'ref_logps' is missing", write(tmp_path / "d.parquet", table(arrays)), call=worst, rank="kl")


def test_sequences_without_tokens_are_not_among_them(tmp_path):
    rows = pa.table({"logps": [[], [-1.0]], "old_logps": [[], [-1.0]], "mask": [[], [0]]})
    assert worst(write(tmp_path / "a.parquet", rows)) == []
    no = pa.table({"logps": lists([], [0, 0]), "old_logps": lists([], [0, 0])})
    assert worst(write(tmp_path / "b.parquet", no)) == []

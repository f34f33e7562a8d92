"""Results by the value of a column: in one read, however values are scattered; the whole is their sum, to the bit."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add

import numpy as np
import pytest

from grpo_fast import BLOCK, evaluate, grpo_loss
from grpo_fast.__main__ import main
from grpo_fast.files import sweep

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from rollout_files import FORMATS, GRID, OPTIONS, PROBABILITIES, lists, probabilities, refused, table, tokens, write  # noqa: E402

from grpo_fast import _json_lines  # noqa: E402

formats = pytest.mark.parametrize("suffix", FORMATS)


def of_value(arrays, keys, value):
    """The arguments of the sequences that have that key."""
    bounds, keys = arrays["cu_seqlens"], np.asarray(keys, object)
    rows = [i for i, key in enumerate(keys) if key == value]
    pick = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in rows]).astype(int)
    per_token = {name for name, x in arrays.items() if len(x) == bounds[-1] and name != "cu_seqlens"}
    lengths = np.diff(bounds)[rows]
    others = {name: x[rows] for name, x in arrays.items() if name not in per_token and name != "cu_seqlens"}
    return {name: arrays[name][pick] for name in per_token} | others | {"cu_seqlens": np.append(0, np.cumsum(lengths))}


def keyed(arrays, keys, name="step"):
    return table(arrays).append_column(name, pa.array(keys))


KEYS = {
    "ints": lambda rng, n: rng.integers(-3, 4, n).tolist(),
    "strings": lambda rng, n: [f"π{k}" for k in rng.integers(0, 4, n)],
    "nulls": lambda rng, n: [None if k == 0 else int(k) for k in rng.integers(0, 4, n)],
    "sorted": lambda rng, n: sorted(rng.integers(0, 5, n).tolist()),
    "all different": lambda rng, n: rng.permutation(n).tolist(),
}


@formats
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_value_is_that_of_its_rows_and_the_whole_is_the_sum(kind, batch_size, suffix, tmp_path):
    arrays = tokens(60, optional=True)
    keys = KEYS[kind](np.random.default_rng(0), 60)
    whole = keyed(arrays, keys)
    paths = [write(tmp_path / f"a.{suffix}", whole[:7], whole[7:20]), write(tmp_path / f"b.{suffix}", whole[20:])]
    found = evaluate(paths, by="step", batch_size=batch_size, **OPTIONS)
    assert list(found) == sorted({key for key in keys if key is not None}) + [None] * (None in keys)
    for value, stats in found.items():
        assert stats == grpo_loss(**of_value(arrays, keys, value), **OPTIONS).stats
    assert sum(found.values()) == evaluate(paths, **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats
    with ThreadPoolExecutor(2) as executor:
        assert evaluate(paths, by="step", executor=executor, **OPTIONS) == found
    swept = sweep(paths, by="step", **GRID)
    assert list(swept) == list(found)
    assert all(swept[value].objective[1, 1] == found[value].objective for value in found)
    assert reduce(add, swept.values()) == sweep(paths, **GRID)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=30), st.integers(1, 31))
def test_any_keys(tmp_path_factory, keys, cut):
    arrays = tokens(len(keys), longest=5)
    whole = keyed(arrays, pa.array(keys, pa.int64()))
    path = write(tmp_path_factory.mktemp("by") / "a.parquet", *(whole[:cut], whole[cut:])[: 1 + (cut < len(keys))])
    found = evaluate(path, by="step", **OPTIONS)
    assert set(found) == set(keys)
    assert {value: stats.sequences for value, stats in found.items()} == {key: keys.count(key) for key in set(keys)}
    assert sum(found.values()) == evaluate(path, **OPTIONS)


def test_what_is_between_trainer_and_sampler_sums_too(tmp_path):
    arrays = tokens(30)
    sampler = arrays["old_logps"] + np.random.default_rng(1).normal(0, 0.1, arrays["old_logps"].size)
    whole = keyed(arrays, np.arange(30) % 4).append_column("rollout_logps", lists(sampler, arrays["cu_seqlens"]))
    path = write(tmp_path / "a.parquet", whole)
    found = evaluate(path, by="step", rollout_correction={}, **OPTIONS)
    assert sum(found.values()) == evaluate(path, rollout_correction={}, **OPTIONS)
    alone = write(tmp_path / "b.parquet", whole.filter(pa.compute.equal(whole["step"], 2)))
    assert found[2] == evaluate(alone, rollout_correction={}, **OPTIONS)
    assert found[2].rollout.sequences == 7


def test_every_aggregation(tmp_path):
    keys = np.arange(30) % 3
    arrays = tokens(30)
    path = write(tmp_path / "a.parquet", keyed(arrays, keys))
    for options in ({"aggregation": "token-mean"}, {"aggregation": "token-sum", "normalizer": 7}):
        found = evaluate(path, by="step", **OPTIONS, **options)
        assert sum(found.values()) == evaluate(path, **OPTIONS, **options)
        assert found[1] == grpo_loss(**of_value(arrays, keys, 1), **OPTIONS, **options).stats


@pytest.mark.parametrize("key_type", [pa.int8(), pa.uint32(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_types_of_keys(key_type, tmp_path):
    keys = pa.array(["2", "1", "2", None, "1"]).cast(key_type)
    path = write(tmp_path / "a.arrow", keyed(tokens(5), keys))
    found = evaluate(path, by="step", **OPTIONS)
    assert [str(value) for value in found] == ["1", "2", "None"]
    assert {type(value) for value in found} == {int if pa.types.is_integer(key_type) else str, type(None)}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key_type", ["categorical", "string"])
def test_string_views_of_polars(key_type, nested):
    words = pa.array(["b", "a"]).cast(pa.string_view())
    keys = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, None, 1], pa.uint32()), words)
    if key_type == "string":
        keys = pa.array(["b", "a", "b", None, "a"]).cast(pa.string_view())
    if nested:
        keys = pa.StructArray.from_arrays([keys], ["name"])
    rows, arrays = keyed(tokens(5), keys), tokens(5)
    found = evaluate(rows, by="step.name" if nested else "step", **OPTIONS)
    assert list(found) == ["a", "b", None]
    assert found == evaluate(keyed(arrays, ["b", "a", "b", None, "a"]), by="step", **OPTIONS)


def test_a_column_of_nulls(tmp_path):
    path = write(tmp_path / "a.parquet", keyed(tokens(5), pa.nulls(5)))
    assert evaluate(path, by="step", **OPTIONS) == {None: evaluate(path, **OPTIONS)}


def test_flat_columns(tmp_path):
    arrays = probabilities(3 * BLOCK)
    keys = np.repeat([5, 6, 5], BLOCK)
    whole = table(arrays).append_column("step", pa.array(keys))
    path = write(tmp_path / "a.parquet", whole)
    found = evaluate(path, by="step")
    assert list(found) == [5, 6]
    assert sum(found.values()) == evaluate(path)  # where they change at blocks, to the bit
    scattered = write(tmp_path / "b.parquet", table(arrays).append_column("s", pa.array(keys[::-1].astype(str))))
    total = sum(evaluate(scattered, by="s").values())
    assert total.tokens == 3 * BLOCK
    assert total.objective == pytest.approx(evaluate(path).objective, rel=1e-14)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ([0.5, 1.0], "by must be a column of ints or strings, got column 'step' of double"),
        ([True, False], "by must be a column of ints or strings, got column 'step' of bool"),
        ([[1], [2]], "by must be a column of ints or strings, got column 'step' of list"),
    ],
)
@formats
def test_other_columns_are_refused(keys, error, suffix, tmp_path):
    path = write(tmp_path / f"a.{suffix}", keyed(tokens(2), keys))
    refused(f"a.{suffix}: {error}", path, by="step")


def test_what_is_no_column_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", keyed(tokens(2), [1, 2]))
    refused("a.parquet: column 'stepp' .for by. is missing; it has .*: did you mean 'step'", path, by="stepp")
    other = write(tmp_path / "b.parquet", keyed(tokens(2), ["1", "2"]))
    message = "by='step' must be of one type in all files: int in .*a.parquet, string in .*b.parquet"
    refused(message, [path, other], by="step")
    refused("a.parquet: by must be a column of ints", path, by="advantages")


def test_errors_name_the_row_of_the_file(tmp_path):
    rows = keyed(tokens(9, longest=5), [1, 2, 3] * 3).to_pydict()
    rows["advantages"][5] = None
    path = write(tmp_path / "a.parquet", pa.table(rows))
    refused("a.parquet, row group 0, row 5: column 'advantages' has a null", path, by="step")


def test_thousands_of_values(tmp_path):
    arrays = tokens(4000, longest=3)
    whole = keyed(arrays, np.random.default_rng(0).permutation(4000) // 2)
    paths = [write(tmp_path / f"{i}.parquet", whole[i : i + 1000]) for i in range(0, 4000, 1000)]
    found = evaluate(paths, by="step", **OPTIONS)
    assert len(found) == 2000
    assert sum(found.values()) == evaluate(paths, **OPTIONS)


# --- hive partitions --------------------------------------------------------------------------------------------------
def hive(tmp_path, name, values):
    arrays = [tokens(4, seed=i) for i in range(len(values))]
    for value, x in zip(values, arrays, strict=True):
        folder = tmp_path / f"{name}={value}"
        folder.mkdir()
        write(folder / "part-0.parquet", table(x))
    return arrays


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["1", "002", "10"], [1, 2, 10]),
        (["1", "x%20y", "10"], ["1", "x y", "10"]),
        (["1", "__HIVE_DEFAULT_PARTITION__", "-3"], [1, None, -3]),
    ],
)
def test_a_partition_is_a_column(texts, values, tmp_path):
    arrays = hive(tmp_path, "step", texts)
    expected = {value: grpo_loss(**x, **OPTIONS).stats for value, x in zip(values, arrays, strict=True)}
    for paths in (tmp_path, str(tmp_path / "*"), str(tmp_path / "step=*" / "*.parquet")):
        found = evaluate(paths, by="step", **OPTIONS)
        assert found == expected
        assert [value is None for value in found] == sorted(value is None for value in found)
    with ThreadPoolExecutor(2) as executor:
        assert evaluate(tmp_path, by="step", executor=executor, **OPTIONS) == expected
    refused("column 'steps' .for by. is missing; .*, step: did you mean 'step'", tmp_path, by="steps")


def test_a_partition_beside_a_column_is_refused(tmp_path):
    hive(tmp_path, "step", ["1"])
    write(tmp_path / "other.parquet", keyed(tokens(3), [1, 2, 3]))
    message = "by='step' must be a column in every file, or a partition of every path: .*other.parquet has a column,"
    refused(f"{message} .*step=1.* has none", tmp_path, by="step")


# --- shards of nothing ------------------------------------------------------------------------------------------------
def of_nothing(**columns):
    """Three sequences in lists that are all empty, as pandas and polars write them."""
    column = pa.array([[]] * 3, pa.list_(pa.null()))
    return pa.table({"logps": column, "old_logps": column, "ref_logps": column, "advantages": np.ones(3)} | columns)


@formats
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("keys", [[7, 8, 7] * 7, ["a", "b", "c"] * 7, [None] * 21])
@pytest.mark.parametrize(
    "column",
    [{}, {"step": pa.nulls(3)}, {"step": [0.5] * 3}, {"step": ["a"] * 3}, {"step": [7] * 3}, {"step": [[]] * 3}],
)
def test_shards_of_empty_lists_count_as_nothing(column, keys, where, suffix, tmp_path):
    full = write(tmp_path / f"full.{suffix}", keyed(tokens(21), pa.array(keys)))
    expected = evaluate(full, by="step", aggregation="token-mean", **OPTIONS)
    shards = [full]
    shards.insert(where, write(tmp_path / f"nothing.{suffix}", of_nothing(**column)))
    found = evaluate(shards, by="step", aggregation="token-mean", **OPTIONS)
    assert sum(found.values()) == evaluate(shards, aggregation="token-mean", **OPTIONS)
    for value, stats in expected.items():
        assert found[value].as_dict() == stats.as_dict() | {"sequences": found[value].sequences}
    value = next((value for value in expected if column and value == column["step"][0]), None)
    assert found.keys() == expected.keys() | {value}
    assert found[value].sequences == 3 + (expected[value].sequences if value in expected else 0)


def test_and_beside_partitions(tmp_path):
    for step, rows in {"3": table(tokens(9)), "4": of_nothing(), "x": of_nothing(step=[1, 2, 3])}.items():
        (tmp_path / f"step={step}").mkdir()
        write(tmp_path / f"step={step}" / "a.parquet", rows)
    found = evaluate([tmp_path / "step=3", tmp_path / "step=4"], by="step", **OPTIONS)
    assert {value: stats.sequences for value, stats in found.items()} == {3: 9, 4: 3}
    found = evaluate(tmp_path, by="step", **OPTIONS)  # a column, which is not where those of the others are
    assert {value: stats.sequences for value, stats in found.items()} == {3: 9, 4: 3, None: 3}
    refused(
        "the Table of pyarrow has a column, .*a.parquet has none",
        [of_nothing(), keyed(tokens(2), [1, 2]), tmp_path / "step=3"],
        by="step",
    )


def test_by_over_nothing_is_no_samples(tmp_path, capsys):
    empty = pa.array([[], []], pa.list_(pa.float64()))
    path = write(tmp_path / "a.parquet", pa.table(dict.fromkeys(PROBABILITIES, empty) | {"step": [0, 1]}))
    for by in (None, "step"):
        with pytest.raises(ValueError, match=r"a\.parquet: no samples"):
            evaluate(path, by=by)
    assert main(["evaluate", str(path), "--by", "step", "--json"]) == 2
    assert "no samples" in capsys.readouterr().err


def test_keys_of_json_lines_that_are_null_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(_json_lines, "_FIRST_PIECE", 200)
    monkeypatch.setattr(_json_lines, "_PIECE", 200)
    row = {"logps": [-1.0], "old_logps": [-1.5], "advantages": 1.0}

    def lines(keys):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f"{json.dumps(row | {'step': key})}\n" for key in [None] * 20 + keys))
        return path

    for keys in ([3, 3, 4], ["a", "a", "b"]):
        found = evaluate(lines(keys), by="step")
        assert {value: stats.sequences for value, stats in found.items()} == {keys[0]: 2, keys[2]: 1, None: 20}
    refused("by must be a column of ints or strings, got column 'step' of double", lines([0.5]), by="step")
    both = [lines(["a"]), pa.Table.from_pylist([row | {"step": 1}])]
    refused("by must be of one type in all files, got ints and strings", both, by="step")

"""Shards in which nothing is, masks by other names, nulls where masked: counted right, or refused by name."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import FORMATS, GRID, OPTIONS, PER_TOKEN, PROBABILITIES, lists, refused, table, tokens, write  # noqa: E402

from grpo_fast import _formats, evaluate, grpo_loss  # noqa: E402
from grpo_fast._sources import File  # noqa: E402
from grpo_fast.files import sweep  # noqa: E402

formats = pytest.mark.parametrize("suffix", FORMATS)


# --- nothing ----------------------------------------------------------------------------------------------------------
def empty_lists(sequences):
    """As pandas and polars write columns of lists that are all empty."""
    column = pa.array([[]] * sequences, pa.list_(pa.null()))
    return pa.table({"logps": column, "old_logps": column, "ref_logps": column, "advantages": np.ones(sequences)})


@formats
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_shard_of_empty_lists_adds_its_sequences(where, suffix, tmp_path):
    arrays = [tokens(20, seed=k) for k in range(2)]
    shards = [write(tmp_path / f"{k}.{suffix}", table(x)) for k, x in enumerate(arrays)]
    expected = evaluate(shards, aggregation="token-mean", **OPTIONS)
    shards.insert(where, write(tmp_path / f"empty.{suffix}", empty_lists(3)))
    stats = evaluate(shards, aggregation="token-mean", **OPTIONS)
    assert stats.as_dict() == expected.as_dict() | {"sequences": 43}
    assert sweep(shards, aggregation="token-mean", **GRID).tokens == expected.tokens


@formats
@pytest.mark.parametrize("where", [0, 1])
def test_a_shard_without_rows_counts_as_nothing(where, suffix, tmp_path):
    shards = [write(tmp_path / f"full.{suffix}", table(tokens(20)))]
    expected = evaluate(shards, **OPTIONS)
    for kind in (pa.float64(), pa.null(), pa.string()):
        nothing = pa.table({name: pa.array([], kind) for name in ("logps", "old_logps", "ref_logps", "advantages")})
        both = list(shards)
        both.insert(where, write(tmp_path / f"nothing.{suffix}", nothing))
        assert evaluate(both, **OPTIONS) == expected


@formats
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("nothing", [{}, {"x": pa.array([], pa.int64())}, {"rhos": [], "mask": []}])
def test_whatever_its_columns_are(nothing, where, suffix, tmp_path):
    empty = write(tmp_path / f"empty.{suffix}", pa.table(nothing))
    for rows, options, grid in (
        (table(tokens(20)), OPTIONS, GRID),
        (pa.table({name: np.full(6, 0.5) for name in PROBABILITIES}), {}, GRID),
    ):
        full = write(tmp_path / f"full.{suffix}", rows)
        both = [full]
        both.insert(where, empty)
        assert evaluate(both, **options) == evaluate(full, **options)
        assert sweep(both, **grid) == sweep(full, **grid)
    refused(f"empty.{suffix}: no rows", empty)
    refused(f"empty.{suffix}, .*again.{suffix}: no rows", [empty, write(tmp_path / f"again.{suffix}", pa.table({}))])


@formats
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_shard_of_empty_lists_may_lack_masks_and_advantages(where, suffix, tmp_path):
    arrays = [tokens(20, seed=k, optional=True) for k in range(2)]
    shards = [write(tmp_path / f"{k}.{suffix}", table(x)) for k, x in enumerate(arrays)]
    expected = evaluate(shards, aggregation="token-mean", **OPTIONS).as_dict() | {"sequences": 43}
    nothing = empty_lists(3).set_column(3, "advantages", pa.nulls(3))
    shards.insert(where, write(tmp_path / f"empty.{suffix}", nothing))
    for columns in (
        None,
        {"logps": "logps", "mask": "mask"},
        {"mask": ["mask"], "rollout_is_weights": "rollout_is_weights"},
    ):
        assert evaluate(shards, aggregation="token-mean", columns=columns, **OPTIONS).as_dict() == expected
    with ThreadPoolExecutor(2) as executor:
        assert evaluate(shards, aggregation="token-mean", executor=executor, **OPTIONS).as_dict() == expected
    other = write(tmp_path / f"other.{suffix}", table(tokens(3)))
    refused(f"other.{suffix} differs from .*[01].{suffix} in its columns", [*shards, other], **OPTIONS)
    flat = write(tmp_path / f"flat.{suffix}", pa.table({name: np.ones(2) for name in nothing.column_names}))
    refused("in its columns: lists in .* beside numbers in", [write(other, nothing), flat], **OPTIONS)


@pytest.mark.parametrize("of_lists", [True, False])
def test_an_empty_row_group_changes_nothing(of_lists, tmp_path, monkeypatch):
    rows = table(tokens(300)) if of_lists else pa.table({name: np.full(9000, 0.5) for name in PROBABILITIES})
    options = OPTIONS if of_lists else {}
    expected = evaluate(write(tmp_path / "a.parquet", rows), **options)
    read = []
    inner = _formats.ParquetFile._read
    monkeypatch.setattr(_formats.ParquetFile, "_read", lambda *a: (read.append(a[3]), inner(*a))[1])
    assert evaluate(write(tmp_path / "b.parquet", rows[:0], rows, rows[:0]), **options) == expected
    assert min(read) >= (64 if of_lists else 4096)  # rows at a time


def test_batches_are_the_rows_in_order_whatever_their_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(_formats, "BATCH_BYTES", 1000)
    monkeypatch.setattr(_formats, "_LEAST_BYTES", 1000)
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(0, 3, 200), rng.integers(50, 90, 70), [0, 3000, 1], rng.integers(0, 3, 99)])
    values = pa.array(np.arange(lengths.sum(), dtype=float))
    rows = pa.table({"x": pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype("i4"), values)})
    file = _formats.opened(File(str(write(tmp_path / "a.parquet", rows))))
    batches = list(file.batches(0, ["x"], None, False))
    assert pa.Table.from_batches(batches) == rows
    assert all(batch.nbytes >= 900 for batch in batches[:-1])  # joined; one has fewer offsets than its parts had
    large = [batch for batch in batches if batch.num_rows > 1 and batch.nbytes > 2000]
    assert len(large) <= 3  # of 64 rows, of 8, and the longest row with an empty one: then one is read at a time


# --- masks ------------------------------------------------------------------------------------------------------------
def masked(names, seed=0):
    """Rollouts with masks of these names, and their product."""
    arrays, rng = tokens(50, seed), np.random.default_rng(seed)
    masks = {name: rng.random(arrays["logps"].size) < 0.8 for name in names}
    rows = table(arrays)
    for name, mask in masks.items():
        rows = rows.append_column(name, table({"mask": mask, "cu_seqlens": arrays["cu_seqlens"]})["mask"])
    return arrays, masks, rows


@formats
def test_masks_multiply(suffix, tmp_path):
    arrays, masks, rows = masked(["completion_mask", "tool_mask"])
    path = write(tmp_path / f"a.{suffix}", rows)
    names = ["completion_mask", "tool_mask"]
    for columns in ({"mask": names}, {"mask": tuple(names[::-1])}):
        stats = evaluate(path, columns={"logps": "logps", **columns}, **OPTIONS)
        product = masks["completion_mask"] & masks["tool_mask"]
        assert stats == grpo_loss(**arrays, mask=product, **OPTIONS).stats
    one = evaluate(path, columns={"mask": ["tool_mask"]}, **OPTIONS)
    assert one == grpo_loss(**arrays, mask=masks["tool_mask"], **OPTIONS).stats
    assert evaluate(path, columns={"mask": None}, **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats


@formats
@pytest.mark.parametrize(
    "name", ["completion_mask", "response_mask", "loss_mask", "attention_Mask", "MASK", "loss_masks"]
)
def test_a_mask_by_another_name_is_not_ignored(name, suffix, tmp_path):
    _, _, rows = masked([name])
    path = write(tmp_path / f"a.{suffix}", rows)
    message = f"column '{name}' looks like a mask and is not used: columns={{'mask': '{name}'}} uses it .* ignores it"
    refused(message, path, **OPTIONS)
    refused(message, path, call=sweep, **GRID)
    _, _, rows = masked(["mask", name])
    refused(
        rf"{{'mask': \['mask', '{name}'\]}} uses both .* columns={{'mask': \['mask'\]}} ignores it",
        write(path, rows),
        **OPTIONS,
    )


def test_to_name_one_mask_does_not_silence_the_others(tmp_path):
    arrays, masks, rows = masked(["completion_mask", "tool_mask", "x_mask"])
    path = write(tmp_path / "a.parquet", rows.drop_columns(["x_mask"]))
    both = (
        r"{'mask': \['completion_mask', 'tool_mask'\]} uses both .*, columns={'mask': \['completion_mask'\]} ignores it"
    )
    refused(f"'tool_mask' looks like a mask .*{both}", path, columns={"mask": "completion_mask"}, **OPTIONS)
    every = r"\['completion_mask', 'tool_mask', 'x_mask'\]} uses all .* ignores 'tool_mask', 'x_mask'"
    refused(every, write(path, rows), columns={"mask": "completion_mask"}, **OPTIONS)
    only = evaluate(path, columns={"mask": ["completion_mask"]}, **OPTIONS)
    assert only == grpo_loss(**arrays, mask=masks["completion_mask"], **OPTIONS).stats


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1, 1], [-1, 1]], np.int8),
        np.array([[2, 1], [0, 1]]),
        np.array([[16, 1], [16, 1]], np.int8),
        np.array([[2, 1], [0.5, 1]]),
        np.array([[0, 1], [np.nan, 1]]),
    ],
)
def test_each_of_several_masks_is_a_mask(values, tmp_path):
    rows = table(tokens(1, longest=1) | {name: np.zeros(2) for name in PER_TOKEN[:3]} | {"cu_seqlens": [0, 2]})
    for name, mask in zip(("m1", "m2"), values, strict=True):
        rows = rows.append_column(name, [[mask]])
    path = write(tmp_path / "a.parquet", rows)
    one_by_one = {"m1": values[0], "m2": values[1]}
    name, bad = next((n, x[0]) for n, x in one_by_one.items() if x[0] not in (0, 1))
    message = rf"row 0: mask must hold bools or 0/1, got mask\[0\] = {bad}"
    refused(rf"{message} \(mask is column '{name}'\)$", path, columns={"mask": name}, **OPTIONS)
    for order in (["m1", "m2"], ["m2", "m1"]):
        worse = next(n for n in order if one_by_one[n][0] not in (0, 1))
        message = rf"row 0: mask must hold bools or 0/1, got mask\[0\] = {one_by_one[worse][0]} in column '{worse}'$"
        refused(message, path, columns={"mask": order}, **OPTIONS)


@formats
@pytest.mark.parametrize("of_lists", [True, False])
@pytest.mark.parametrize("name", ["mask", "completion_mask"])
def test_probabilities_take_no_mask(name, of_lists, suffix, tmp_path):
    rows = pa.table({name: np.full(6, 0.5) for name in PROBABILITIES} | {name: np.arange(6) < 3})
    if of_lists:
        rows = pa.table({name: lists(rows[name].to_numpy(), [0, 2, 6]) for name in rows.column_names})
    path = write(tmp_path / f"a.{suffix}", rows)
    advice = r"files of probabilities take no mask: .*columns={'mask': None} ignores it"
    for columns in (None, {"rhos": "rhos"}):
        refused(f"a.{suffix}: column '{name}' looks like a mask, but {advice}", path, columns=columns)
    refused(f"column '{name}' looks like a mask, but {advice}", path, call=sweep, **GRID)
    for columns in ({"rhos": "rhos", "mask": name}, {"mask": name}, {"rhos": "rhos", "mask": [name]}):
        refused(rf"'{name}'.* is named as the mask, but {advice}", path, columns=columns)
    expected = evaluate(write(tmp_path / f"b.{suffix}", rows.drop_columns([name])))
    for columns in ({"mask": None}, {"mask": None, "rhos": "rhos"}):
        assert evaluate(path, columns=columns) == expected


def test_a_mask_decides_where_files_hold_both_forms(tmp_path):
    arrays, masks, rows = masked(["completion_mask"])
    path = write(tmp_path / "a.parquet", rows.append_column("rhos", rows["logps"]))
    stats = evaluate(path, columns={"mask": "completion_mask"}, **OPTIONS)
    assert stats == grpo_loss(**arrays, mask=masks["completion_mask"], **OPTIONS).stats
    assert evaluate(path, columns={"mask": None}, **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats


def test_what_only_sounds_like_a_mask_is_left_alone(tmp_path):
    arrays = tokens(20)
    rows = table(arrays)
    for name, column in {"mask": ["a"] * 20, "no_mask": [1] * 20, "masked": [[1]] * 20}.items():
        if name != "mask":
            rows = rows.append_column(name, [column])
    assert evaluate(write(tmp_path / "a.parquet", rows), **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats


@pytest.mark.parametrize("wrong", [[], ["mask", 1], {"mask"}, 1])
def test_a_mask_is_one_name_or_several(wrong, tmp_path):
    path = write(tmp_path / "a.parquet", table(tokens(3)))
    refused("columns\\['mask'\\] must be the name of a column", path, columns={"mask": wrong}, error=TypeError)
    refused("columns\\['logps'\\] must be", path, columns={"logps": ["a", "b"]}, error=TypeError)


@pytest.mark.parametrize("view", ["ListViewArray", "LargeListViewArray"])
@pytest.mark.parametrize("name", ["mask", "completion_mask"])
def test_list_views_are_lists(name, view, tmp_path):
    arrays, masks, rows = masked([name])
    make, kind = getattr(pa, view), pa.int32() if view == "ListViewArray" else pa.int64()
    for column in ("logps", name):
        values, bounds = arrays.get(column, masks[name]), arrays["cu_seqlens"]
        backwards = np.concatenate([values[a:b] for a, b in zip(bounds[-2::-1], bounds[:0:-1], strict=True)])
        offsets, sizes = pa.array(bounds[-1] - bounds[1:], kind), pa.array(np.diff(bounds), kind)
        views = make.from_arrays(offsets, sizes, pa.array(backwards))
        rows = rows.set_column(rows.schema.names.index(column), column, views)
    path = write(tmp_path / "a.arrow", rows)
    if name != "mask":
        refused(f"column '{name}' looks like a mask and is not used", path, **OPTIONS)
    columns = {"mask": name}
    assert evaluate(path, columns=columns, **OPTIONS) == grpo_loss(**arrays, mask=masks[name], **OPTIONS).stats
    bad = rows["logps"].combine_chunks().flatten().to_pylist()
    row = next(i for i, size in enumerate(np.diff(arrays["cu_seqlens"])) if i > 7 and size > 2)
    mask = masks[name].copy()
    at = arrays["cu_seqlens"][row] + 2
    mask[at], bad[at] = True, np.nan
    rows = rows.set_column(0, "logps", lists(np.array(bad), arrays["cu_seqlens"]))
    rows = rows.set_column(rows.schema.names.index(name), name, lists(mask, arrays["cu_seqlens"]))
    views = rows[name].combine_chunks()
    views = make.from_arrays(views.offsets[:-1].cast(kind), pa.array(np.diff(arrays["cu_seqlens"]), kind), views.values)
    path = write(path, rows.set_column(rows.schema.names.index(name), name, views))
    refused(rf"row {row}: logps must be finite .*logps\[2\] = nan", path, columns=columns, **OPTIONS)


# --- nulls ------------------------------------------------------------------------------------------------------------
def with_nulls(rows, name, where):
    """The table with nulls in the lists, or instead of the numbers, of a column."""
    column = rows[name].combine_chunks()
    if pa.types.is_large_list(column.type):
        values = pa.array(column.values.to_numpy(zero_copy_only=False), mask=where)
        column = pa.LargeListArray.from_arrays(column.offsets, values)
    else:
        column = pa.array(column.to_numpy(), mask=where)
    return rows.set_column(rows.schema.names.index(name), name, column)


@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps", "rollout_is_weights"])
def test_a_null_where_masked_is_never_looked_at(name, tmp_path):
    arrays = tokens(50, optional=True)
    mask, rows = arrays["mask"], table(arrays)
    expected = evaluate(write(tmp_path / "a.parquet", rows), **OPTIONS)
    assert evaluate(write(tmp_path / "a.parquet", with_nulls(rows, name, ~mask)), **OPTIONS) == expected
    where = ~mask
    where[np.flatnonzero(mask)[7]] = True
    path = write(tmp_path / "a.parquet", with_nulls(rows, name, where))
    refused(f"row [0-9]+: column '{name}' has a null in a list, which is not masked", path, **OPTIONS)
    refused("column 'mask' has a null in a list", write(path, with_nulls(rows, "mask", where)), **OPTIONS)


def test_nor_one_for_a_sequence_that_is_masked(tmp_path):
    arrays = tokens(50, optional=True)
    bounds = arrays["cu_seqlens"]
    arrays["mask"][bounds[7] : bounds[9]] = False
    rows, where = table(arrays), np.isin(np.arange(50), [7, 8])
    expected = evaluate(write(tmp_path / "a.parquet", rows), **OPTIONS)
    assert evaluate(write(tmp_path / "a.parquet", with_nulls(rows, "advantages", where)), **OPTIONS) == expected
    where[10] = True
    path = write(tmp_path / "a.parquet", with_nulls(rows, "advantages", where))
    refused("row 10: column 'advantages' has a null, which is not masked", path)


@formats
def test_nor_one_for_a_sequence_without_tokens(suffix, tmp_path):
    arrays = tokens(20)
    lengths = np.diff(arrays["cu_seqlens"])
    lengths = np.insert(lengths, [3, 20], 0)
    arrays |= {
        "cu_seqlens": np.append(0, np.cumsum(lengths)),
        "advantages": np.insert(arrays["advantages"], [3, 20], 0),
    }
    expected, empty = grpo_loss(**arrays, **OPTIONS).stats, lengths == 0
    path = write(tmp_path / f"a.{suffix}", with_nulls(table(arrays), "advantages", empty))
    assert evaluate(path, **OPTIONS) == expected
    assert evaluate(path, columns={"old_logps": "old_logps"}, batch_size=1, **OPTIONS) == expected
    empty[5] = True
    path = write(tmp_path / f"a.{suffix}", with_nulls(table(arrays), "advantages", empty))
    refused("row 5: column 'advantages' has a null$", path, **OPTIONS)
    without_type = table(arrays).drop_columns(["advantages"]).append_column("advantages", pa.nulls(22))
    refused("row 0: column 'advantages' has a null$", write(path, without_type), **OPTIONS)


# --- names ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """A folder whose name is not UTF-8."""
    path = tmp_path / os.fsdecode(b"\xff")
    try:
        path.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system has names in Unicode only")
    return path


def moved(path, folder):
    """The file, which pyarrow could not write there, in the folder."""
    return path.rename(folder / os.fsdecode(b"\xfe-" + os.fsencode(path.name)))


@formats
def test_names_that_are_not_utf8(suffix, folder, tmp_path):
    arrays = tokens(20)
    expected = grpo_loss(**arrays, **OPTIONS).stats
    whole = table(arrays)
    path = moved(write(tmp_path / f"a.{suffix}", whole[:5], whole[5:]), folder)
    for paths in (path, str(path), [path], os.fsencode(path), [os.fsencode(path)], str(folder / "*")):
        assert evaluate(paths, **OPTIONS) == expected
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        assert evaluate(path, executor=executor, **OPTIONS) == expected


@formats
def test_messages_name_them_so_that_they_can_be_printed(suffix, folder, tmp_path):
    name = rf"\\xff.{{1,2}}\\xfe-a.{suffix}"

    def refused_printably(message, rows, paths=None, **options):
        path = moved(write(tmp_path / f"a.{suffix}", rows), folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as info:
            evaluate(paths or path, **options)
        str(info.value).encode()

    good, flat = table(tokens(3)), {name: [0.5] for name in ("logps", "old_logps", "ref_logps", "advantages")}
    refused_printably(f"{name}: no rows", good[:0])
    refused_printably(f"{name} must have either", pa.table({"x": [1]}))
    refused_printably(f"{name}: column 'ref_logps' is missing", good.drop_columns(["ref_logps"]), **OPTIONS)
    refused_printably(f"{name}: the columns are flat", pa.table(flat))
    refused_printably(
        f"{name}, .* 0, row 0: logps must be", pa.table(flat | {"logps": [np.nan]}), aggregation="token-sum"
    )
    samples = pa.table({name: pa.array([[]], pa.list_(pa.null())) for name in PROBABILITIES})
    refused_printably(f"{name}: no samples", samples)
    refused_printably(
        f"{name} differs from .*b.{suffix}",
        good,
        [write(tmp_path / f"b.{suffix}", pa.table(flat)), *map(str, [folder / "*"])],
    )
    refused_printably("named twice", good, [str(folder), str(folder / "*")])
    refused_printably("no such file", good, folder / "nothing")
    refused_printably(f"{name} is named twice", good, [str(folder / "*")] * 2)
    path = next(folder.glob("*"))
    for content in (b"x", b"PAR1", b"ARROW1"):
        path.write_bytes(content)
        refused(f"{name}(: cannot be read| is neither a)", path)


@pytest.mark.parametrize("wrong", [5, None, [5], [["a"]]])
def test_paths_are_paths(wrong):
    refused("^paths must be a path or an iterable of them, got", wrong, error=TypeError)

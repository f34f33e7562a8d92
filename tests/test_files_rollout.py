"""`evaluate` corrects a column of the sampler's log-probabilities in the same read, and says how far they are away."""

import json
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from grpo_fast import BLOCK, K3, Reject, RolloutStats, evaluate, grpo_loss, rollout_correction
from grpo_fast.__main__ import main
from grpo_fast.files import histogram, worst
from grpo_fast.rollout_stats import ROLLOUT_KEYS

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import FORMATS, lists, probabilities, refused, table, tokens, write  # noqa: E402

from grpo_fast import _json_lines  # noqa: E402

CORRECTION = {"level": "sequence", "mode": "mask", "upper": 3.0, "reject": [Reject("k3", "seq_max", upper=0.04)]}


def rollouts(sequences=40, optional=True, **options):
    """Arguments of grpo_loss, and with them the sampler's log-probabilities, some of which are missing."""
    arrays = tokens(sequences, optional=optional, **options)
    arrays.pop("rollout_is_weights", None)
    rng = np.random.default_rng(1)
    n = arrays["logps"].size
    arrays["rollout_logps"] = np.where(rng.random(n) < 0.02, np.nan, arrays["old_logps"] + rng.normal(0, 0.1, n))
    return arrays


def expected_of(arrays, correction=CORRECTION, **options):
    """What the functions of arrays say."""
    rest = {name: x for name, x in arrays.items() if name != "rollout_logps"}
    about = {name: x for name, x in rest.items() if name in ("mask", "cu_seqlens")}
    old = rest.get("old_logps", rest["logps"])
    corrected = rollout_correction(old, arrays["rollout_logps"], **about, **correction)
    rest.setdefault("old_logps", None)
    stats = grpo_loss(**rest, rollout_is_weights=corrected.weights, **options).stats
    return replace(stats, rollout=corrected.stats)


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_lists(batch_size, suffix, tmp_path):
    arrays = rollouts()
    whole = table(arrays)
    path = write(tmp_path / f"rollouts.{suffix}", whole.slice(0, 23), whole.slice(23))
    expected = expected_of(arrays, kl=K3(0.04))
    found = evaluate(path, rollout_correction=CORRECTION, kl=K3(0.04), batch_size=batch_size)
    assert found == expected
    assert isinstance(found.rollout, RolloutStats)
    assert 0 < found.rollout.rejected_sequences < 1
    assert found.rollout.missing
    assert found.surrogate != evaluate(path, kl=K3(0.04)).surrogate
    assert evaluate(path, kl=K3(0.04)).rollout is None


def test_shards_and_executors(tmp_path):
    arrays = rollouts()
    whole = table(arrays)
    paths = [write(tmp_path / "a.parquet", whole.slice(9)), write(tmp_path / "b.parquet", whole.slice(0, 9))]
    expected = expected_of(arrays)
    with ThreadPoolExecutor(2) as executor:
        assert evaluate(paths, rollout_correction=CORRECTION, executor=executor) == expected
    parts = [evaluate(path, rollout_correction=CORRECTION) for path in paths]
    assert sum(parts) == expected
    with pytest.raises(ValueError, match="Stats with and without rollout_correction cannot be added"):
        parts[0] + evaluate(paths[1])
    with pytest.raises(ValueError, match="RolloutStats of different upper cannot be added"):
        parts[0] + evaluate(paths[1], rollout_correction=CORRECTION | {"upper": 2.5})


def test_by_a_column(tmp_path):
    whole = table(rollouts())
    steps = pa.array([i % 3 for i in range(len(whole))])
    path = write(tmp_path / "rollouts.parquet", whole.append_column("step", steps))
    found = evaluate(path, by="step", rollout_correction=CORRECTION)
    assert list(found) == [0, 1, 2]
    assert sum(found.values()) == evaluate(path, rollout_correction=CORRECTION)
    assert sum(stats.rollout.tokens for stats in found.values()) == evaluate(path).tokens


def test_flat_columns(tmp_path):
    rng = np.random.default_rng(0)
    n = 3 * BLOCK + 77
    old = -rng.exponential(size=n)
    arrays = {"logps": old + rng.normal(0, 0.1, n), "old_logps": old, "advantages": rng.normal(size=n)}
    arrays["rollout_logps"] = old + rng.normal(0, 0.1, n)
    path = write(tmp_path / "tokens.parquet", table(arrays))
    options = {"aggregation": "token-mean"}
    correction = {"lower": 0.9, "reject": Reject("ratio", "token", 0.8, 1.2)}
    found = [evaluate(path, rollout_correction=correction, batch_size=size, **options) for size in (None, BLOCK)]
    assert found[0] == found[1]
    alone = expected_of(arrays, correction, **options)
    assert found[0].objective == alone.objective
    for name in ROLLOUT_KEYS.values():
        value = getattr(found[0].rollout, name)
        if name == "sequences" or re.search("sequence$|sequences$|ppl", name):
            assert math.isnan(value)
        else:  # the blocks of one sequence are added in float64, those of several exactly
            assert value == pytest.approx(getattr(alone.rollout, name), rel=1e-13)
    assert "rollout_corr/training_ppl" not in found[0].as_dict()
    for wrong in ({"level": "sequence"}, {"level": "geometric"}, {"reject": Reject("ratio", "seq_min", 0.1)}):
        refused("flat, .* rollout_correction must be at level 'token'", path, rollout_correction=wrong, **options)


@pytest.mark.parametrize("correction", [{}, {"mode": "raw", "level": "geometric"}, {"mode": "mask", "lower": 0.9}])
def test_other_options(correction, tmp_path):
    arrays = rollouts()
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    expected = expected_of(arrays, correction)
    assert evaluate(path, rollout_correction=correction, batch_size=9) == expected
    assert pickle.loads(pickle.dumps(expected)) == expected


def test_on_policy_the_policy_is_the_old_one(tmp_path):
    arrays = rollouts()
    del arrays["old_logps"]
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    assert evaluate(path, rollout_correction={}, columns={"old_logps": None}) == expected_of(arrays, {})


def test_a_null_is_missing_and_another_name(tmp_path):
    arrays = rollouts()
    expected = expected_of(arrays)
    whole = table(arrays)
    values = pa.array(arrays["rollout_logps"], mask=np.isnan(arrays["rollout_logps"]))
    nulls = lists(values, arrays["cu_seqlens"])
    whole = whole.drop_columns("rollout_logps").append_column("vllm", nulls)
    path = write(tmp_path / "rollouts.parquet", whole)
    assert evaluate(path, rollout_correction=CORRECTION, columns={"rollout_logps": "vllm"}) == expected


def test_weights_of_the_file_are_not_read(tmp_path):
    arrays = rollouts()
    whole = table(arrays)
    path = write(tmp_path / "rollouts.parquet", whole.append_column("rollout_is_weights", pa.array(["?"] * len(whole))))
    assert evaluate(path, rollout_correction=CORRECTION) == expected_of(arrays)
    refused("column 'rollout_is_weights' must hold real numbers", path)
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    line = f"evaluate {path} --rollout-correction level=token --plot {tmp_path}/run.svg"
    assert main(line.split()) == 0


# --- bad input --------------------------------------------------------------------------------------------------------
def test_refuses(tmp_path):
    arrays = rollouts()
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    without = {name: x for name, x in arrays.items() if name != "rollout_logps"}
    other = write(tmp_path / "without.parquet", table(without))
    refused("column 'rollout_logps' is missing", other, rollout_correction={})
    assert evaluate(other).rollout is None
    samples = write(tmp_path / "samples.parquet", table(probabilities(9)))
    refused("column 'logps' is missing", samples, rollout_correction={})
    for correction, error, message in [
        ("token", TypeError, "rollout_correction must be a dict of level, mode, lower, upper, reject, got 'token'"),
        ({"levle": 1}, ValueError, "must be a dict of .*, got 'levle': did you mean 'level'"),
        ({"normalize": True}, ValueError, "must be without normalize over files"),
        ({"level": "seq"}, ValueError, "level must be one of"),
        ({"upper": -1}, ValueError, "upper must be a number in"),
    ]:
        refused(message, path, error=error, rollout_correction=correction)
    columns = {"rollout_is_weights": "mask"}
    refused("columns must not name rollout_is_weights beside", path, rollout_correction={}, columns=columns)
    refused("columns must name rollout_logps beside", path, rollout_correction={}, columns={"rollout_logps": None})
    refused("columns must map", path, error=TypeError, rollout_correction={}, columns=3)


def test_a_bad_number_is_named(tmp_path):
    arrays = rollouts(optional=False)
    arrays["rollout_logps"][arrays["cu_seqlens"][7] + 3] = math.inf
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    refused(
        r"row group 0, row 7: rollout_logps must be finite, or NaN .* rollout_logps\[3\] = inf",
        path,
        rollout_correction={},
    )
    assert evaluate(path).tokens  # it is not read


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command(tmp_path, capsys):
    arrays = rollouts()
    path = str(write(tmp_path / "rollouts.parquet", table(arrays)))
    correction = "level=sequence,mode=mask,upper=3,reject=k3:seq_max::0.04"
    line = ["evaluate", path, "--rollout-correction", correction]
    assert main(line) == 0
    expected = evaluate(path, rollout_correction=CORRECTION)
    assert capsys.readouterr().out == f"{expected}\n"
    assert "rollout_corr/kl" in str(expected)
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected.as_dict(), nan_ok=True)
    two = "reject=ratio:geometric:0.99:1.01,reject=ratio:seq_min:1e-4"
    assert main(["evaluate", path, "--rollout-correction", two]) == 0
    rejects = [Reject("ratio", "geometric", 0.99, 1.01), Reject("ratio", "seq_min", 1e-4)]
    assert capsys.readouterr().out == f"{evaluate(path, rollout_correction={'reject': rejects})}\n"


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ("token", "--rollout-correction: must be level=…, mode=…, lower=…, upper=…, reject=…, .* got 'token'"),
        ("levle=token", "got 'levle=token': did you mean 'level'"),
        ("level=", "got 'level=': NAME=VALUE is wanted, as in level=…"),
        ("level", "got 'level': NAME=VALUE is wanted, as in level=…"),
        ("level=token,level=token", "must name level once"),
        ("level=seq", "level must be one of 'token', 'sequence', 'geometric', got 'seq'"),
        ("upper=x", "must be numbers"),
        ("mode=raw,upper=2", "upper must be None with mode='raw'"),
        ("reject=ratio", "--rollout-correction: must have reject=STATISTIC:LEVEL:LOWER:UPPER, got 'ratio'"),
        ("reject=ratio:seq_sum:1:2", "level of 'ratio' must be one of"),
        ("reject=k1:token:1:2", "statistic must be one of 'ratio', 'k2', 'k3', got 'k1'"),
        ("reject=ratio:token:2:1", "upper must be a number in"),
        ("reject=ratio:token:1:2:3", "must have reject=STATISTIC:LEVEL:LOWER:UPPER"),
    ],
)
def test_the_command_refuses(correction, message, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "rollouts.parquet", "--rollout-correction", correction])
    assert re.search(message, capsys.readouterr().err)


def test_not_for_probabilities(tmp_path, capsys):
    path = str(write(tmp_path / "samples.parquet", table(probabilities(9))))
    assert main(["evaluate", path, "--rollout-correction", "level=token"])
    assert "not for probability columns" in capsys.readouterr().err


# --- what is not there ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("has", [False, True])
def test_shards_of_empty_lists_count_as_nothing(has, where, suffix, tmp_path):
    column = pa.array([[]] * 3, pa.list_(pa.null()))
    nothing = pa.table({name: column for name in ("logps", "old_logps", "rollout_logps")} | {"advantages": np.ones(3)})
    nothing = nothing if has else nothing.drop_columns(["rollout_logps"])
    arrays = rollouts()
    shards = [write(tmp_path / f"a.{suffix}", table(arrays))]
    expected = evaluate(shards, rollout_correction={}, aggregation="token-mean")
    shards.insert(where, write(tmp_path / f"nothing.{suffix}", nothing))
    found = evaluate(shards, rollout_correction={}, aggregation="token-mean")
    assert found.sequences == expected.sequences + 3
    assert (found.objective, found.tokens) == (expected.objective, expected.tokens)
    assert found.rollout.ess == expected.rollout.ess


LISTS = {
    "list": pa.list_(pa.float64()),
    "large": pa.large_list(pa.float64()),
    "view": pa.list_view(pa.float64()),
    "large view": pa.large_list_view(pa.float64()),
}


def with_missing_lists(arrays, rows, kind=LISTS["list"]):
    """The table, in which ``rollout_logps`` of these rows is null; and the same arguments, in which it is NaN."""
    bounds = arrays["cu_seqlens"]
    column = [arrays["rollout_logps"][i:j].tolist() for i, j in pairwise(bounds)]
    rollout = arrays["rollout_logps"].copy()
    for row in rows:
        column[row] = None
        rollout[bounds[row] : bounds[row + 1]] = np.nan
    whole = table(arrays).drop_columns(["rollout_logps"]).append_column("rollout_logps", pa.array(column, kind))
    return whole, arrays | {"rollout_logps": rollout}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("rows", [[0], [3, 4, 39], range(40)])
def test_a_null_in_place_of_a_list_is_missing_throughout(rows, kind, tmp_path):
    whole, arrays = with_missing_lists(rollouts(), rows, LISTS[kind])
    path = write(tmp_path / "a.arrow", whole[:7], whole[7:])
    for source in (path, whole[2:][:30]):
        of_nan = table(arrays)
        of_nan = of_nan if source is path else of_nan[2:][:30]
        assert evaluate(source, rollout_correction={}) == evaluate(of_nan, rollout_correction={})
        assert histogram(source) == histogram(of_nan)
    assert evaluate(path, rollout_correction=CORRECTION) == expected_of(arrays)
    keyed = whole.append_column("step", pa.array([1, 2] * 20))
    assert sum(evaluate(keyed, by="step", rollout_correction=CORRECTION).values()) == expected_of(arrays)


def test_also_of_float32_and_of_one_length(tmp_path):
    old = np.linspace(-2, -1, 12, dtype=np.float32).reshape(4, 3)
    columns = {"logps": list(old), "old_logps": list(old), "advantages": np.ones(4, np.float32)}
    sampler = [None, [-1.0, None, -2.0], None, [-1.0, -1.0, -1.0]]
    as_nan = [[np.nan] * 3, [-1.0, np.nan, -2.0], [np.nan] * 3, [-1.0] * 3]
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 3), pa.list_(pa.float64())):
        rows, expected = (pa.table(columns | {"rollout_logps": pa.array(values, kind)}) for values in (sampler, as_nan))
        path = write(tmp_path / "a.parquet", rows)
        assert evaluate(path, rollout_correction={}) == evaluate(expected, rollout_correction={})
        assert histogram(path) == histogram(expected)
    longer = pa.table(columns | {"rollout_logps": [None, [-1.0] * 4, None, [-1.0] * 3]})
    refused(r"row 1: lists must be of one length, got 4 in column 'rollout_logps'", longer, rollout_correction={})


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_column_of_nulls_is_missing_throughout(suffix, tmp_path):
    whole, arrays = with_missing_lists(rollouts(), range(40))
    whole = whole.drop_columns(["rollout_logps"]).append_column("rollout_logps", pa.nulls(40))
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in whole.to_pylist()))
    else:
        write(path, whole)
    assert evaluate(path, rollout_correction=CORRECTION) == expected_of(arrays)
    assert evaluate(path, kl=K3(0.04)) == evaluate(whole.drop_columns(["rollout_logps"]), kl=K3(0.04))
    flat = {name: np.full(9, -1.0) for name in ("logps", "old_logps", "advantages")}
    found, expected = (
        evaluate(pa.table(flat | {"rollout_logps": x}), rollout_correction={}, aggregation="token-mean")
        for x in (pa.nulls(9), np.full(9, np.nan))
    )
    assert found == expected


def lines_with_nulls_first(path, monkeypatch, arrays, nulls, last=None):
    """JSON Lines, of which the piece that types are taken of, and the next, have no ``rollout_logps`` but nulls."""
    whole, arrays = with_missing_lists(arrays, range(nulls))
    rows = whole.to_pylist()
    rows[-1] |= {} if last is None else {"rollout_logps": last}
    lines = [f"{json.dumps(row)}\n" for row in rows]
    size = sum(map(len, lines[: nulls // 2]))
    monkeypatch.setattr(_json_lines, "_FIRST_PIECE", size)
    monkeypatch.setattr(_json_lines, "_PIECE", size)
    path.write_text("".join(lines))
    return arrays


def test_json_lines_in_which_it_comes_late(tmp_path, monkeypatch):
    arrays = rollouts(120)
    path = tmp_path / "a.jsonl"
    arrays = lines_with_nulls_first(path, monkeypatch, arrays, 60)
    assert evaluate(path, rollout_correction=CORRECTION) == expected_of(arrays)
    assert histogram(path) == histogram(table(arrays))
    assert worst(path, rank="mismatch") == [x._replace(file=str(path)) for x in worst(table(arrays), rank="mismatch")]
    for last in ("x", -1.0, {"a": 1}, ["x"]):
        lines_with_nulls_first(path, monkeypatch, rollouts(120), 60, last)
        refused("a.jsonl.*(column 'rollout_logps'|cannot be read)", path, rollout_correction={})
    lines_with_nulls_first(path, monkeypatch, rollouts(120), 119, "x")
    refused("column 'rollout_logps' must hold lists of real numbers, got string", path, rollout_correction={})
    lines_with_nulls_first(path, monkeypatch, rollouts(120), 119, -1.0)
    refused("column 'rollout_logps' must hold lists of real numbers, got double", path, rollout_correction={})


def test_flat_json_lines_in_which_it_comes_late(tmp_path, monkeypatch):
    monkeypatch.setattr(_json_lines, "_FIRST_PIECE", 1000)
    monkeypatch.setattr(_json_lines, "_PIECE", 1000)
    rows = [{"logps": -0.5, "old_logps": -1.0, "advantages": 1.0, "rollout_logps": None} for _ in range(200)]
    rows += [row | {"rollout_logps": x} for row, x in zip(rows, [-1] * 50 + [-1.5] * 50, strict=False)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"rollout_correction": {}, "aggregation": "token-mean"}
    found, expected = (evaluate(x, **options).as_dict() for x in (path, pa.Table.from_pylist(rows)))
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)  # cut into other blocks
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows[:-1], rows[-1] | {"rollout_logps": "x"}]))
    refused("a.jsonl.*rollout_logps", path, **options)

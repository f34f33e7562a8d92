"""Files give the bits of arrays: whatever the format, the shards, their order, the batches."""

import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from grpo_fast import BLOCK, K3, Clip, evaluate, grpo_loss, grpo_stats, grpo_sweep
from grpo_fast.files import sweep

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import FORMATS, GRID, OPTIONS, PER_TOKEN, lists, probabilities, refused, table, tokens, write  # noqa: E402

LIST_TYPES = [pa.list_, pa.large_list]


def loss_stats(arrays, **options):
    return grpo_loss(**arrays, **OPTIONS | options).stats


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("batch_size", [None, 1, BLOCK, 2 * BLOCK + 1])
def test_samples_in_any_batches(batch_size, dtype, tmp_path):
    arrays = probabilities(7 * BLOCK + 77, dtype)
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    assert evaluate(path, batch_size=batch_size) == grpo_stats(**arrays)
    swept = sweep(str(path), batch_size=batch_size, **GRID)
    assert swept == grpo_sweep(**arrays, **GRID)


def test_samples_without_importance_weights(tmp_path):
    arrays = probabilities(3 * BLOCK + 77)
    whole = table(arrays)
    path = write(tmp_path / "rollouts.parquet", whole.slice(0, BLOCK), whole.slice(BLOCK))
    option = {"importance_weighted": False}
    assert evaluate(path, **option) == grpo_stats(**arrays, **option)
    assert sweep(path, **GRID, **option) == grpo_sweep(**arrays, **GRID, **option)
    assert evaluate(path, **option).kl != evaluate(path).kl


@pytest.mark.parametrize("suffix", FORMATS)
def test_samples_in_shuffled_shards(suffix, tmp_path):
    arrays = probabilities(7 * BLOCK + 77)
    whole = table(arrays)
    cuts = [0, 3 * BLOCK, 4 * BLOCK, 6 * BLOCK, len(whole)]
    tables = [whole.slice(i, j - i) for i, j in pairwise(cuts)]
    paths = [
        write(tmp_path / f"a.{suffix}", tables[2], tables[0]),
        write(tmp_path / f"b.{suffix}", tables[3]),
        write(tmp_path / f"c.{suffix}", whole.slice(0, 0), tables[1]),  # an empty row group is nothing
    ]
    expected = grpo_stats(**arrays)
    assert evaluate(paths) == expected
    random.Random(0).shuffle(paths)
    assert evaluate(iter(paths)) == expected
    assert evaluate(str(tmp_path / f"*.{suffix}")) == expected


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("list_type", LIST_TYPES)
@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_sequences_in_any_batches(batch_size, list_type, suffix, tmp_path):
    arrays = tokens(40)
    whole = table(arrays, list_type)
    path = write(tmp_path / f"rollouts.{suffix}", whole.slice(0, 23), whole.slice(23))  # Arrow keeps the offset
    expected = loss_stats(arrays)
    assert evaluate(path, batch_size=batch_size, **OPTIONS) == expected
    swept = sweep(path, batch_size=batch_size, **GRID)
    assert swept.objective[1, 1] == expected.objective
    assert (swept.kl, swept.clip_ratio_low[1], swept.clip_ratio_high[1]) == (
        expected.kl,
        expected.clip_ratio_low,
        expected.clip_ratio_high,
    )


@pytest.mark.parametrize("aggregation", ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("normalizer", [None, 48.0])
def test_every_aggregation_is_that_of_the_whole(aggregation, normalizer, tmp_path):
    options = {"aggregation": aggregation, "normalizer": normalizer}
    arrays = tokens(30)
    whole = table(arrays)
    paths = [write(tmp_path / f"{i}.parquet", whole.slice(i, 10)) for i in (20, 0, 10)]
    assert evaluate(paths, batch_size=3, **OPTIONS, **options) == loss_stats(arrays, **options)
    swept = sweep(paths, batch_size=3, **GRID, **options)
    for e, epsilon in enumerate(GRID["epsilons"]):
        expected = loss_stats(arrays, **options, surrogate=Clip(epsilon))
        assert swept.objective[e].tolist() == [
            loss_stats(arrays, **options, surrogate=Clip(epsilon), kl=K3(0)).objective,
            expected.objective,
        ]
        assert (swept.clip_ratio_low[e], swept.clip_ratio_high[e]) == (
            expected.clip_ratio_low,
            expected.clip_ratio_high,
        )


def test_another_kl_term_in_a_sweep(tmp_path):
    arrays = tokens(10)
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    kl = partial(K3, importance_weighted=False)
    assert sweep(path, epsilons=0.2, betas=0.04, kl=kl).objective == loss_stats(arrays, kl=kl(0.04)).objective


# --- columns ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_token", [False, True])
def test_all_columns(per_token, tmp_path):
    arrays = tokens(30, optional=True)
    whole = table(arrays)
    if per_token:
        arrays["advantages"] = np.repeat(arrays["advantages"], np.diff(arrays["cu_seqlens"]))
        whole = whole.set_column(2, "advantages", lists(arrays["advantages"], arrays["cu_seqlens"]))
    path = write(tmp_path / "rollouts.parquet", whole)
    assert evaluate(path, batch_size=4, **OPTIONS) == loss_stats(arrays)


def test_weights_per_sequence(tmp_path):
    arrays = tokens(30, optional=True) | {"rollout_is_weights": np.linspace(0.5, 2, 30)}
    columns = {name: lists(x, arrays["cu_seqlens"]) if name in PER_TOKEN[:4] else x for name, x in arrays.items()}
    del columns["cu_seqlens"]
    path = write(tmp_path / "rollouts.parquet", pa.table(columns))
    assert evaluate(path, batch_size=4, **OPTIONS) == loss_stats(arrays)


@pytest.mark.parametrize("suffix", FORMATS)
def test_lists_of_fixed_size(suffix, tmp_path):
    n, size = 20, 6
    arrays = tokens(200) | {"cu_seqlens": np.arange(0, n * size + 1, size)}
    arrays = {
        name: x[:n] if name == "advantages" else x[: n * size] if name != "cu_seqlens" else x
        for name, x in arrays.items()
    }
    whole = pa.table(
        {
            name: pa.FixedSizeListArray.from_arrays(pa.array(x), size) if name in PER_TOKEN else x
            for name, x in arrays.items()
            if name != "cu_seqlens"
        }
    )
    path = write(tmp_path / f"rollouts.{suffix}", whole.slice(0, 7), whole.slice(7))
    assert evaluate(path, batch_size=3, **OPTIONS) == loss_stats(arrays)
    arrays["logps"][10 * size + 4] = np.inf  # a row of the second row group, which is searched for in slices
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(arrays[name]), size) for name in PER_TOKEN[:3]}
    whole = pa.table(columns | {"advantages": arrays["advantages"]})
    path = write(tmp_path / f"rollouts.{suffix}", whole.slice(0, 7), whole.slice(7))
    refused(r" 1, row 3: logps must be finite .*, got logps\[4\] = inf", path, **OPTIONS)


@pytest.mark.parametrize("mask_type", [pa.bool_(), pa.int8(), pa.float32()])
def test_padded_rows_with_a_mask(mask_type, tmp_path):
    rng = np.random.default_rng(0)
    mask = np.arange(16) < rng.integers(0, 17, (9, 1))
    logps, old, ref = np.where(mask, -rng.exponential(size=(3, 9, 16)), np.nan)  # what is masked is not looked at
    advantages = rng.normal(size=9)
    columns = {"logps": logps, "old_logps": old, "ref_logps": ref, "mask": mask}
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 16) for name, x in columns.items()}
    columns["mask"] = columns["mask"].cast(pa.list_(mask_type, 16))
    path = write(tmp_path / "rollouts.parquet", pa.table(columns | {"advantages": advantages}))
    expected = grpo_loss(logps, old, advantages, ref, mask=mask, **OPTIONS).stats
    assert evaluate(path, **OPTIONS) == expected


def test_as_many_tokens_as_sequences(tmp_path):
    # One advantage for each of two sequences must not pass for one for each of two tokens.
    rows = {"logps": [[], [-1.0, -1.0]], "old_logps": [[], [-1.1, -1.2]], "ref_logps": [[], [-1.3, -1.0]]}
    path = write(tmp_path / "rollouts.parquet", pa.table(rows | {"advantages": [5.0, -1.0]}))
    expected = loss_stats(
        tokens(1) | {name: np.array(x[1]) for name, x in rows.items()} | {"advantages": -1.0, "cu_seqlens": None}
    )
    stats = evaluate(path, **OPTIONS)
    assert (stats.sequences, stats.tokens, stats.sums.surrogate) == (2, 2, expected.sums.surrogate)


def test_sequences_without_a_token(tmp_path):
    empty = {"logps": [[], []], "old_logps": [[], []], "ref_logps": [[], []], "advantages": [1.0, 2.0]}
    schema = pa.schema({name: pa.float64() if name == "advantages" else pa.list_(pa.float64()) for name in empty})
    arrays = tokens(5)
    paths = [
        write(tmp_path / "empty.parquet", pa.table(empty, schema)),
        write(tmp_path / "full.parquet", table(arrays, pa.list_)),
    ]
    stats, full = evaluate(paths, **OPTIONS), loss_stats(arrays)
    assert (stats.sequences, stats.tokens) == (7, full.tokens)
    assert stats.numerator.surrogate == full.numerator.surrogate
    assert evaluate(paths[0], **OPTIONS).objective == 0


@pytest.mark.parametrize("batch_size", [None, BLOCK])
def test_flat_tokens(batch_size, tmp_path):
    arrays = tokens(100)
    n = arrays.pop("cu_seqlens")[-1]
    assert n > 3 * BLOCK
    arrays["advantages"] = np.random.default_rng(0).normal(size=n)
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    stats = evaluate(path, batch_size=batch_size, aggregation="token-mean", **OPTIONS)
    expected = loss_stats(arrays, aggregation="token-mean")
    assert np.isnan(stats.sequences)
    assert (stats.objective, stats.sums.surrogate, stats.sums.kl) == (
        expected.objective,
        expected.sums.surrogate,
        expected.sums.kl,
    )
    swept = sweep(path, batch_size=batch_size, aggregation="token-mean", **GRID)
    assert swept.objective[1, 1] == expected.objective


def test_a_mask_does_not_move_the_blocks_of_flat_tokens(tmp_path):
    rng = np.random.default_rng(0)
    n = 3 * BLOCK + 77
    logps, old, ref = -rng.exponential(size=(3, n))
    mask = rng.random(n) < 0.9
    mask[: BLOCK + 5] = False  # the second batch begins with masked tokens
    columns = {"logps": logps, "old_logps": old, "ref_logps": ref, "advantages": logps, "mask": mask}
    path = write(tmp_path / "rollouts.parquet", pa.table(columns))
    results = [evaluate(path, batch_size=size, aggregation="token-mean", **OPTIONS) for size in (None, 1, 2 * BLOCK)]
    assert results[0] == results[1] == results[2]
    assert results[0].tokens == mask.sum()


def test_flat_tokens_have_no_sequences(tmp_path):
    arrays = tokens(3)
    del arrays["cu_seqlens"]
    arrays["advantages"] = arrays["logps"]
    path = write(tmp_path / "rollouts.parquet", table(arrays))
    for call in (partial(evaluate, path), partial(sweep, path, **GRID)):
        with pytest.raises(
            ValueError, match=r"rollouts.parquet: the columns are flat.*'seq-mean-token-mean'.*as a list"
        ):
            call()
    with pytest.raises(ValueError, match=r"the columns are flat.*'sequence'"):
        evaluate(path, aggregation="token-mean", importance_sampling_level="sequence")


def test_probabilities_in_lists(tmp_path):
    arrays = probabilities(1000)
    bounds = np.arange(0, 1001, 50)
    path = write(tmp_path / "rollouts.parquet", pa.table({name: lists(x, bounds) for name, x in arrays.items()}))
    assert evaluate(path) == grpo_stats(**arrays)


def test_columns_of_other_names(tmp_path):
    arrays = tokens(10)
    names = {"logps": "policy", "old_logps": "sampler.logps", "advantages": "Â"}
    whole = table(arrays)
    whole = whole.rename_columns([names.get(name, name) for name in whole.column_names])
    path = write(tmp_path / "rollouts.parquet", whole.append_column("rhos", pa.array(["text"] * 10)))
    assert evaluate(path, columns=names, **OPTIONS) == loss_stats(arrays)
    on_policy = evaluate(path, columns=names | {"old_logps": None}, **OPTIONS)
    assert on_policy == loss_stats(arrays | {"old_logps": None})


def test_only_what_is_needed_is_read(tmp_path):
    arrays = probabilities(100)
    path = write(tmp_path / "samples.parquet", table({name: arrays[name] for name in ("rhos", "A")}))
    stats = evaluate(path, beta=0)
    assert stats == grpo_stats(arrays["rhos"], arrays["A"], None, None, beta=0)
    assert stats.objective == grpo_stats(**arrays, beta=0).objective
    assert np.isnan(stats.kl)
    assert sweep(path, epsilons=0.2, betas=0).objective == stats.objective
    arrays = tokens(10)
    del arrays["ref_logps"]
    path = write(tmp_path / "tokens.parquet", table(arrays))
    assert evaluate(path) == loss_stats(arrays, kl=None)


def test_floats_of_16_bits_and_integers(tmp_path):
    arrays = {name: x.astype(np.float16) for name, x in probabilities(100).items()}
    arrays["A"] = np.arange(-50, 50)
    path = write(tmp_path / "rollouts.arrow", table(arrays))
    assert evaluate(path) == grpo_stats(**arrays)


def test_a_bar_on_request(tmp_path, capsys):
    pytest.importorskip("tqdm", reason="the bar needs pip install 'grpo_fast[data]'")
    path = write(tmp_path / "rollouts.parquet", table(probabilities(100)))
    evaluate(path)
    assert capsys.readouterr() == ("", "")
    evaluate(path, progress=True)
    out, err = capsys.readouterr()
    assert (out, "100%" in err, "100/100" in err) == ("", True, True)

"""What results print, and what they are as dicts: tables, keys that depend on the options alone, options as called."""

import csv
import json
import math
import sys
from importlib import reload

import numpy as np
import pytest
from combinations import COMBINATIONS
from samples import samples

import grpo_fast
from grpo_fast import CISPO, K1, K2, K3, SAPO, Clip, Unclipped, evaluate, grpo_loss, grpo_stats, grpo_sweep
from grpo_fast._tables import as_csv, as_json
from grpo_fast.stats import KEYS
from grpo_fast.terms import Options

LOGPS = np.log([[0.5, 0.4], [0.1, 0.9]])


def loss(**options):
    ref = LOGPS if options.get("kl") else None
    return grpo_loss(LOGPS, LOGPS - 0.1, [1.0, -1.0], ref, **options)


# --- tables -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("result", [loss().stats, loss(grad=True), grpo_sweep(*samples(99), [0.1, 0.2], [0, 0.04])])
def test_a_result_prints_its_table_everywhere(result):
    text = repr(result)
    assert str(result) == text == f"{result}"
    assert max(map(len, text.splitlines())) < 80
    assert len(text) < 900
    assert not any(len(word) > 20 for word in text.split() if word[0].isdigit())


def test_a_loss_says_what_its_gradient_is():
    assert repr(loss()).splitlines()[-1] == "grad                     None"
    assert repr(loss(grad=True)).splitlines()[-1] == "grad                     float64 (2, 2)"
    assert repr(loss(grad=True)).startswith(repr(loss().stats))


def test_a_table_has_every_key():
    stats = loss(kl=K3(0.1)).stats
    lines = [line.split() for line in repr(stats).splitlines()]
    assert {key: float(value) for key, value in lines} == pytest.approx(stats.as_dict(), rel=1e-8)


def test_a_sweep_has_a_row_for_each_epsilon_and_a_column_for_each_beta():
    sweep = grpo_sweep(*samples(99), [0.1, 0.2, 0.3], [0, 0.04])
    head, *rows, empty, below = repr(sweep).splitlines()
    assert head.split() == ["epsilon", "clipped", "low", "clipped", "high", "beta", "0", "beta", "0.04"]
    columns = zip(sweep.epsilons, sweep.clip_ratio_low, sweep.clip_ratio_high, *sweep.objective.T, strict=True)
    assert np.array([row.split() for row in rows], float) == pytest.approx(np.array([*columns]), rel=1e-5)
    assert (empty, below) == ("", f"objective by epsilon and beta; mean KL {sweep.kl:.6g}, 99 tokens")
    assert "KL" not in repr(grpo_sweep(*samples(9), 0.1, 0))


# --- dicts ------------------------------------------------------------------------------------------------------------
ALWAYS = {"objective", "loss", "surrogate", "ratio/mean", "ratio/min", "ratio/max", "ess", "approx_kl", "tokens"}
CLIPPED = {f"clip_ratio/{name}_mean" for name in ("low", "high", "region", "delta")}


@pytest.mark.parametrize("surrogate", [Clip(), Clip(0.2, delta=3), CISPO(), SAPO(), Unclipped()])
@pytest.mark.parametrize("kl", [None, K3(0.1), K3(0.0)])
@pytest.mark.parametrize("mask", [None, [[1, 0], [1, 1]], [[0, 0], [0, 0]]])
def test_the_keys_depend_on_the_options_alone(surrogate, kl, mask):
    stats = loss(surrogate=surrogate, kl=kl, mask=mask).stats
    expected = ALWAYS | {"sequences"} | ({"kl"} if kl else set())
    expected |= CLIPPED if isinstance(surrogate, Clip) else {"cispo_clip_ratio"} if surrogate == CISPO() else set()
    assert set(stats.as_dict()) == expected
    if mask is None or np.any(mask):
        assert not any(map(math.isnan, stats.as_dict().values()))
    for key, value in stats.as_dict().items():
        assert np.array_equal(value, getattr(stats, KEYS[key]), equal_nan=True)
    assert all(math.isnan(getattr(stats, KEYS[key])) for key in set(KEYS) - expected)


def test_a_mean_over_nothing_stays():
    nothing = loss(mask=np.zeros((2, 2)), kl=K3(0.1)).stats.as_dict()
    assert {key for key, value in nothing.items() if math.isnan(value)} == set(nothing) - {
        "objective", "loss", "tokens", "sequences"
    }  # fmt: skip
    assert json.loads(as_json([{"of": [nothing]}]))[0]["of"][0]["kl"] is None
    (row,) = csv.DictReader(as_csv([nothing]).splitlines())
    assert (row["kl"], row["objective"], row["tokens"]) == ("", "0.0", "0")


def test_probabilities_have_no_sequences():
    assert set(grpo_stats(*samples(9)).as_dict()) == ALWAYS | CLIPPED | {"kl"}
    assert set(grpo_stats(*samples(9)[:2], None, None, beta=0).as_dict()) == ALWAYS | CLIPPED
    assert set(grpo_sweep(*samples(9), 0.1, 0.1).as_dict()) == {
        "epsilons", "betas", "objective", "clip_ratio/low_mean", "clip_ratio/high_mean", "kl", "tokens"
    }  # fmt: skip


def test_a_sweep_as_a_dict_is_numbers_and_lists():
    sweep = grpo_sweep(*samples(99), [0.1, 0.2], [0, 0.04])
    found = json.loads(json.dumps(sweep.as_dict()))
    assert found == sweep.as_dict()
    assert np.array_equal(found["objective"], sweep.objective)
    assert (found["epsilons"], found["betas"], found["tokens"], found["kl"]) == ([0.1, 0.2], [0, 0.04], 99, sweep.kl)
    assert found["clip_ratio/low_mean"] == sweep.clip_ratio_low.tolist()
    assert "kl" not in grpo_sweep(*samples(9), 0.1, 0).as_dict()


def test_a_sweep_of_sequences_counts_them(tmp_path):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from rollout_files import GRID, table, tokens, write

    path = write(tmp_path / "a.parquet", table(tokens(7)))
    grid = grpo_fast.files.sweep(path, **GRID)
    assert grid.as_dict()["sequences"] == 7
    assert repr(grid).endswith(f"{grid.tokens:,} tokens in 7 sequences")


# --- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "text"),
    [
        (Clip(), "Clip(epsilon=0.2)"),
        (Clip(0.1), "Clip(epsilon=0.1)"),
        (Clip(0.2, 0.28), "Clip(epsilon=0.2, epsilon_high=0.28)"),
        (Clip(0.2, delta=3), "Clip(epsilon=0.2, delta=3.0)"),
        (Clip(0.2, math.inf), "Clip(epsilon=0.2, epsilon_high=float('inf'))"),
        (CISPO(), "CISPO(ratio_max=5.0)"),
        (CISPO(2, 0.5), "CISPO(ratio_max=2.0, ratio_min=0.5)"),
        (SAPO(1, 2), "SAPO(tau_pos=1.0, tau_neg=2.0)"),
        (K3(0.04), "K3(beta=0.04)"),
        (K1(0.04, importance_weighted=False), "K1(beta=0.04, importance_weighted=False)"),
        (Options(kl=K2(1)), "Options(surrogate=Clip(epsilon=0.2), kl=K2(beta=1.0))"),
        (Options(aggregation="token-sum"), "Options(surrogate=Clip(epsilon=0.2), aggregation='token-sum')"),
    ],
    ids=str,
)
def test_an_option_prints_as_it_is_called(option, text):
    assert repr(option) == str(option) == text
    assert eval(text) == option


@pytest.mark.parametrize("row", COMBINATIONS, ids=str)
def test_all_options_can_be_read_again(row):
    options = Options(row.surrogate, row.kl, row.level, row.aggregation, row.normalizer)
    assert eval(repr(options)) == options


def test_options_stay_what_they_are_when_their_modules_are_loaded_again():
    terms = sys.modules["grpo_fast.terms"]
    before = loss(surrogate=Clip(0.1), kl=K3(0.1))
    old = terms.Clip
    for name in ("option", "kl_terms", "surrogates", "trust_regions", "options"):  # as a notebook's autoreload does
        reload(sys.modules[f"grpo_fast.terms.{name}"])
    reload(terms)
    assert terms.Clip is old
    for make, kl in ((Clip, K3), (terms.Clip, terms.K3)):
        again = loss(surrogate=make(0.1), kl=kl(0.1))
        assert again.stats == before.stats
        assert (again.stats + before.stats).tokens == 8
        assert again.stats.clip_ratio_low == before.stats.clip_ratio_low
    assert type(grpo_loss(LOGPS, None, [1.0, 1.0]).stats.options) is terms.Options


def test_evaluate_prints_a_table(tmp_path):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from rollout_files import table, tokens, write

    arrays = tokens(7)
    assert repr(evaluate(write(tmp_path / "a.parquet", table(arrays)))) == repr(grpo_loss(**arrays).stats)

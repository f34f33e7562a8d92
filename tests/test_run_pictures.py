"""The picture of a run has what there is to see, readable on light and dark pages, whatever values and names are."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo_fast import CISPO, GMPO, K3, SAPO, TV, Band, Clip, Unclipped, grpo_loss
from grpo_fast._run_pictures import draw_run

matplotlib = pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
from test_pictures import contrast  # noqa: E402

from grpo_fast._histograms import histogram_of  # noqa: E402

SEQUENCES = {"importance_sampling_level": "sequence", "aggregation": "seq-mean-token-mean"}
RNG = np.random.default_rng(0)


def arrays(seed=0, rollout=True):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=900)
    found = {"logps": old + rng.normal(0, 0.2, 900), "old_logps": old, "ref_logps": old + rng.normal(0, 0.3, 900)}
    found["cu_seqlens"] = np.arange(0, 901, 30)
    return found | ({"rollout_logps": old + rng.normal(0, 0.01, 900)} if rollout else {})


def of(values, rollout=True, **options):
    """Stats and histograms by value."""
    options = {"kl": K3(0.04)} | options
    level = options.get("importance_sampling_level", "token")
    every = {value: arrays(i, rollout) for i, value in enumerate(values)}
    stats = {
        value: grpo_loss(
            **{name: x for name, x in given.items() if name != "rollout_logps"},
            advantages=RNG.normal(size=(30, 1)),
            **options,
        ).stats
        for value, given in every.items()
    }
    return stats, {value: histogram_of(given, level=level) for value, given in every.items()}


def drawn(tmp_path, stats, histograms, by="step"):
    """The figure and the text of the file."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
        draw_run(str(tmp_path / "run.svg"), ["a/run"], stats, histograms, by)
    return figures[0], (tmp_path / "run.svg").read_text("utf-8")


def titles(figure):
    return [axes.get_title("left") for axes in figure.axes]


def test_everything_is_there(tmp_path):
    stats, histograms = of([0, 1, 2, 10])
    figure, text = drawn(tmp_path, stats, histograms)
    assert titles(figure) == [
        *("objective", "KL, nats", "clipped", "effective sample size"),
        *("ρ, with its bounds", "|log π_old − log π_rollout|", "log ρ, with its bounds", "log π_θ − log π_ref"),
    ]
    objective, kl, clipped, ess, ratio, mismatch, of_ratio, _ = figure.axes
    assert objective.lines[0].get_xdata().tolist() == [0, 1, 2, 10]
    assert objective.lines[0].get_ydata().tolist() == [x.objective for x in stats.values()]
    assert [line.get_ydata().tolist() for line in kl.lines] == [
        [x.kl for x in stats.values()],
        [x.approx_kl for x in stats.values()],
    ]
    assert [line.get_ydata().tolist() for line in clipped.lines] == [
        [x.clip_ratio_low for x in stats.values()],
        [x.clip_ratio_high for x in stats.values()],
    ]
    assert ess.lines[0].get_ydata().tolist() == [x.ess for x in stats.values()]
    assert ratio.lines[0].get_ydata().tolist() == [x.ratio_max for x in stats.values()]
    medians = [np.median(np.abs(x["old_logps"] - x["rollout_logps"])) for x in map(arrays, range(4))]
    assert mismatch.lines[0].get_ydata() == pytest.approx(medians, rel=0.04)
    assert sorted(line.get_xdata()[0] for line in of_ratio.lines) == pytest.approx([math.log(0.8), math.log(1.2)])
    assert figure.get_size_inches()[0] * 100 == 900
    assert "run: 3,600 tokens in 120 completions" in text
    assert "fill: #ffffff" not in text
    assert "<text " in text


def test_shares_are_those_of_the_tokens(tmp_path):
    stats, histograms = of([0, 1])
    figure, _ = drawn(tmp_path, stats, histograms)
    shares = figure.axes[-2].patches[0].get_data()
    every = np.concatenate([arrays(i)["logps"] - arrays(i)["old_logps"] for i in (0, 1)])
    expected = np.histogram(every, shares.edges)[0] / every.size
    assert np.abs(shares.values - expected).max() < 0.01  # a bin of the histogram may lie in two of the picture's
    assert shares.values.sum() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("options", "label", "bounds"),
    [
        ({"surrogate": Clip(0.1, 0.3, 4)}, "ρ > 4, A < 0", [0.9, 1.3, 4]),
        ({"surrogate": CISPO(3)}, "clipped: ρ > 3, A > 0", [3]),
        ({"surrogate": SAPO()}, "nothing is clipped", []),
        ({"surrogate": Unclipped(), "trust_region": TV(0.1)}, "clipped: beyond the trust region", []),
        ({"surrogate": CISPO(math.inf), "trust_region": Band(0.5, 2)}, "beyond the trust region", [0.5, 2]),
        (
            {"surrogate": GMPO(), "importance_sampling_level": "sequence"},
            "log ρ > ε, A > 0",
            [math.exp(-0.4), math.exp(0.4)],
        ),
        ({"kl": None}, "KL to π_old (k1), nats", [0.8, 1.2]),
        (SEQUENCES | {"surrogate": GMPO(math.inf)}, "mean log ρ of the sequence", []),
    ],
)
def test_every_loss_can_be_drawn(options, label, bounds, tmp_path):
    stats, histograms = of([1, 2], rollout=False, **options)
    figure, _ = drawn(tmp_path, stats, histograms)
    assert len(figure.axes) == 7
    legends = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert label in [*titles(figure), *legends]
    marked = [math.exp(line.get_xdata()[0]) for line in figure.axes[5].lines]
    assert marked == pytest.approx(bounds)


@pytest.mark.parametrize(
    "values",
    [[5], list(range(300)), ["a", "$x_{$", None], [None], [f"a data set with a long name {i}" for i in range(40)]],
)
def test_all_kinds_of_values_can_be_drawn(values, tmp_path):
    stats, histograms = of(values[:1])
    one, counts = stats[values[0]], histograms[values[0]]
    figure, text = drawn(tmp_path, dict.fromkeys(values, one), dict.fromkeys(values, counts), by="$data_{set")
    assert "$data_{set" in text
    assert figure.axes[0].lines[0].get_xdata().size == len(values)
    assert len(figure.axes[0].get_xticks()) <= 20


def test_without_a_column_there_are_the_distributions(tmp_path):
    stats, histograms = of([None])
    figure, _ = drawn(tmp_path, stats, histograms, by=None)
    assert titles(figure) == ["log ρ, with its bounds", "log π_θ − log π_ref", "log π_old − log π_rollout"]


def test_what_is_not_finite_or_not_there_can_be_drawn(tmp_path):
    empty = grpo_loss(np.zeros((1, 0)), None, [1.0], np.zeros((1, 0)), kl=K3(0.04)).stats
    counts = {name: np.zeros(0) for name in ("logps", "old_logps", "ref_logps")} | {"cu_seqlens": np.array([0, 0])}
    far = replace(empty, least_ratio=0.0, largest_ratio=math.inf, tokens=1)
    for stats in (empty, far):
        figure, _ = drawn(tmp_path, {0: stats, 1: stats}, dict.fromkeys((0, 1), histogram_of(counts, level="token")))
        assert len(figure.axes) == 7


def test_the_committed_picture():
    text = (Path(__file__).parent.parent / "bench" / "run.svg").read_text(encoding="utf-8")
    colors = {color for color in re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text)}
    for page in ("#ffffff", "#0d1117"):
        assert all(contrast(color, page) >= 3 for color in colors)

"""Pictures are for light and dark pages, say what they are of, and do not enlarge what is next to nothing."""

import re
from pathlib import Path

import numpy as np
import pytest
from samples import samples

from grpo_fast import grpo_sweep
from grpo_fast._pictures import ACCENT, OTHERS, STYLE, TEXT, draw_sweep, ends_from_zero, limits, picture
from grpo_fast.files import sweep

matplotlib = pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")

BENCH = Path(__file__).parent.parent / "bench"


def luminance(color):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in matplotlib.colors.to_rgb(color)]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    """As in the Web Content Accessibility Guidelines, 1 … 21."""
    light, dark = sorted([luminance(a), luminance(b)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def drawn(tmp_path, result, *files):
    draw_sweep(result, str(tmp_path / "sweep.svg"), files, "samples")
    return (tmp_path / "sweep.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colors_are_seen_on_light_and_dark(page):
    cycle = re.findall("#[0-9a-f]{6}", STYLE["axes.prop_cycle"])
    assert len(cycle) >= 6
    assert all(contrast(color, page) >= 3 for color in [ACCENT, OTHERS, *cycle])
    assert contrast(TEXT, page) >= 4


@pytest.mark.parametrize("name", ["speed", "sizes", "training", "sweep"])
def test_committed_pictures_are_transparent_and_hold_text(name):
    text = (BENCH / f"{name}.svg").read_text(encoding="utf-8")
    assert "fill: #ffffff" not in text
    assert "<text " in text
    assert "<dc:date>" not in text


def test_a_picture_of_a_sweep_says_what_it_is_of(tmp_path):
    result = grpo_sweep(*samples(1000), [0.1, 0.2], [0.0, 0.04])
    text = drawn(tmp_path, result, "runs/samples.parquet", "more/*.parquet")
    assert "samples.parquet and 1 more: 1,000 samples" in text
    assert all(label in text for label in ("clipped samples", "β = 0.04", "ρ &gt; 1 + ε, A &gt; 0", "0.0%"))
    assert "fill: #ffffff" not in text  # the background is transparent
    assert drawn(tmp_path, result, "runs/samples.parquet", "more/*.parquet") == text  # the same bytes again


@pytest.mark.parametrize("name", ["$x_{$.parquet", "a\ud800b\n\x01.parquet", "<&>.parquet", f"{'x' * 300}.parquet"])
def test_names_of_files_are_only_text(name, tmp_path):
    text = drawn(tmp_path, grpo_sweep(*samples(100), [0.1, 0.2], [0.0]), name)
    assert ".parquet: 100 samples" in text
    assert "\x01" not in text


@pytest.mark.parametrize("epsilons", [[0.2], [0.0], [np.inf], [0.2, np.inf]])
def test_any_grid_can_be_drawn(epsilons, tmp_path):
    assert "ε" in drawn(tmp_path, grpo_sweep(*samples(100), epsilons, [0.0, 0.04]), "samples.parquet")


def axes_of(result, tmp_path):
    """What is drawn, left and right."""
    from matplotlib.figure import Figure

    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).touch()))
        draw_sweep(result, str(tmp_path / "sweep.svg"), ["samples.parquet"], "samples")
    figures[0].draw_without_rendering()
    return figures[0].axes


def test_of_a_single_epsilon_the_objective_is_over_beta_and_the_fractions_are_bars(tmp_path):
    result = grpo_sweep(*samples(1000), [0.2], [0.0, 0.01, 0.04])
    left, right = axes_of(result, tmp_path)
    assert (left.get_title("left"), left.get_xlabel()) == ("objective, ε = 0.2", "β")
    assert left.lines[0].get_xydata().tolist() == [
        [beta, y] for beta, y in zip(result.betas, result.objective[0], strict=True)
    ]
    assert [bar.get_height() for bar in right.patches] == [result.clip_ratio_low[0], result.clip_ratio_high[0]]
    assert [text.get_text() for text in right.texts] == [f"{bar.get_height():.3%}" for bar in right.patches]
    assert right.get_ylim()[0] == 0
    assert [label.get_text() for label in right.get_xticklabels()] == ["ρ < 1 − ε, A < 0", "ρ > 1 + ε, A > 0"]


@pytest.mark.parametrize("epsilons", [[0.2], [0.1, 0.2], [0.3, 0.1]])
@pytest.mark.parametrize("epsilon_high", [None, 0.3])
def test_what_is_clipped_is_named_as_it_is(epsilons, epsilon_high, tmp_path):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from rollout_files import table, tokens, write

    path = write(tmp_path / "a.parquet", table(tokens(7)))
    right = axes_of(sweep(path, epsilons=epsilons, betas=0, epsilon_high=epsilon_high), tmp_path)[1]
    names = [x.get_text() for x in (right.get_legend().texts if len(epsilons) > 1 else right.get_xticklabels())]
    assert names == ["ρ < 1 − ε, A < 0", f"ρ > 1 + {'ε' if epsilon_high is None else '0.3'}, A > 0"]


@pytest.mark.parametrize("betas", [[0.04], [0.0, 1e-9]])
def test_of_a_single_epsilon_nothing_is_enlarged(betas, tmp_path):
    result = grpo_sweep(*samples(1000), [0.2], betas)
    (low, high), largest = axes_of(result, tmp_path)[0].get_ylim(), np.abs(result.objective).max()
    assert high - low >= 0.999 * largest / 20
    if len(betas) == 1:
        assert low <= 0 <= high


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_every_beta_has_a_color_of_its_own_and_a_name_below_the_axes(count, tmp_path):
    betas = [0.01 * i for i in range(count)]
    left, right = axes_of(grpo_sweep(*samples(1000), [0.1, 0.2], betas), tmp_path)
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in left.lines}) == count
    assert [text.get_text() for text in left.get_legend().texts] == [f"β = {beta:g}" for beta in betas]
    for axes in (left, right):
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
        assert axes.get_xlim()[0] == 0
        assert axes.get_window_extent().height > 100  # pixels that are left for the curves
        assert contrasts_suffice(line.get_color() for line in axes.lines)


def contrasts_suffice(colors):
    return all(contrast(color, page) >= 3 for color in colors for page in ("#ffffff", "#0d1117"))


def test_limits():
    assert limits(np.array([1.0, 3.0])) == pytest.approx((0.92, 3.08))
    assert limits(np.array([1.0, 1.00001])) == pytest.approx((0.975, 1.025), abs=1e-4)
    assert limits(np.array([-2.0, np.nan])) == pytest.approx((-2.05, -1.95))
    assert limits(np.array([0.0])) == (-1, 1) == limits(np.array([np.nan]))
    assert ends_from_zero(np.array([0.5, np.inf, np.nan])) == (0, 0.54)
    assert ends_from_zero(np.array([np.nan])) == (0, 1) == ends_from_zero(np.array([0.0]))


def test_what_the_host_has_set_neither_matters_nor_changes(tmp_path):
    result = grpo_sweep(*samples(100), [0.1, 0.2], [0.0])
    text = drawn(tmp_path, result, "samples.parquet")
    with matplotlib.rc_context({"figure.facecolor": "red", "lines.linewidth": 7, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert drawn(tmp_path, result, "samples.parquet") == text
        assert dict(matplotlib.rcParams) == before


def test_nothing_is_left_of_a_picture_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), picture(str(tmp_path / "a.svg"), 3, 2):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

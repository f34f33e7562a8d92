"""The picture of a run: diagnostics over the values of a column, and how log-ratios are distributed in the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._histograms import EDGES, Histogram, magnitudes, quantile
from ._pictures import ACCENT, OTHERS, TEXT, ends_from_zero, limits, name_of, picture, size_of
from .stats import Stats
from .terms import CISPO, GMPO, Band, Clip, Options

_BINS = 120  # of a distribution, from end to end of its axis
_MARKED = 60  # points of a curve, up to which each has a marker
_LABELLED = 12  # values that are words, up to which each is named below the axis
_QUANTILES = {"median": 0.5, "99%": 0.99, "99.9%": 0.999}  # of the mismatch

Value = int | str | None


def draw_run(
    path: str,
    files: Sequence[str],
    stats: Mapping[Value, Stats],
    histograms: Mapping[Value, Histogram],
    by: str | None,
) -> None:
    """Draw a run into a file at ``path``; ``files`` are those it was made of.

    The ``stats`` of each value of the column ``by`` are curves; below them are the distributions of the whole, of which
    there are none of probabilities. Without ``by`` there are these alone, of the only value.
    """
    whole = sum(stats.values())
    if not isinstance(whole, Stats):
        raise ValueError("there must be something to draw, got no values")
    panels: list[Callable[[Any], None]] = []
    if by is not None:
        over = _Over(by, list(stats))
        panels += _curves(over, list(stats.values()), whole.options)
        mismatch = [h.mismatch for h in histograms.values() if h.mismatch is not None]
        if mismatch and len(mismatch) == len(stats):
            panels.append(lambda axes: _draw_mismatch(axes, over, mismatch))
    if histograms:
        every = reduce(add, histograms.values())
        if by is not None:
            every = replace(every, mismatch=None)  # of which there are the quantiles
        panels += _distributions(every, whole.options)
    unit = "samples" if whole.sequence_count is None and not histograms else "tokens"
    rows = math.ceil(len(panels) / 2)
    with picture(path, 9, 0.5 + 2.3 * rows) as figure:
        figure.suptitle(f"{name_of(files)}: {size_of(whole, unit)}", x=0.01, ha="left", parse_math=False)
        places = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, draw in zip(places, panels, strict=False):
            draw(axes)
        for axes in places[len(panels) :]:
            axes.remove()


# --- over the values of a column --------------------------------------------------------------------------------------
class _Over:
    """The axis of the values: as they are if they are ints, otherwise one place for each."""

    def __init__(self, name: str, values: Sequence[Value]) -> None:
        self._name = name
        numbers = [x for x in values if isinstance(x, int)]
        self._words = [] if len(numbers) == len(values) else ["null" if x is None else str(x) for x in values]
        self._x: list[float] = [float(x) for x in numbers] if not self._words else list(range(len(values)))

    def plot(self, axes: Any, ys: Sequence[float], **how: Any) -> None:
        marker = "o" if len(self._x) <= _MARKED else None
        axes.plot(self._x, ys, marker=marker, markersize=3, **how)

    def finish(self, axes: Any, **how: Any) -> None:
        """Label the axis below, and set what else is given; several curves get a legend."""
        axes.set(xlabel=self._name, **how)
        axes.xaxis.label.set_parse_math(False)
        if self._words:
            every = math.ceil(len(self._words) / _LABELLED)
            names = [word if len(word) <= 10 else f"{word[:9]}…" for word in self._words[::every]]
            axes.set_xticks(self._x[::every], names, parse_math=False, rotation=30 if len(names) > 5 else 0)
        else:
            from matplotlib.ticker import MaxNLocator

            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(axes.lines) > 1:
            axes.legend(fontsize="small", handlelength=1.2)


def _curves(over: _Over, stats: Sequence[Stats], options: Options) -> list[Callable[[Any], None]]:
    """What is drawn over the values, each on axes of its own."""
    return [
        lambda axes: _draw_objective(axes, over, stats),
        lambda axes: _draw_kl(axes, over, stats, options),
        lambda axes: _draw_clipped(axes, over, stats, options),
        lambda axes: _draw_ess(axes, over, stats),
        lambda axes: _draw_ratio(axes, over, stats, options),
    ]


def _draw_objective(axes: Any, over: _Over, stats: Sequence[Stats]) -> None:
    objective = [x.objective for x in stats]
    over.plot(axes, objective)
    over.finish(axes, title="objective", ylim=limits(np.array(objective)))


def _draw_kl(axes: Any, over: _Over, stats: Sequence[Stats], options: Options) -> None:
    of_old = [x.approx_kl for x in stats]
    drawn = list(of_old)
    if options.kl is not None:
        of_ref = [x.kl for x in stats]
        over.plot(axes, of_ref, label=f"to π_ref, {type(options.kl).__name__.lower()}")
        drawn += of_ref
    over.plot(axes, of_old, label="to π_old, k1", color=OTHERS if options.kl is not None else None)
    values = np.array([*drawn, 0.0])
    over.finish(axes, title="KL, nats" if len(axes.lines) > 1 else "KL to π_old (k1), nats", ylim=limits(values))


def clipped_series(options: Options) -> dict[str, Callable[[Stats], float]]:
    """What of tokens is clipped or dropped, by its label."""
    surrogate: Any = options.surrogate
    series: dict[str, Callable[[Stats], float]] = {}
    if isinstance(surrogate, (Clip, GMPO)):
        above = "ε" if surrogate.epsilon_high == surrogate.epsilon else f"{surrogate.epsilon_high:g}"
        low, high = ("log ρ < −ε", f"log ρ > {above}")
        if isinstance(surrogate, Clip):
            low, high = "ρ < 1 − ε", f"ρ > 1 + {above}"
        series |= {f"{low}, A < 0": lambda x: x.clip_ratio_low, f"{high}, A > 0": lambda x: x.clip_ratio_high}
        if isinstance(surrogate, Clip) and surrogate.delta < math.inf:
            series[f"ρ > {surrogate.delta:g}, A < 0"] = lambda x: x.clip_ratio_delta
    if isinstance(surrogate, CISPO):
        series[f"ρ > {surrogate.ratio_max:g}, A > 0"] = lambda x: x.cispo_clip_ratio
    if options.trust_region is not None:
        series["beyond the trust region"] = lambda x: x.trust_region_ratio
    return series


def _draw_clipped(axes: Any, over: _Over, stats: Sequence[Stats], options: Options) -> None:
    from matplotlib.ticker import PercentFormatter

    series = clipped_series(options)
    every = [0.0]
    for label, of in series.items():
        fractions = [of(x) for x in stats]
        over.plot(axes, fractions, label=label)
        every += fractions
    title = "clipped" if len(series) > 1 else next((f"clipped: {label}" for label in series), "nothing is clipped")
    over.finish(axes, title=title, ylim=ends_from_zero(np.array(every)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_ess(axes: Any, over: _Over, stats: Sequence[Stats]) -> None:
    from matplotlib.ticker import PercentFormatter

    ess = np.array([x.ess for x in stats])
    over.plot(axes, ess.tolist())
    least = float(np.min(ess, where=np.isfinite(ess), initial=1.0))
    over.finish(
        axes, title="effective sample size", ylim=(1 - 1.08 * max(1 - least, 0.01), 1 + 0.08 * max(1 - least, 0.01))
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_ratio(axes: Any, over: _Over, stats: Sequence[Stats], options: Options) -> None:
    for label, ratios in (("largest", [x.ratio_max for x in stats]), ("least", [x.ratio_min for x in stats])):
        over.plot(axes, [x if 0 < x < math.inf else math.nan for x in ratios], label=label)
    for bound in _bounds(options):
        if 0 < math.exp(bound) < math.inf:
            axes.axhline(math.exp(bound), color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)), label="_")
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    level = "" if options.importance_sampling_level == "token" else " of sequences"
    over.finish(axes, title=f"ρ{level}, with its bounds" if _bounds(options) else f"ρ{level}")


def _draw_mismatch(axes: Any, over: _Over, counts: Sequence[NDArray[np.int64]]) -> None:
    of_size = [magnitudes(x) for x in counts]
    for label, q in _QUANTILES.items():
        over.plot(axes, [quantile(x, q) for x in of_size], label=label)
    over.finish(axes, title="|log π_old − log π_rollout|", ylim=(0.0, None))


def _plain_log_ticks(axes: Any) -> None:
    """Numbers as they are on a logarithmic axis: 0.5, 1, 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


# --- distributions ----------------------------------------------------------------------------------------------------
class _Distribution(NamedTuple):
    """One of them, and what is marked in it."""

    title: str
    counts: NDArray[np.int64]
    bounds: Sequence[float] = ()


def _distributions(histogram: Histogram, options: Options) -> list[Callable[[Any], None]]:
    of_what = "log ρ" if histogram.level == "token" else "mean log ρ of the sequence"
    marked = ", with its bounds" if _bounds(options) else ""
    found = [_Distribution(f"{of_what}{marked}", histogram.log_ratio, _bounds(options))]
    if histogram.ref_log_ratio is not None:
        found.append(_Distribution("log π_θ − log π_ref", histogram.ref_log_ratio))
    if histogram.mismatch is not None:
        found.append(_Distribution("log π_old − log π_rollout", histogram.mismatch))
    return [lambda axes, x=x: _draw_distribution(axes, x) for x in found]  # type: ignore[misc]


def _bounds(options: Options) -> list[float]:
    """Where the surrogate and a band clip or drop, as log ρ."""
    surrogate: Any = options.surrogate
    ratios: list[float] = []
    if isinstance(surrogate, GMPO):  # whose bounds are of log ρ itself
        return [bound for bound in (-surrogate.epsilon, surrogate.epsilon_high) if math.isfinite(bound)]
    if isinstance(surrogate, Clip):
        ratios += [1 - surrogate.epsilon, 1 + surrogate.epsilon_high, surrogate.delta]
    if isinstance(surrogate, CISPO):
        ratios += [surrogate.ratio_min, surrogate.ratio_max]
    if isinstance(options.trust_region, Band):
        ratios += [options.trust_region.ratio_min, options.trust_region.ratio_max]
    return [math.log(ratio) for ratio in ratios if 0 < ratio < math.inf]


def _draw_distribution(axes: Any, of: _Distribution) -> None:
    """Draw the shares of tokens in bins of equal width, on a logarithmic axis: the tails are what is asked about."""
    total = int(of.counts.sum())
    half = max(map(abs, (quantile(of.counts, 0.0005), quantile(of.counts, 0.9995)))) if total else 1.0
    half = max(1.15 * half, *(1.3 * abs(bound) for bound in of.bounds), 1e-4)
    ends = np.linspace(-half, half, _BINS + 1)
    below = np.interp(ends, np.clip(EDGES, EDGES[1], EDGES[-2]), np.append(0, np.cumsum(of.counts)))
    shares = np.diff(below) / max(total, 1)
    axes.stairs(shares, ends, fill=True, color=ACCENT, alpha=0.35)
    axes.stairs(shares, ends, baseline=None, color=ACCENT, linewidth=1.2)
    for bound in of.bounds:
        axes.axvline(bound, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
    seen = shares[shares > 0]
    axes.set(title=of.title, ylabel="share of tokens", xlim=(-half, half))
    if seen.size:
        axes.set_yscale("log")
        axes.set_ylim(max(0.5 * float(seen.min()), 0.3 / max(total, 1)), 2 * float(seen.max()))
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.yaxis.set_major_locator(LogLocator(10, numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.locator_params("x", nbins=7)

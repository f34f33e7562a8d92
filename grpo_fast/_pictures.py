"""Pictures for light and for dark pages: their one style, how they are saved, and the picture of a sweep.

They need matplotlib (``pip install 'grpo_fast[plot]'``). The background is transparent, and every colour has a contrast
of at least 3 to both white and GitHub's dark page (#0d1117), text of at least 4. Text in SVG files is text.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ._atomic import replaced_when_complete
from .stats import Stats, Sweep

TEXT = "#777e86"
OTHERS = "#8b9098"  # what ours stands beside
ACCENT = "#1f7ae0"  # ours
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": TEXT,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.prop_cycle": f"cycler('color', {[ACCENT, '#c4701a', '#2a9d62', '#9a6dd7', '#d1524f', OTHERS, '#c2559d']})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.facecolor": "none",
    "figure.titlesize": "medium",
    "grid.alpha": 0.25,
    "grid.color": TEXT,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "grpo_fast",  # the same bytes again
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


@contextmanager
def picture(path: str, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of so many inches to draw on; afterwards it is saved at ``path``, as its suffix says.

    On an exception there is no new file, and what was at ``path`` before stays. What the host has set of matplotlib
    neither matters nor changes.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), replaced_when_complete(path) as temporary:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(temporary, metadata={"Date": None} if path.endswith(".svg") else None)


def draw_sweep(result: Sweep, path: str, files: Sequence[str], unit: str) -> None:
    """Draw objective and clip fractions over ε into a file at ``path``; ``files`` are those it was made of.

    What is counted in them is called by ``unit``, "tokens" or "samples". Of a single ε, the objective is drawn over β,
    and the fractions are bars.
    """
    from matplotlib.ticker import PercentFormatter

    with picture(path, 9, 3.9) as figure:
        title = f"{name_of(files)}: {size_of(result, unit)}"
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)  # a $ in the name of a file is one
        left, right = figure.subplots(1, 2)
        if len(result.epsilons) > 1:
            _draw_over_epsilon(result, left, right)
        else:
            _draw_one_epsilon(result, left, right)
        clipped = np.append(result.clip_ratio_low, result.clip_ratio_high)
        right.set(title=f"clipped {unit}", ylim=ends_from_zero(clipped))
        right.yaxis.set_major_formatter(PercentFormatter(1.0))


def _clipped(result: Sweep) -> tuple[str, str]:
    """What is clipped on either side."""
    clip: Any = result.options.surrogate
    above = "ε" if clip.epsilon_high == clip.epsilon else f"{clip.epsilon_high:g}"
    return "ρ < 1 − ε, A < 0", f"ρ > 1 + {above}, A > 0"


def _draw_over_epsilon(result: Sweep, left: Any, right: Any) -> None:
    """A curve for each β, and for what is clipped on either side."""
    colors = _ordered_colors(len(result.betas))
    for beta, objective, color in zip(result.betas, result.objective.T, colors, strict=True):
        left.plot(result.epsilons, objective, marker="o", color=color, label=f"β = {beta:g}")
    for fractions, label in zip((result.clip_ratio_low, result.clip_ratio_high), _clipped(result), strict=True):
        right.plot(result.epsilons, fractions, marker="o", label=label)
    left.set(title="objective", ylim=limits(result.objective))
    for axes in (left, right):
        axes.set(xlabel="ε", xlim=ends_from_zero(result.epsilons))
        axes.locator_params("x", nbins=6)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3 if axes is right else 4)


def _draw_one_epsilon(result: Sweep, left: Any, right: Any) -> None:
    """The objective over β, and a bar for what is clipped on either side."""
    left.plot(result.betas, result.objective[0], marker="o")
    from_zero = np.append(result.objective, 0.0)  # what a single number is large or small beside
    ends = limits(from_zero if len(result.betas) == 1 else result.objective)
    left.set(title=f"objective, ε = {result.epsilons[0]:g}", xlabel="β", xlim=ends_from_zero(result.betas), ylim=ends)
    fractions = [float(result.clip_ratio_low[0]), float(result.clip_ratio_high[0])]
    bars = right.bar(_clipped(result), fractions, width=0.5, color=_ordered_colors(2))
    right.bar_label(bars, [f"{fraction:.3%}" for fraction in fractions], padding=2)
    right.grid(visible=False, axis="x")


def _ordered_colors(count: int) -> list[Any]:
    """So many colours: those of the style; where it has too few, steps on the way between two of them."""
    from matplotlib import rcParams
    from matplotlib.colors import LinearSegmentedColormap

    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    if count <= len(cycle):
        return list(cycle[:count])
    return list(LinearSegmentedColormap.from_list("", cycle[:2])(np.linspace(0, 1, count)))


def name_of(files: Sequence[str]) -> str:
    """What to call the files: the name of the first, and how many more there are."""
    name = "".join(c if c.isprintable() else "?" for c in os.path.basename(files[0]))  # as XML, and a font, can have it
    name = name if len(name) <= 60 else f"{name[:30]}…{name[-29:]}"
    return name if len(files) == 1 else f"{name} and {len(files) - 1} more"


def size_of(result: Sweep | Stats, unit: str) -> str:
    """How many tokens or samples it is over, and of how many completions, if that is known."""
    completions = "" if result.sequence_count is None else f" in {result.sequence_count:,} completions"
    return f"{result.tokens:,} {unit}{completions}"


def ends_from_zero(values: Any) -> tuple[float, float]:
    """The ends of an axis from 0 that shows all values, none of them negative."""
    return 0.0, 1.08 * float(np.max(values, where=np.isfinite(values), initial=0.0)) or 1.0


def limits(values: Any) -> tuple[float, float]:
    """The ends of an axis that shows all values: never less than a twentieth of the largest from end to end.

    Fitted to its values alone, it would make a mountain of what differs in the fifth digit.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return -1.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    half = max(0.54 * (high - low), 0.025 * max(abs(low), abs(high))) or 1.0
    return (low + high) / 2 - half, (low + high) / 2 + half

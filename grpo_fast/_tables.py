"""What the command prints of results: tables for people, JSON and CSV for programs."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._worst import Outlier, shown_name
from .stats import KEYS, Stats, Sweep

#: Of `Stats.as_dict`, what a table over the values of a column has, and what it is called there; JSON and CSV have all.
_SHORT = {
    "objective": "objective",
    "kl": "kl",
    "clip_ratio/low_mean": "clipped low",
    "clip_ratio/high_mean": "clipped high",
    "clip_ratio/delta_mean": "clipped delta",
    "cispo_clip_ratio": "clipped",
    "trust_region_ratio": "dropped",
    "ess": "ess",
    "approx_kl": "approx_kl",
    "ratio/min": "ratio min",
    "ratio/max": "ratio max",
    "rollout_corr/k3_kl": "sampler k3",
    "rollout/ess": "sampler ess",
    "tokens": "tokens",
}


# --- rows -------------------------------------------------------------------------------------------------------------
def rows_of(result: Stats | Sweep) -> list[dict[str, Any]]:
    """The numbers as rows of a table: one, or one for each ε × β."""
    if isinstance(result, Stats):
        return [result.as_dict()]
    values = result.as_dict()
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean")
    same = {name: values[name] for name in ("kl", "tokens", "sequences") if name in values}
    return [
        {"epsilon": epsilon, "beta": beta, "objective": values["objective"][e][b]}
        | {name: values[name][e] for name in names}
        | same
        for e, epsilon in enumerate(values["epsilons"])
        for b, beta in enumerate(values["betas"])
    ]


def key_name(by: str) -> str:
    """What the column is called beside the diagnostics."""
    taken = {*KEYS, "epsilon", "epsilons", "beta", "betas"}
    return by if by not in taken else f"by {by}"


# --- texts ------------------------------------------------------------------------------------------------------------
def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as CSV under their keys, numbers to the last digit; empty where there is no value, or a NaN."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: None if x != x else x for key, x in row.items()})
    return text.getvalue().removesuffix("\n")


def as_json(values: Any) -> str:
    """``values``, which may be nested, as JSON text, in which NaN and infinity are null."""

    def null_unless_finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: null_unless_finite(x) for name, x in value.items()}
        if isinstance(value, list):
            return [null_unless_finite(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(null_unless_finite(values), indent=2, allow_nan=False)


def of_values(results: Mapping[int | str | None, Any], by: str) -> str:
    """A row of the most telling diagnostics for each value of the column; of sweeps, a table for each."""
    first = next(iter(results.values()))
    if isinstance(first, Sweep):
        return "\n\n\n".join(f"{by} {_cell(value)}\n\n{sweep}" for value, sweep in results.items())
    keys = [key for key in first.as_dict() if key in _SHORT and _tells(key, results)]
    head = [by, *(_SHORT[key] for key in keys)]
    body = [[_cell(value), *(_number(stats.as_dict()[key]) for key in keys)] for value, stats in results.items()]
    return aligned([head, *body])


def _tells(key: str, results: Mapping[int | str | None, Stats]) -> bool:
    """Whether there is anything to say under that key: a δ that is not given clips nothing."""
    return key != "clip_ratio/delta_mean" or any(stats.clip_ratio_delta > 0 for stats in results.values())


def of_outliers(outliers: Sequence[Outlier], rank: str) -> str:
    """A table of the sequences that stand out."""
    value = {"ratio": "log-ratio", "kl": "mean k3", "mismatch": "mismatch"}[rank]
    shown = list(dict.fromkeys(name for x in outliers for name in x.shown))
    head = [value, *(shown_name(name, shown) for name in shown), "token", "of", "row", "file"]
    body = [
        [
            f"{x.value:.6g}",
            *(_cell(x.shown.get(name)) for name in shown),
            str(x.token),
            str(x.tokens),
            str(x.row),
            x.file,
        ]
        for x in outliers
    ]
    return aligned([head, *body])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The cells in columns, the last of which, if it holds names of files, is as long as it likes."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _cell(value: Any) -> str:
    """A value of a column on one line, not too long."""
    text = "null" if value is None else "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= 40 else f"{text[:39]}…"

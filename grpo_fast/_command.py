"""The subcommands ``evaluate`` and ``sweep`` of the command line: argparse over the functions of `files`.

First the arguments, then what is printed, then what is run; results go to stdout, the bar to stderr.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from ._pictures import draw_sweep
from .files import evaluate, sweep
from .stats import Stats, Sweep
from .terms import AGGREGATIONS, BETA, EPSILON, K1, K2, K3, LEVELS, Clip

_KL_TERMS = {"k1": K1, "k2": K2, "k3": K3}


# --- arguments --------------------------------------------------------------------------------------------------------
def add_subcommands(subparsers: Any) -> None:
    """Add ``evaluate`` and ``sweep`` to argparse's ``subparsers``; each sets ``run``, which `run` calls."""
    for name, run, about in (
        ("evaluate", _evaluate, "the objective and its diagnostics over rollouts in files"),
        ("sweep", _sweep, "the objective for every epsilon and beta over rollouts in files"),
    ):
        parser = subparsers.add_parser(name, help=about, description=f"Compute {about} (Parquet or Arrow IPC).")
        parser.set_defaults(run=run)
        parser.add_argument("files", nargs="+", metavar="FILE", help="a file or a glob")
        _add_options(parser, of_sweep=name == "sweep")
        parser.add_argument(
            "--batch-size", type=int, metavar="ROWS", help="rows read at a time (default: about 16 MiB)"
        )
        parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one)")
        parser.add_argument("--no-progress", action="store_true", help="no bar on stderr")
        parser.add_argument("--json", action="store_true", help="print JSON, in which null is what does not apply")


def _add_options(parser: argparse.ArgumentParser, *, of_sweep: bool) -> None:
    """Add what is computed, and from which columns; ``--epsilon`` and ``--beta`` are lists for a sweep."""
    if of_sweep:
        parser.add_argument("--epsilon", type=_floats, default="0.1,0.2,0.3", metavar="E,E,…", help="(%(default)s)")
        parser.add_argument("--beta", type=_floats, default=f"0,{BETA}", metavar="B,B,…", help="(%(default)s)")
        parser.add_argument("--plot", metavar="OUT", help="draw it into a .png, .svg or .pdf")
    else:
        parser.add_argument("--epsilon", type=float, default=EPSILON, help="(%(default)s)")
        parser.add_argument("--beta", type=float, default=BETA, help="weight of the KL term; 0: none (%(default)s)")
        parser.add_argument("--epsilon-high", type=float, help="(as --epsilon)*")
        parser.add_argument("--delta", type=float, help="hard bound of the ratio*")
        parser.add_argument("--importance-sampling-level", choices=LEVELS, help="(token)*")
    parser.add_argument(
        "--no-importance-weighted",
        dest="importance_weighted",
        action="store_false",
        help="leave the ratio out of the KL term, as DeepSeekMath does",
    )
    parser.epilog = "Options with * are those of log-probability columns."
    parser.add_argument("--kl", choices=tuple(_KL_TERMS), help="estimator of the KL term (k3)*")
    parser.add_argument("--aggregation", choices=AGGREGATIONS, help="(seq-mean-token-mean)*")
    parser.add_argument("--normalizer", type=float, help="what to divide by instead*")
    parser.add_argument(
        "--columns",
        nargs="+",
        type=_argument_and_column,
        metavar="NAME=COLUMN",
        help="which columns to take for which arguments; of several masks name each (they multiply), or one and mask= "
        "for no other; mask= alone: none",
    )


def _floats(text: str) -> list[float]:
    """The numbers in ``text``, which commas separate; argparse makes an error message of a ValueError."""
    return [float(number) for number in text.split(",")]


def _argument_and_column(text: str) -> tuple[str, str | None]:
    """The two names in ``NAME=COLUMN``; in ``NAME=``, None as the column."""
    name, equals, column = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=COLUMN, got {text!r}")
    return name, column or None


# --- what is printed and drawn ----------------------------------------------------------------------------------------
def _as_json(values: dict[str, Any]) -> str:
    """``values``, which may be nested lists, as JSON text, in which NaN and infinity are null."""

    def null_unless_finite(value: Any) -> Any:
        if isinstance(value, list):
            return [null_unless_finite(element) for element in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: null_unless_finite(x) for name, x in values.items()}, indent=2, allow_nan=False)


def _sweep_as_dict(result: Sweep) -> dict[str, Any]:
    """What a sweep found, as numbers and lists under the names that `Stats.as_dict` uses."""
    return {
        "epsilons": result.epsilons.tolist(),
        "betas": result.betas.tolist(),
        "objective": result.objective.tolist(),
        "clip_ratio/low_mean": result.clip_ratio_low.tolist(),
        "clip_ratio/high_mean": result.clip_ratio_high.tolist(),
        "kl": result.kl,
        "tokens": result.tokens,
    }


def _sweep_as_table(result: Sweep) -> str:
    """A line for each ε with the clip fractions and the objective for each β; mean KL and tokens below."""
    head = ["epsilon", "clipped low", "clipped high", *(f"beta {beta:g}" for beta in result.betas)]
    rows = zip(result.epsilons, result.clip_ratio_low, result.clip_ratio_high, result.objective, strict=True)
    lines = [[f"{x:.6g}" for x in (epsilon, low, high, *objectives)] for epsilon, low, high, objectives in rows]
    table = "\n".join("".join(f"{cell:>14}" for cell in line) for line in (head, *lines))
    return f"{table}\n\nobjective by epsilon and beta; mean KL {result.kl:.6g}, {result.tokens:,} tokens"


def _draw(result: Sweep, path: str, files: list[str]) -> None:
    """Draw a sweep over files into a file at ``path``, or raise an ImportError that says what to install."""
    try:
        draw_sweep(result, path, files)
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'grpo_fast[plot]'") from error


# --- what is run ------------------------------------------------------------------------------------------------------
def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand that was parsed, print its result, or its error to stderr, and return the exit code.

    It is 2 for bad input and 130 after Ctrl-C.
    """
    try:
        print(arguments.run(arguments))
    except (OSError, ImportError, TypeError, ValueError) as error:
        print(f"grpo-fast: error: {' '.join(str(error).split())}", file=sys.stderr)  # pyarrow's may have many lines
        return 2
    except KeyboardInterrupt:
        print("grpo-fast: interrupted", file=sys.stderr)
        return 130
    return 0


def _evaluate(arguments: argparse.Namespace) -> str:
    """What ``grpo-fast evaluate`` prints."""
    only_tokens = ("epsilon_high", "delta", "importance_sampling_level", "kl", "aggregation", "normalizer")
    given = _given(arguments, only_tokens)
    options: dict[str, Any]
    if _files_hold_log_probabilities(arguments, given):
        clip = Clip(arguments.epsilon, given.pop("epsilon_high", None), given.pop("delta", None))
        kl = _KL_TERMS[given.pop("kl", "k3")](arguments.beta, arguments.importance_weighted) if arguments.beta else None
        options = given | {"surrogate": clip, "kl": kl}
    else:
        options = {name: getattr(arguments, name) for name in ("epsilon", "beta", "importance_weighted")}
    with _executor(arguments.workers) as executor:
        stats: Stats = evaluate(arguments.files, executor=executor, **_common(arguments), **options)
    return _as_json(stats.as_dict()) if arguments.json else str(stats)


def _sweep(arguments: argparse.Namespace) -> str:
    """What ``grpo-fast sweep`` prints; draws a picture if one was asked for."""
    options = _given(arguments, ("kl", "aggregation", "normalizer"))
    if arguments.plot and os.path.splitext(arguments.plot)[1] not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot must end in .png, .svg or .pdf, got {arguments.plot}")
    if _files_hold_log_probabilities(arguments, options):
        term = _KL_TERMS[options.get("kl", "k3")]
        options["kl"] = partial(term, importance_weighted=arguments.importance_weighted)
    else:
        options["importance_weighted"] = arguments.importance_weighted
    grid = {"epsilons": arguments.epsilon, "betas": arguments.beta}
    with _executor(arguments.workers) as executor:
        result = sweep(arguments.files, executor=executor, **grid, **_common(arguments), **options)
    if arguments.plot:
        _draw(result, arguments.plot, arguments.files)
    return _as_json(_sweep_as_dict(result)) if arguments.json else _sweep_as_table(result)


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options ``names`` that are on the command line; none of them has a default."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _files_hold_log_probabilities(arguments: argparse.Namespace, given: dict[str, Any]) -> bool:
    """Whether they do, rather than probabilities; then a ValueError if any options are ``given`` that these lack."""
    from . import _plan  # which needs pyarrow

    form = _plan.form_of(_plan.find(arguments.files), _common(arguments)["columns"])
    if given and form is _plan.Form.PROBABILITIES:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{options}: not for probability columns, which have no tokens and sequences")
    return form is _plan.Form.LOG_PROBABILITIES


def _columns_of(pairs: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """The column of each argument; for a mask that is named more than once, the list of its columns.

    A list names all masks that there are, as does one with ``mask=`` beside it.
    """
    columns: dict[str, Any] = {}
    for argument, column in pairs:
        if argument in columns and argument != "mask":
            raise ValueError(f"--columns names two columns for {argument}, got {columns[argument]} and {column}")
        columns[argument] = column
    masks = [column for argument, column in pairs if argument == "mask"]
    if len(masks) > 1:
        columns["mask"] = [column for column in masks if column is not None] or None
    return columns


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `evaluate` and `sweep` have in common, but for files and executor."""
    return {
        "columns": _columns_of(arguments.columns) if arguments.columns else None,
        "batch_size": arguments.batch_size,
        "progress": not arguments.no_progress,
    }


@contextmanager
def _executor(workers: int) -> Iterator[Executor | None]:
    """A pool of so many processes, which leave Ctrl-C to this one; None without any."""
    if workers < 0:
        raise ValueError(f"--workers must be at least 0, got {workers}")
    if not workers:
        yield None
        return
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    # Spawned, not forked: pyarrow and Numba have threads, which a fork would not take along.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=ignore) as executor:
        yield executor

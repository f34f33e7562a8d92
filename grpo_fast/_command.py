"""The subcommands over files, and `compile`: from what was parsed to calls of the functions, and to text.

Results go to stdout, the bar to stderr.
"""

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np

from ._advice import flag_of
from ._columns import ARGUMENTS, Columns, Form
from ._histograms import WithHistogram, beside_histogram
from ._jobs import Work
from ._kernels.notices import untold
from ._kernels.threads import WORTH_SHARING
from ._measure import read
from ._option_groups import PICTURES
from ._pictures import draw_sweep
from ._run_pictures import draw_run
from ._summing import Reading, evaluated
from ._tables import as_csv, as_json, key_name, of_outliers, of_values, rows_of
from ._warm_up import ARRAYS, DTYPES, PAPERS, calls_with, steps
from ._words import BY_NAME, KL_TERMS, OF_SURROGATES, SURROGATES, UsageError, in_terms_of_the_shell
from .files import evaluate, sweep, worst
from .terms import BETA, Clip, Options

T = TypeVar("T")


# --- evaluate ---------------------------------------------------------------------------------------------------------
def run_evaluate(arguments: argparse.Namespace) -> str:
    """What ``grpo-fast evaluate`` prints; draws a picture if one was asked for."""
    if arguments.plot:
        _refuse_unless_it_can_be_drawn(arguments.plot)
    with in_terms_of_the_shell():
        of_tokens = _loss_options(arguments)
    _refuse_names_of_columns(arguments.files)
    columns = _columns_of(arguments.columns)
    if _form_of(arguments, columns) is Form.LOG_PROBABILITIES:
        options = of_tokens | _given(arguments, ("rollout_correction",))
        _refuse_weighting_of_nothing(arguments, options["kl"] is not None, "--kl or --beta")
    else:
        _refuse_for_probabilities(arguments, ("epsilon", "beta", "importance_weighted"))
        if arguments.rollout_correction is not None:
            raise UsageError("--rollout-correction: not for probability columns, which have no sampler's beside them")
        options = _given(arguments, ("epsilon", "beta", "importance_weighted"))
    if arguments.plot:
        found = _with_workers(arguments, partial(_evaluate_to_draw, arguments, columns, options))
    else:
        call = partial(evaluate, arguments.files, columns=columns, by=arguments.by, **options, **_reading(arguments))
        found = _with_workers(arguments, lambda executor: call(executor=executor))
    return _printed(found, arguments)


def _evaluate_to_draw(
    arguments: argparse.Namespace, columns: Columns, options: dict[str, Any], executor: Executor | None
) -> Any:
    """What `evaluate` finds; a picture is drawn of it, of which the histogram is from the same read."""
    reading = Reading(arguments.files, columns, executor=executor, **_reading(arguments))
    level = arguments.importance_sampling_level or "token"

    def drawn(form: Form, work: Work) -> Work:
        if form is Form.PROBABILITIES and arguments.by is None:
            raise UsageError("--plot draws probabilities over the values of a column alone: name it with --by")
        return work if form is Form.PROBABILITIES else beside_histogram(work, level)

    found = evaluated(reading, arguments.by, options, drawn)
    by_value = {None: found} if arguments.by is None else found
    stats = {value: x.result if isinstance(x, WithHistogram) else x for value, x in by_value.items()}
    histograms = {value: x.histogram for value, x in by_value.items() if isinstance(x, WithHistogram)}
    draw_run(arguments.plot, arguments.files, stats, histograms, arguments.by)
    return stats[None] if arguments.by is None else stats


def _loss_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options for files of log-probabilities, checked."""
    options = {"surrogate": _surrogate(arguments), "kl": _kl(arguments)} | _by_name(arguments)
    Options(**options)
    return options


def _by_name(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options of log-probabilities that are named and given as `grpo_loss` has them."""
    if arguments.normalizer == 0:  # which is right only where no token counts, and then for nothing
        raise UsageError("--normalizer must be above 0, got 0")
    return _given(arguments, BY_NAME)


def _refuse_weighting_of_nothing(arguments: argparse.Namespace, with_kl: bool, needed: str) -> None:
    if arguments.importance_weighted is not None and not with_kl:
        raise UsageError(f"--importance-weighted and --no-importance-weighted are about a KL term: add {needed}")
    if arguments.kl_gradient is not None and not with_kl:
        raise UsageError(f"--kl-gradient is about a KL term: add {needed}")


def _surrogate(arguments: argparse.Namespace) -> Any:
    """The policy term with those of its numbers that are given."""
    chosen = arguments.surrogate or "clip"
    for kind, surrogate in SURROGATES.items():
        others = [name for name in _given(arguments, surrogate._fields) if name not in SURROGATES[chosen]._fields]
        if others:
            raise UsageError(f"{flag_of(others[0])} is an option of --surrogate {kind}, got --surrogate {chosen}")
    surrogate = SURROGATES[chosen]
    return surrogate(**_given(arguments, surrogate._fields))


def _kl(arguments: argparse.Namespace) -> Any:
    """The KL term; None unless it is asked for, by its name or a weight."""
    if arguments.kl == "none" and arguments.beta:
        raise UsageError(f"--beta is the weight of a KL term, got --beta {arguments.beta:g} with --kl none")
    if arguments.kl == "none" or (arguments.kl is None and not arguments.beta):
        return None
    beta = BETA if arguments.beta is None else arguments.beta
    return KL_TERMS[arguments.kl or "k3"](beta, **_weighting(arguments))


def _weighting(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said of a KL term beside its name and weight."""
    weighted, gradient = arguments.importance_weighted is not False, arguments.kl_gradient or "own"
    if gradient != "own" and weighted:
        raise UsageError(f"--kl-gradient {gradient} needs --no-importance-weighted")
    return {"importance_weighted": weighted, "gradient": gradient}


# --- sweep ------------------------------------------------------------------------------------------------------------
def run_sweep(arguments: argparse.Namespace) -> str:
    """What ``grpo-fast sweep`` prints; draws a picture if one was asked for."""
    if arguments.plot and arguments.by:
        raise UsageError("--plot draws one sweep: leave out --by, or name the files of one value")
    if arguments.plot:
        _refuse_unless_it_can_be_drawn(arguments.plot)
    with in_terms_of_the_shell():
        for epsilon in arguments.epsilons:
            Options(Clip(epsilon, arguments.epsilon_high, arguments.delta), **_by_name(arguments))
        for beta in arguments.betas or []:
            KL_TERMS["k3"](beta)
    _refuse_names_of_columns(arguments.files)
    columns = _columns_of(arguments.columns)
    form = _form_of(arguments, columns)
    if form is Form.LOG_PROBABILITIES:
        term = KL_TERMS[arguments.kl or "k3"]
        options = _given(arguments, ("epsilon_high", "delta")) | _by_name(arguments)
        options["kl"] = partial(term, **_weighting(arguments))
        betas = arguments.betas or ([0.0, BETA] if arguments.kl else [0.0])
        _refuse_weighting_of_nothing(arguments, any(betas), "--kl or --beta")
    else:
        _refuse_for_probabilities(arguments, ("importance_weighted",))
        options = _given(arguments, ("importance_weighted",))
        betas = arguments.betas or [0.0, BETA]
    options |= {"epsilons": arguments.epsilons, "betas": betas} | _reading(arguments)
    call = partial(sweep, arguments.files, columns=columns, by=arguments.by, **options)
    result = _with_workers(arguments, lambda executor: call(executor=executor))
    if arguments.plot:
        unit = "tokens" if form is Form.LOG_PROBABILITIES else "samples"
        draw_sweep(result, arguments.plot, arguments.files, unit)
    return _printed(result, arguments)


def _refuse_unless_it_can_be_drawn(path: str) -> None:
    """Raise the error for a picture that could not be written in the end, before anything is read."""
    if os.path.splitext(path)[1] not in PICTURES:
        raise UsageError(f"--plot must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}, got {path}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"--plot: there is no folder {folder} for {os.path.basename(path)}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--plot: the folder {folder} cannot be written to")
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'grpo_fast[plot]'")


# --- worst ------------------------------------------------------------------------------------------------------------
def run_worst(arguments: argparse.Namespace) -> str:
    """What ``grpo-fast worst`` prints."""
    _refuse_names_of_columns(arguments.files)
    columns = _columns_of(arguments.columns)
    options = {"rank": arguments.rank, "n": arguments.n, "show": arguments.show} | _reading(arguments)
    call = partial(worst, arguments.files, columns=columns, **options)
    found = _with_workers(arguments, lambda executor: call(executor=executor))
    rows = [outlier.as_dict() for outlier in found]
    return as_json(rows) if arguments.json else as_csv(rows) if arguments.csv else of_outliers(found, arguments.rank)


# --- compile ----------------------------------------------------------------------------------------------------------
def run_compile(arguments: argparse.Namespace) -> str:
    """Compile, printing a line for each call, and return the last one."""
    _refuse_weighting_of_nothing(arguments, arguments.kl is not None, "--kl")
    options = _given(arguments, ("importance_sampling_level",))
    if arguments.surrogate:
        options["surrogate"] = SURROGATES[arguments.surrogate]()
    if arguments.kl:
        options["kl"] = KL_TERMS[arguments.kl](BETA, **_weighting(arguments))
    arrays = {name: getattr(arguments, name) for name in ARRAYS}
    calls = calls_with(options, arrays)
    grads = (True, False) if arguments.grad is None else (arguments.grad,)
    dtypes = (arguments.dtype,) if arguments.dtype else DTYPES
    all_steps: list[tuple[str, Callable[[], object]]] = [*steps(calls, grads, dtypes)]
    if calls is PAPERS:
        all_steps += [(f"grpo-fast demo, {dtype}", partial(_compile_reading, dtype)) for dtype in dtypes]
    begin = time.perf_counter()
    with untold():  # the lines below say it
        for name, call in all_steps:
            print(f"{name} ...", end=" ", flush=True)
            start = time.perf_counter()
            call()
            print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return f"compiled, or found compiled, in {time.perf_counter() - begin:.1f} s"


def _compile_reading(dtype: str) -> None:
    """Call what the demonstration compares with, on a few numbers and on many."""
    for samples in (1, WORTH_SHARING):
        read(*[np.ones(samples, dtype)] * 4)


# --- what they share --------------------------------------------------------------------------------------------------
def _printed(found: Any, arguments: argparse.Namespace) -> str:
    """A result, or those of each value of a column, as asked for."""
    if arguments.by is None:
        if arguments.json:
            return as_json(found.as_dict())
        return as_csv(rows_of(found)) if arguments.csv else str(found)
    name = key_name(arguments.by)
    if arguments.json:
        return as_json([{name: value} | x.as_dict() for value, x in found.items()])
    if arguments.csv:
        return as_csv({name: value} | row for value, x in found.items() for row in rows_of(x))
    return of_values(found, arguments.by)


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options ``names`` that are on the command line; None is the default of all."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    # Nobody asked for the bar: where it cannot be had there is none.
    return {"batch_size": arguments.batch_size, "progress": arguments.progress and find_spec("tqdm") is not None}


def _form_of(arguments: argparse.Namespace, columns: Columns) -> Form:
    """What the files hold."""
    from . import _paths, _plan  # the second needs pyarrow

    return _plan.form_of(_paths.find(arguments.files), columns)


def _refuse_for_probabilities(arguments: argparse.Namespace, allowed: Iterable[str]) -> None:
    """Raise the error for options that are for log-probabilities only, if any are given, and for other KL terms."""
    if arguments.kl == "none" and arguments.beta is None:
        raise UsageError("--kl none: probability columns have a KL term unless its weight is 0: --beta 0")
    if arguments.kl in ("k1", "k2"):
        raise UsageError(f"--kl {arguments.kl}: not for probability columns, whose KL term is k3")
    names = [name for name in ("surrogate", *OF_SURROGATES, *BY_NAME) if name not in allowed]
    given = _given(arguments, [name for name in names if hasattr(arguments, name)])
    if given:
        flags = ", ".join(map(flag_of, given))
        raise UsageError(f"{flags}: not for probability columns, which have no tokens and sequences")


def _refuse_names_of_columns(files: list[str]) -> None:
    """Raise the error for a file that looks like a column's name, and is not there."""
    for name in files:
        if name.partition("=")[0] in ARGUMENTS and "=" in name and not os.path.exists(name):
            raise UsageError(f"no such file: {name}; as a column it stands behind a comma, or --columns {name}")


def _columns_of(options: Iterable[Iterable[tuple[str, str | None]]]) -> dict[str, Any]:
    """The column of each argument; for a mask that is named more than once, the list of its columns.

    A list names all masks that there are, as does one with ``mask=`` beside it.
    """
    pairs = [pair for several in options for pair in several]
    columns: dict[str, Any] = {}
    for argument, column in pairs:
        if argument in columns and argument != "mask":
            given = " and ".join(f"{argument}={name or ''}" for name in (columns[argument], column))
            raise UsageError(f"--columns names {argument} twice, got {given}")
        columns[argument] = column
    masks = [column for argument, column in pairs if argument == "mask"]
    if len(masks) > 1:
        columns["mask"] = [column for column in masks if column is not None] or None
    return columns


#: What a worker does first. It is text, as nothing else is had without importing this package, before Ctrl-C, which is
#: for the process that has the workers, is ignored. That process speaks to the user, too.
_BEGIN_WORKER = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from grpo_fast._kernels import notices
notices.never_tell()
"""


def _with_workers(arguments: argparse.Namespace, work: Callable[[Executor | None], T]) -> T:
    """What ``work`` makes with a pool of as many processes as asked for; None in place of one without any.

    It runs on another thread: Ctrl-C in the middle of `concurrent.futures`, where a lock is taken or a process started,
    can leave it waiting forever. So this one waits; when it is interrupted it ends the processes, and so the work.
    """
    workers: int = arguments.workers
    if not workers:
        return work(None)
    others = set(multiprocessing.active_children())
    # Spawned, not forked: pyarrow and Numba have threads, which a fork would not take along.
    context = multiprocessing.get_context("spawn")
    begin = partial(exec, _BEGIN_WORKER, {})
    with ProcessPoolExecutor(workers, context, initializer=begin) as executor, ThreadPoolExecutor(1) as thread:
        future = thread.submit(work, executor)
        try:
            return future.result()
        except KeyboardInterrupt:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            while not wait([future], 0.05).done:
                for worker in set(multiprocessing.active_children()) - others:
                    worker.kill()
            signal.signal(signal.SIGINT, before)
            raise

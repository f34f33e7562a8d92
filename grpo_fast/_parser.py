"""The arguments of the command: a parser for each subcommand, whose options are named as the functions' arguments.

Options that several of them have are in `_option_groups`; what they make of files is in `_command`, what single words
mean in `_words`.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any, Never

from . import __version__
from . import _option_groups as groups
from ._advice import flag_of
from ._checks import did_you_mean
from ._warm_up import DTYPES
from ._words import (
    KL_TERMS,
    SURROGATES,
    count,
    floats,
    names,
)
from ._worst import RANKS, SHOWN
from .terms import (
    BETA,
    EPSILON,
)

EPSILONS = [0.1, 0.2, 0.3]

_DESCRIPTION = """\
The GRPO objective and its diagnostics over rollouts in files (Parquet, Arrow IPC, JSON Lines) of any size, in one read.

  grpo-fast evaluate run                                      every diagnostic, of all files in a folder
  grpo-fast evaluate run --by step --plot run.svg             a row, and a point, for each training step
  grpo-fast worst run --rank mismatch                         the sequences that stand out
  grpo-fast evaluate rollouts.parquet --beta 0.04 --json      with a KL term, as JSON
  grpo-fast sweep rollouts.parquet --plot sweep.svg           the objective over epsilon and beta
  grpo-fast demo                                              no file at hand: synthetic samples, timed beside NumPy

grpo-fast SUBCOMMAND --help says more of each. python -m grpo_fast alone is grpo-fast demo.
"""
_COLUMNS = """\
columns of FILE:
  A row is a completion, its columns lists with a number for each token:
    logps, old_logps       log-probabilities under the policy and under the one that sampled
    advantages             one number, or a list
    ref_logps              with a KL term: under the reference
    mask                   if there: 0 where a token does not count
    rollout_is_weights     if there: weights of the policy term, one number, or a list
    loss_weights           if there: weights of policy and KL term, one number, or a list
    rollout_logps          for --rollout-correction, --plot and worst: under the engine that sampled; null or NaN where
                           missing
  or a row is a token, with a number in each of these columns; or a sample, given as probabilities:
    rhos, A                ratio and advantage
    pi_theta_old, pi_theta_ref
  Other names: --columns logps=my_logps,old_logps=their_logps. Of several masks name each, and they multiply:
  mask=completion_mask,mask=tool_mask. With one and mask= there is no other; with mask= alone, none at all; with
  old_logps= all is on-policy. A comma within a name is written 'logps=my\\,logps'.

"""
_EXAMPLE_EVALUATE = """\
examples:
  grpo-fast evaluate run --by step --csv
  grpo-fast evaluate 'run/*.parquet' --epsilon 0.2 --epsilon-high 0.28 --aggregation token-mean
  grpo-fast evaluate rollouts.parquet --columns logps=policy_logps,mask=completion_mask --kl k3 --beta 0.04
  grpo-fast evaluate rollouts.parquet --surrogate cispo --ratio-max 5
  grpo-fast evaluate rollouts.parquet --surrogate unclipped --trust-region tv,0.2
  grpo-fast evaluate rollouts.parquet --rollout-correction level=sequence,mode=mask,upper=3
  grpo-fast evaluate rollouts.parquet --rollout-correction mode=raw,reject=ratio:geometric:0.99:1.01
"""
_EXAMPLE_SWEEP = """\
examples:
  grpo-fast sweep rollouts.parquet --epsilons 0.1,0.2,0.3 --betas 0,0.01,0.04 --plot sweep.svg
  grpo-fast sweep rollouts.parquet --epsilons 3e-4,4e-4 --importance-sampling-level sequence
"""
_EXAMPLE_WORST = """\
examples:
  grpo-fast worst run --rank ratio -n 5
  grpo-fast worst run --rank mismatch --show step,reward --json
"""
_EXAMPLE_IDENTIFY = """
The exit code is 0 if grpo_loss has options that compute the same, 1 where nothing it has does (with --strict, where it
is fragile, too), 2 for bad input.

examples:
  grpo-fast identify mypackage.losses:dapo_loss
  grpo-fast identify losses.py:loss --names logps=log_prob,mask=response_mask
"""
_EXAMPLE_COMPILE = """\
What is compiled is kept for you, a version and this kind of CPU, in NUMBA_CACHE_DIR if that is set. What only several
threads need is compiled where there are several (NUMBA_NUM_THREADS).

examples:
  grpo-fast compile --dtype float32
  NUMBA_CACHE_DIR=/opt/kernels grpo-fast compile --surrogate cispo --kl k3
  grpo-fast compile --kl k3 --no-importance-weighted
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with what was meant, and whose options are written out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, **options
        )
        self.add_argument("-h", "--help", action="help", help="print this help")

    def error(self, message: str) -> Never:
        self.exit(2, f"grpo-fast: error: {message} ({self.prog} --help says more)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            meant = did_you_mean(str(value), allowed)
            raise argparse.ArgumentError(action, f"must be one of {', '.join(allowed)}, got {value!r}{meant}")


class _Subcommand(Parser):
    """A parser whose files and options may be in any order, and which names an unknown option itself."""

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within:  # argparse's own way to mix them comes back here
            return super().parse_known_args(args, namespace)
        if "--" in args:  # of which argparse knows no more when it comes back: what follows is made to be no option
            at = args.index("--")
            args = [*args[:at], *(os.path.join(".", x) if x.startswith("-") else x for x in args[at + 1 :])]
        self._within = True
        try:
            parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(f"{self.prog.rpartition(' ')[2]} takes options alone, got {unknown[0]}")
            name = unknown[0].partition("=")[0]
            self.error(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")
        return parsed, unknown


def parsed(argv: Sequence[str]) -> argparse.Namespace | None:
    """What is on the command line, with the ``subcommand``; None if that is nothing, and the help was printed.

    What cannot be right ends the process with a message and exit code 2, ``--help`` with 0.
    """
    parser = Parser(prog="grpo-fast", usage="grpo-fast SUBCOMMAND …", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    subparsers = parser.add_subparsers(
        title="subcommands", metavar="SUBCOMMAND", dest="subcommand", parser_class=_Subcommand, prog="grpo-fast"
    )
    _add_evaluate(subparsers)
    _add_sweep(subparsers)
    _add_worst(subparsers)
    _add_compile(subparsers)
    _add_identify(subparsers)
    _add_demo(subparsers)
    if argv and argv[0].startswith("-") and argv[0] not in parser._option_string_actions:
        option = argv[0].partition("=")[0]
        meant = [word for word in argv if word in subparsers.choices]
        meant += [name for name, of_it in subparsers.choices.items() if option in of_it._option_string_actions]
        if meant:
            parser.error(f"a subcommand comes first, as in grpo-fast {meant[0]} {argv[0]} …")
        parser.error(f"unknown option {option}; a subcommand comes first: {', '.join(subparsers.choices)}")
    arguments = parser.parse_args(argv)
    if arguments.subcommand is None:
        parser.print_help()
        return None
    return arguments


def _subparser(subparsers: Any, name: str, about: str, usage: str, epilog: str = "") -> Any:
    return subparsers.add_parser(
        name,
        help=about,
        usage=f"grpo-fast {name} {usage}",
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=epilog,
    )


def _add_evaluate(subparsers: Any) -> None:
    about = "the objective and every diagnostic over rollouts in files"
    parser = _subparser(subparsers, "evaluate", about, "FILE… [OPTION…]", _COLUMNS + _EXAMPLE_EVALUATE)
    groups.add_files(parser)
    groups.add_policy_term(parser)
    groups.add_kl_term(parser)
    groups.add_aggregation(parser)
    groups.add_rollout_correction(parser)
    groups.add_reading(parser)
    groups.add_by(parser)
    groups.add_plot(parser, "draw diagnostics over the column of --by, and the distributions of log-ratios")


def _add_worst(subparsers: Any) -> None:
    about = "the sequences that stand out most over rollouts in files"
    parser = _subparser(subparsers, "worst", about, "FILE… [OPTION…]", _COLUMNS + _EXAMPLE_WORST)
    groups.add_files(parser)
    parser.add_argument(
        "--rank",
        choices=RANKS,
        default=RANKS[0],
        help="by a token's log-ratio, the mean KL term, or a token's mismatch with the sampler (ratio)",
    )
    parser.add_argument("-n", type=count, default=20, metavar="N", help="how many (20)")
    parser.add_argument(
        "--show", type=names, metavar="COLUMN,…", help=f"columns to show beside ({', '.join(SHOWN)}, if there)"
    )
    groups.add_reading(parser)


def _add_sweep(subparsers: Any) -> None:
    about = "the objective for every epsilon and beta over rollouts in files"
    parser = _subparser(subparsers, "sweep", about, "FILE… [OPTION…]", _COLUMNS + _EXAMPLE_SWEEP)
    groups.add_files(parser)
    grid = parser.add_argument_group("grid")
    grid.add_argument("--epsilons", "--epsilon", type=floats, default=EPSILONS, metavar="E,E,…", help="(0.1,0.2,0.3)")
    grid.add_argument(
        "--betas", "--beta", type=floats, metavar="B,B,…", help=f"(0,{BETA}; of log-probabilities 0, unless --kl)"
    )
    fixed = parser.add_argument_group("the same over the grid, of log-probabilities")
    for name in ("epsilon_high", "delta"):
        fixed.add_argument(flag_of(name), type=float, metavar="X", help=groups.ABOUT[name])
    fixed.add_argument("--kl", choices=tuple(KL_TERMS), help="estimator of the KL term (k3)")
    groups.add_importance_weighted(fixed)
    groups.add_kl_gradient(fixed)
    groups.add_aggregation(parser)
    groups.add_reading(parser)
    groups.add_by(parser)
    groups.add_plot(parser, "draw it")


def _add_compile(subparsers: Any) -> None:
    about = "compile beforehand: for all calls in the guide's table of papers, or for one"
    parser = _subparser(subparsers, "compile", about, "[OPTION…]", _EXAMPLE_COMPILE)
    parser.add_argument("--surrogate", choices=tuple(SURROGATES), help="(clip)")
    parser.add_argument("--kl", choices=tuple(KL_TERMS), help="(none)")
    groups.add_importance_weighted(parser)
    groups.add_kl_gradient(parser)
    groups.add_level(parser)
    for name in ("old-logps", "mask"):
        flags = {"action": "store_false", "help": f"for calls without {name.replace('-', '_')}"}
        parser.add_argument(f"--no-{name}", dest=name.replace("-", "_"), **flags)
    for name in ("rollout-is-weights", "loss-weights"):
        parser.add_argument(f"--{name}", action="store_true", help="for calls with them")
    parser.add_argument(
        "--grad", action=argparse.BooleanOptionalAction, help="for calls with the gradient, or without (both)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(both)")


def _add_identify(subparsers: Any) -> None:
    about = "what a loss of your own computes, in the words of grpo_loss, and what it does wrong"
    parser = _subparser(subparsers, "identify", about, "MODULE:FUNCTION [OPTION…]", _EXAMPLE_IDENTIFY)
    parser.add_argument(
        "loss",
        metavar="MODULE:FUNCTION",
        help="a function of logps, old_logps, advantages, ref_logps, mask, or some of them; or FILE.py:FUNCTION",
    )
    parser.add_argument("--framework", choices=("numpy", "torch", "jax"), help="what it is written in (found out)")
    parser.add_argument("--device", metavar="DEVICE", help="where its tensors are to be, in torch (cpu)")
    parser.add_argument(
        "--names",
        default="",
        metavar="NAME=ARGUMENT,…",
        help="what it calls its arguments: logps=log_prob,mask=response_mask",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 where it is fragile, too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_demo(subparsers: Any) -> None:
    about = "the objective of synthetic samples, and how long it takes beside NumPy; needs no file"
    parser = _subparser(subparsers, "demo", about, "[OPTION…]")
    parser.add_argument("--samples", type=count, default=10_000_000, metavar="N", help="how many (10 million)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(float64)")
    parser.add_argument("--epsilon", type=float, default=EPSILON, metavar="E", help="(%(default)s)")
    parser.add_argument("--beta", type=float, default=BETA, metavar="B", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")

"""The arguments of the command: a parser for each subcommand, whose options are named as the functions' arguments.

What they make of files is in `_command`, what single words mean in `_words`; here is what may be written, and the
help.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any, Never

from . import __version__
from ._advice import flag_of
from ._checks import did_you_mean
from ._warm_up import DTYPES
from ._words import (
    KL_TERMS,
    SURROGATES,
    arguments_and_columns,
    count,
    count_or_none,
    floats,
    names,
    rollout_correction_of,
    trust_region_of,
)
from ._worst import RANKS, SHOWN
from .rollout_terms import LOWER, UPPER, WEIGHT_LEVELS, WEIGHT_MODES
from .terms import (
    AGGREGATIONS,
    BETA,
    CISPO,
    EPSILON,
    GMPO,
    KL_GRADIENTS,
    LEVELS,
    SAPO,
    VESPO,
)

PICTURES = (".png", ".svg", ".pdf")
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
#: What the arguments of the surrogates are, for their help.
_ABOUT = {
    "epsilon": f"how far the ratio may fall below 1 ({EPSILON}), or its log below 0 ({GMPO().epsilon:g})",
    "epsilon_high": "how far it may rise above 1 (as --epsilon)",
    "delta": "hard bound of the ratio where A < 0 (none)",
    "ratio_max": f"upper bound of the weight ({CISPO().ratio_max:g})",
    "ratio_min": f"its lower bound ({CISPO().ratio_min:g})",
    "tau_pos": f"temperature where A > 0 ({SAPO().tau_pos:g})",
    "tau_neg": f"temperature elsewhere ({SAPO().tau_neg:g})",
    "k_pos": f"power of the sequence's ratio where A >= 0 ({VESPO().k_pos:g})",
    "lambda_pos": f"its decay ({VESPO().lambda_pos:g})",
    "k_neg": f"power of the sequence's ratio where A < 0 ({VESPO().k_neg:g})",
    "lambda_neg": f"its decay ({VESPO().lambda_neg:g})",
}


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
    _add_files(parser)
    _add_policy_term(parser)
    _add_kl_term(parser)
    _add_aggregation(parser)
    _add_rollout_correction(parser)
    _add_reading(parser)
    _add_by(parser)
    _add_plot(parser, "draw diagnostics over the column of --by, and the distributions of log-ratios")


def _add_worst(subparsers: Any) -> None:
    about = "the sequences that stand out most over rollouts in files"
    parser = _subparser(subparsers, "worst", about, "FILE… [OPTION…]", _COLUMNS + _EXAMPLE_WORST)
    _add_files(parser)
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
    _add_reading(parser)


def _add_sweep(subparsers: Any) -> None:
    about = "the objective for every epsilon and beta over rollouts in files"
    parser = _subparser(subparsers, "sweep", about, "FILE… [OPTION…]", _COLUMNS + _EXAMPLE_SWEEP)
    _add_files(parser)
    grid = parser.add_argument_group("grid")
    grid.add_argument("--epsilons", "--epsilon", type=floats, default=EPSILONS, metavar="E,E,…", help="(0.1,0.2,0.3)")
    grid.add_argument(
        "--betas", "--beta", type=floats, metavar="B,B,…", help=f"(0,{BETA}; of log-probabilities 0, unless --kl)"
    )
    fixed = parser.add_argument_group("the same over the grid, of log-probabilities")
    for name in ("epsilon_high", "delta"):
        fixed.add_argument(flag_of(name), type=float, metavar="X", help=_ABOUT[name])
    fixed.add_argument("--kl", choices=tuple(KL_TERMS), help="estimator of the KL term (k3)")
    _add_importance_weighted(fixed)
    _add_kl_gradient(fixed)
    _add_aggregation(parser)
    _add_reading(parser)
    _add_by(parser)
    _add_plot(parser, "draw it")


def _add_compile(subparsers: Any) -> None:
    about = "compile beforehand: for all calls in the guide's table of papers, or for one"
    parser = _subparser(subparsers, "compile", about, "[OPTION…]", _EXAMPLE_COMPILE)
    parser.add_argument("--surrogate", choices=tuple(SURROGATES), help="(clip)")
    parser.add_argument("--kl", choices=tuple(KL_TERMS), help="(none)")
    _add_importance_weighted(parser)
    _add_kl_gradient(parser)
    _add_level(parser)
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


# --- groups of options ------------------------------------------------------------------------------------------------
def _add_files(parser: Any) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, folder, glob or URI (s3://…)")
    parser.add_argument(
        "--columns",
        action="append",
        type=arguments_and_columns,
        default=[],
        metavar="NAME=COLUMN,…",
        help="what other columns than those below are called; may be given again",
    )


def _add_policy_term(parser: Any) -> None:
    group = parser.add_argument_group("policy term (of probabilities: --epsilon)")
    group.add_argument("--surrogate", choices=tuple(SURROGATES), help="(clip)")
    for name, about in _ABOUT.items():
        kinds = ", ".join(kind for kind, surrogate in SURROGATES.items() if name in surrogate._fields)
        group.add_argument(flag_of(name), type=float, metavar="X", help=f"{kinds}: {about}")
    _add_level(group)
    _add_trust_region(group)


def _add_trust_region(group: Any) -> None:
    group.add_argument(
        "--trust-region",
        type=trust_region_of,
        metavar="NAME,X,…",
        help="which tokens keep their policy term: tv,DELTA or binary-kl,DELTA, also with a DELTA_LOW; "
        "band,RATIO_MIN,RATIO_MAX (all)",
    )


def _add_level(group: Any) -> None:
    group.add_argument(
        "--importance-sampling-level",
        "--level",
        choices=LEVELS,
        help="one ratio for each token, or for each sequence, in whose gradient tokens may be their own (token)",
    )


def _add_kl_term(parser: Any) -> None:
    group = parser.add_argument_group(
        "KL term (of probabilities: k3; of log-probabilities: none, unless --kl or --beta)"
    )
    group.add_argument("--kl", choices=("none", *KL_TERMS), help="estimator (with --beta: k3)")
    group.add_argument("--beta", type=float, metavar="B", help=f"its weight ({BETA}); 0: no KL term, unless --kl")
    _add_importance_weighted(group)
    _add_kl_gradient(group)


def _add_importance_weighted(group: Any) -> None:
    group.add_argument(
        "--importance-weighted",
        action=argparse.BooleanOptionalAction,
        help="whether the ratio multiplies the KL term; not in DeepSeekMath (it does)",
    )


def _add_kl_gradient(group: Any) -> None:
    group.add_argument(
        "--kl-gradient", choices=KL_GRADIENTS, help="of a term that is not importance-weighted: another one (own)"
    )


def _add_aggregation(parser: Any) -> None:
    group = parser.add_argument_group("aggregation, of log-probabilities")
    group.add_argument("--aggregation", choices=AGGREGATIONS, metavar="HOW", help=", ".join(AGGREGATIONS))
    group.add_argument("--normalizer", type=float, metavar="X", help="what to divide by instead of what is counted")
    if parser.prog.endswith("sweep"):
        _add_level(group)
        _add_trust_region(group)


def _add_rollout_correction(parser: Any) -> None:
    group = parser.add_argument_group("between trainer and sampler, of log-probabilities")
    group.add_argument(
        "--rollout-correction",
        type=rollout_correction_of,
        metavar="NAME=X,…",
        help="weigh the policy term by old_logps over rollout_logps: "
        f"level={'|'.join(WEIGHT_LEVELS)}, mode={'|'.join(WEIGHT_MODES)}, lower=X, upper=X "
        f"({WEIGHT_LEVELS[0]}, {WEIGHT_MODES[0]}, {LOWER:g}, {UPPER:g}); and by 0 what is outside of "
        "reject=STATISTIC:LEVEL:LOWER:UPPER, as often as you like, where a bound may be empty: of ratio, k2 or k3, at "
        "level token, or of a sequence (ratio: sequence, geometric, seq_min, seq_max; else seq_sum, seq_mean, seq_max)",
    )


def _add_reading(parser: Any) -> None:
    group = parser.add_argument_group("reading and printing")
    group.add_argument("--batch-size", type=count, metavar="ROWS", help="rows read at a time (about 16 MiB)")
    group.add_argument("--workers", type=count_or_none, default=0, metavar="N", help="processes (this one)")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no bar on stderr")
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print JSON, in which infinity, and a mean over nothing, is null"
    )
    form.add_argument("--csv", action="store_true", help="print CSV, with a line of names first")


def _add_by(parser: Any) -> None:
    parser.add_argument(
        "--by", metavar="COLUMN", help="a result for each value of a column of ints or strings, or of run/COLUMN=…/"
    )


def _add_plot(parser: Any, what: str) -> None:
    parser.add_argument("--plot", metavar="PICTURE", help=f"{what}, into a file: {', '.join(PICTURES)}")

"""Options that several subcommands have, added to a parser: what may be written, and the help of it."""

import argparse
from typing import Any

from ._advice import flag_of
from ._words import (
    KL_TERMS,
    SURROGATES,
    arguments_and_columns,
    count,
    count_or_none,
    rollout_correction_of,
    trust_region_of,
)
from .rollout_terms import LOWER, UPPER, WEIGHT_LEVELS, WEIGHT_MODES
from .terms import AGGREGATIONS, BETA, CISPO, EPSILON, GMPO, KL_GRADIENTS, LEVELS, SAPO, VESPO

PICTURES = (".png", ".svg", ".pdf")
#: What the arguments of the surrogates are, for their help.
ABOUT = {
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


def add_files(parser: Any) -> None:
    """The files, and what their columns are called."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, folder, glob or URI (s3://…)")
    parser.add_argument(
        "--columns",
        action="append",
        type=arguments_and_columns,
        default=[],
        metavar="NAME=COLUMN,…",
        help="what other columns than those below are called; may be given again",
    )


def add_policy_term(parser: Any) -> None:
    """The surrogate and its numbers, the level, the trust region."""
    group = parser.add_argument_group("policy term (of probabilities: --epsilon)")
    group.add_argument("--surrogate", choices=tuple(SURROGATES), help="(clip)")
    for name, about in ABOUT.items():
        kinds = ", ".join(kind for kind, surrogate in SURROGATES.items() if name in surrogate._fields)
        group.add_argument(flag_of(name), type=float, metavar="X", help=f"{kinds}: {about}")
    add_level(group)
    add_trust_region(group)


def add_trust_region(group: Any) -> None:
    """The trust region."""
    group.add_argument(
        "--trust-region",
        type=trust_region_of,
        metavar="NAME,X,…",
        help="which tokens keep their policy term: tv,DELTA or binary-kl,DELTA, also with a DELTA_LOW; "
        "band,RATIO_MIN,RATIO_MAX (all)",
    )


def add_level(group: Any) -> None:
    """The importance sampling level."""
    group.add_argument(
        "--importance-sampling-level",
        "--level",
        choices=LEVELS,
        help="one ratio for each token, or for each sequence, in whose gradient tokens may be their own (token)",
    )


def add_kl_term(parser: Any) -> None:
    """The estimator, its weight, and the forms below."""
    group = parser.add_argument_group(
        "KL term (of probabilities: k3; of log-probabilities: none, unless --kl or --beta)"
    )
    group.add_argument("--kl", choices=("none", *KL_TERMS), help="estimator (with --beta: k3)")
    group.add_argument("--beta", type=float, metavar="B", help=f"its weight ({BETA}); 0: no KL term, unless --kl")
    add_importance_weighted(group)
    add_kl_gradient(group)


def add_importance_weighted(group: Any) -> None:
    """Whether ρ multiplies the KL term."""
    group.add_argument(
        "--importance-weighted",
        action=argparse.BooleanOptionalAction,
        help="whether the ratio multiplies the KL term; not in DeepSeekMath (it does)",
    )


def add_kl_gradient(group: Any) -> None:
    """Which gradient the KL term has."""
    group.add_argument(
        "--kl-gradient", choices=KL_GRADIENTS, help="of a term that is not importance-weighted: another one (own)"
    )


def add_aggregation(parser: Any) -> None:
    """The aggregation and the normalizer; of a sweep, what else is fixed."""
    group = parser.add_argument_group("aggregation, of log-probabilities")
    group.add_argument("--aggregation", choices=AGGREGATIONS, metavar="HOW", help=", ".join(AGGREGATIONS))
    group.add_argument("--normalizer", type=float, metavar="X", help="what to divide by instead of what is counted")
    if parser.prog.endswith("sweep"):
        add_level(group)
        add_trust_region(group)


def add_rollout_correction(parser: Any) -> None:
    """The correction between trainer and sampler."""
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


def add_reading(parser: Any) -> None:
    """How files are read, and how what is found is printed."""
    group = parser.add_argument_group("reading and printing")
    group.add_argument("--batch-size", type=count, metavar="ROWS", help="rows read at a time (about 16 MiB)")
    group.add_argument("--workers", type=count_or_none, default=0, metavar="N", help="processes (this one)")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no bar on stderr")
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print JSON, in which infinity, and a mean over nothing, is null"
    )
    form.add_argument("--csv", action="store_true", help="print CSV, with a line of names first")


def add_by(parser: Any) -> None:
    """The column by whose values results are told apart."""
    parser.add_argument(
        "--by", metavar="COLUMN", help="a result for each value of a column of ints or strings, or of run/COLUMN=…/"
    )


def add_plot(parser: Any, what: str) -> None:
    """The picture."""
    parser.add_argument("--plot", metavar="PICTURE", help=f"{what}, into a file: {', '.join(PICTURES)}")

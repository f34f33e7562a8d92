"""What words on the command line mean: options by their names, texts as values, and the errors about them."""

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._advice import flag_of
from ._checks import did_you_mean
from ._columns import ARGUMENTS, REQUIRED
from .rollout_terms import Reject, RolloutOptions
from .terms import CISPO, GMPO, K1, K2, K3, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped

SURROGATES: dict[str, Any] = {
    "clip": Clip,
    "cispo": CISPO,
    "sapo": SAPO,
    "unclipped": Unclipped,
    "vespo": VESPO,
    "gmpo": GMPO,
}
TRUST_REGIONS: dict[str, Any] = {"tv": TV, "binary-kl": BinaryKL, "band": Band}
KL_TERMS: dict[str, Any] = {"k1": K1, "k2": K2, "k3": K3}
#: Options that are named as the arguments of `grpo_loss` and go there as they are.
BY_NAME = ("importance_sampling_level", "aggregation", "normalizer", "trust_region")
#: The numbers of surrogates, each of which is an option.
OF_SURROGATES = tuple(dict.fromkeys(name for surrogate in SURROGATES.values() for name in surrogate._fields))


class UsageError(Exception):
    """What is on the command line cannot be meant, as the message says in its terms."""


@contextmanager
def in_terms_of_the_shell() -> Iterator[None]:
    """A context in which errors of options, which call them as Python does, become those of the command line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        options = {*OF_SURROGATES, "beta", *BY_NAME}
        raise UsageError(re.sub(rf"\b({'|'.join(options)})\b", lambda m: flag_of(m[0]), str(error))) from error


# --- texts as values --------------------------------------------------------------------------------------------------
def floats(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def trust_region_of(text: str) -> Any:
    name, *numbers = text.split(",")
    if name not in TRUST_REGIONS:
        meant = did_you_mean(name, list(TRUST_REGIONS))
        raise argparse.ArgumentTypeError(f"must begin with one of {', '.join(TRUST_REGIONS)}, got {text!r}{meant}")
    try:
        return TRUST_REGIONS[name](*floats(",".join(numbers)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    except TypeError:
        raise argparse.ArgumentTypeError(f"{name}: of other numbers than the help says, got {text!r}") from None


def rollout_correction_of(text: str) -> dict[str, Any]:
    """The options in ``NAME=X,NAME=X``, checked."""
    options: dict[str, Any] = {"reject": []}
    allowed = RolloutOptions._fields
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value or name not in allowed:
            several = ", ".join(f"{name}=…" for name in allowed)
            wanted = f": NAME=VALUE is wanted, as in {name}=…"
            meant = wanted if name in allowed else did_you_mean(name, allowed)
            raise argparse.ArgumentTypeError(f"must be {several}, with commas between several, got {part!r}{meant}")
        if name == "reject":
            options["reject"].append(_reject(value))
        elif name in options:
            raise argparse.ArgumentTypeError(f"must name {name} once, got {text!r}")
        else:
            options[name] = value if name in ("level", "mode") else floats(value)[0]
    with _as_type_error():
        RolloutOptions(**options)
    return options


def _reject(text: str) -> Reject:
    statistic, _, rest = text.partition(":")
    level, *bounds = rest.split(":")
    if not 1 <= len(bounds) <= 2:
        raise argparse.ArgumentTypeError(f"must have reject=STATISTIC:LEVEL:LOWER:UPPER, got {text!r}")
    low, high = (floats(bound)[0] if bound else None for bound in (*bounds, "")[:2])
    which: Any = {"statistic": statistic, "level": level}
    with _as_type_error():
        return Reject(**which, lower=-math.inf if low is None else low, upper=math.inf if high is None else high)


@contextmanager
def _as_type_error() -> Iterator[None]:
    """A context in which an option's ValueError becomes that of its text."""
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text!r}")
    return number


def count(text: str) -> int:
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    return _whole(text, 0)


def arguments_and_columns(text: str) -> list[tuple[str, str | None]]:
    """The pairs of names in ``NAME=COLUMN,NAME=COLUMN``; in ``NAME=``, None as the column.

    A comma behind a backslash is part of the name.
    """
    pairs = []
    for part in re.split(r"(?<!\\),", text):
        name, equals, column = part.replace("\\,", ",").partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(
                f"must be NAME=COLUMN, with commas between several, got {part!r}; a comma within a name is \\,"
            )
        if name not in ARGUMENTS:
            meant = did_you_mean(name, ARGUMENTS)
            raise argparse.ArgumentTypeError(f"NAME must be one of {', '.join(ARGUMENTS)}, got {name!r}{meant}")
        if not column and name in REQUIRED:
            raise argparse.ArgumentTypeError(f"{name} must be a column, got {part!r}")
        pairs.append((name, column or None))
    return pairs

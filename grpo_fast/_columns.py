"""Which columns of a file are which arguments: the two forms of files, and what may be said of their columns."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeAlias

from ._advice import AdvisedError, Keywords
from ._checks import did_you_mean

#: Which column each argument is; a mask may be the product of several.
Columns: TypeAlias = Mapping[str, str | Sequence[str] | None]


class Form(Enum):
    """What files hold: probabilities, for `grpo_stats`, or log-probabilities, for `grpo_loss`.

    The values are the arguments that a file may have as columns; the first one marks a file as of that form.
    """

    PROBABILITIES = ("rhos", "A", "pi_theta_old", "pi_theta_ref")
    LOG_PROBABILITIES = (
        "logps",
        "old_logps",
        "advantages",
        "ref_logps",
        "mask",
        "rollout_is_weights",
        "loss_weights",
        "rollout_logps",
    )

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments that can be columns."""
        names: tuple[str, ...] = self.value
        return names


#: The arguments of both forms.
ARGUMENTS = Form.PROBABILITIES.arguments + Form.LOG_PROBABILITIES.arguments
#: There is nothing to compute without these: ``columns`` cannot map them to None.
REQUIRED = ("rhos", "A", "logps", "advantages")
#: Read where a file has such a column; a column for any other argument must be there.
OPTIONAL = ("mask", "rollout_is_weights", "loss_weights", "rollout_logps")
#: A null among these is a number that is missing, as a NaN is.
MAY_BE_NULL = ("rollout_logps",)
#: One number for each sequence, unless they are lists.
PER_SEQUENCE = ("advantages", "rollout_is_weights", "loss_weights")


def no_mask(reason: str) -> AdvisedError:
    """The error about a mask beside probabilities."""
    template = (
        "{reason}, but files of probabilities take no mask: leave out what is masked when they are written; {none} "
        "ignores it"
    )
    return AdvisedError(template, {"reason": reason, "none": Keywords({"columns": {"mask": None}})})


def check_mapping(columns: Columns | None) -> None:
    """Raise a TypeError or ValueError unless ``columns`` maps arguments to columns, or those allowed to None.

    A mask may be several columns.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise TypeError(f"columns must map arguments to names of columns, got {columns!r}")
    for argument, column in (columns or {}).items():
        if argument not in ARGUMENTS:
            meant = did_you_mean(str(argument), ARGUMENTS)
            raise ValueError(f"columns must name arguments among {', '.join(ARGUMENTS)}; got {argument!r}{meant}")
        if argument == "mask" and isinstance(column, (list, tuple)) and column:
            if all(isinstance(name, str) for name in column):
                continue
        elif isinstance(column, str) or (column is None and argument not in REQUIRED):
            continue
        raise TypeError(f"columns[{argument!r}] must be the name of a column, got {column!r}")


def with_sampler(columns: Columns | None) -> Columns | None:
    """``columns`` where ``rollout_correction`` makes the weights: ``rollout_logps`` must be there.

    Raises the ValueError if the weights are named as a column, or it is said that there is none of the sampler.
    """
    if columns is not None and not isinstance(columns, Mapping):
        return columns  # `check_mapping` says so
    named = {"rollout_logps": "rollout_logps", **(columns or {})}
    if named.get("rollout_is_weights") is not None:
        raise ValueError(
            "columns must not name rollout_is_weights beside rollout_correction, which makes them of rollout_logps; "
            f"got {named['rollout_is_weights']!r}"
        )
    if named["rollout_logps"] is None:
        raise ValueError("columns must name rollout_logps beside rollout_correction, which is about them, got None")
    return named

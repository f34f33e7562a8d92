"""What the user is told of the machine: each thing once in a process."""

import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    """Give a RuntimeWarning, unless it was given before."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)

"""What the user is told of the machine: of each subject once in a process."""

import warnings

_told: set[str] = set()


def warn_once(subject: str, message: str) -> None:
    """Give a RuntimeWarning, unless one was given on the subject."""
    if subject not in _told:
        _told.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

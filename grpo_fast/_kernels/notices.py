"""Warnings about the machine, of each subject one in a process."""

import warnings

_warned: set[str] = set()


def warn_once(subject: str, message: str) -> None:
    """Give a RuntimeWarning, unless one was given on the subject."""
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

"""Files that are there as a whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced_when_complete(path: str) -> Iterator[str]:
    """The name of a file beside ``path`` to write to; afterwards it is moved there, or removed on an exception.

    Its name begins with a dot, so that nobody who lists the folder meanwhile takes it for a file that is complete, and
    ends as ``path`` does, which says the format.
    """
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    temporary = os.path.join(folder, f".{stem}.{os.getpid()}{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

"""Which files of a directory are its rollouts."""

import os
from collections.abc import Iterable

from ._sources import printable

_PACKED = ("", ".gz", ".zst", ".bz2")
#: How the names of files of rollouts end; of a directory, the files of the first kind that it has are read.
KINDS = (
    (".parquet", ".pq"),
    (".arrow", ".feather", ".ipc"),
    tuple(f"{suffix}{packed}" for suffix in (".jsonl", ".ndjson") for packed in _PACKED),
    tuple(f".json{packed}" for packed in _PACKED),
)


def files_below(directory: str) -> list[str]:
    """The files of rollouts in a directory of this machine, or below it, sorted; a ValueError if there are none."""

    def every() -> Iterable[str]:
        for folder, folders, names in os.walk(directory, followlinks=True):
            folders[:] = [name for name in folders if _counts(name)]
            for name in names:
                yield os.path.join(folder, name)

    return rollouts_among(every(), directory)


def rollouts_among(names: Iterable[str], directory: str) -> list[str]:
    """Those of the files of ``directory`` that hold its rollouts, sorted; a ValueError if there are none.

    What begins with a dot or an underscore is about the files, or on its way.
    """
    files = sorted(name for name in names if _counts(os.path.basename(name)))
    for endings in KINDS:
        if found := [name for name in files if name.lower().endswith(endings)]:
            return found
    endings_of_all = ", ".join(kind[0] for kind in KINDS)
    raise ValueError(f"{printable(directory)} is a directory without rollouts: no file in it ends in {endings_of_all}")


def _counts(name: str) -> bool:
    return not name.startswith((".", "_"))

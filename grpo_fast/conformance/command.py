"""``grpo-fast identify module:function``: what a loss of the user's own computes."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from .._checks import did_you_mean
from .._words import UsageError
from . import identify


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 where something differs (with ``--strict``, where it is fragile, too)."""
    report = identify(_found(arguments.loss), framework=arguments.framework, device=arguments.device)
    report = report._replace(strict=arguments.strict)
    print(report, flush=True)
    return 0 if report.ok else 1


def _found(text: str) -> Any:
    """What ``package.module:function``, or ``file.py:function``, names; modules of the current folder are found."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"the loss must be module:function, or file.py:function, got {text!r}")
    found: Any = _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            meant = did_you_mean(part, [x for x in vars(found) if not x.startswith("_")])
            raise UsageError(f"{place} has no {name!r}{meant}")
        found = getattr(found, part)
    return found


def _module(place: str) -> Any:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not os.path.exists(place):
            raise FileNotFoundError(f"there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        if added:
            sys.path.remove(here)

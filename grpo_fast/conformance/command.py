"""``grpo-fast identify module:function``: what a loss of the user's own computes."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from .._checks import did_you_mean
from .._tables import as_json
from .._words import UsageError
from . import identify
from .signature import NAMES, message_of


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The report, and the exit code: 1 where something differs (with ``--strict``, where it is fragile, too)."""
    names = {}
    for pair in filter(None, arguments.names.split(",")):
        ours, equals, theirs = pair.partition("=")
        if not equals or ours not in NAMES or not theirs:
            raise UsageError(f"--names must be pairs such as logps=log_prob, of {', '.join(NAMES)}, got {pair!r}")
        names[ours] = theirs
    loss = _found(arguments.loss)
    report = identify(loss, framework=arguments.framework, device=arguments.device, names=names)
    report = report._replace(strict=arguments.strict)
    return as_json(report.as_dict()) if arguments.json else str(report), 0 if report.ok else 1


def _found(text: str) -> Any:
    """What ``package.module:function``, or ``file.py:function``, names; modules of the current folder are found."""
    place, colon, name = text.replace("::", ":").rpartition(":")
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
    """The module, imported with the current folder, or the folder of its file, on the path, as Python itself would."""
    here = os.path.dirname(os.path.abspath(place)) if place.endswith(".py") else os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not os.path.exists(place):
            raise UsageError(f"there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except UsageError:
        raise
    except Exception as error:  # of whatever kind, it is that of the module, not of what was asked
        raise UsageError(f"{place} cannot be imported: {message_of(error)}") from error
    finally:
        if added:
            sys.path.remove(here)

"""What a loss is called, which arguments it takes by which names, and what is told of an error it raises."""

import functools
import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from .._checks import did_you_mean, one_of

#: What a loss may take.
NAMES = ("logps", "old_logps", "advantages", "ref_logps", "mask")


def name_of(loss: Callable[..., Any]) -> str:
    """What the loss is called."""
    loss = getattr(loss, "func", loss)  # of a partial
    return str(getattr(loss, "__qualname__", None) or type(loss).__name__).replace("<locals>.", "")


def message_of(error: Exception) -> str:
    """An error in one line, with where it was raised: the innermost line of a file that is of no installed package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _PACKAGES.search(f.filename)]
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


_PACKAGES = re.compile(r"site-packages|dist-packages|[/\\]grpo_fast[/\\]|<frozen|<__array_function__")


def checked_names(names: Mapping[str, str] | None) -> dict[str, str]:
    """What the loss calls its arguments, or the error for what cannot be that."""
    if names is None:
        return {}
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise TypeError(f"names must map {', '.join(NAMES)} to names of arguments of the loss, got {names!r}")
    for name in names:
        one_of("a key of names", name, NAMES)
    all_of_them = [names.get(name, name) for name in NAMES]
    twice = sorted({name for name in all_of_them if all_of_them.count(name) > 1})
    if twice:
        raise ValueError(f"names must give each argument one meaning, got {twice[0]!r} twice in {dict(names)!r}")
    return dict(names)


def renamed(loss: Callable[..., Any], theirs: Mapping[str, str]) -> Callable[..., Any]:
    """The loss with our names for its arguments."""
    return lambda **arrays: loss(**{theirs.get(name, name): x for name, x in arrays.items()})


def _written(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose parameters are those of the loss: ``forward`` of a module, bound as a partial binds it."""
    if isinstance(loss, functools.partial):
        return functools.partial(_written(loss.func), *loss.args, **loss.keywords)
    return loss.forward if hasattr(loss, "forward") and not inspect.isroutine(loss) else loss


def taken_by(loss: Callable[..., Any], theirs: Mapping[str, str]) -> tuple[str, ...]:
    """Those of `NAMES` that the loss takes, or the TypeError for what it takes besides."""
    if inspect.isclass(loss):
        raise TypeError(f"the loss must be a function, got the class {loss.__name__}: make an object of it, or wrap it")
    if hasattr(loss, "schema"):  # of TorchScript
        return tuple(argument.name for argument in loss.schema.arguments)
    try:
        parameters = inspect.signature(_written(loss)).parameters.values()
    except (TypeError, ValueError):  # of no Python function
        return NAMES
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return NAMES
    known = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    ours = {theirs.get(name, name): name for name in NAMES}
    allowed = ", ".join(NAMES)
    wrap = f"say what it calls them, names={{'logps': …}}, or wrap it, as in lambda {allowed}: my_loss(…)"
    if "self" in known:
        raise TypeError("the loss must be a function, got one that takes self: take it of an object, not of its class")
    for p in parameters:
        if p.name in ours and p.kind is p.POSITIONAL_ONLY:
            raise TypeError(f"the loss must take {p.name} by name, got it as positional only: {wrap}")
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    others = [p.name for p in needed if p.name not in ours]
    if others:
        meant = did_you_mean(others[0], NAMES) if len(others) == 1 else ""
        got = ", ".join(map(repr, others))
        raise TypeError(f"the loss must take {allowed}, or some of them, by name, got {got}{meant}; {wrap}")
    for name in ("logps", "advantages"):
        if theirs.get(name, name) not in known:
            raise TypeError(f"the loss must take {name} by name, got {', '.join(sorted(known)) or 'nothing'}: {wrap}")
    return tuple(name for name in NAMES if theirs.get(name, name) in known)

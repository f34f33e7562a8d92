"""A loss as this package calls it: by the names of its parameters, with what it takes, and its errors told apart.

How it wants its mask and advantages is found out here once, by a small batch.
"""

import functools
import inspect
import math
import os
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import did_you_mean, one_of
from . import frameworks
from .frameworks import FRAMEWORKS, Answer, Framework, NoGradient

#: What a loss may take.
NAMES = ("logps", "old_logps", "advantages", "ref_logps", "mask")
Form = Literal["(B,)", "(B, T)", "(B, 1)"]
#: The dtypes in which a mask is tried, in this order: most losses multiply by it, some index with it.
MASKS = ("float64", "bool", "int64")

Floats = NDArray[np.float64]


class Batch(NamedTuple):
    """The arguments of a loss: float64, the mask of bools; advantages (B,) or (B, T)."""

    logps: Floats
    old_logps: Floats
    advantages: Floats
    ref_logps: Floats
    mask: NDArray[np.bool_]


def each(at: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with each of its arrays changed."""
    return Batch(*(change(x) for x in at))


def batch(
    logps: ArrayLike,
    old_logps: ArrayLike | None = None,
    advantages: ArrayLike = 1.0,
    ref_logps: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Batch:
    """A batch of these values; by default on-policy, with the reference the same, A = 1, and nothing masked."""
    logps = np.array(logps, np.float64, ndmin=2)
    advantages = np.array(advantages, np.float64)
    if advantages.ndim == 0:
        advantages = np.full(len(logps), advantages)
    old, ref = (logps if x is None else np.array(x, np.float64, ndmin=2) for x in (old_logps, ref_logps))
    keep = np.ones(logps.shape, bool) if mask is None else np.array(mask, bool, ndmin=2)
    return Batch(logps, old.copy(), advantages, ref.copy(), keep)


class CallFailed(Exception):  # noqa: N818 - it is not the user's error, but what is told of one
    """The loss raised an error, which is the cause, on this batch."""

    def __init__(self, at: Batch, error: Exception) -> None:
        super().__init__(message_of(error))
        self.at = at


class Loss:
    """A loss that can be called with a `Batch`, whose answer has a gradient always.

    Of a loss in NumPy that returns none it is made of central differences, for a step of the cube root of eps, where
    their error is least: 1e-10 for numbers near 1. Such a gradient is that of the value, and says nothing about what
    the author holds constant: `gives_gradient` is False, and nobody is blamed for it.

    Raises
    ------
    TypeError
        Parameters that this package has nothing for; the loss cannot be called in any framework that is there.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        framework: str | None = None,
        device: Any = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of {', '.join(NAMES)} or some of them, got {loss!r}")
        theirs = _checked_names(names)
        self._loss = _renamed(loss, theirs) if theirs else loss
        self._device = device
        self.name = name_of(loss)
        self.takes = _taken_by(loss, theirs)
        self.calls = 0
        #: Whether every batch is padded by one masked token more, for a loss that leaves full rows out.
        self.padded = False
        #: Whether the reference is the old policy in every batch, for a loss whose KL is told already.
        self.tied = False
        #: Whether π_old and π_ref change places in every batch, for a loss that has them swapped.
        self.swapped = False
        #: What relative differences mean nothing because of a constant that the loss adds somewhere.
        self.rough = 0.0
        #: Below it the loss clamps log-probabilities.
        self.least = -math.inf
        tried: list[Framework]
        named: Any = None if framework is None else one_of("framework", framework, FRAMEWORKS)
        tried = frameworks.candidates(loss) if named is None else [named]
        self.framework: Framework = tried[0]
        self.mask_dtype = MASKS[0]
        self.form: Form = "(B,)"
        answer = self._find_out(tried)
        self.gives_gradient = answer.grad is not None
        self.dtype = answer.dtype
        if "16" in self.dtype:
            raise TypeError(
                f"the loss must answer in float32 or float64, got {self.dtype}, whose rounding hides what is computed"
            )
        self.eps = float(np.finfo(np.float32 if "32" in answer.dtype else np.float64).eps)
        self.forms = self._forms()

    # --- what it wants ------------------------------------------------------------------------------------------------
    def _find_out(self, tried: Iterable[Framework]) -> Answer:
        """Settle the framework, the mask's dtype and the form of the advantages by the first call that succeeds."""
        small = batch([[-1.0, -1.1, -1.2], [-0.9, -1.3, -0.7]], mask=[[1, 1, 1], [1, 1, 0]])
        errors: dict[str, Exception] = {}
        told: list[str] = []
        for self.framework in tried:
            self._evaluate = frameworks.evaluator(self._loss, self.framework, self._device)
            for self.form in ("(B,)", "(B, T)", "(B, 1)"):
                for self.mask_dtype in MASKS:
                    try:
                        return self._raw(small)
                    except (ImportError, NoGradient):
                        raise
                    except Exception as error:
                        errors.setdefault(self.framework, error)
                        told.append(f"{self.framework}: {message_of(error)}")
        each = "; ".join(list(dict.fromkeys(told))[:4])
        raise TypeError(
            f"the loss must take {', '.join(self.takes)} of any number of sequences and tokens; with 2 sequences of 3 "
            f"tokens it raises, as arrays of {each}"
        ) from next(iter(errors.values()))

    def _forms(self) -> tuple[Form, ...]:
        """In which forms it takes advantages, without saying that it takes them rightly."""
        small = batch(np.full((2, 3), -1.0))
        found: list[Form] = []
        kept = self.form
        for self.form in ("(B,)", "(B, T)", "(B, 1)"):
            try:
                self._raw(small)
                found.append(self.form)
            except Exception:
                continue
        self.form = kept
        return tuple(found)

    # --- calling ------------------------------------------------------------------------------------------------------
    def __call__(self, at: Batch) -> Answer:
        """The loss and its gradient.

        Raises
        ------
        CallFailed
            The loss raised an error.
        """
        try:
            answer = self._raw(at)
            if answer.grad is None:
                answer = answer._replace(grad=self._differences(at))
            return answer
        except Exception as error:
            raise CallFailed(at, error) from error

    def value(self, at: Batch) -> float:
        """The loss alone, without a gradient that would have to be measured.

        Raises
        ------
        CallFailed
            The loss raised an error.
        """
        try:
            return self._raw(at).loss
        except Exception as error:
            raise CallFailed(at, error) from error

    def policy_value(self, at: Batch) -> float:
        """What the advantages of a batch take from the loss: Σ c·s.

        Raises
        ------
        CallFailed
            The loss raised an error.
        """
        return self.value(at._replace(advantages=np.zeros_like(at.advantages))) - self.value(at)

    def _raw(self, at: Batch) -> Answer:
        self.calls += 1
        arrays: dict[str, NDArray[Any]] = at._asdict()
        advantages = at.advantages
        if advantages.ndim == 1 and self.form != "(B,)":
            one_each = advantages[:, None]
            advantages = one_each if self.form == "(B, 1)" else np.broadcast_to(one_each, at.logps.shape)
        arrays["advantages"] = np.ascontiguousarray(advantages)
        arrays["mask"] = at.mask.astype(self.mask_dtype)
        if self.swapped:
            arrays["old_logps"], arrays["ref_logps"] = arrays["ref_logps"], arrays["old_logps"]
        if self.tied:
            arrays["ref_logps"] = arrays["old_logps"]
        if not self.padded:
            return self._evaluate({name: arrays[name] for name in self.takes})
        last = {name: x[:, -1:] for name, x in arrays.items() if x.ndim == 2 and x.shape == at.logps.shape}
        last["mask"] = np.zeros_like(last["mask"])
        wider = {name: np.concatenate([arrays[name], x], axis=1) for name, x in last.items()}
        answer = self._evaluate({name: wider.get(name, arrays[name]) for name in self.takes})
        return answer if answer.grad is None else answer._replace(grad=answer.grad[:, :-1])

    @np.errstate(all="ignore")
    def _differences(self, at: Batch) -> Floats:
        grad = np.zeros(at.logps.shape)
        for i in np.ndindex(at.logps.shape):
            h = 6e-6 * max(1.0, float(abs(at.logps[i]))) if np.isfinite(at.logps[i]) else 6e-6
            sides = []
            for sign in (1, -1):
                moved = at.logps.copy()
                moved[i] += sign * h
                sides.append((self._raw(at._replace(logps=moved)).loss, moved[i]))
            (up, x_up), (down, x_down) = sides
            grad[i] = 0.0 if up == down else (up - down) / (x_up - x_down)
        return grad

    @property
    def improbable(self) -> float:
        """A log-probability so far below 0 that no trust region of probabilities acts, and nothing is clamped."""
        return max(-9.0, self.least / 2)

    # --- what it can be told ------------------------------------------------------------------------------------------
    @property
    def exactness(self) -> float:
        """What relative differences of its answers mean nothing: rounding, or that of central differences."""
        single = self.eps > 1e-10
        return max(2e-4 if single else 1e-8, 0.0 if self.gives_gradient else 2e-6, self.rough)


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


def _checked_names(names: Mapping[str, str] | None) -> dict[str, str]:
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


def _renamed(loss: Callable[..., Any], theirs: Mapping[str, str]) -> Callable[..., Any]:
    """The loss with our names for its arguments."""
    return lambda **arrays: loss(**{theirs.get(name, name): x for name, x in arrays.items()})


def _written(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose parameters are those of the loss: ``forward`` of a module, bound as a partial binds it."""
    if isinstance(loss, functools.partial):
        return functools.partial(_written(loss.func), *loss.args, **loss.keywords)
    return loss.forward if hasattr(loss, "forward") and not inspect.isroutine(loss) else loss


def _taken_by(loss: Callable[..., Any], theirs: Mapping[str, str]) -> tuple[str, ...]:
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

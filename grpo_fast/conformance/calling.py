"""A loss as this package calls it: by the names of its parameters, with what it takes, and its errors told apart.

How it wants its mask and advantages is found out here once, by a small batch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import one_of
from . import frameworks
from .frameworks import FRAMEWORKS, Answer, Framework, NoGradient
from .signature import NAMES, checked_names, message_of, name_of, renamed, taken_by

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
        theirs = checked_names(names)
        self._loss = renamed(loss, theirs) if theirs else loss
        self._device = device
        self.name = name_of(loss)
        self.takes = taken_by(loss, theirs)
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

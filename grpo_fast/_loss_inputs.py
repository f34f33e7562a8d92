"""The arguments of `grpo_loss` → the `Batch` of its kernels, with a place for the gradient, or an error that names one.

Values are looked at here only after a kernel has found that a sum is not finite.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import FLOAT32, FLOAT64, Array, as_array, first_problem, flat, real, refuse_unless_mask
from ._kernels.tokens import Batch


class Inputs(NamedTuple):
    """The arguments of `grpo_loss`, checked."""

    batch: Batch  # for the kernels: everything flat, of one dtype, not copied where it is that already
    shape: tuple[int, ...]  # that of ``logps`` as given
    place: Array | None  # where the caller wants the gradient, in that shape

    @classmethod
    def of(
        cls,
        logps: ArrayLike,
        old_logps: ArrayLike | None,
        advantages: ArrayLike,
        ref_logps: ArrayLike | None,
        mask: ArrayLike | None,
        cu_seqlens: ArrayLike | None,
        rollout_is_weights: ArrayLike | None,
        loss_weights: ArrayLike | None,
        grad: bool | Array,
    ) -> "Inputs":
        """The inputs of these arguments, which are those of `grpo_loss`; see there for what is raised."""
        array, expected = expected_beside("logps", logps, cu_seqlens)
        advantages_per_token, flat_advantages = expected.per_token_or_sequence("advantages", advantages)
        weights_per_token, weights = loss_weights_per_token, of_both = True, None
        if rollout_is_weights is not None:
            weights_per_token, weights = expected.per_token_or_sequence("rollout_is_weights", rollout_is_weights)
        if loss_weights is not None:
            loss_weights_per_token, of_both = expected.per_token_or_sequence("loss_weights", loss_weights)
        place = _place_for(grad, array.shape, expected.dtype)
        if place is not None and place is grad:
            _refuse_overlap(
                place,
                logps=array,
                old_logps=old_logps,
                advantages=advantages,
                ref_logps=ref_logps,
                mask=mask,
                rollout_is_weights=rollout_is_weights,
                loss_weights=loss_weights,
                cu_seqlens=cu_seqlens,
            )
        batch = Batch(
            logps=expected.per_token("logps", array),
            old_logps=None if old_logps is None else expected.per_token("old_logps", old_logps),
            advantages=flat_advantages,
            ref_logps=None if ref_logps is None else expected.per_token("ref_logps", ref_logps),
            mask=None if mask is None else expected.mask(mask),
            weights=weights,
            loss_weights=of_both,
            grad=None if place is None else _flat_gradient(place),
            bounds=expected.bounds,
            advantages_per_token=advantages_per_token,
            weights_per_token=weights_per_token,
            loss_weights_per_token=loss_weights_per_token,
        )
        return cls(batch, array.shape, place)

    def refuse_advantages_of_tokens(self) -> None:
        """Raise the ValueError unless there is one advantage for each sequence."""
        if self.batch.advantages_per_token and (np.diff(self.batch.bounds) > 1).any():
            sequences = len(self.batch.bounds) - 1
            raise ValueError(
                f"advantages must be one per sequence, {(sequences,)}, with a GMPO, got one per token, {self.shape}"
            )

    def deliver_gradient(self) -> None:
        """Copy the gradient to where the caller wants it, if the kernels could not write it there."""
        if self.place is not None and not self.place.flags.carray:
            self.place[...] = self.batch.grad.reshape(self.shape)


def expected_beside(name: str, value: ArrayLike, cu_seqlens: ArrayLike | None) -> tuple[Array, "Expected"]:
    """The named argument, which says how tokens are laid out and in which dtype to compute, and what follows of it."""
    array = real(name, value)
    if array.ndim not in (1, 2):
        flat_fits = f": {name}.ravel() is (N,)" if array.ndim else ""
        raise ValueError(f"{name} must be (B, T) or (N,), got shape {array.shape}{flat_fits}")
    dtype = array.dtype
    if dtype is not FLOAT64 and dtype is not FLOAT32:
        dtype = FLOAT32 if dtype.newbyteorder("=") in (np.float32, np.float16) else FLOAT64
    return array, Expected(name, array.shape, dtype, bounds_of(array.shape, cu_seqlens, beside=name))


class Expected(NamedTuple):
    """What other arrays must be like."""

    beside: str  # the name of the argument that says it
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # that computes
    bounds: Array

    def per_token(self, name: str, value: Any) -> Array:
        """The flat array of an argument that has one number for each token."""
        if self._is_as_needed(value):
            needed: Array = value.reshape(-1)
            return needed
        array = np.atleast_1d(real(name, value))
        if array.shape != self.shape:
            flat_fits = f": {name}.ravel() has it" if (array.size,) == self.shape else ""
            raise ValueError(f"{name} must have shape {self.shape} as {self.beside}, got {array.shape}{flat_fits}")
        return flat(array, self.dtype)

    def per_token_or_sequence(self, name: str, value: Any) -> tuple[bool, Array]:
        """Whether an argument has one number for each token, else for each sequence; and its flat array."""
        sequences = len(self.bounds) - 1
        if (
            type(value) is np.ndarray
            and value.dtype is self.dtype
            and value.shape == (sequences,)
            and len(self.shape) == 2
            and value.flags.carray
        ):  # as nearly always
            return False, value
        array = value if self._is_as_needed(value) else np.atleast_1d(real(name, value))
        per_token = array.shape == self.shape or (len(self.shape) == 1 and array.shape == (1, *self.shape))
        per_sequence = array.shape in ((sequences,), (sequences, 1))
        if per_token and per_sequence and (np.diff(self.bounds) != 1).any():
            raise ValueError(
                f"{name} must have shape (1, {self.shape[0]}), one per token, or ({sequences}, 1), one per sequence: "
                f"there are as many, and {array.shape} could be either"
            )
        if not per_token and not per_sequence:
            flat_fits = f": {name}.ravel() has one per sequence" if array.size == sequences else ""
            raise ValueError(
                f"{name} must have shape {self.shape} as {self.beside} or {(sequences,)}, one per sequence, "
                f"got {array.shape}{flat_fits}"
            )
        return per_token, flat(array, self.dtype)

    def per_sequence(self, name: str, value: Any) -> Array:
        """The flat array of an argument that has one number for each sequence."""
        array, sequences = np.atleast_1d(real(name, value)), len(self.bounds) - 1
        if array.shape not in ((sequences,), (sequences, 1)):
            raise ValueError(f"{name} must have shape {(sequences,)}, one per sequence, got {array.shape}")
        return flat(array, self.dtype)

    def mask(self, mask: ArrayLike) -> Array:
        """The mask as flat bytes; bools are used in place."""
        array = real("mask", mask)
        if array.shape != self.shape:
            raise ValueError(f"mask must have shape {self.shape} as {self.beside}, got {array.shape}")
        refuse_unless_mask(array, self.shape)
        return flat(array, np.dtype(np.bool_)).view(np.uint8)

    def _is_as_needed(self, value: Any) -> bool:  # as nearly always: the rest would take three times as long
        return (
            type(value) is np.ndarray and value.dtype is self.dtype and value.shape == self.shape and value.flags.carray
        )


def bounds_of(shape: tuple[int, ...], cu_seqlens: ArrayLike | None, *, beside: str = "logps") -> Array:
    """Where sequences begin and end in the flat arrays, int64 (S + 1,), of which one is ``beside`` it in messages."""
    size = math.prod(shape)
    if cu_seqlens is None:
        return _bounds_of_rows(*(shape if len(shape) == 2 else (1, size)))
    bounds = real("cu_seqlens", cu_seqlens)
    if len(shape) != 1 or bounds.ndim != 1 or bounds.size < 1 or bounds.dtype.kind not in "iu":
        raise ValueError(
            f"cu_seqlens must be a one-dimensional array of at least one int, beside {beside} of shape (N,); "
            f"got {bounds.dtype} {bounds.shape} beside {beside} {shape}{_flat_fits(shape, bounds, beside)}"
        )
    if bounds[0] != 0 or bounds[-1] != size:
        cut = f"; without padding at the end: {beside}[:{bounds[-1]}]" if 0 <= bounds[-1] < size else ""
        raise ValueError(
            f"cu_seqlens must go from 0 to {size}, the size of {beside}, got {bounds[0]} to {bounds[-1]}{cut}"
        )
    falling = bounds[1:] < bounds[:-1]
    if falling.any():
        i = int(falling.argmax()) + 1
        raise ValueError(f"cu_seqlens must not fall, got cu_seqlens[{i}] = {bounds[i]} after {bounds[i - 1]}")
    return flat(bounds, np.dtype(np.int64))


def _flat_fits(shape: tuple[int, ...], bounds: Array, beside: str) -> str:
    """The end of a message about packed arrays that have dimensions too many."""
    if shape[:1] == (1,):
        return f": {beside}[0] is"
    if len(shape) == 1 and bounds.ndim > 1:
        return ": cu_seqlens.ravel() is"
    return f": {beside}.ravel() is, and {beside}[mask] without padding" if len(shape) == 2 else ""


@lru_cache(maxsize=16)
def _bounds_of_rows(rows: int, width: int) -> Array:
    """Those of so many sequences of the same width; an array that nobody may write to, as all calls share it.

    (From a cache, since they are mostly those of the call before: a microsecond of some twenty.)
    """
    # NumPy's own choice of integers has 32 bits on Windows before NumPy 2.
    return np.arange(rows + 1, dtype=np.int64) * width


# --- the gradient -----------------------------------------------------------------------------------------------------
def _place_for(grad: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
    """Where the gradient goes: the caller's array, a new one, or nowhere."""
    if grad is False or grad is True or isinstance(grad, np.bool_):
        return np.empty(shape, dtype) if grad else None
    if not isinstance(grad, np.ndarray):
        raise TypeError(f"grad must be False, True or an array to write into, got {grad!r}")
    if grad.shape != shape or grad.dtype != dtype:
        raise ValueError(f"grad must be {dtype} {shape} as logps, got {grad.dtype} {grad.shape}")
    if not grad.flags.writeable:
        raise ValueError("grad must be writeable, got a read-only array")
    return grad


def _flat_gradient(place: Array) -> Array:
    """What the kernels write into: the same memory, if it is C-contiguous and aligned, or new memory."""
    gradient = np.asarray(place) if place.flags.carray else np.empty(place.shape, place.dtype)
    return gradient.reshape(-1)


def _refuse_overlap(grad: Array, **arguments: Any) -> None:
    """Raise the ValueError for the first of the arguments that shares memory with ``grad``, if any."""
    alone = grad.flags.owndata
    for name, values in arguments.items():
        if values is None or isinstance(values, (list, tuple)):
            continue
        if type(values) is np.ndarray:
            array = values
            if alone and values.flags.owndata and values is not grad:  # a third of the time of what follows
                continue
        else:
            array = as_array(name, values)
        if np.may_share_memory(grad, array) and np.shares_memory(grad, array):  # the first is quick, the second exact
            raise ValueError(f"grad must not overlap another argument, got memory of {name}")


# --- what is not finite -----------------------------------------------------------------------------------------------
def refuse_if_not_finite(inputs: Inputs) -> None:
    """Raise the ValueError for the first unmasked token with a number that is not finite, or is not allowed, if any.

    There may be none: sums may overflow, too.
    """
    batch = inputs.batch
    mask = np.ones(1, np.uint8) if batch.mask is None else batch.mask
    per_token = {"logps": batch.logps, "old_logps": batch.old_logps, "ref_logps": batch.ref_logps}
    per_sequence: dict[str, Any] = {}
    (per_token if batch.advantages_per_token else per_sequence)["advantages"] = batch.advantages
    (per_token if batch.weights_per_token else per_sequence)["rollout_is_weights"] = batch.weights
    (per_token if batch.loss_weights_per_token else per_sequence)["loss_weights"] = batch.loss_weights
    named = {name: array for name, array in per_token.items() if array is not None}

    def problems(keep: Any, *arrays: Any) -> Mapping[str, NDArray[np.bool_]]:
        return {
            f"{name} must be {_ALLOWED[name == 'loss_weights']} where it is not masked, "
            f"got {name}[{{i}}] = {{values[{k}]!r}}": _is_wrong(name, x) & (keep != 0)
            for k, (name, x) in enumerate(zip(named, arrays, strict=True), start=1)
        }

    problem = first_problem(problems, [np.broadcast_to(mask, batch.logps.shape), *named.values()], inputs.shape)
    if problem:
        raise ValueError(problem)
    for name, array in per_sequence.items():
        if array is None:
            continue
        for i in np.flatnonzero(_is_wrong(name, array)).tolist():
            first, last = batch.bounds[i : i + 2].tolist()
            if last > first if batch.mask is None else batch.mask[first:last].any():
                allowed = _ALLOWED[name == "loss_weights"]
                raise ValueError(
                    f"{name} must be {allowed} where it is not masked, got {name}[{i}] = {array[i].item()!r}"
                )


#: What an unmasked number may be; and a loss weight.
_ALLOWED = ("finite", "finite and at least 0")


def _is_wrong(name: str, x: Array) -> NDArray[np.bool_]:
    wrong: NDArray[np.bool_] = ~np.isfinite(x)
    return wrong | (x < 0) if name == "loss_weights" else wrong

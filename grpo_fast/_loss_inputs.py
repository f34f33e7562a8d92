"""The arguments of `loss` → the `Batch` of its kernels and a place for the gradient, or an error that says what is bad.

Values are looked at here only after a kernel has found that a sum is not finite.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import FLOAT32, FLOAT64, Array, complaint, flat, real
from ._kernels.tokens import Batch


def batch_of(shape: tuple[int, ...], inputs: Mapping[str, Any], cu_seqlens: ArrayLike | None) -> Batch:
    """The arrays for the kernels: flat, of one dtype, not copied where they are that already."""
    dtype = FLOAT32 if inputs["logps"].dtype.newbyteorder("=") == np.float32 else FLOAT64
    bounds = _bounds(shape, cu_seqlens)
    sequences = (len(bounds) - 1,)

    def each(name: str, *, or_per_sequence: bool = False, optional: bool = True) -> tuple[Any, bool]:
        """The flat array, and whether it holds one number for each token."""
        value = inputs[name]
        if value is None and optional:
            return None, True
        if type(value) is np.ndarray and value.dtype is dtype and value.shape == shape and value.flags.carray:
            return value.reshape(-1), True  # as nearly always: the rest would take three times as long
        array = np.atleast_1d(real(name, value))
        if array.shape == shape or (or_per_sequence and array.shape == sequences):
            return flat(array, dtype), array.shape == shape
        or_else = f" or {sequences}, one per sequence" if or_per_sequence else ""
        raise ValueError(f"{name} must have shape {shape} as logps{or_else}, got {array.shape}")

    advantages, advantages_per_token = each("advantages", or_per_sequence=True, optional=False)
    weights, weights_per_token = each("rollout_is_weights", or_per_sequence=True)
    return Batch(
        logps=each("logps")[0],
        old=each("old_logps")[0],
        advantages=advantages,
        ref=each("ref_logps")[0],
        mask=_mask(shape, inputs["mask"]),
        weights=weights,
        bounds=bounds,
        advantages_per_token=advantages_per_token,
        weights_per_token=weights_per_token,
    )


def _bounds(shape: tuple[int, ...], cu_seqlens: ArrayLike | None) -> Array:
    """Where sequences begin and end in the flat arrays, int64 (S + 1,)."""
    size = math.prod(shape)
    if cu_seqlens is None:
        return np.arange(0, size + 1, shape[-1])
    bounds = real("cu_seqlens", cu_seqlens)
    if len(shape) != 1 or bounds.ndim != 1 or bounds.size < 2 or bounds.dtype.kind not in "iu":
        raise ValueError(
            f"cu_seqlens must be a one-dimensional array of at least two ints, beside logps of shape (N,); "
            f"got {bounds.dtype} {bounds.shape} beside logps {shape}"
        )
    if bounds[0] != 0 or bounds[-1] != size:
        raise ValueError(f"cu_seqlens must go from 0 to {size}, the size of logps, got {bounds[0]} to {bounds[-1]}")
    falling = bounds[1:] < bounds[:-1]
    if falling.any():
        i = int(falling.argmax()) + 1
        raise ValueError(f"cu_seqlens must not fall, got cu_seqlens[{i}] = {bounds[i]} after {bounds[i - 1]}")
    return flat(bounds, np.dtype(np.int64))


def _mask(shape: tuple[int, ...], mask: ArrayLike | None) -> Array | None:
    """The mask as bytes; bools are used in place."""
    if mask is None:
        return None
    array = real("mask", mask)
    if array.shape != shape:
        raise ValueError(f"mask must have shape {shape} as logps, got {array.shape}")
    if array.dtype != np.bool_:
        message = "mask must hold bools or 0/1, got mask[{i}] = {values[0]!r}"
        found = complaint(lambda m: {message: (m != 0) & (m != 1)}, [array.reshape(-1)], shape)
        if found:
            raise ValueError(found)
    return flat(array, np.dtype(np.bool_)).view(np.uint8)


def place_for_gradient(
    grad: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: Mapping[str, Any]
) -> NDArray[Any] | None:
    """Where the gradient goes, or None."""
    if isinstance(grad, (bool, np.bool_)):
        return np.empty(shape, dtype) if grad else None
    if not isinstance(grad, np.ndarray):
        raise TypeError(f"grad must be False, True or an array to write into, got {grad!r}")
    if grad.shape != shape or grad.dtype != dtype:
        raise ValueError(f"grad must be {dtype} {shape} as logps, got {grad.dtype} {grad.shape}")
    if not grad.flags.writeable:
        raise ValueError("grad must be writeable, got a read-only array")
    for name, values in inputs.items():
        if values is None or isinstance(values, (list, tuple)):
            continue
        array = np.asarray(values)
        if np.may_share_memory(grad, array) and np.shares_memory(grad, array):  # the first is quick, the second exact
            raise ValueError(f"grad must not overlap another argument, got memory of {name}")
    return grad


def refuse_if_not_finite(batch: Batch, shape: tuple[int, ...]) -> None:
    """Raise the ValueError for the first unmasked token that is not finite, if any: sums may overflow, too."""
    mask = np.ones(1, np.uint8) if batch.mask is None else batch.mask
    per_token = {"logps": batch.logps, "old_logps": batch.old, "ref_logps": batch.ref}
    per_sequence: dict[str, Any] = {}
    for name, array, each in (
        ("advantages", batch.advantages, batch.advantages_per_token),
        ("rollout_is_weights", batch.weights, batch.weights_per_token),
    ):
        (per_token if each else per_sequence)[name] = array
    named = {name: array for name, array in per_token.items() if array is not None}

    def bad(keep: Any, *arrays: Any) -> Mapping[str, NDArray[np.bool_]]:
        return {
            f"{name} must be finite where it is not masked, got {name}[{{i}}] = {{values[{k}]!r}}": ~np.isfinite(x)
            & (keep != 0)
            for k, (name, x) in enumerate(zip(named, arrays, strict=True), start=1)
        }

    found = complaint(bad, [np.broadcast_to(mask, batch.logps.shape), *named.values()], shape)
    if found:
        raise ValueError(found)
    for name, array in per_sequence.items():
        if array is None:
            continue
        for i in np.flatnonzero(~np.isfinite(array)).tolist():
            if batch.mask is None or batch.mask[batch.bounds[i] : batch.bounds[i + 1]].any():
                raise ValueError(f"{name} must be finite where it is not masked, got {name}[{i}] = {array[i].item()!r}")

"""Rewards → advantages: how much better a completion is than the others of its group (the same prompt)."""

from __future__ import annotations

from typing import Any, Literal, Never, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import as_array, flag, hides_unknown, not_negative, number, one_of, refuse_unknown

Scale: TypeAlias = Literal["group", "batch", "none"]
LARGEST = 1e100  # of a reward; its square, and the sum of as many squares as memory holds, stay inside float64


@hides_unknown
@np.errstate(all="ignore")  # float16 and float32 may not hold the difference of two rewards; tiny ones underflow
def group_advantages(
    rewards: ArrayLike,
    group_size: int | None = None,
    *,
    group_ids: ArrayLike | None = None,
    scale: Scale = "group",
    leave_one_out: bool = False,
    ddof: int = 1,
    eps: float = 1e-4,
    **unknown: Never,
) -> NDArray[np.floating]:
    """Advantages relative to the group: reward minus the group's mean, by default over its standard deviation.

    ::

        A = (r − mean) / (std + eps)     scale="group": GRPO; "batch": mean of the group, std of the whole batch
        A = r − mean                     scale="none": Dr. GRPO
        A = (r − mean)·n/(n − 1)         scale="none", leave_one_out=True: RLOO, r minus the mean of the others

    Statistics are those of r − r₀ in float64, r₀ being the first reward of the group (of the batch, for its std): equal
    rewards give exactly 0, and float32 rewards that differ in their last digits keep what they differ by. A group of
    one gives 0.

    Parameters
    ----------
    rewards : (groups, G), or (N,) with ``group_size`` or ``group_ids``; ints, bools or floats
        r: finite, below 1e100 in magnitude. A row is a group.
    group_size : int, optional
        G: each run of G rewards is a group; divides N. TRL ``num_generations``; verl ``rollout.n``.
    group_ids : (N,) ints or strings, optional
        Equal ids are one group, wherever they stand. verl ``uid``.
    scale : "group", "batch" or "none"
        TRL ``scale_rewards``; verl ``norm_adv_by_std_in_grpo``, True being "group" and False "none".
    leave_one_out : bool
        RLOO; needs ``scale="none"``.
    ddof : 0 or 1
        The variance divides by n − ddof. 1 is ``torch.std``, TRL and verl.
    eps : float, in [0, inf)
        Added to the standard deviation. TRL 1e-4, verl 1e-6.

    Returns
    -------
    array like ``rewards``
        In the dtype of ``rewards``, float64 for ints and bools.

    Raises
    ------
    ValueError, TypeError
        No or several groupings given, shapes that do not fit, a reward that is not a number (with its index), an
        option outside what is allowed.

    References
    ----------
    GRPO (DeepSeekMath), arXiv:2402.03300, section 4.1.2. "none": Dr. GRPO, arXiv:2503.20783. Leave one out:
    arXiv:2402.14740. "batch": arXiv:2508.08221.
    """
    if unknown:
        refuse_unknown(group_advantages, unknown)
    rewards = _checked_rewards(rewards)
    ddof, eps = _checked_options(scale, leave_one_out, ddof, eps)
    group, first = _groups(rewards, group_size, group_ids)

    r = rewards.ravel().astype(np.float64)
    if not r.size:
        return r.astype(_result_dtype(rewards)).reshape(rewards.shape)
    size = np.bincount(group)
    shifted = r - r[first][group]
    centred = shifted - (np.bincount(group, shifted) / size)[group]
    if leave_one_out:
        centred *= (size / np.maximum(size - 1, 1))[group]
    if scale == "group":
        largest = np.zeros(size.size)
        np.maximum.at(largest, group, np.abs(centred))
        unit = _power_of_two_above(largest)
        variance = np.bincount(group, (centred / unit[group]) ** 2) / np.maximum(size - ddof, 1)
        centred = _divide(centred, (unit * np.sqrt(variance))[group] + eps)
    elif scale == "batch":
        from_first = r - r[0]
        unit = _power_of_two_above(np.abs(from_first).max())
        std = unit * np.std(from_first / unit, ddof=ddof) if r.size > ddof else 0.0
        centred = _divide(centred, std + eps)
    return centred.astype(_result_dtype(rewards)).reshape(rewards.shape)


def _result_dtype(rewards: NDArray[np.generic]) -> np.dtype[Any]:
    return rewards.dtype if rewards.dtype.kind == "f" else np.dtype(np.float64)


def _power_of_two_above(x: Any) -> Any:
    """The least power of two above x ≥ 0; 1 for 0. Numbers up to x are divided by it so that no square vanishes."""
    return np.ldexp(1.0, np.frexp(x)[1])


def _divide(a: NDArray[np.float64], b: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """a/b, and 0 where b is 0: equal rewards, eps = 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _groups(
    rewards: NDArray[np.generic], group_size: int | None, group_ids: ArrayLike | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The group of each reward, 0 … groups − 1, and where each group's first reward stands."""
    ways = (rewards.ndim == 2) + (group_size is not None) + (group_ids is not None)
    if ways != 1 or rewards.ndim not in (1, 2):
        flat = ": rewards.ravel() is 1-D" if rewards.ndim > 1 else ""
        raise ValueError(
            "rewards must be 2-D (groups, G), or 1-D with either group_size or group_ids; "
            f"got shape {rewards.shape}, {group_size=}, group_ids {'not ' if group_ids is None else ''}given{flat}"
        )
    if group_ids is not None:
        ids = as_array("group_ids", group_ids, "ints or strings")
        if ids.dtype.kind not in "iubSUTO" and ids.size:
            raise TypeError(f"group_ids must be ints or strings, got {ids.dtype}")
        if ids.shape != rewards.shape:
            raise ValueError(f"group_ids must have the shape of rewards {rewards.shape}, got {ids.shape}")
        try:
            _, first, group = np.unique(ids, return_index=True, return_inverse=True)
        except TypeError as error:  # objects that cannot be sorted
            raise TypeError("group_ids must be all ints or all strings, got a mixture") from error
        return group, first
    size = max(rewards.shape[1], 1) if group_size is None else group_size
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {size!r}")
    if size < 1 or rewards.size % size:
        raise ValueError(f"group_size must be at least 1 and divide the number of rewards {rewards.size}, got {size}")
    return np.arange(rewards.size, dtype=np.intp) // size, np.arange(0, rewards.size, size, dtype=np.intp)


def _checked_rewards(rewards: ArrayLike) -> NDArray[np.generic]:
    """``rewards`` as an array, or a TypeError or ValueError."""
    array = as_array("rewards", rewards)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"rewards must be numbers or bools, got {array.dtype}")
    bad = np.argwhere(~(np.abs(array.astype(np.float64)) < LARGEST))
    if bad.size:
        index = tuple(bad[0].tolist())
        raise ValueError(f"rewards must be finite and below {LARGEST:g}, got {array[index]} at index {index}")
    return array


def _checked_options(scale: str, leave_one_out: bool, ddof: int, eps: float) -> tuple[int, float]:
    """``ddof`` and ``eps``; a TypeError or ValueError if one of the four is not allowed."""
    one_of("scale", scale, ("group", "batch", "none"))
    if flag("leave_one_out", leave_one_out) and scale != "none":
        raise ValueError(f"leave_one_out must be False unless scale='none', got True with {scale!r}")
    return int(number("ddof", ddof, "that is 0 or 1", lambda x: x in (0, 1))), not_negative("eps", eps)

"""Rewards → advantages: how much better a completion is than the others of its group (the same prompt)."""

from __future__ import annotations

from typing import Literal, Never, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import (
    as_array,
    as_given,
    flag,
    float_dtype,
    hides_unknown,
    not_negative,
    number,
    one_of,
    real,
    refuse_unknown,
    refuse_unless_finite,
    unmasked,
)
from ._groups import LARGEST, Groups, checked_rewards, divided, groups_of, std_of_all

Scale: TypeAlias = Literal["group", "batch", "mean", "none"]
Missing: TypeAlias = Literal["raise", "skip"]
_WHITENING = 1e-8  # added to the variance by `whiten`, as verl and OpenRLHF do


@hides_unknown
@np.errstate(all="ignore")  # float16 and float32 may not hold the difference of two rewards; tiny ones underflow
def group_advantages(
    rewards: ArrayLike,
    group_size: int | None = None,
    *,
    group_ids: ArrayLike | None = None,
    scale: Scale = "group",
    leave_one_out: bool = False,
    lengths: ArrayLike | None = None,
    missing: Missing = "raise",
    ddof: int = 1,
    eps: float = 1e-4,
    **unknown: Never,
) -> NDArray[np.floating]:
    """Advantages relative to the group: reward minus the group's mean, by default over its standard deviation.

    ::

        A = (r − mean) / (std + eps)     scale="group": GRPO; "batch": mean of the group, std of the whole batch
        A = (r − mean) / (mean + eps)    scale="mean": MaxRL
        A = r − mean                     scale="none": Dr. GRPO
        A = (r − mean)·n/(n − 1)         scale="none", leave_one_out=True: RLOO, r minus the mean of the others
        A = (r − Σ len·r/Σ len) / …      with ``lengths``: OPO, the mean of the group weighted by length

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
    scale : "group", "batch", "mean" or "none"
        TRL ``scale_rewards``; verl ``norm_adv_by_std_in_grpo``, True being "group" and False "none". "mean" is for
        rewards such as 0 and 1, whose mean is not negative.
    leave_one_out : bool
        Mean, and with ``scale="group"`` standard deviation, of the *other* rewards of the group; in groups of two or
        fewer nothing is divided then. Needs ``scale="none"`` (RLOO) or ``"group"`` (NeMo-RL
        ``use_leave_one_out_baseline``).
    lengths : like ``rewards``, numbers in [0, inf), optional
        Tokens of each completion. They weigh the mean that is subtracted, not the divisor. Where a group has no token,
        its advantages are 0.
    missing : "raise" or "skip"
        Whether a reward that is NaN is an error, or left out of all statistics, with the advantage 0.
    ddof : 0 or 1
        The variance divides by n − ddof. 1 is ``torch.std``, TRL and verl.
    eps : float, in [0, inf)
        Added to the divisor. TRL 1e-4, verl 1e-6. Where divisor and ``eps`` are 0, nothing is divided.

    Returns
    -------
    array, or tensor, like ``rewards``
        In the dtype of ``rewards``, float64 for ints and bools, float32 for bfloat16; a tensor for a tensor.

    Raises
    ------
    ValueError, TypeError
        No or several groupings given, shapes that do not fit, a reward that is not a number (with its index), an
        option outside what is allowed, or with ``scale="mean"`` a group whose mean + eps is not above 0.

    References
    ----------
    GRPO (DeepSeekMath), arXiv:2402.03300, section 4.1.2. "none": Dr. GRPO, arXiv:2503.20783. Leave one out:
    arXiv:2402.14740. "batch": arXiv:2508.08221. "mean": MaxRL, arXiv:2602.02710. ``lengths``: OPO, arXiv:2505.23585.
    """
    if unknown:
        refuse_unknown(group_advantages, unknown)
    one_of("missing", missing, ("raise", "skip"))
    array = checked_rewards(rewards, missing)
    ddof, eps = _checked_options(scale, leave_one_out, lengths, ddof, eps)
    group = groups_of(array.shape, group_size, group_ids)
    tokens = None if lengths is None else _checked_lengths(lengths, array.shape)

    all_rewards = array.ravel().astype(np.float64)
    present = ~np.isnan(all_rewards)
    r = all_rewards[present]
    result = np.zeros(array.size)
    if r.size:
        groups = Groups(r, group[present])
        centred = groups.centred
        if tokens is not None:
            shift = groups.weighted_shift(tokens[present])[groups.of]
            centred = np.where(np.isnan(shift), 0, groups.shifted - shift)
        if leave_one_out:
            centred = centred * (groups.size / np.maximum(groups.size - 1, 1))[groups.of]
        if scale == "group":
            if leave_one_out:
                divisor = np.where(groups.size[groups.of] > 2, groups.std_of_others(ddof) + eps, 1.0)
            else:
                divisor = groups.std(ddof)[groups.of] + eps
            centred = divided(centred, divisor)
        elif scale == "batch":
            centred = divided(centred, std_of_all(r, ddof) + eps)
        elif scale == "mean":
            _refuse_unless_positive(groups, eps, np.flatnonzero(present), array.shape)
            centred = divided(centred, groups.mean[groups.of] + eps)
        result[present] = centred
    return as_given(rewards, result.astype(float_dtype(array)).reshape(array.shape))


@np.errstate(all="ignore")
def gdpo_advantages(
    rewards: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    group_size: int | None = None,
    group_ids: ArrayLike | None = None,
    eps: float = 1e-4,
) -> NDArray[np.floating]:
    """Advantages of several rewards, each normalised within its group before they are summed (GDPO).

    ::

        A_k = (r_k − mean_k) / (std_k + eps)     over the group, as `group_advantages` with ddof=1; 0 where r_k is NaN
        x   = Σ_k weights_k·A_k
        A   = (x − mean) / (std + eps)           over all responses, ddof=1

    so that a reward with little spread, or one of another size, is not drowned by the others.

    Parameters
    ----------
    rewards : (N, K)
        K rewards of each of N responses, below 1e100 in magnitude. NaN is a missing one: it is left out of mean and
        standard deviation, and counts 0 in the sum. A response of which all are missing is left out of the last line,
        and its advantage is 0.
    weights : (K,), optional
        Of each reward, below 1e100 in magnitude; 1 unless given. TRL ``reward_weights``.
    group_size : int, optional
        Each run of so many responses is a group; divides N.
    group_ids : (N,) ints or strings, optional
        Equal ids are one group, wherever they stand; either these or ``group_size``.
    eps : float, in [0, inf)
        Added to the standard deviations; where both are 0, nothing is divided.

    Returns
    -------
    (N,) array, or tensor if ``rewards`` is one
        In the dtype of ``rewards``, float64 for ints and bools.

    Raises
    ------
    ValueError, TypeError
        As `group_advantages`; or ``weights`` are not K finite numbers below 1e100 in magnitude.

    References
    ----------
    GDPO, arXiv:2601.05242. TRL ``multi_objective_aggregation="normalize_then_sum"``.
    """
    array = checked_rewards(rewards, "skip")
    if array.ndim != 2:
        raise ValueError(f"rewards must be (N, K), K rewards of each response, got shape {array.shape}")
    eps = not_negative("eps", eps)
    n, kinds = array.shape
    factors = np.ones(kinds)
    if weights is not None:
        factors = real("weights", weights).astype(np.float64)
        if factors.shape != (kinds,) or not (np.abs(factors) < LARGEST).all():
            raise ValueError(
                f"weights must be {kinds} finite numbers below {LARGEST:g} in magnitude, one for each reward, "
                f"got {weights!r}"
            )
    group = groups_of((n,), group_size, group_ids, may_be_rows=False)

    all_rewards = array.astype(np.float64)
    total = np.zeros(n)
    for k in range(kinds):
        present = ~np.isnan(all_rewards[:, k])
        if present.any():
            groups = Groups(all_rewards[present, k], group[present])
            total[present] += factors[k] * divided(groups.centred, groups.std(1)[groups.of] + eps)
    scored = ~np.isnan(all_rewards).all(axis=1)
    result = np.zeros(n)
    if scored.any():
        x = total[scored]
        result[scored] = divided(x - x[0] - np.mean(x - x[0]), std_of_all(x, 1) + eps)
    return as_given(rewards, result.astype(float_dtype(array)))


@np.errstate(all="ignore")
def whiten(advantages: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.floating]:
    """The advantages of all tokens with mean 0 and variance 1 over the unmasked ones; 0 where masked.

    ::

        (A − mean) / √(var + 1e-8)      var divides by the number of tokens less one

    Parameters
    ----------
    advantages : array of any shape
        One per token, finite and below 1e100 in magnitude where not masked. (`group_advantages` gives one per
        completion: spread them over the tokens first, since here a long completion counts more than a short one.)
    mask : like ``advantages``, bools or 0/1, optional
        Which tokens count; what is elsewhere is never looked at.

    Returns
    -------
    array, or tensor, like ``advantages``
        In its dtype, float64 for ints and bools. Fewer than two unmasked tokens give 0.

    Raises
    ------
    ValueError, TypeError
        A mask of another shape, or an unmasked number that is not finite or not below 1e100 in magnitude (with its
        index).

    References
    ----------
    REINFORCE++-baseline, arXiv:2501.03262; verl ``masked_whiten``.
    """
    array = real("advantages", advantages)
    keep = unmasked("advantages", array, mask)
    refuse_unless_finite("advantages", array, keep, below=LARGEST)
    result = np.zeros(array.shape)
    if np.count_nonzero(keep) > 1:
        x = array[keep].astype(np.float64)
        x = x - x[0]
        x = x - np.mean(x)
        result[keep] = x / np.sqrt(np.sum(x * x) / (x.size - 1) + _WHITENING)
    return as_given(advantages, result.astype(float_dtype(array)))


def _checked_options(
    scale: str, leave_one_out: bool, lengths: ArrayLike | None, ddof: int, eps: float
) -> tuple[int, float]:
    """``ddof`` and ``eps``; a TypeError or ValueError if an option is not allowed, or does not go with another."""
    one_of("scale", scale, ("group", "batch", "mean", "none"))
    if flag("leave_one_out", leave_one_out) and scale not in ("none", "group"):
        raise ValueError(f"leave_one_out must be False unless scale='none' or 'group', got True with {scale!r}")
    if leave_one_out and lengths is not None:
        raise ValueError("leave_one_out must be False with lengths, which make another baseline, got True")
    return int(number("ddof", ddof, "that is 0 or 1", lambda x: x in (0, 1))), not_negative("eps", eps)


def _checked_lengths(lengths: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The lengths, flat, or a TypeError or ValueError."""
    array = as_array("lengths", lengths)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"lengths must be numbers of tokens, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"lengths must have the shape of rewards {shape}, got {array.shape}")
    bad = np.argwhere(~((array >= 0) & (array < np.inf)))
    if bad.size:
        index = tuple(bad[0].tolist())
        raise ValueError(f"lengths must be in [0, inf), got {array[index]} at index {index}")
    return array.ravel().astype(np.float64)


def _refuse_unless_positive(groups: Groups, eps: float, places: NDArray[np.intp], shape: tuple[int, ...]) -> None:
    """Raise the ValueError for the first group whose mean + eps is not above 0, if any."""
    bad = ~(groups.mean[groups.of] + eps > 0)
    if bad.any():
        first = int(bad.argmax())
        index = tuple(int(i) for i in np.unravel_index(places[first], shape))
        raise ValueError(
            "rewards must have a mean + eps above 0 in each group with scale='mean', got "
            f"{groups.mean[groups.of[first]]} + {eps} in the group of index {index}"
        )

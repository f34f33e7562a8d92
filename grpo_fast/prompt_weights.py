"""Prompts → loss weights: of each sequence what makes the loss a mean over prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import as_given, counts_of, positive, real, refuse_unless_mask
from ._groups import groups_of
from ._loss_inputs import bounds_of


def prompt_mean_weights(
    mask: ArrayLike | None = None,
    group_size: int | None = None,
    *,
    group_ids: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    prompts: float | None = None,
) -> NDArray[np.float64]:
    """The ``loss_weights`` of `grpo_loss` with which ``aggregation="token-sum"`` is a mean over prompts.

    ::

        u = 1/(P·Σn)      P prompts, Σn the unmasked tokens of all completions of the sequence's prompt

    So each prompt counts alike, and within it each token: a mean over prompts of means over tokens.

    Parameters
    ----------
    mask : (B, T), or (N,) with ``cu_seqlens``, bools or 0/1; or None with ``cu_seqlens``
        Which tokens count.
    group_size : int, optional
        Each run of so many sequences has one prompt; divides their number. TRL ``num_generations``.
    group_ids : (B,) or (S,) ints or strings, optional
        Equal ids are one prompt, wherever they stand. verl ``uid``.
    cu_seqlens : (S + 1,) ints, optional
        Where packed sequences begin and end.
    prompts : float, in (0, inf), optional
        P, of all micro-batches and ranks, where the loss is added up over them; those that are here unless given. A
        prompt must be here with all its completions.

    Returns
    -------
    (B,) or (S,) float64 array, or tensor if that is what was given
        0 for the sequences of a prompt without an unmasked token, which counts in P.

    Raises
    ------
    TypeError, ValueError
        Neither ``mask`` nor ``cu_seqlens`` is given, or not exactly one grouping; shapes do not fit; an argument is
        outside what is allowed.

    References
    ----------
    "Prompt-level averaging" of ScaleRL, arXiv:2510.13786, section 3.2.

    Examples
    --------
    >>> from grpo_fast import prompt_mean_weights
    >>> prompt_mean_weights([[1, 0, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]], 2)
    array([0.125, 0.125, 0.25 , 0.25 ])
    """
    tokens = _tokens_of_each(mask, cu_seqlens)
    group = groups_of(tokens.shape, group_size, group_ids, may_be_rows=False, of="sequences")
    of_group = np.bincount(group, tokens).astype(np.float64)  # of nothing NumPy counts in int64
    count = float(of_group.size) if prompts is None else positive("prompts", prompts)
    weights = np.divide(1.0, count * of_group, out=np.zeros_like(of_group), where=of_group > 0)
    return as_given(cu_seqlens if mask is None else mask, weights[group])


def _tokens_of_each(mask: ArrayLike | None, cu_seqlens: ArrayLike | None) -> NDArray[np.int64]:
    """How many unmasked tokens each sequence has."""
    if mask is None:
        if cu_seqlens is None:
            raise ValueError("mask must be given, or else cu_seqlens, got neither")
        bounds = real("cu_seqlens", cu_seqlens)
        size = int(bounds[-1]) if bounds.ndim == 1 and bounds.size and bounds.dtype.kind in "iu" else 0
        return np.diff(bounds_of((size,), cu_seqlens, beside="mask"))
    array = real("mask", mask)
    if array.ndim not in (1, 2):
        raise ValueError(f"mask must be (B, T), or (N,) with cu_seqlens, got shape {array.shape}")
    refuse_unless_mask(array, array.shape)
    bounds = bounds_of(array.shape, cu_seqlens, beside="mask")
    return counts_of(array.reshape(-1) != 0, bounds)

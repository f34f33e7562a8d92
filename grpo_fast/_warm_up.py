"""Compiling beforehand, for images, CI and impatient people: `warm_up` calls what would compile, on next to no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ._checks import flag, one_of
from ._kernels.threads import WORTH_SHARING
from .loss import grpo_loss
from .objective import grpo_objective, grpo_stats, grpo_sweep
from .rollout import rollout_correction
from .rollout_terms import Reject, WeightLevel
from .terms import (
    CISPO,
    DEFAULT_SURROGATE,
    GMPO,
    K3,
    KL,
    LEVELS,
    SAPO,
    TV,
    VESPO,
    Band,
    BinaryKL,
    Clip,
    Level,
    Surrogate,
    TrustRegion,
    Unclipped,
)

DType: TypeAlias = Literal["float64", "float32"]
DTYPES: tuple[DType, ...] = get_args(DType)

#: Which arrays calls have unless told otherwise.
ARRAYS = {"old_logps": True, "mask": True, "rollout_is_weights": False, "loss_weights": False}
#: The calls of the guide's table of papers, as arguments of `warm_up`: one of each kind, since what is compiled depends
#: on the classes of the options and on which arrays there are, not on numbers.
PAPERS: dict[str, dict[str, Any]] = {
    "GRPO": {"kl": K3(0.04, importance_weighted=False)},
    "DeepSeek-V3.2": {"kl": K3(0.04)},
    "DAPO, Dr. GRPO, two-sided clip": {"surrogate": Clip(0.2, 0.28)},
    "CISPO": {"surrogate": CISPO()},
    "SAPO": {"surrogate": SAPO()},
    "DPPO": {"surrogate": Unclipped(), "trust_region": TV(0.2)},
    "DPPO, by KL": {"surrogate": Unclipped(), "trust_region": BinaryKL(0.05)},
    "GLM-5": {"surrogate": CISPO(float("inf")), "trust_region": Band(0.5, 2.0)},
    "on-policy distillation": {"surrogate": Unclipped()},
    "GSPO, LUSPO": {"importance_sampling_level": "sequence"},
    "GSPO-token": {"importance_sampling_level": "sequence_token"},
    "VESPO": {"surrogate": VESPO(), "importance_sampling_level": "sequence"},
    "GMPO": {"surrogate": GMPO(), "importance_sampling_level": "sequence"},
    "RLOO, on-policy": {"old_logps": False},
    "truncated importance sampling": {"rollout_is_weights": True},
    "ScaleRL": {"surrogate": CISPO(), "loss_weights": True},
}


def warm_up(
    *,
    surrogate: Surrogate | None = None,
    kl: KL | None = None,
    importance_sampling_level: Level | None = None,
    trust_region: TrustRegion | None = None,
    old_logps: bool = True,
    mask: bool = True,
    rollout_is_weights: bool = False,
    loss_weights: bool = False,
    grad: bool | None = None,
    dtype: DType | None = None,
) -> None:
    """Compile what `grpo_loss` with these options needs, for small and for large batches, so that no later call waits.

    Where all options but ``grad`` and ``dtype`` are as they are unless given: for every call of the guide's table of
    papers, for `grpo_objective`, `grpo_stats` and `grpo_sweep`, and for `rollout_correction`, which takes minutes. What
    was compiled before is only loaded. It is kept on disk for all processes of this user (in ``NUMBA_CACHE_DIR``, if
    that is set, as for an image), on this kind of CPU. `evaluate`, `sweep` and `grpo_fast.torch.grpo_loss` need the
    same. What only several threads need is compiled where there are several (`numba.get_num_threads`): on one, a
    process that has more of them will still wait for it.

    Parameters
    ----------
    surrogate, kl, importance_sampling_level, trust_region
        As in `grpo_loss`. Only their classes matter, and how the KL term is weighted and differentiated, not their
        numbers. "sequence" and "sequence_token" are one.
    old_logps, mask, rollout_is_weights, loss_weights : bool
        Whether calls will have that array.
    grad : bool, or None
        Whether they will ask for the gradient; None for both.
    dtype : "float64" or "float32", or None
        In which they will compute; None for both.

    Raises
    ------
    TypeError, ValueError
        An option is not one that `grpo_loss` takes, a word is none of those allowed, or a flag not a bool.
    """
    options: dict[str, Any] = {"surrogate": surrogate, "kl": kl, "trust_region": trust_region}
    options["importance_sampling_level"] = importance_sampling_level
    given = {name: value for name, value in options.items() if value is not None}
    arrays: dict[str, bool] = {"old_logps": old_logps, "mask": mask, "rollout_is_weights": rollout_is_weights}
    arrays["loss_weights"] = loss_weights
    for name, value in arrays.items():
        flag(name, value)
    grads = (True, False) if grad is None else (flag("grad", grad),)
    dtypes = DTYPES if dtype is None else (one_of("dtype", dtype, DTYPES),)
    for _, call in steps(calls_with(given, arrays), grads, dtypes):
        call()


def calls_with(options: dict[str, Any], arrays: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """The call of `grpo_loss` with these options and arrays, by its name; where none is given, all `PAPERS`."""
    return {"grpo_loss": options | arrays} if options or arrays != ARRAYS else PAPERS


def steps(
    calls: dict[str, dict[str, Any]], grads: Iterable[bool], dtypes: Iterable[DType]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the name of each of the ``calls``, and what compiles it; of all `PAPERS`, the other functions, too."""
    for dtype, (name, options) in product(dtypes, calls.items()):
        yield f"{name}, {dtype}", partial(_compile_loss, tuple(grads), dtype, **options)
    if calls is PAPERS:
        for dtype in dtypes:
            yield f"from probabilities, {dtype}", partial(_compile_objective, dtype)
            yield f"rollout_correction, {dtype}", partial(_compile_rollout_correction, dtype)


def _compile_loss(
    grads: Iterable[bool],
    dtype: DType,
    *,
    surrogate: Surrogate = DEFAULT_SURROGATE,
    kl: KL | None = None,
    importance_sampling_level: Level = "token",
    trust_region: TrustRegion | None = None,
    old_logps: bool = True,
    mask: bool = True,
    rollout_is_weights: bool = False,
    loss_weights: bool = False,
) -> None:
    """Call `grpo_loss` on a few tokens; on many, which are shared out; and on a sequence that is shared out itself."""
    level: Any = one_of("importance_sampling_level", importance_sampling_level, LEVELS)
    for grad, lengths in product(grads, ([2, 1], [WORTH_SHARING // 4] * 2, [WORTH_SHARING + 1, 1])):
        tokens, rows = sum(lengths), len(lengths)
        logps = np.full(tokens, -1.0, dtype)
        grpo_loss(
            logps,
            logps if old_logps else None,
            np.ones((rows, 1)),
            None if kl is None else logps,
            mask=np.ones(tokens, np.bool_) if mask else None,
            cu_seqlens=np.append(0, np.cumsum(lengths)),
            surrogate=surrogate,
            kl=kl,
            importance_sampling_level=level,
            trust_region=trust_region,
            rollout_is_weights=np.ones((rows, 1)) if rollout_is_weights else None,
            loss_weights=np.ones((rows, 1)) if loss_weights else None,
            grad=grad,
        )


def _compile_objective(dtype: DType) -> None:
    """Call the three functions of probabilities, with both KL terms, on few samples, on more, and on many."""
    for samples, importance_weighted in product((1, WORTH_SHARING // 2, WORTH_SHARING), (True, False)):
        x = np.full(samples, 0.5, dtype)
        grpo_objective(x, x, x, x, importance_weighted=importance_weighted)
        grpo_stats(x, x, x, x, importance_weighted=importance_weighted)
        grpo_sweep(x, x, x, x, 0.2, 0.01, importance_weighted=importance_weighted)


def _compile_rollout_correction(dtype: DType) -> None:
    """Call `rollout_correction` with weights of tokens and of sequences, and rejections of neither and of either."""
    rejects = (), Reject("ratio", "geometric", 0.5), Reject("ratio", "token", 0.5)
    levels: tuple[WeightLevel, ...] = "token", "sequence"
    for shape, masked in product(((2, 1), (2, WORTH_SHARING // 4), (1, WORTH_SHARING + 1)), (True, False)):
        x = np.full(shape, -1.0, dtype)
        for level, reject in product(levels, rejects):
            mask = np.ones(shape, np.bool_) if masked else None
            rollout_correction(x, x, mask=mask, level=level, reject=reject, normalize=True)

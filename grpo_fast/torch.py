"""`grpo_loss` for PyTorch, which autograd and torch.compile know; `rollout_correction` and two masks, of tensors.

First the loss, and what it is when it is called, an `autograd.Function`; then what it is in a graph, an operator,
of which a schema takes tensors, strings and numbers; last, what goes in and out of that: options as a kind and its
numbers, `Stats` as bytes. (Tensors as arrays are in `_tensors`, trainer and sampler in `_torch_rollout`.) One file,
though a long one: function and operator are the same thing twice, and are read side by side.
"""

import pickle
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import numpy as np

from ._checks import hides_unknown, not_negative, refuse_unknown
from .loss import LossResult
from .loss import grpo_loss as loss_of_arrays
from .stats import Stats
from .terms import DEFAULT_SURROGATE, K1, K2, K3, KL, KL_GRADIENTS, Aggregation, Level, Options, Surrogate, TrustRegion

try:
    import torch
except ImportError as error:
    raise ImportError("grpo_fast.torch needs PyTorch: pip install 'grpo_fast[torch]'") from error

from ._tensors import CAN_BE_SAID, HALVES, Tensor, array, constant, refuse_unless_plain
from ._torch_rollout import RolloutCorrection, high_entropy_mask, off_policy_sequence_mask, rollout_correction

__all__ = [
    "LossOptions",
    "RolloutCorrection",
    "Tensor",
    "grpo_loss",
    "high_entropy_mask",
    "off_policy_sequence_mask",
    "rollout_correction",
]


class LossOptions(TypedDict, total=False):
    """The keywords of `grpo_loss` but for ``return_stats``, which decides what it returns; for who checks types."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    surrogate: Surrogate
    kl: KL | None
    importance_sampling_level: Level
    rollout_is_weights: Tensor | None
    loss_weights: Tensor | None
    aggregation: Aggregation
    normalizer: float | Tensor | None
    trust_region: TrustRegion | None


@overload
def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, Stats]: ...


@overload
def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Stats]: ...


@hides_unknown
def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    surrogate: Surrogate = DEFAULT_SURROGATE,
    kl: KL | None = None,
    importance_sampling_level: Level = "token",
    rollout_is_weights: Tensor | None = None,
    loss_weights: Tensor | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
    trust_region: TrustRegion | None = None,
    return_stats: bool = False,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Stats]:
    """The loss of `grpo_fast.grpo_loss` as a scalar tensor to call ``backward()`` on; with the `Stats`, if asked for.

    Without a ``kl`` there is no KL term: ``ref_logps`` may be given and is ignored. The gradient ∂loss/∂logps is
    computed in the forward pass, if ``logps`` requires one and gradients are enabled; it is all that is kept for the
    backward pass. The options, shapes and formulas are those of `grpo_fast.grpo_loss`.

    Parameters
    ----------
    logps : tensor (B, T) padded, (N,) packed with ``cu_seqlens``, or (N,) alone
        log π_θ of each token, on the CPU. float32 and float64 compute in their own dtype; bfloat16 and float16 as
        ``logps.float()``, with the gradient back in theirs.
    old_logps, advantages, ref_logps, mask, cu_seqlens, rollout_is_weights, loss_weights : tensors, on the CPU
        As in `grpo_fast.grpo_loss`, of any real dtype. They are taken as constants, whether they require a gradient or
        not.
    surrogate, kl, importance_sampling_level, aggregation, trust_region
        As in `grpo_fast.grpo_loss`.
    normalizer : float, or tensor of one number, or None
        As in `grpo_fast.grpo_loss`. Under `torch.compile` a float is part of what is compiled: one that is another at
        each step should be a tensor.
    return_stats : bool
        Whether to return the diagnostics, too.

    Returns
    -------
    loss : scalar tensor
        Of the dtype that computes: float32 for bfloat16 and float16 too, whose 8 or 11 bits say little about a loss.
    stats : Stats
        With ``return_stats=True``. Python numbers cannot be part of a graph: `torch.compile` breaks it there, and with
        ``fullgraph=True`` refuses.

    Raises
    ------
    TypeError, ValueError
        As `grpo_fast.grpo_loss`, and: an argument is not a tensor, not dense, not on the CPU, or not of a dtype named
        above.
    RuntimeError
        The gradient is to be differentiated once more: it is known here as numbers, not as a function of ``logps``. Or
        it is to be had by `torch.func` or in forward mode, which need such a function, too.

    Notes
    -----
    Not copied: contiguous tensors of the dtype that computes, masks of bools, int64 ``cu_seqlens``. If the gradient
    that comes to the loss is 1, as from ``loss.backward()``, the one computed in the forward pass is handed on as it
    is. Otherwise, as from ``(loss / steps).backward()``, a scaled one is made beside it; a ``normalizer`` that counts
    the steps spares that.
    """
    if unknown:
        refuse_unknown(grpo_loss, unknown)
    if not torch.compiler.is_compiling():
        _refuse_transforms(logps)
    refuse_unless_plain("logps", logps)
    if logps.dtype in HALVES:
        logps = logps.float()
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logps must be float32, float64, bfloat16 or float16, got {logps.dtype}")
    denominator: Any = normalizer
    if torch.is_tensor(normalizer):
        denominator = constant("normalizer", normalizer)
        if denominator.numel() != 1:
            raise ValueError(f"normalizer must be one number, got shape {tuple(denominator.shape)}")
    constants = (
        constant("old_logps", old_logps),
        constant("advantages", advantages, optional=False),
        constant("ref_logps", None if kl is None else ref_logps),
        constant("mask", mask),
        constant("cu_seqlens", cu_seqlens),
        constant("rollout_is_weights", rollout_is_weights),
        constant("loss_weights", loss_weights),
    )
    grad = logps.requires_grad and torch.is_grad_enabled()
    if _is_traced(logps):
        # Refuses bad ones before they become text.
        Options(surrogate, kl, importance_sampling_level, aggregation, None, trust_region)
        if denominator is not None and not torch.is_tensor(denominator):
            denominator = torch.tensor(not_negative("normalizer", denominator), dtype=torch.float64, device="cpu")
        terms = [x for option in (surrogate, kl, trust_region) for x in _kind_and_numbers(option)]
        loss, _, stats = _operator(
            logps, *constants, denominator, *terms, importance_sampling_level, aggregation, grad, bool(return_stats)
        )
        return (loss, _stats_of(stats)) if return_stats else loss
    result = _result(
        logps, constants, denominator, surrogate, kl, trust_region, importance_sampling_level, aggregation, grad
    )
    # By way of NumPy, a scalar is made in a fifth of the time, and on the CPU, whatever PyTorch's default device is.
    loss = torch.from_numpy(np.asarray(result.loss, np.float64 if logps.dtype is torch.float64 else np.float32))
    if result.grad is not None:
        loss = _Known.apply(logps, loss, torch.from_numpy(result.grad))
    return (loss, result.stats) if return_stats else loss


def _result(
    logps: Tensor,
    constants: tuple[Tensor | None, ...],
    normalizer: Any,
    surrogate: Surrogate,
    kl: KL | None,
    trust_region: TrustRegion | None,
    importance_sampling_level: Level,
    aggregation: Aggregation,
    grad: bool,
) -> LossResult:
    """The `LossResult` of tensors; ``constants`` are those of `_operator`, in its order."""
    old_logps, advantages, ref_logps, mask, cu_seqlens, rollout_is_weights, loss_weights = map(array, constants)
    return loss_of_arrays(
        array(logps),
        old_logps,
        advantages,
        ref_logps,
        mask=mask,
        cu_seqlens=cu_seqlens,
        surrogate=surrogate,
        kl=kl,
        importance_sampling_level=importance_sampling_level,
        rollout_is_weights=rollout_is_weights,
        loss_weights=loss_weights,
        aggregation=aggregation,
        trust_region=trust_region,
        normalizer=normalizer.item() if torch.is_tensor(normalizer) else normalizer,
        grad=grad,
    )


# --- when it is called ------------------------------------------------------------------------------------------------
class _Known(torch.autograd.Function):  # type: ignore[misc]  # torch is not looked at
    """A loss whose gradient was computed with it: half the time of the operator, which is for graphs."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, None, None]:
        return _gradient(ctx, by), None, None


def _gradient(ctx: Any, by: Tensor) -> Tensor:
    """∂loss/∂logps times what comes to the loss."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "grpo_loss can be differentiated once: its gradient is known as numbers, not as a function of logps; "
            "differentiate it without create_graph=True"
        )
    gradient: Tensor
    (gradient,) = ctx.saved_tensors
    # One pass less over memory, and half of it. While a graph is traced a tensor holds no number to ask for; then it is
    # of another class.
    if type(by) is Tensor and by.item() == 1:
        return gradient
    return gradient * by


def _is_traced(logps: Tensor) -> bool:
    """Whether a graph is made of this call, and not a loss."""
    modes = getattr(torch._C, "_len_torch_dispatch_stack", int)
    return torch.compiler.is_compiling() or type(logps) not in (Tensor, torch.nn.Parameter) or modes() > 0


# --- when a graph is made of it: the operator ----------------------------------------------------------------------
@torch.library.custom_op("grpo_fast::grpo_loss", mutates_args=())
def _operator(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    rollout_is_weights: Tensor | None,
    loss_weights: Tensor | None,
    normalizer: Tensor | None,
    surrogate: str,
    surrogate_numbers: list[float],
    kl: str,
    kl_numbers: list[float],
    trust_region: str,
    trust_region_numbers: list[float],
    importance_sampling_level: str,
    aggregation: str,
    grad: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, ∂loss/∂logps, and the `Stats` as bytes; the last two empty if not wanted."""
    level: Any = importance_sampling_level
    how: Any = aggregation
    constants = old_logps, advantages, ref_logps, mask, cu_seqlens, rollout_is_weights, loss_weights
    options = (surrogate, surrogate_numbers), (kl, kl_numbers), (trust_region, trust_region_numbers)
    chosen, penalty, region = (_option(*option) for option in options)
    result = _result(logps, constants, normalizer, chosen, penalty, region, level, how, grad)
    return (
        torch.tensor(result.loss, dtype=logps.dtype, device="cpu"),
        logps.new_empty(0) if result.grad is None else torch.from_numpy(result.grad),
        _bytes_of(result.stats) if return_stats else torch.empty(0, dtype=torch.uint8, device="cpu"),
    )


@_operator.register_fake
def _(logps: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of what `_operator` returns."""
    grad, return_stats = arguments[-2:]
    size = torch.library.get_ctx().new_dynamic_size() if return_stats else 0
    return (
        logps.new_empty(()),
        logps.new_empty(logps.shape if grad else 0),
        logps.new_empty(size, dtype=torch.uint8),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gradient, stats = output
    ctx.set_materialize_grads(False)  # else each backward pass makes zeros, as many as tokens, for `gradient`'s own
    ctx.mark_non_differentiable(gradient, stats)
    ctx.save_for_backward(gradient)
    ctx.others = (None,) * (len(inputs) - 1)


def _backward(ctx: Any, by: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return None if by is None else _gradient(ctx, by), *ctx.others


_operator.register_autograd(_backward, setup_context=_setup_context)


# --- what goes in and comes out ---------------------------------------------------------------------------------------
_OPTIONS: dict[str, Callable[..., Any]] = {
    option.__name__: option for kind in (Surrogate, KL, TrustRegion) for option in get_args(kind)
}


def _refuse_transforms(logps: Any) -> None:
    """Raise the RuntimeError where a transform wants what is not known: otherwise it would be refused, or be 0."""
    interpreters = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", lambda: None)() or ()
    transforms = [str(interpreter.key()).rpartition(".")[2] for interpreter in interpreters]
    forward_mode = torch.autograd.forward_ad
    tangent = None
    if getattr(forward_mode, "_current_level", -1) >= 0 and torch.is_tensor(logps):
        tangent = forward_mode.unpack_dual(logps).tangent
    if "Grad" in transforms or "Jvp" in transforms or tangent is not None:
        raise RuntimeError(
            "grpo_loss has a gradient for loss.backward() and torch.autograd.grad alone: its derivatives by torch.func "
            "(grad, vjp, jacrev, jvp, …) and in forward mode are not known; take torch.autograd.grad(loss, logps)"
        )
    if "Vmap" in transforms:
        raise RuntimeError("grpo_loss is of one batch, and not known to torch.vmap: loop over them, or join them")


#: The words among the fields of options; in the schema of an operator, the number of their place here.
_WORDS = ("sequence", *KL_GRADIENTS)


def _kind_and_numbers(option: Any) -> tuple[str, list[float]]:
    """The name of an option's class and its fields as floats, which the schema of an operator can take."""
    if option is None:
        return "", []
    # A word is below 0, where no field is.
    return type(option).__name__, [-1.0 - _WORDS.index(x) if isinstance(x, str) else float(x) for x in option]


def _option(kind: str, numbers: list[float]) -> Any:
    """The option of which `_kind_and_numbers` made these."""
    if not kind:
        return None
    fields: list[Any] = [_WORDS[int(-1 - x)] if x < 0 else x for x in numbers]
    make = _OPTIONS[kind]
    if make in (K1, K2, K3) and not isinstance(fields[1], str):
        fields[1] = bool(fields[1])
    return make(*fields)


def _bytes_of(stats: Stats) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(stats)), dtype=torch.uint8)


#: What `torch.compile` says where a graph must end; if that can be said.
_REASON = (
    "grpo_loss(…, return_stats=True) returns Python numbers, which no graph can hold: leave return_stats out, or "
    "compile without fullgraph=True"
)


@torch.compiler.disable(**({"reason": _REASON} if CAN_BE_SAID else {}))
def _stats_of(pickled: Tensor) -> Stats:
    """The `Stats` of which `_bytes_of` made these."""
    stats: Stats = pickle.loads(pickled.numpy(force=True).tobytes())
    return stats

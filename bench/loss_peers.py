"""The loss and its gradient by everything that a user would pick instead of grpo_loss, and whether they are right.

All compute one loss: Clip(0.2) and K3(0.04) without importance weights, the mean over sequences of the mean over their
tokens. First grpo_loss and NumPy, then the compilers, then torch and the losses of TRL and Liger-Kernel, which are
called as they are; last, `PEERS`, the list. Each entry makes, if what it needs is
installed, a function that takes a batch, a level and whether the gradient is wanted, and gives a call without arguments
that returns both: what the arrays must be converted to is not timed.

TRL's loss also logs (clip ratios, KL, entropy), as grpo_loss also gives its diagnostics; the others do not.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import numba
import numpy as np
from batches import Batch
from compiled_torch import compiled_or_missing
from numpy.typing import NDArray

import grpo_fast
from grpo_fast import K3, Clip

EPSILON, BETA = 0.2, 0.04
LEVELS = ("token", "sequence")

Found: TypeAlias = tuple[float, NDArray[Any] | None]  # the loss and, if wanted, ∂loss/∂logps
Bind: TypeAlias = Callable[[Batch, str, bool], Callable[[], Found]]


# --- grpo_fast --------------------------------------------------------------------------------------------------------
def fast(batch: Batch, level: str, grad: bool | NDArray[Any]) -> Found:
    """``grpo_loss``; ``grad`` may also be an array to write into."""
    result = grpo_fast.grpo_loss(
        batch.logps,
        batch.old_logps,
        batch.advantages,
        batch.ref_logps,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        surrogate=Clip(EPSILON),
        kl=K3(BETA, importance_weighted=False),
        importance_sampling_level=level,
        grad=grad,
    )
    return result.loss, result.grad


def _fast() -> Bind:
    return lambda *case: partial(fast, *case)


def _fast_in_place() -> Bind:
    """With an array for the gradient that is there already, as in a training loop."""

    def bind(batch: Batch, level: str, grad: bool) -> Callable[[], Found]:
        return partial(fast, batch, level, np.empty_like(batch.logps) if grad else False)

    return bind


# --- NumPy and numexpr ------------------------------------------------------------------------------------------------
def textbook(batch: Batch, level: str, grad: bool) -> Found:
    """The formulas as they stand in the papers, whole arrays at a time; the gradient derived by hand."""
    logps, old_logps, ref_logps, A, mask, _ = batch
    A = A[:, None]
    counts = None if mask is None else mask.sum(axis=1, dtype=logps.dtype, keepdims=True)
    log_ratio = logps - old_logps
    if level == "sequence" and mask is None:
        log_ratio = np.mean(log_ratio, axis=1, keepdims=True)
    elif level == "sequence":
        log_ratio = np.sum(log_ratio * mask, axis=1, keepdims=True) / counts

    ratio = np.exp(log_ratio)
    unclipped = ratio * A
    clipped = np.clip(ratio, 1 - EPSILON, 1 + EPSILON) * A
    s = np.minimum(unclipped, clipped)
    d = ref_logps - logps
    r = np.exp(d)
    loss = BETA * (r - d - 1) - s
    c = 1 / loss.size if mask is None else mask / (len(mask) * counts)
    value = np.mean(loss) if mask is None else np.sum(c * loss)
    return float(value), c * (BETA * (1 - r) - np.where(unclipped <= clipped, unclipped, 0)) if grad else None


def _numpy() -> Bind:
    return lambda *case: partial(textbook, *case)


def _numexpr() -> Bind:
    import numexpr

    numexpr.set_num_threads(numba.get_num_threads())
    policy = "where(rho * A < bounded * A, rho * A, bounded * A)"
    bounded = "where(rho < low, low, where(rho > high, high, rho))"
    k3 = "(exp(ref - logps) - (ref - logps) - 1)"

    def bind(batch: Batch, level: str, grad: bool) -> Callable[[], Found]:
        number = batch.logps.dtype.type
        names = {"logps": batch.logps, "old": batch.old_logps, "ref": batch.ref_logps, "A": batch.advantages[:, None]}
        names |= {"low": number(1 - EPSILON), "high": number(1 + EPSILON), "beta": number(BETA)}

        def call() -> Found:
            mask = np.ones((1, 1), batch.logps.dtype) if batch.mask is None else batch.mask
            counts = batch.logps.shape[1] if batch.mask is None else mask.sum(axis=1, keepdims=True)
            c = mask / number(len(batch.logps)) / counts
            rho = "exp(logps - old)"
            given = names | {"c": c.astype(batch.logps.dtype, copy=False)}
            if level == "sequence":
                change = numexpr.evaluate("(logps - old) * mask", names | {"mask": mask})
                rho, given["ratio"] = "ratio", np.exp(change.sum(axis=1, keepdims=True) / counts).astype(number)
            s = policy.replace("bounded", bounded).replace("rho", rho)
            slope = f"where({rho} * A <= {bounded.replace('rho', rho)} * A, {rho} * A, 0)"
            value = numexpr.evaluate(f"c * (beta * {k3} - {s})", given).sum()
            gradient = numexpr.evaluate(f"c * (beta * (1 - exp(ref - logps)) - {slope})", given) if grad else None
            return float(value), gradient

        return call

    return bind


# --- Numba and JAX ----------------------------------------------------------------------------------------------------
def _numba() -> Bind:
    @numba.njit(parallel=True, fastmath=True)
    def loss(logps, old, ref, A, mask, sequence_level, low, high, beta, gradient):
        total = 0.0
        zero, one = logps.dtype.type(0), logps.dtype.type(1)  # a 0 or 1 would make float64 of float32
        B, T = logps.shape
        for i in numba.prange(B):
            tokens, change = 0, 0.0
            for t in range(T):
                if mask is None or mask[i, t]:
                    tokens += 1
                    if sequence_level:
                        change += logps[i, t] - old[i, t]
            c = logps.dtype.type(1 / (B * max(tokens, 1)))
            rho = np.exp(logps.dtype.type(change / max(tokens, 1)))
            for t in range(T):
                if mask is None or mask[i, t]:
                    if not sequence_level:
                        rho = np.exp(logps[i, t] - old[i, t])
                    d = ref[i, t] - logps[i, t]
                    r = np.exp(d)
                    unclipped = rho * A[i]
                    clipped = min(max(rho, low), high) * A[i]
                    total += c * (beta * (r - d - one) - min(unclipped, clipped))
                    if gradient is not None:
                        gradient[i, t] = c * (beta * (one - r) - (unclipped if unclipped <= clipped else zero))
                elif gradient is not None:
                    gradient[i, t] = 0
        return total

    def bind(batch: Batch, level: str, grad: bool) -> Callable[[], Found]:
        number = batch.logps.dtype.type

        def call() -> Found:
            gradient = np.empty_like(batch.logps) if grad else None
            options = level == "sequence", number(1 - EPSILON), number(1 + EPSILON), number(BETA)
            return loss(*batch[:5], *options, gradient), gradient

        return call

    return bind


def _jax() -> Bind:
    import jax

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy

    def loss(logps: Any, old: Any, ref: Any, A: Any, mask: Any, level: str) -> Any:
        log_ratio = logps - old
        counts = logps.shape[1] if mask is None else jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        if level == "sequence":
            log_ratio = (log_ratio if mask is None else log_ratio * mask).sum(axis=1, keepdims=True) / counts
        ratio = jnp.exp(log_ratio)
        s = jnp.minimum(ratio * A[:, None], jnp.clip(ratio, 1 - EPSILON, 1 + EPSILON) * A[:, None])
        d = ref - logps
        terms = BETA * (jnp.exp(d) - d - 1) - s
        return ((terms if mask is None else terms * mask) / counts).sum() / len(logps)

    value = jax.jit(loss, static_argnames="level")
    both = jax.jit(jax.value_and_grad(loss), static_argnames="level")

    def bind(batch: Batch, level: str, grad: bool) -> Callable[[], Found]:
        arrays = [None if x is None else jnp.asarray(x) for x in batch[:5]]

        def call() -> Found:
            if not grad:
                return float(value(*arrays, level=level)), None
            found, gradient = both(*arrays, level=level)
            return float(found), np.asarray(gradient)

        return call

    return bind


# --- torch ------------------------------------------------------------------------------------------------------------
def _torch_loss(logps: Any, old: Any, ref: Any, A: Any, mask: Any, level: str) -> Any:
    """The loss as it is written by hand in torch."""
    log_ratio = logps - old
    if level == "sequence" and mask is None:
        log_ratio = log_ratio.mean(1, keepdim=True)
    elif level == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    A = A.unsqueeze(1)
    s = (ratio * A).minimum(ratio.clamp(1 - EPSILON, 1 + EPSILON) * A)
    d = ref - logps
    loss = BETA * (d.exp() - d - 1) - s
    return loss.mean() if mask is None else ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _trl_loss(logps: Any, old: Any, ref: Any, A: Any, mask: Any, level: str) -> Any:
    """``GRPOTrainer._compute_loss`` on log-probabilities that are there: all that stands before it is a stub."""
    import torch
    from trl import GRPOTrainer

    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    nothing = logps.new_zeros(()).expand(logps.shape)  # the entropies, of which it logs the mean
    ids = torch.empty((len(logps), logps.shape[1]), dtype=torch.int8)
    itself = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *arguments, **options: (logps, nothing, None),
        accelerator=itself,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        beta=BETA,
        current_gradient_accumulation_steps=1,
        epsilon_high=EPSILON,
        epsilon_low=EPSILON,
        importance_sampling_level=level,
        loss_type="grpo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": {name: [] for name in _TRL_LOGS}},
    )
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": A,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


_TRL_LOGS = ("kl", "entropy", *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max")))
_TRL_LOGS += ("clip_ratio/region_mean",)


def _liger_loss(function: Callable[..., Any], *batch: Any) -> Any:
    """What Liger-Kernel's fused layer computes once it has the log-probabilities; it, too, compiles that by default."""
    import torch

    logps, old, ref, A, mask, level = batch
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    options = {"epsilon_low": EPSILON, "epsilon_high": EPSILON, "beta": BETA, "loss_type": "grpo"}
    return function(logps, mask, A, mask, ref, old, importance_sampling_level=level, **options)[0]


def _through_torch(function: Callable[..., Any]) -> Bind:
    import torch

    torch.set_num_threads(numba.get_num_threads())

    def bind(batch: Batch, level: str, grad: bool) -> Callable[[], Found]:
        tensors = [None if x is None else torch.from_numpy(x) for x in batch[:5]]
        logps = tensors[0].requires_grad_(grad)

        def call() -> Found:
            loss = function(*tensors, level)
            return loss.item(), torch.autograd.grad(loss, logps)[0].numpy() if grad else None

        return call

    return bind


def _torch_eager() -> Bind:
    return _through_torch(_torch_loss)


def _torch_compile() -> Bind:
    return _through_torch(compiled_or_missing(_torch_loss))


def _trl() -> Bind:
    import trl.trainer.grpo_trainer  # noqa: F401 - or it is missing

    return _through_torch(_trl_loss)


def _liger() -> Bind:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    return _through_torch(partial(_liger_loss, compiled_or_missing(LigerFusedLinearGRPOFunction.ppo_loss_fn)))


PEERS: dict[str, Callable[[], Bind]] = {
    "grpo_fast": _fast,
    "grpo_fast, in place": _fast_in_place,
    "torch.compile": _torch_compile,
    "Liger-Kernel": _liger,
    "JAX": _jax,
    "Numba loop": _numba,
    "TRL": _trl,
    "torch eager": _torch_eager,
    "numexpr": _numexpr,
    "NumPy": _numpy,
}

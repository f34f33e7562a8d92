"""The objective from probabilities by everything that a user would pick instead.

Each entry of `PEERS` makes, if what it needs is installed, a function that takes the four arrays and gives a call
without arguments that returns the objective: what the arrays must be converted to is not timed. All compute the same
formula, with r − log r − 1 as it stands, where grpo_fast takes care not to cancel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numba
import numpy as np
from compiled_torch import compiled_or_missing

import grpo_fast
from grpo_fast import reference

EPSILON, BETA = 0.2, 0.01

Bind: TypeAlias = Callable[..., Callable[[], Any]]


def _fast() -> Bind:
    return lambda *samples: partial(grpo_fast.grpo_objective, *samples, EPSILON, BETA)


def _numpy() -> Bind:
    return lambda *samples: partial(reference.grpo_objective, *samples, EPSILON, BETA)


def _numba() -> Bind:
    @numba.njit(parallel=True, fastmath=True)
    def objective(rho: Any, A: Any, old: Any, ref: Any, low: Any, high: Any, beta: Any) -> float:
        total = 0.0
        one = rho.dtype.type(1)  # a 1 would make float64 of float32
        for i in numba.prange(rho.size):
            r = ref[i] / (rho[i] * old[i])
            surrogate = min(rho[i] * A[i], min(max(rho[i], low), high) * A[i])
            total += surrogate - beta * rho[i] * (r - np.log(r) - one)
        return total / rho.size

    def bind(*samples: Any) -> Callable[[], Any]:
        return partial(objective, *samples, *(samples[0].dtype.type(x) for x in (1 - EPSILON, 1 + EPSILON, BETA)))

    return bind


def _numexpr() -> Bind:
    import numexpr

    numexpr.set_num_threads(numba.get_num_threads())
    r = "(ref / (rho * old))"
    clipped = "where(rho < low, low, where(rho > high, high, rho))"
    term = f"where(rho * A < {clipped} * A, rho * A, {clipped} * A) - beta * rho * ({r} - log({r}) - 1)"

    def bind(rho: Any, A: Any, old: Any, ref: Any) -> Callable[[], Any]:
        values = {"low": 1 - EPSILON, "high": 1 + EPSILON, "beta": BETA}
        names = {"rho": rho, "A": A, "old": old, "ref": ref} | {k: rho.dtype.type(v) for k, v in values.items()}
        return lambda: numexpr.evaluate(term, names).mean()  # its own sum() runs on one thread, and is slower

    return bind


def _torch_objective(rho: Any, A: Any, old: Any, ref: Any) -> Any:
    r = ref / (rho * old)
    surrogate = (rho * A).minimum(rho.clamp(1 - EPSILON, 1 + EPSILON) * A)
    return (surrogate - BETA * rho * (r - r.log() - 1)).mean()


def _through_torch(function: Callable[..., Any]) -> Bind:
    import torch

    torch.set_num_threads(numba.get_num_threads())

    def bind(*samples: Any) -> Callable[[], Any]:
        tensors = [torch.from_numpy(x) for x in samples]
        return lambda: function(*tensors).item()

    return bind


def _torch_eager() -> Bind:
    return _through_torch(_torch_objective)


def _torch_compile() -> Bind:
    return _through_torch(compiled_or_missing(_torch_objective))


def _jax() -> Bind:
    import jax

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy

    @jax.jit
    def objective(rho: Any, A: Any, old: Any, ref: Any) -> Any:
        r = ref / (rho * old)
        surrogate = jnp.minimum(rho * A, jnp.clip(rho, 1 - EPSILON, 1 + EPSILON) * A)
        return jnp.mean(surrogate - BETA * rho * (r - jnp.log(r) - 1))

    def bind(*samples: Any) -> Callable[[], Any]:
        arrays = [jnp.asarray(x) for x in samples]
        return lambda: float(objective(*arrays))

    return bind


PEERS: dict[str, Callable[[], Bind]] = {
    "grpo_fast": _fast,
    "Numba loop": _numba,
    "JAX": _jax,
    "torch.compile": _torch_compile,
    "torch eager": _torch_eager,
    "numexpr": _numexpr,
    "NumPy": _numpy,
}

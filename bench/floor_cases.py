"""What the floor and the kernels do side by side: the data, the calls, and whether both find the same.

As in a policy that trains: log-ratios normal with a standard deviation of 0.05, which is near, or of 0.6, which is far.
Each peer makes, for a function, "near" or "far", and the data, a call without arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import floors
import numpy as np
from floors import LossSums
from numpy.typing import NDArray

from grpo_fast import K3, Clip, grpo_loss, grpo_objective

SPREAD = {"near": 0.05, "far": 0.6}
EPSILON, BETA = 0.2, 1.0  # with β = 1 a fault of either term shows; the time does not depend on it


# --- data -------------------------------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """One sequence, (1, n), its advantage, (1,), and a place for the gradient."""

    logps: NDArray[Any]
    old_logps: NDArray[Any]
    ref_logps: NDArray[Any]
    advantages: NDArray[Any]
    grad: NDArray[Any]


class Samples(NamedTuple):
    """Arrays (n,)."""

    rhos: NDArray[Any]
    A: NDArray[Any]
    pi_old: NDArray[Any]
    pi_ref: NDArray[Any]


def tokens(n: int, way: str, dtype: str, advantage: float = 1.0) -> Tokens:
    """The arguments of grpo_loss."""
    rng = np.random.default_rng(0)
    logps = -rng.exponential(1.0, (1, n))
    old, ref = (logps + rng.normal(0.0, SPREAD[way], (1, n)) for _ in range(2))
    return Tokens(*(x.astype(dtype) for x in (logps, old, ref, np.array([advantage]), logps)))


def samples(n: int, way: str, dtype: str) -> Samples:
    """The arguments of grpo_objective; log ρ, and the log of r = π_ref/π_θ, are spread alike."""
    rng = np.random.default_rng(0)
    rhos, ratios = (np.exp(rng.normal(0.0, SPREAD[way], n)) for _ in range(2))
    old = np.exp(-rng.exponential(1.0, n))
    return Samples(*(x.astype(dtype) for x in (rhos, rng.standard_normal(n), old, ratios * rhos * old)))


DATA: dict[str, Callable[[int, str, str], Any]] = {"grpo_loss": tokens, "grpo_objective": samples}


# --- calls ------------------------------------------------------------------------------------------------------------
Bind = Callable[[str, str, Any], Callable[[], Any]]


def fast() -> Bind:
    """By grpo_fast."""

    def bind(function: str, way: str, data: Any) -> Callable[[], Any]:
        if function == "grpo_objective":
            return partial(grpo_objective, *data, EPSILON, BETA)
        options = {"surrogate": Clip(EPSILON), "kl": K3(BETA, importance_weighted=True), "grad": data.grad}
        return partial(grpo_loss, data.logps, data.old_logps, data.advantages, data.ref_logps, **options)

    return bind


def floor() -> Bind:
    """By the floor; an ImportError where there is none."""
    for dtype in ("float64", "float32"):
        floors.library(dtype)

    def bind(function: str, way: str, data: Any) -> Callable[[], Any]:
        if function == "grpo_objective":
            return floors.bind_objective(data, EPSILON, BETA, way)
        return floors.bind_loss(*data[:3], float(data.advantages[0]), EPSILON, BETA, data.grad, way)

    return bind


PEERS: dict[str, Callable[[], Bind]] = {"grpo_fast": fast, "C floor": floor}


# --- whether both find the same ---------------------------------------------------------------------------------------
def check(function: str, way: str, data: Any) -> None:
    """Assert that the floor finds what grpo_fast does, but for rounding."""
    ours, by_hand = (peer()(function, way, data) for peer in (fast, floor))
    if function == "grpo_objective":
        rounding = 64 * float(np.finfo(data.A.dtype).eps)
        assert abs(ours() - by_hand()) <= rounding * float(np.mean(np.abs(data.rhos * data.A)))
        return
    result = ours()
    grad = result.grad.copy()
    data.grad.fill(np.nan)
    _check_loss(data, result.stats, grad, LossSums(*by_hand()))


def _check_loss(data: Tokens, stats: Any, grad: NDArray[Any], sums: LossSums) -> None:
    n, rounding = grad.size, 64 * float(np.finfo(grad.dtype).eps)
    log_rhos, distances = data.logps - data.old_logps, np.abs(data.logps - data.ref_logps)
    found = {
        "surrogate": sums.policy / n,
        "kl": sums.kl / n,
        "ratio_mean": sums.ratio / n,
        "ess": sums.ratio**2 / (n * sums.ratio_squared),
        "ratio_min": np.exp(sums.least),
        "ratio_max": np.exp(sums.most),
    }
    for name, value in found.items():  # of terms with one sign
        assert abs(value - getattr(stats, name)) <= rounding * abs(value), name
    assert abs(sums.log_ratio / n + stats.approx_kl) <= rounding * float(np.mean(np.abs(log_rhos)))
    assert (sums.least, sums.most, sums.farthest) == (log_rhos.min(), log_rhos.max(), distances.max())
    # Within rounding of a bound of ρ, a token may be clipped or not.
    rhos = np.exp(log_rhos.astype(np.float64))
    unclear = np.minimum(abs(rhos - (1 - EPSILON)), abs(rhos - (1 + EPSILON))) <= rounding
    for name, count in (("clip_ratio_low", sums.clipped_low), ("clip_ratio_high", sums.clipped_high)):
        assert abs(count - n * getattr(stats, name)) <= np.count_nonzero(unclear) + 0.5, name
    size = rhos * (abs(data.advantages[0]) + BETA * distances) / n
    assert np.all((abs(data.grad - grad) <= rounding * size) | unclear)

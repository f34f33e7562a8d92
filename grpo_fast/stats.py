"""What a kernel's sums say: `Stats`, every diagnostic for one choice of options; `Sweep`, the objective over a grid.

Both hold exact sums and nothing rounded: adding the results of shards, in any order and any grouping, gives the result
of the whole to the last bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .exact import Exact
from .terms import K1, K2, K3, Clip


def objective_of(surrogate: float, kl: float, beta: float) -> float:
    """surrogate − β·kl, where β = 0 switches even an infinite or missing KL off."""
    return surrogate - beta * kl if beta else surrogate


def _added_by(how: Callable[[Any, Any], Any]) -> Any:
    return field(metadata={"added_by": how})


class _Additive:
    """Dataclasses that add field by field: with +, unless a field says how, or says that it must be the same."""

    def __add__(self, other: object) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        total = {}
        for f in fields(self):  # type: ignore[arg-type]
            a, b = getattr(self, f.name), getattr(other, f.name)
            how = f.metadata.get("added_by")
            if how is _same and a != b:
                raise ValueError(f"{type(self).__name__} of different {f.name} cannot be added: {a} and {b}")
            total[f.name] = how(a, b) if how else a + b
        return type(self)(**total)

    def __radd__(self, other: object) -> Self:  # sum() begins with 0
        return self if other == 0 else NotImplemented


def _same(a: Any, _: Any) -> Any:
    return a


def _each(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, kw_only=True)
class Stats(_Additive):
    """The objective and its diagnostics over N tokens (samples), from exact sums.

    ``a + b`` and ``sum(shards)`` are exact and need the same options. Means are over unmasked tokens; what does not
    apply is NaN.

    Attributes
    ----------
    objective, loss : float
        What was maximised, and its negative, what an optimiser minimises.
    surrogate, kl : float
        Mean policy term, and mean KL term as penalised, without β; objective = surrogate − β·kl.
    clip_ratio_low, clip_ratio_high, clip_ratio_region : float
        Fraction of tokens with ρ < 1−ε and A < 0; with ρ > 1+ε and A > 0; with either. TRL's ``clip_ratio/low_mean`` …
    ratio_mean, ratio_min, ratio_max : float
        Of ρ = π_θ/π_old.
    ess : float
        Effective sample size as a fraction of N, (Σρ)²/(N·Σρ²), in (0, 1]; NaN where a ρ² overflows.
    approx_kl : float
        Mean of log π_old − log π_θ, nats: the k1 estimate of KL(π_old ‖ π_θ). Good to 2⁻⁵²·(1 + mean |log ρ|).
    tokens : int
        N.
    sequences : float
        Number of sequences; NaN for probabilities, which know none.
    """

    options: tuple[Clip, K1 | K2 | K3] = _added_by(_same)
    tokens: int
    surrogate_sum: Exact
    kl_sum: Exact
    drift_sum: Exact  # Σ (ρ − 1)
    drift_squared_sum: Exact  # Σ (ρ − 1)²
    log_ratio_sum: Exact
    clipped_low: int
    clipped_high: int
    ratio_min: float = _added_by(min)
    ratio_max: float = _added_by(max)

    def _mean(self, total: Exact) -> float:
        return float(total) / self.tokens

    @property
    def objective(self) -> float:
        return objective_of(self.surrogate, self.kl, self.options[1].beta)

    @property
    def loss(self) -> float:
        return -self.objective

    @property
    def surrogate(self) -> float:
        return self._mean(self.surrogate_sum)

    @property
    def kl(self) -> float:
        return self._mean(self.kl_sum)

    @property
    def clip_ratio_low(self) -> float:
        return self.clipped_low / self.tokens

    @property
    def clip_ratio_high(self) -> float:
        return self.clipped_high / self.tokens

    @property
    def clip_ratio_region(self) -> float:
        return (self.clipped_low + self.clipped_high) / self.tokens

    @property
    def ratio_mean(self) -> float:
        return 1.0 + self._mean(self.drift_sum)

    @property
    def ess(self) -> float:
        drift = self._mean(self.drift_sum)
        return (1.0 + drift) * (1.0 + drift) / (1.0 + 2.0 * drift + self._mean(self.drift_squared_sum))

    @property
    def approx_kl(self) -> float:
        return 0.0 - self._mean(self.log_ratio_sum)

    @property
    def sequences(self) -> float:
        return math.nan

    def as_dict(self) -> dict[str, float]:
        """The diagnostics under the keys that TRL logs, where it has one."""
        return {
            "objective": self.objective,
            "loss": self.loss,
            "surrogate": self.surrogate,
            "kl": self.kl,
            "clip_ratio/low_mean": self.clip_ratio_low,
            "clip_ratio/high_mean": self.clip_ratio_high,
            "clip_ratio/region_mean": self.clip_ratio_region,
            "ratio/mean": self.ratio_mean,
            "ratio/min": self.ratio_min,
            "ratio/max": self.ratio_max,
            "ess": self.ess,
            "approx_kl": self.approx_kl,
            "tokens": self.tokens,
            "sequences": self.sequences,
        }

    def __str__(self) -> str:
        return "\n".join(f"{key:<24} {value:.9g}" for key, value in self.as_dict().items() if not math.isnan(value))


@dataclass(frozen=True, kw_only=True)
class Sweep(_Additive):
    """The objective for every ε × β, from one read of the data; exact sums, so that shards add.

    Attributes
    ----------
    epsilons, betas : (E,), (B,) float64 arrays
    objective : (E, B) float64 array
        Row e, column b is ``grpo_objective(…, epsilon=epsilons[e], beta=betas[b])``, to the bit if all arrays are of
        one dtype. (Of mixed ones ``beta=0`` leaves two out, which may leave a narrower dtype to compute in.)
    clip_ratio_low, clip_ratio_high : (E,) float64 arrays
        As in `Stats`.
    kl : float
        Mean KL term, without β; NaN if all β are 0, since the probabilities are not read then.
    tokens : int
    """

    grid: tuple[tuple[float, ...], tuple[float, ...]] = _added_by(_same)
    tokens: int
    surrogate_sums: tuple[Exact, ...] = _added_by(_each)
    kl_sum: Exact
    clipped_low: tuple[int, ...] = _added_by(_each)
    clipped_high: tuple[int, ...] = _added_by(_each)

    @property
    def epsilons(self) -> NDArray[np.float64]:
        return np.array(self.grid[0])

    @property
    def betas(self) -> NDArray[np.float64]:
        return np.array(self.grid[1])

    @property
    def kl(self) -> float:
        return float(self.kl_sum) / self.tokens if any(self.grid[1]) else math.nan

    @property
    def objective(self) -> NDArray[np.float64]:
        surrogates = [float(total) / self.tokens for total in self.surrogate_sums]
        return np.array([[objective_of(s, self.kl, beta) for beta in self.grid[1]] for s in surrogates])

    @property
    def clip_ratio_low(self) -> NDArray[np.float64]:
        return np.array(self.clipped_low) / self.tokens

    @property
    def clip_ratio_high(self) -> NDArray[np.float64]:
        return np.array(self.clipped_high) / self.tokens

"""What a kernel's sums say: `Stats`, every diagnostic for one choice of options; `Sweep`, the objective over a grid.

Both hold exact sums and nothing rounded: adding the results of shards, in any order and any grouping, gives the result
of the whole to the last bit.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ._kernels.exact import Exact
from ._kernels.sums import Clipped, Numerator, Sums, Totals
from .terms import CISPO, Clip, Options

#: What `Stats` makes of a kernel's sums when it is first asked for.
_MADE_LATER = ("sums", "numerator", "clipped", "least_ratio", "largest_ratio")

#: Below it, squares have lost digits, being subnormal.
_LEAST_SQUARES = sys.float_info.min / sys.float_info.epsilon


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
                name, a, b = _difference(f.name, a, b)
                raise ValueError(f"{type(self).__name__} of different {name} cannot be added: {a} and {b}")
            total[f.name] = how(a, b) if how else a + b
        return type(self)(**total)

    def __radd__(self, other: object) -> Self:  # sum() begins with 0
        return self if other == 0 else NotImplemented


def _difference(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The name and the values of a field; of options, of the first one that differs."""
    if isinstance(a, Options):
        return next((x, y, z) for x, y, z in zip(a._fields, a, b, strict=True) if y != z)
    return name, a, b


def _same(a: Any, _: Any) -> Any:
    return a


def _if_known(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _each(a: Any, b: Any) -> Any:
    """The sums of two tuples, field by field."""
    total = (x + y for x, y in zip(a, b, strict=True))
    return a._make(total) if hasattr(a, "_make") else tuple(total)


@dataclass(frozen=True, kw_only=True)
class Stats(_Additive):
    """The objective and its diagnostics over N unmasked tokens (or samples), from exact sums.

    ``a + b`` and ``sum(shards)`` are exact and need the same options; without a ``normalizer`` the denominators add,
    too, so that the sum is that of the whole batch. All means are over unmasked tokens. What does not apply is NaN.

    Attributes
    ----------
    objective, loss : float
        As aggregated: what was maximised, and its negative, what an optimiser minimises.
    surrogate, kl : float
        Mean policy term (with the rollout weight); mean KL term as penalised, without β.
    clip_ratio_low, clip_ratio_high, clip_ratio_region : float
        Of `Clip`, the fraction of tokens with ρ < 1−ε and A < 0; with ρ > 1+ε_high and A > 0; with either. TRL's
        ``clip_ratio/low_mean`` …
    clip_ratio_delta : float
        Of `Clip`, the fraction with ρ > δ and A < 0; verl's ``pg_clipfrac_lower``.
    cispo_clip_ratio : float
        Of `CISPO`, the fraction with ρ > ratio_max and A > 0.
    ratio_mean, ratio_min, ratio_max : float
        Of ρ = π_θ/π_old; at sequence level, of the sequence's ρ at each of its tokens.
    ess : float
        Effective sample size as a fraction of N, (Σρ)²/(N·Σρ²), in (0, 1]; NaN where all ρ² that count are beyond the
        normal numbers of float64.
    approx_kl : float
        Mean of log π_old − log π_θ, nats: the k1 estimate of KL(π_old ‖ π_θ).
    tokens : int
        N.
    sequences : float
        Number of sequences, those without an unmasked token included; NaN for probabilities, which know none.
    """

    # Those of _MADE_LATER must have no defaults: as attributes of the class these would hide `__getattr__`.
    options: Options = _added_by(_same)  # noqa: RUF009 - a dataclass field
    tokens: int
    sequence_count: int | None = _added_by(_if_known)
    sums: Sums = _added_by(_each)  # noqa: RUF009 - a dataclass field; of Exact
    numerator: Numerator = _added_by(_each)  # noqa: RUF009 - of the objective; of Exact
    clipped: Clipped = _added_by(_each)  # noqa: RUF009
    least_ratio: float = _added_by(min)
    largest_ratio: float = _added_by(max)

    @classmethod
    def of(cls, options: Options, totals: Totals, sequence_count: int | None) -> Self:
        """The `Stats` of what the kernels have added up."""
        stats = cls.__new__(cls)
        stats.__dict__.update(options=options, tokens=totals.tokens, sequence_count=sequence_count, _totals=totals)
        return stats

    def __getattr__(self, name: str) -> Any:
        """The other fields, when one is first asked for: to make them takes a third of a small call."""
        if name not in _MADE_LATER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        totals = self._totals
        sums = Sums(*Exact.of_limbs(totals.limbs["sums"][0]))
        numerator = Numerator(sums.surrogate, sums.kl)
        if self.options.mean_within:
            numerator = Numerator(*Exact.of_limbs(totals.limbs["numerator"][0]))
        self.__dict__.update(
            sums=sums,
            numerator=numerator,
            clipped=Clipped(totals.clipped_low, totals.clipped_high, totals.clipped_hard),
            least_ratio=totals.least_ratio,
            largest_ratio=totals.largest_ratio,
        )
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _mean(self, total: Exact | int) -> float:
        return float(total) / self.tokens if self.tokens else math.nan

    def _fraction(self, surrogate: type, clipped: int) -> float:
        return self._mean(clipped) if isinstance(self.options.surrogate, surrogate) else math.nan

    @property
    def denominator(self) -> float:
        """What the aggregation divides by; ``normalizer``, if there is one."""
        return self.options.denominator(self.tokens, self.sequence_count)

    @property
    def objective(self) -> float:
        if totals := self.__dict__.get("_totals"):
            surrogate, kl = totals.surrogate_numerator, totals.kl_numerator
        else:
            surrogate, kl = map(float, self.numerator)
        denominator = self.denominator
        return objective_of(surrogate / denominator, kl / denominator, self.options.kl.beta if self.options.kl else 0.0)

    @property
    def loss(self) -> float:
        return 0.0 - self.objective

    @property
    def surrogate(self) -> float:
        return self._mean(self.sums.surrogate)

    @property
    def kl(self) -> float:
        return self._mean(self.sums.kl) if self.options.kl else math.nan

    @property
    def clip_ratio_low(self) -> float:
        return self._fraction(Clip, self.clipped.low)

    @property
    def clip_ratio_high(self) -> float:
        return self._fraction(Clip, self.clipped.high)

    @property
    def clip_ratio_region(self) -> float:
        return self._fraction(Clip, self.clipped.low + self.clipped.high)

    @property
    def clip_ratio_delta(self) -> float:
        return self._fraction(Clip, self.clipped.hard)

    @property
    def cispo_clip_ratio(self) -> float:
        return self._fraction(CISPO, self.clipped.hard)

    @property
    def ratio_mean(self) -> float:
        return self._mean(self.sums.ratio)

    @property
    def ratio_min(self) -> float:
        return self.least_ratio if self.tokens else math.nan

    @property
    def ratio_max(self) -> float:
        return self.largest_ratio if self.tokens else math.nan

    @property
    def ess(self) -> float:
        total, squares = float(self.sums.ratio), self.tokens * float(self.sums.ratio_squared)
        # Of equal ρ, rounding makes more than 1.
        return min(total * total / squares, 1.0) if _LEAST_SQUARES < squares < math.inf else math.nan

    @property
    def approx_kl(self) -> float:
        return 0.0 - self._mean(self.sums.log_ratio)

    @property
    def sequences(self) -> float:
        return math.nan if self.sequence_count is None else self.sequence_count

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
            "clip_ratio/delta_mean": self.clip_ratio_delta,
            "cispo_clip_ratio": self.cispo_clip_ratio,
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
        one dtype. (Of mixed ones ``beta=0`` leaves two out, which may leave a narrower dtype to compute in.) Of
        log-probabilities, the objective of `grpo_loss` with ``Clip(epsilons[e])`` and a KL term of ``betas[b]``.
    clip_ratio_low, clip_ratio_high : (E,) float64 arrays
        As in `Stats`.
    kl : float
        Mean KL term, without β; NaN if all β are 0, since the probabilities are not read then.
    tokens : int
    """

    grid: tuple[tuple[float, ...], tuple[float, ...]] = _added_by(_same)
    options: Options = _added_by(_same)  # noqa: RUF009 - a dataclass field; but for ε and β, the same over the grid
    tokens: int
    surrogate_numerators: tuple[Exact, ...] = _added_by(_each)  # of the objective, for each ε
    kl_numerator: Exact
    kl_sum: Exact
    clipped_low: tuple[int, ...] = _added_by(_each)
    clipped_high: tuple[int, ...] = _added_by(_each)
    sequence_count: int | None = _added_by(_if_known)

    @property
    def epsilons(self) -> NDArray[np.float64]:
        return np.array(self.grid[0])

    @property
    def betas(self) -> NDArray[np.float64]:
        return np.array(self.grid[1])

    @property
    def kl(self) -> float:
        return float(self.kl_sum) / self.tokens if any(self.grid[1]) and self.tokens else math.nan

    @property
    def objective(self) -> NDArray[np.float64]:
        denominator = self.options.denominator(self.tokens, self.sequence_count)
        kl, *surrogates = (float(total) / denominator for total in (self.kl_numerator, *self.surrogate_numerators))
        return np.array([[objective_of(s, kl, beta) for beta in self.grid[1]] for s in surrogates])

    @property
    def clip_ratio_low(self) -> NDArray[np.float64]:
        return np.array(self.clipped_low) / (self.tokens or math.nan)

    @property
    def clip_ratio_high(self) -> NDArray[np.float64]:
        return np.array(self.clipped_high) / (self.tokens or math.nan)

"""What a kernel's sums say: `Stats`, every diagnostic for one choice of options; `Sweep`, the objective over a grid.

Both hold exact sums and nothing rounded: adding the results of shards, in any order and any grouping, gives the result
of the whole to the last bit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ._additive import Additive, added_by, both_or_neither, each, effective_fraction, if_known, same
from ._kernels.exact import Exact
from ._kernels.sums import Clipped, Numerator, Sums, Totals
from .rollout_stats import RolloutStats
from .terms import CISPO, GMPO, Clip, Options

#: What `Stats` makes of a kernel's sums when it is first asked for.
_MADE_LATER = ("sums", "numerator", "clipped", "least_ratio", "largest_ratio")

#: The key of each diagnostic in `Stats.as_dict`, and its attribute. TRL logs "loss", "kl", "clip_ratio/low_mean",
#: "clip_ratio/high_mean", "clip_ratio/region_mean" and "cispo_clip_ratio" under the same keys; the others are ours.
KEYS = {
    "objective": "objective",
    "loss": "loss",
    "surrogate": "surrogate",
    "kl": "kl",
    "clip_ratio/low_mean": "clip_ratio_low",
    "clip_ratio/high_mean": "clip_ratio_high",
    "clip_ratio/region_mean": "clip_ratio_region",
    "clip_ratio/delta_mean": "clip_ratio_delta",
    "cispo_clip_ratio": "cispo_clip_ratio",
    "trust_region_ratio": "trust_region_ratio",
    "ratio/mean": "ratio_mean",
    "ratio/min": "ratio_min",
    "ratio/max": "ratio_max",
    "ess": "ess",
    "approx_kl": "approx_kl",
    "tokens": "tokens",
    "sequences": "sequences",
}


def objective_of(surrogate: float, kl: float, beta: float) -> float:
    """surrogate − β·kl, where β = 0 switches even an infinite or missing KL off."""
    return surrogate - beta * kl if beta else surrogate


@dataclass(frozen=True, kw_only=True)
class Stats(Additive):
    """The objective and its diagnostics over N unmasked tokens (or samples), from exact sums.

    ``a + b`` and ``sum(shards)`` are exact and need the same options; without a ``normalizer`` the denominators add,
    too, so that the sum is that of the whole batch. All means are over unmasked tokens. What does not apply is NaN.
    It prints as a table.

    Attributes
    ----------
    objective, loss : float
        As aggregated: what was maximised, and its negative, what an optimiser minimises.
    surrogate, kl : float
        Mean policy term (with the rollout weight); mean KL term as penalised, without β. Neither has the loss weight.
    clip_ratio_low, clip_ratio_high, clip_ratio_region : float
        Of `Clip`, the fraction of tokens with ρ < 1−ε and A < 0; with ρ > 1+ε_high and A > 0; with either. TRL's
        ``clip_ratio/low_mean`` … Of `GMPO`, by the token's own log ρ and its bounds.
    clip_ratio_delta : float
        Of `Clip`, the fraction with ρ > δ and A < 0; verl's ``pg_clipfrac_lower``.
    cispo_clip_ratio : float
        Of `CISPO`, the fraction with ρ > ratio_max and A > 0.
    trust_region_ratio : float
        The fraction of tokens that the ``trust_region`` drops; the other diagnostics count them, too.
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
    rollout : RolloutStats or None
        How far trainer and sampler are apart, if `evaluate` was told a ``rollout_correction``.
    """

    # Those of _MADE_LATER must have no defaults: as attributes of the class these would hide `__getattr__`.
    options: Options = added_by(same)  # noqa: RUF009 - a dataclass field
    tokens: int
    sequence_count: int | None = added_by(if_known)
    sums: Sums = added_by(each)  # noqa: RUF009 - a dataclass field; of Exact
    numerator: Numerator = added_by(each)  # noqa: RUF009 - of the objective; of Exact
    clipped: Clipped = added_by(each)  # noqa: RUF009
    least_ratio: float = added_by(min)
    largest_ratio: float = added_by(max)
    rollout: RolloutStats | None = added_by(both_or_neither, default=None)  # noqa: RUF009

    @classmethod
    def of(cls, options: Options, totals: Totals, sequence_count: int | None) -> Self:
        """The `Stats` of what the kernels have added up."""
        stats = cls.__new__(cls)
        stats.__dict__.update(options=options, tokens=totals.tokens, sequence_count=sequence_count, _totals=totals)
        return stats

    if not TYPE_CHECKING:  # else any attribute at all would be one of type Any

        def __getattr__(self, name: str) -> Any:
            """The other fields, when one is first asked for: to make them takes a third of a small call."""
            if name not in _MADE_LATER:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            self.__dict__.update(_made_later(self.options, self._totals))
            return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _mean(self, total: Exact | int) -> float:
        return float(total) / self.tokens if self.tokens else math.nan

    def _fraction(self, surrogates: tuple[type, ...], clipped: int) -> float:
        return self._mean(clipped) if isinstance(self.options.surrogate, surrogates) else math.nan

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
        return self._fraction((Clip, GMPO), self.clipped.low)

    @property
    def clip_ratio_high(self) -> float:
        return self._fraction((Clip, GMPO), self.clipped.high)

    @property
    def clip_ratio_region(self) -> float:
        return self._fraction((Clip, GMPO), self.clipped.low + self.clipped.high)

    @property
    def clip_ratio_delta(self) -> float:
        return self._fraction((Clip,), self.clipped.hard)

    @property
    def cispo_clip_ratio(self) -> float:
        return self._fraction((CISPO,), self.clipped.hard)

    @property
    def trust_region_ratio(self) -> float:
        return self._mean(self.clipped.dropped) if self.options.trust_region else math.nan

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
        return effective_fraction(float(self.sums.ratio), float(self.sums.ratio_squared), self.tokens)

    @property
    def approx_kl(self) -> float:
        return 0.0 - self._mean(self.sums.log_ratio)

    @property
    def sequences(self) -> float:
        return math.nan if self.sequence_count is None else self.sequence_count

    def as_dict(self) -> dict[str, float]:
        """The diagnostics by the keys of `KEYS`, less those that the options rule out; a mean over nothing is NaN.

        So the keys are the same on all ranks and at all steps: without a KL term there is no "kl", without sequences no
        "sequences", without a `Clip` or `GMPO` no "clip_ratio/…" (of which a `GMPO` has no "clip_ratio/delta_mean"),
        without a `CISPO` no "cispo_clip_ratio", and without a trust region no "trust_region_ratio". With ``rollout``
        there is what that says, too.
        """
        surrogate = type(self.options.surrogate)
        ruled_out = {
            "kl": self.options.kl is None,
            "sequences": self.sequence_count is None,
            "cispo_clip_ratio": surrogate is not CISPO,
            "trust_region_ratio": self.options.trust_region is None,
            **dict.fromkeys(("clip_ratio_low", "clip_ratio_high", "clip_ratio_region"), surrogate not in (Clip, GMPO)),
            "clip_ratio_delta": surrogate is not Clip,
        }
        values = {key: getattr(self, name) for key, name in KEYS.items() if not ruled_out.get(name)}
        return values if self.rollout is None else values | self.rollout.as_dict()

    def __repr__(self) -> str:
        width = 24 if self.rollout is None else 40
        return "\n".join(f"{key:<{width}} {value:.9g}" for key, value in self.as_dict().items())


def _made_later(options: Options, totals: Totals) -> dict[str, Any]:
    """The fields of `_MADE_LATER`, and the totals without the limbs that they are made of."""
    sums = Sums(*Exact.of_limbs(totals.limbs["sums"][0]))
    numerator = Numerator(sums.surrogate, sums.kl)
    if totals.numerator_apart:
        numerator = Numerator(*Exact.of_limbs(totals.limbs["numerator"][0]))
    return {
        "sums": sums,
        "numerator": numerator,
        "clipped": Clipped(totals.clipped_low, totals.clipped_high, totals.clipped_hard, totals.dropped),
        "least_ratio": totals.least_ratio,
        "largest_ratio": totals.largest_ratio,
        "_totals": totals._replace(limbs=None),
    }


@dataclass(frozen=True, kw_only=True)
class Sweep(Additive):
    """The objective for every ε × β, from one read of the data; exact sums, so that shards add.

    Attributes
    ----------
    epsilons, betas : (E,), (B,) float64 arrays
    objective : (E, B) float64 array
        Row e, column b is ``grpo_objective(…, epsilon=epsilons[e], beta=betas[b])``, to the bit if all arrays are of
        one dtype. (Of mixed ones ``beta=0`` leaves two out, which may leave a narrower dtype to compute in.) Of
        log-probabilities, the objective of `grpo_loss` with ``Clip(epsilons[e], epsilon_high, delta)``, these two if
        they were given, and a KL term of ``betas[b]``.
    clip_ratio_low, clip_ratio_high : (E,) float64 arrays
        As in `Stats`.
    kl : float
        Mean KL term, without β; NaN if all β are 0, since the probabilities are not read then.
    tokens : int
    """

    grid: tuple[tuple[float, ...], tuple[float, ...]] = added_by(same)
    options: Options = added_by(same)  # noqa: RUF009 - a dataclass field; but for ε and β, the same over the grid
    tokens: int
    surrogate_numerators: tuple[Exact, ...] = added_by(each)  # of the objective, for each ε
    kl_numerator: Exact
    kl_sum: Exact
    clipped_low: tuple[int, ...] = added_by(each)
    clipped_high: tuple[int, ...] = added_by(each)
    sequence_count: int | None = added_by(if_known)

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

    def as_dict(self) -> dict[str, Any]:
        """The grid as numbers and lists of them, for JSON or a data frame, under the keys of `Stats.as_dict`.

        Those that the options rule out are left out: "kl" where all β are 0, "sequences" where there are none.
        """
        values = {
            "epsilons": self.epsilons.tolist(),
            "betas": self.betas.tolist(),
            "objective": self.objective.tolist(),
            "clip_ratio/low_mean": self.clip_ratio_low.tolist(),
            "clip_ratio/high_mean": self.clip_ratio_high.tolist(),
            "tokens": self.tokens,
        }
        if any(self.grid[1]):
            values["kl"] = self.kl
        if self.sequence_count is not None:
            values["sequences"] = self.sequence_count
        return values

    def __repr__(self) -> str:
        head = ["epsilon", "clipped low", "clipped high", *(f"beta {beta:g}" for beta in self.grid[1])]
        columns = zip(self.epsilons, self.clip_ratio_low, self.clip_ratio_high, self.objective, strict=True)
        rows = [[f"{x:.6g}" for x in (epsilon, low, high, *objectives)] for epsilon, low, high, objectives in columns]
        mean_kl = f"mean KL {self.kl:.6g}, " if any(self.grid[1]) else ""
        sequences = "" if self.sequence_count is None else f" in {self.sequence_count:,} sequences"
        below = f"objective by epsilon and beta; {mean_kl}{self.tokens:,} tokens{sequences}"
        return f"{_aligned([head, *rows])}\n\n{below}"


def _aligned(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("".join(f"{cell:>14}" for cell in line) for line in lines)

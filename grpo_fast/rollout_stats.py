"""How far trainer and sampler are apart, and what is made of it: `RolloutStats`, from exact sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from ._additive import Additive, added_by, each, effective_fraction, if_known, same
from ._kernels.exact import Exact
from ._kernels.rollout_sums import RolloutCounts, RolloutExtremes, RolloutSums, RolloutTotals
from .rollout_terms import RolloutOptions

#: The key of each diagnostic in `RolloutStats.as_dict`, and its attribute. verl logs those that begin with
#: "rollout_corr/" under the same keys; the others are ours.
ROLLOUT_KEYS = {
    "rollout/mean": "mean",
    "rollout/min": "min",
    "rollout/max": "max",
    "rollout/raw_mean": "raw_mean",
    "rollout/raw_min": "raw_min",
    "rollout/raw_max": "raw_max",
    "rollout/fraction_low": "fraction_low",
    "rollout/fraction_high": "fraction_high",
    "rollout_corr/rollout_rs_masked_fraction": "rejected_tokens",
    "rollout/rejected_sequences": "rejected_sequences",
    "rollout_corr/kl": "k1",
    "rollout_corr/k3_kl": "k3",
    "rollout_corr/chi2_token": "chi2_token",
    "rollout_corr/chi2_seq": "chi2_sequence",
    "rollout/ess": "ess",
    "rollout_corr/training_ppl": "train_ppl",
    "rollout_corr/rollout_ppl": "rollout_ppl",
    "rollout_corr/ppl_ratio": "ppl_ratio",
    "rollout/prob_diff": "prob_diff",
    "rollout/tokens": "tokens",
    "rollout/sequences": "sequences",
    "rollout/missing": "missing",
}
#: What is of sequences, and so of nothing where nobody says where they begin.
_OF_SEQUENCES = ("rejected_sequences", "chi2_sequence", "train_ppl", "rollout_ppl", "ppl_ratio", "sequences")


def _wider(a: RolloutExtremes, b: RolloutExtremes) -> RolloutExtremes:
    """The extremes of both."""
    return RolloutExtremes(
        min(a.least, b.least),
        max(a.largest, b.largest),
        min(a.least_raw, b.least_raw),
        max(a.largest_raw, b.largest_raw),
    )


@dataclass(frozen=True, kw_only=True)
class RolloutStats(Additive):
    """The diagnostics of `rollout_correction` over N unmasked tokens, from exact sums; it prints as a table.

    ``a + b`` and ``sum(shards)`` are exact and need the same options. r = π_old/π_rollout is that of a token. What is
    of sequences is over those that have an unmasked token. What does not apply, and a mean over nothing, is NaN.

    Attributes
    ----------
    mean, min, max : float
        Of the weights of all unmasked tokens, as returned but before they are normalised: 0 where rejected.
    raw_mean, raw_min, raw_max : float
        Of the weights before they are bounded, whatever is rejected; at their level: over tokens at "token", over
        sequences at "sequence" and "geometric".
    fraction_low, fraction_high : float
        How many of these are below ``lower``, above ``upper``; NaN with mode "raw", which has no bounds.
    rejected_tokens, rejected_sequences : float
        The fraction of tokens that are rejected, alone or with their sequence; of sequences of which none is kept.
    k1, k3 : float
        Mean of −log r, and of r − 1 − log r: two estimates of KL(π_rollout ‖ π_old), nats.
    chi2_token, chi2_sequence : float
        Mean of r² less 1; and of the squared product of r over each sequence, less 1: how much the weights vary.
    ess : float
        Effective sample size of the weights as a fraction of N, (Σw)²/(N·Σw²), those of rejected tokens being 0. NaN
        if all are 0, or where the sum of squares is beyond the normal numbers of float64.
    train_ppl, rollout_ppl, ppl_ratio : float
        Mean over sequences of exp(−mean log π_old); of exp(−mean log π_rollout); and of the ratio of the two.
    prob_diff : float
        Mean of |π_old − π_rollout|, with π = exp(min(log π, 0)).
    tokens : int
        N.
    sequences : float
        Number of sequences, those without an unmasked token included; NaN for flat columns of files, which know none.
    missing : int
        Tokens whose log π_rollout is NaN. They have r = 1, and are left out of the perplexities and ``prob_diff``.
    """

    options: RolloutOptions = added_by(same)  # noqa: RUF009 - a dataclass field
    tokens: int
    sequence_count: int | None = added_by(if_known)
    sums: RolloutSums = added_by(each)  # noqa: RUF009 - a dataclass field; of Exact
    counts: RolloutCounts = added_by(each)  # noqa: RUF009
    extremes: RolloutExtremes = added_by(_wider)  # noqa: RUF009

    @classmethod
    def of(cls, options: RolloutOptions, totals: RolloutTotals, sequence_count: int | None) -> Self:
        """The stats of what the kernels have added up."""
        return cls(
            options=options,
            tokens=totals.tokens,
            sequence_count=sequence_count,
            sums=totals.sums,
            counts=totals.counts,
            extremes=totals.extremes,
        )

    def without_sequences(self) -> Self:
        """The same of tokens whose sequences are not known, and without what is of them."""
        nothing = Exact()
        of_sequences = ("weight_of_sequence", "ratio_squared_of_sequence", "train_ppl", "rollout_ppl", "ppl_ratio")
        return replace(
            self,
            sequence_count=None,
            sums=self.sums._replace(**dict.fromkeys(of_sequences, nothing)),
            counts=self.counts._replace(filled=0, known=0, rejected_sequences=0),
        )

    def _of_tokens(self, total: Exact | int) -> float:
        return float(total) / self.tokens if self.tokens else math.nan

    def _of_sequences(self, total: Exact | int, count: int) -> float:
        return float(total) / count if count and self.sequence_count is not None else math.nan

    def _at_level(self, total: Exact | int) -> float:
        if self.options.level == "token":
            return self._of_tokens(total)
        return self._of_sequences(total, self.counts.filled)

    def _bounded(self, count: int) -> float:
        return math.nan if self.options.mode == "raw" else self._at_level(count)

    def _extreme(self, x: float) -> float:
        return x if self.tokens else math.nan

    @property
    def mean(self) -> float:
        return self._of_tokens(self.sums.weight)

    @property
    def min(self) -> float:
        return self._extreme(self.extremes.least)

    @property
    def max(self) -> float:
        return self._extreme(self.extremes.largest)

    @property
    def raw_mean(self) -> float:
        return self._at_level(self.sums.raw)

    @property
    def raw_min(self) -> float:
        return self._extreme(self.extremes.least_raw)

    @property
    def raw_max(self) -> float:
        return self._extreme(self.extremes.largest_raw)

    @property
    def fraction_low(self) -> float:
        return self._bounded(self.counts.low)

    @property
    def fraction_high(self) -> float:
        return self._bounded(self.counts.high)

    @property
    def rejected_tokens(self) -> float:
        return self._of_tokens(self.counts.rejected_tokens)

    @property
    def rejected_sequences(self) -> float:
        return self._of_sequences(self.counts.rejected_sequences, self.counts.filled)

    @property
    def k1(self) -> float:
        return 0.0 - self._of_tokens(self.sums.log_ratio)

    @property
    def k3(self) -> float:
        return self._of_tokens(self.sums.k3)

    @property
    def chi2_token(self) -> float:
        return self._of_tokens(self.sums.ratio_squared) - 1.0

    @property
    def chi2_sequence(self) -> float:
        return self._of_sequences(self.sums.ratio_squared_of_sequence, self.counts.filled) - 1.0

    @property
    def ess(self) -> float:
        return effective_fraction(float(self.sums.weight), float(self.sums.weight_squared), self.tokens)

    @property
    def train_ppl(self) -> float:
        return self._of_sequences(self.sums.train_ppl, self.counts.known)

    @property
    def rollout_ppl(self) -> float:
        return self._of_sequences(self.sums.rollout_ppl, self.counts.known)

    @property
    def ppl_ratio(self) -> float:
        return self._of_sequences(self.sums.ppl_ratio, self.counts.known)

    @property
    def prob_diff(self) -> float:
        there = self.tokens - self.missing
        return float(self.sums.prob_diff) / there if there else math.nan

    @property
    def sequences(self) -> float:
        return math.nan if self.sequence_count is None else self.sequence_count

    @property
    def missing(self) -> int:
        return int(self.counts.missing)

    @property
    def mean_to_divide_by(self) -> float:
        """What ``normalize`` divides by: the mean weight of tokens, or at another level of sequences."""
        if self.options.level == "token":
            return self.mean
        return self._of_sequences(self.sums.weight_of_sequence, self.counts.filled)

    def as_dict(self) -> dict[str, float]:
        """The diagnostics by the keys of `ROLLOUT_KEYS`, less those ruled out by the options; a mean of nothing is NaN.

        So the keys are the same on all ranks and at all steps: with mode "raw" there are no fractions, and without
        sequences nothing that is of them.
        """
        ruled_out: tuple[str, ...] = ("fraction_low", "fraction_high") if self.options.mode == "raw" else ()
        if self.sequence_count is None:
            ruled_out += _OF_SEQUENCES
        return {key: getattr(self, name) for key, name in ROLLOUT_KEYS.items() if name not in ruled_out}

    def __repr__(self) -> str:
        return "\n".join(f"{key:<40} {value:.9g}" for key, value in self.as_dict().items())

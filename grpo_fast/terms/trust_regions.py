"""The trust region M, which tokens keep their policy term: `TV`, `BinaryKL`, `Band`."""

from typing import NamedTuple, Self, TypeAlias

from .._checks import not_negative, number
from .option import Option, kept


class _TrustRegion(Option, NamedTuple("_TrustRegion", [("delta", float), ("delta_low", float)])):
    """What the two regions of a token's probability share: a bound for A > 0 and one for A < 0."""

    __slots__ = ()


@kept
class TV(_TrustRegion):
    """DPPO's trust region by total variation: how far a token's probability may move in the direction of A.

    ::

        M = 0  where A > 0 and π_θ − π_old > δ,  or A < 0 and π_θ − π_old < −δ_low;  else 1

    What is exactly at a bound is kept. Of single tokens: at sequence level it is refused.

    Parameters
    ----------
    delta : float, in [0, 1]
        δ. prime-rl, SkyRL and verl ``clip_ratio`` of ``loss_mode="dppo_tv"``; 0.2 in the paper.
    delta_low : float, in [0, 1], optional
        δ_low; as δ unless given.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    DPPO, arXiv:2602.04879.
    """

    __slots__ = ()

    def __new__(cls, delta: float, delta_low: float | None = None) -> Self:
        high = number("delta", delta, "in [0, 1]", lambda x: 0 <= x <= 1)
        low = high if delta_low is None else number("delta_low", delta_low, "in [0, 1]", lambda x: 0 <= x <= 1)
        return super().__new__(cls, high, low)


@kept
class BinaryKL(_TrustRegion):
    """DPPO's trust region by the KL divergence of "this token or another", two Bernoulli distributions.

    ::

        D = π_old·(log π_old − log π_θ) + (1 − π_old)·log((1 − π_old)/(1 − π_θ))
        M = 0  where A > 0, π_θ > π_old and D > δ,  or A < 0, π_θ < π_old and D > δ_low;  else 1

    What is exactly at a bound is kept. Of single tokens: at sequence level it is refused.

    Parameters
    ----------
    delta : float, in [0, inf)
        δ, nats.
    delta_low : float, in [0, inf), optional
        δ_low; as δ unless given.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    DPPO, arXiv:2602.04879.
    """

    __slots__ = ()

    def __new__(cls, delta: float, delta_low: float | None = None) -> Self:
        high = not_negative("delta", delta)
        return super().__new__(cls, high, high if delta_low is None else not_negative("delta_low", delta_low))


@kept
class Band(Option, NamedTuple("Band", [("ratio_min", float), ("ratio_max", float)])):
    """A band of ρ, whatever the sign of A; at sequence level of the sequence's ρ, so of a whole sequence.

    ::

        M = 0  where ρ < ratio_min or ρ > ratio_max;  else 1

    What is exactly at a bound is kept.

    Parameters
    ----------
    ratio_min : float, in [0, ratio_max]
        Lower bound of ρ.
    ratio_max : float, in [ratio_min, inf]
        Upper bound of ρ.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    IcePop, arXiv:2510.18855; GLM-5, arXiv:2602.15763.
    """

    __slots__ = ()

    def __new__(cls, ratio_min: float, ratio_max: float) -> Self:
        low = number("ratio_min", ratio_min, "in [0, ratio_max]", lambda x: x >= 0)
        high = number("ratio_max", ratio_max, f"in [ratio_min = {low}, inf]", lambda x: x >= low)
        return super().__new__(cls, low, high)


TrustRegion: TypeAlias = TV | BinaryKL | Band

"""The policy term s(ρ, A): `Clip`, `CISPO`, `SAPO`, `Unclipped`; of whole sequences `VESPO`, `GMPO`."""

import math
from typing import NamedTuple, Self, TypeAlias

from .._checks import not_negative, number, positive
from .option import Option, kept

#: The default of ε, wherever it is a parameter of a call or an option of the command.
EPSILON = 0.2


@kept
class Clip(Option, NamedTuple("Clip", [("epsilon", float), ("epsilon_high", float), ("delta", float)])):
    """PPO's clipped surrogate, as GRPO uses it; with δ also bounded where A < 0 (dual clip, two-sided clip).

    ::

        s         = min( min(ρ, δ)·A,  clip(ρ, 1−ε, 1+ε_high)·A )
        ∂s/∂log ρ = ρ·A  where the first operand is ≤ the second and ρ ≤ δ,  else 0

    Parameters
    ----------
    epsilon : float, in [0, inf]
        ε: how far ρ may fall below 1 before a token with A < 0 stops counting; from 1 on, it never does.
        TRL ``epsilon``; verl ``clip_ratio_low`` (or ``clip_ratio``).
    epsilon_high : float, in [0, inf], optional
        ε_high: how far ρ may rise above 1 before a token with A > 0 stops counting; as ε unless given.
        TRL ``epsilon_high``; verl ``clip_ratio_high``. DAPO's "clip-higher" is 0.28.
    delta : float, above 1 + ε_high, optional
        δ: bound on ρ for tokens with A < 0; none (infinity) unless given.
        TRL ``delta``; verl ``clip_ratio_c``, which is 3.0 there unless changed.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    PPO, arXiv:1707.06347, Eq. 7. GRPO (DeepSeekMath), arXiv:2402.03300, Eq. 3. ε_high: DAPO, arXiv:2503.14476,
    section 3.1. δ: dual-clip PPO, arXiv:1912.09729; INTELLECT-2, arXiv:2505.07291.
    """

    __slots__ = ()

    def __new__(cls, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None) -> Self:
        epsilon = number("epsilon", epsilon, "in [0, inf]", lambda x: x >= 0)
        high = (
            epsilon if epsilon_high is None else number("epsilon_high", epsilon_high, "in [0, inf]", lambda x: x >= 0)
        )
        bound = math.inf
        if delta is not None:
            bound = number(
                "delta", delta, f"above 1 + epsilon_high = {1 + high}", lambda x: x > 1 + high or x == math.inf
            )
        return super().__new__(cls, epsilon, high, bound)


@kept
class CISPO(Option, NamedTuple("CISPO", [("ratio_max", float), ("ratio_min", float)])):
    """The policy gradient weighted with a clipped ratio: no token loses its gradient.

    ::

        s           = w·A·log π_θ,   w = clip(ρ, ratio_min, ratio_max) held constant
        ∂s/∂log π_θ = w·A

    Parameters
    ----------
    ratio_max : float, in (0, inf]
        Upper bound of the weight itself, not its distance from 1.
        TRL ``epsilon_high`` with ``loss_type="cispo"``; verl 1 + ``clip_ratio_high`` with ``loss_mode="cispo"``.
    ratio_min : float, in [0, ratio_max]
        Lower bound of the weight. TRL has none; verl 1 − ``clip_ratio_low``.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    MiniMax-M1, arXiv:2506.13585, Eq. 4 and 5. ``ratio_max`` = 5 without a lower bound: ScaleRL, arXiv:2510.13786.
    """

    __slots__ = ()

    def __new__(cls, ratio_max: float = 5.0, ratio_min: float = 0.0) -> Self:
        high = number("ratio_max", ratio_max, "in (0, inf]", lambda x: x > 0)
        low = number("ratio_min", ratio_min, f"in [0, ratio_max = {high}]", lambda x: 0 <= x <= high)
        return super().__new__(cls, high, low)


@kept
class SAPO(Option, NamedTuple("SAPO", [("tau_pos", float), ("tau_neg", float)])):
    """A sigmoid gate around ρ = 1 in place of the clip: the gradient fades out instead of being cut.

    ::

        s         = (4/τ)·σ(τ(ρ − 1))·A,   τ = tau_pos where A > 0, else tau_neg
        ∂s/∂log ρ = 4σ(1 − σ)·ρ·A

    Parameters
    ----------
    tau_pos : float, in (0, inf)
        Temperature of tokens with A > 0. TRL ``sapo_temperature_pos``; verl ``tau_pos`` with ``loss_mode="sapo"``.
    tau_neg : float, in (0, inf)
        Temperature of the others. TRL ``sapo_temperature_neg``; verl ``tau_neg``.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    SAPO, arXiv:2511.20347, Eq. 5 and 6.
    """

    __slots__ = ()

    def __new__(cls, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Self:
        return super().__new__(cls, positive("tau_pos", tau_pos), positive("tau_neg", tau_neg))


@kept
class Unclipped(Option, NamedTuple("Unclipped", [])):
    """The importance-weighted policy gradient, which nothing bounds: for a ``trust_region``, or on-policy.

    ::

        s         = ρ·A
        ∂s/∂log ρ = ρ·A

    References
    ----------
    DPPO, arXiv:2602.04879: prime-rl's and SkyRL's is this with ``trust_region=TV(0.2)``.
    """

    __slots__ = ()

    def __new__(cls) -> Self:
        return super().__new__(cls)


@kept
class VESPO(
    Option,
    NamedTuple("VESPO", [("k_pos", float), ("lambda_pos", float), ("k_neg", float), ("lambda_neg", float)]),
):
    """The policy gradient weighted with a soft function of the whole sequence's ratio; at sequence level only.

    ::

        log w       = clip(Σ_t clip(log ρ_t, −20, 20), log 1e-8, 20)
        φ           = exp(λ + k·log w − λ·w), held constant; k and λ by the sign of the token's A
        s           = φ·A·log π_θ
        ∂s/∂log π_θ = φ·A

    So φ is 1 on-policy, and falls to 0 where the sequence has become much more, or much less, likely.

    Parameters
    ----------
    k_pos, k_neg : float, in [0, inf)
        k where A ≥ 0, and where A < 0. TRL ``vespo_k_pos``, ``vespo_k_neg``.
    lambda_pos, lambda_neg : float, in [0, inf)
        λ where A ≥ 0, and where A < 0. TRL ``vespo_lambda_pos``, ``vespo_lambda_neg``.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    Notes
    -----
    TRL multiplies w by the weights of vLLM's importance sampling. Here that is ``old_logps``, the sampler's, and no
    ``rollout_is_weights``: but for the limits of each factor, the same.

    References
    ----------
    VESPO, arXiv:2602.10693.
    """

    __slots__ = ()

    def __new__(cls, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0) -> Self:
        return super().__new__(
            cls,
            not_negative("k_pos", k_pos),
            not_negative("lambda_pos", lambda_pos),
            not_negative("k_neg", k_neg),
            not_negative("lambda_neg", lambda_neg),
        )


@kept
class GMPO(Option, NamedTuple("GMPO", [("epsilon", float), ("epsilon_high", float)])):
    """The geometric mean of ratios, of which each is clipped by itself; at sequence level only.

    ::

        c_t            = min(log ρ_t, ε_high) where A > 0,  max(log ρ_t, −ε) where A < 0
        s              = exp(mean of c_t)·A, for each token of the sequence
        ∂s/∂log ρ_t    = s/n where c_t = log ρ_t,  else 0

    A is one per sequence. The bounds are of log ρ, not of ρ.

    Parameters
    ----------
    epsilon : float, in [0, inf]
        ε: how far log ρ may fall below 0 before a token with A < 0 stops counting.
        verl ``clip_ratio_low`` with ``loss_mode="geo_mean"``; 0.4 in the paper.
    epsilon_high : float, in [0, inf], optional
        ε_high: how far log ρ may rise above 0 before a token with A > 0 stops counting; as ε unless given.

    Raises
    ------
    TypeError, ValueError
        A parameter is not a number, or is outside its interval.

    References
    ----------
    GMPO, arXiv:2507.20673, Eq. 4.
    """

    __slots__ = ()

    def __new__(cls, epsilon: float = 0.4, epsilon_high: float | None = None) -> Self:
        low = number("epsilon", epsilon, "in [0, inf]", lambda x: x >= 0)
        high = low if epsilon_high is None else number("epsilon_high", epsilon_high, "in [0, inf]", lambda x: x >= 0)
        return super().__new__(cls, low, high)


Surrogate: TypeAlias = Clip | CISPO | SAPO | Unclipped | VESPO | GMPO
#: Those that are of whole sequences, and of no tokens.
OF_SEQUENCES = VESPO, GMPO
#: The surrogate where none is given.
DEFAULT_SURROGATE: Surrogate = Clip()

"""The options as values: policy terms (``Clip`` …), trust regions (``TV`` …), KL terms (``K1`` …); and ``Options``.

A term is a NamedTuple; one whose fields are floats is read by Numba as it is, which compiles one kernel for each class,
while the numbers stay run-time values. (Of a KL term a kernel reads what `_kernels.formulas.kl_for_kernels` makes of
it.) Every way to make one (call, ``_replace``, copy, unpickle) goes through its constructor, so a kernel never meets an
invalid term, nor a None or an int that would make it another type. It prints as it is called, with as little as makes
it again: ``K3(beta=0.04)``.

Notation, per token: ρ = π_θ/π_old (for a whole sequence at sequence level), A the advantage, l = log π_θ − log π_ref.
"""

import inspect
import math
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, TypeVar, get_args

import numpy as np

from ._checks import not_negative, number, one_of, positive

Level: TypeAlias = Literal["token", "sequence", "sequence_token"]
Aggregation: TypeAlias = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]
#: Whether a KL term is multiplied by a ratio: the token's own, or that of its sequence.
ImportanceWeighted: TypeAlias = bool | Literal["sequence"]
KLGradient: TypeAlias = Literal["own", "score", "k2"]
LEVELS: tuple[str, ...] = get_args(Level)
KL_GRADIENTS: tuple[str, ...] = get_args(KLGradient)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
#: The defaults of ε and β, wherever they are parameters of a call or options of the command.
EPSILON = 0.2
BETA = 0.01


# --- what all options share -------------------------------------------------------------------------------------------
_Class = TypeVar("_Class", bound=type)
#: The classes below, by name. They outlive `importlib.reload`, and a notebook's autoreload: kernels and other modules
#: know an option by its class, and a second ``Clip`` would be unknown to them.
_FIRST: dict[str, Any] = globals().get("_FIRST", {})


def _kept(option: _Class) -> _Class:
    """The decorator of each class of options: the first class of its name."""
    kept: _Class = _FIRST.setdefault(option.__name__, option)
    return kept


@_kept
class _Option(tuple[Any, ...]):
    """Makes a NamedTuple equal only to those of its class, and every way to make one go through its constructor."""

    __slots__ = ()

    # `_replace` calls it, too; the NamedTuple's own goes around `__new__`. Any: mypy knows that one by odd arguments.
    _make: ClassVar[Any] = classmethod(lambda cls, fields: cls(*fields))

    def __eq__(self, other: object) -> bool:  # K1(0.1) and K2(0.1) hold the same numbers and mean different terms
        return type(self) is type(other) and super().__eq__(other)

    def __ne__(self, other: object) -> bool:  # a tuple's own would be found otherwise
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), super().__hash__()))

    def __repr__(self) -> str:
        # Fields without a default, the first one, and others that are not what they are when left out.
        fields: Any = dict(zip(self._fields, self, strict=True))  # type: ignore[attr-defined]  # of NamedTuples
        parameters = inspect.signature(type(self)).parameters
        shown = {name: x for name, x in fields.items() if parameters[name].default is inspect.Parameter.empty}
        for name, value in fields.items():
            if not shown or (name not in shown and getattr(type(self)(**shown), name) != value):
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={_literal(value)}' for name, value in shown.items())})"


def _literal(value: object) -> str:
    """What makes the value in Python's source; of infinity, which has no literal, a call."""
    return "float('inf')" if value == math.inf else repr(value)


# --- the policy term s(ρ, A) ------------------------------------------------------------------------------------------
@_kept
class Clip(_Option, NamedTuple("Clip", [("epsilon", float), ("epsilon_high", float), ("delta", float)])):
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


@_kept
class CISPO(_Option, NamedTuple("CISPO", [("ratio_max", float), ("ratio_min", float)])):
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


@_kept
class SAPO(_Option, NamedTuple("SAPO", [("tau_pos", float), ("tau_neg", float)])):
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


@_kept
class Unclipped(_Option, NamedTuple("Unclipped", [])):
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


@_kept
class VESPO(
    _Option,
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


@_kept
class GMPO(_Option, NamedTuple("GMPO", [("epsilon", float), ("epsilon_high", float)])):
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


# --- the trust region M: which tokens keep their policy term ----------------------------------------------------------
class _TrustRegion(_Option, NamedTuple("_TrustRegion", [("delta", float), ("delta_low", float)])):
    """What the two regions of a token's probability share: a bound for A > 0 and one for A < 0."""

    __slots__ = ()


@_kept
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


@_kept
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


@_kept
class Band(_Option, NamedTuple("Band", [("ratio_min", float), ("ratio_max", float)])):
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


# --- the KL term k(l) -------------------------------------------------------------------------------------------------
@_kept
class _KL(
    _Option,
    NamedTuple("_KL", [("beta", float), ("importance_weighted", ImportanceWeighted), ("gradient", KLGradient)]),
):
    """What the three estimators of KL(π_θ ‖ π_ref) share; l = log π_θ − log π_ref (Schulman 2020, `kl-approx`_).

    .. _kl-approx: http://joschu.net/blog/kl-approx.html
    """

    __slots__ = ()

    def __new__(cls, beta: float, importance_weighted: ImportanceWeighted = True, gradient: KLGradient = "own") -> Self:
        beta = not_negative("beta", beta)
        if not (isinstance(importance_weighted, str) and importance_weighted == "sequence"):
            if not isinstance(importance_weighted, (bool, np.bool_)):
                raise TypeError(f"importance_weighted must be True, False or 'sequence', got {importance_weighted!r}")
            importance_weighted = bool(importance_weighted)
        gradient = one_of("gradient", gradient, KL_GRADIENTS)
        if gradient != "own" and importance_weighted is not False:
            raise ValueError(
                f"gradient must be 'own' unless importance_weighted=False, as it is that of the KL term without ρ; "
                f"got {gradient!r} with importance_weighted={importance_weighted!r}"
            )
        return super().__new__(cls, beta, importance_weighted, gradient)


@_kept
class K1(_KL):
    """The plain estimator: unbiased in value, of either sign, high variance.

    ::

        k1      = l                 penalty: −β·k1, or −β·ρ·k1 when importance-weighted
        ∂k1/∂l  = 1                 ∂(ρ·k1)/∂l = ρ(1 + l)

    Parameters
    ----------
    beta : float, in [0, inf)
        β. TRL ``beta`` (which has no k1); verl ``kl_loss_coef`` with ``kl_loss_type="k1"`` (or ``"kl"``).
    importance_weighted : bool or "sequence"
        Whether the token's ρ, at every level, multiplies k1: unbiased under samples from π_old. Its gradient, unlike
        that of k1 alone, is the KL's. "sequence": the sequence's ρ instead, see `K3`.
    gradient : "own", "score" or "k2"
        As of `K3`; verl's "k1+" is "k2".

    Raises
    ------
    TypeError, ValueError
        ``beta`` is not a number in its interval, ``importance_weighted`` not a bool nor "sequence", ``gradient`` none
        of the words, or not "own" though the term is importance-weighted.

    References
    ----------
    Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """

    __slots__ = ()


@_kept
class K2(_KL):
    """The squared estimator: biased in value, and its gradient alone is, on-policy, that of the KL.

    ::

        k2      = l²/2              penalty: −β·k2, or −β·ρ·k2 when importance-weighted
        ∂k2/∂l  = l                 ∂(ρ·k2)/∂l = ρ(l + l²/2)

    Parameters
    ----------
    beta : float, in [0, inf)
        β. TRL ``beta`` (which has no k2); verl ``kl_loss_coef`` with ``kl_loss_type="k2"`` (or ``"mse"``).
    importance_weighted : bool or "sequence"
        Whether the token's ρ, at every level, multiplies k2. "sequence": the sequence's ρ instead, see `K3`.
    gradient : "own", "score" or "k2"
        As of `K3`; "k2" is its own.

    Raises
    ------
    TypeError, ValueError
        ``beta`` is not a number in its interval, ``importance_weighted`` not a bool nor "sequence", ``gradient`` none
        of the words, or not "own" though the term is importance-weighted.

    References
    ----------
    Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """

    __slots__ = ()


@_kept
class K3(_KL):
    """GRPO's estimator: unbiased in value, never negative, low variance.

    ::

        k3      = e^(−l) + l − 1    penalty: −β·k3, or −β·ρ·k3 when importance-weighted
        ∂k3/∂l  = 1 − e^(−l)        ∂(ρ·k3)/∂l = ρ·l

    Parameters
    ----------
    beta : float, in [0, inf)
        β. TRL ``beta``; verl ``kl_loss_coef`` with ``kl_loss_type="low_var_kl"`` (or ``"k3"``).
    importance_weighted : bool or "sequence"
        Whether the token's ρ, at every level, multiplies k3, which makes value and gradient unbiased under samples from
        π_old. TRL ``use_bias_correction_kl``, True there unless changed (in 1.16). With "sequence", at sequence level
        alone, the sequence's ρ multiplies it, as in TRL up to 1.16, which adds (Σk3)·∂ρ to the gradient.
    gradient : "own", "score" or "k2"
        The gradient of the term, whose value stays; another than its own without ``importance_weighted`` only.
        "score" has the sampling term, ρ·(k3 + ∂k3/∂l) = ρ·l (NeMo-RL, OpenRLHF ``unbiased_gradient``); "k2" is l, that
        of `K2` (verl ``kl_loss_type="k3+"``).

    Raises
    ------
    TypeError, ValueError
        ``beta`` is not a number in its interval, ``importance_weighted`` not a bool nor "sequence", ``gradient`` none
        of the words, or not "own" though the term is importance-weighted.

    References
    ----------
    GRPO (DeepSeekMath), arXiv:2402.03300, Eq. 4. Weighted: DeepSeek-V3.2, arXiv:2512.02556, Eq. 7.
    """

    __slots__ = ()


# --- all of them ------------------------------------------------------------------------------------------------------
Surrogate: TypeAlias = Clip | CISPO | SAPO | Unclipped | VESPO | GMPO
TrustRegion: TypeAlias = TV | BinaryKL | Band
KL: TypeAlias = K1 | K2 | K3

_SURROGATES, _TRUST_REGIONS, _KLS = get_args(Surrogate), get_args(TrustRegion), get_args(KL)
#: Surrogates that are of whole sequences, and of no tokens.
_OF_SEQUENCES = VESPO, GMPO


def _instead(value: object, option: str) -> str:
    """The end of a message: what was meant by a number, or by a class, in place of an option."""
    if isinstance(value, type) and value in (*_SURROGATES, *_KLS, *_TRUST_REGIONS):
        numbers = "" if value in _SURROGATES else "0.5, 2" if value is Band else "0.2" if value is TV else "0.04"
        return f": make one, such as {value.__name__}({numbers})"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f": did you mean {option}({value!r})?" if is_number else ""


def _refuse_unless_region(trust_region: object, level: Level) -> None:
    """Raise the error for what is no trust region, or is of single tokens where ρ is one for a sequence."""
    if type(trust_region) not in _TRUST_REGIONS:
        allowed = "a TV, BinaryKL, Band or None"
        raise TypeError(f"trust_region must be {allowed}, got {trust_region!r}{_instead(trust_region, 'TV')}")
    if type(trust_region) is not Band and level != "token":
        raise ValueError(
            f"trust_region must be a Band or None at importance_sampling_level={level!r}, as a "
            f"{type(trust_region).__name__} is of single tokens; got {trust_region!r}"
        )


def _refuse_at_other_levels(surrogate: Surrogate, kl: KL | None, level: Level) -> None:
    """Raise the ValueError for what is known at sequence level only."""
    if type(surrogate) in _OF_SEQUENCES:
        raise ValueError(
            f"importance_sampling_level must be 'sequence' with a {type(surrogate).__name__}, which is of whole "
            f"sequences; got {level!r}"
        )
    if kl is not None and kl.importance_weighted == "sequence":
        raise ValueError(
            f"importance_sampling_level must be 'sequence' with importance_weighted='sequence' in the KL term, got "
            f"{level!r}"
        )


#: The surrogate where none is given.
DEFAULT_SURROGATE: Surrogate = Clip()


@_kept
class Options(
    _Option,
    NamedTuple(
        "Options",
        [
            ("surrogate", Surrogate),
            ("kl", KL | None),
            ("importance_sampling_level", Level),
            ("aggregation", Aggregation),
            ("normalizer", float | None),
            ("trust_region", TrustRegion | None),
        ],
    ),
):
    """What `grpo_loss` computes: all its options, checked. Only `Stats` of the same options can be added.

    Raises
    ------
    TypeError, ValueError
        An option is of another type, not one of the words allowed, or outside its interval.
    """

    __slots__ = ()

    def __new__(
        cls,
        surrogate: Surrogate = DEFAULT_SURROGATE,
        kl: KL | None = None,
        importance_sampling_level: Level = "token",
        aggregation: Aggregation = "seq-mean-token-mean",
        normalizer: float | None = None,
        trust_region: TrustRegion | None = None,
    ) -> Self:
        if type(surrogate) not in _SURROGATES:
            names = f"{', '.join(x.__name__ for x in _SURROGATES[:-1])} or {_SURROGATES[-1].__name__}"
            raise TypeError(f"surrogate must be a {names}, got {surrogate!r}{_instead(surrogate, 'Clip')}")
        if kl is not None and type(kl) not in _KLS:
            raise TypeError(f"kl must be a K1, K2, K3 or None, got {kl!r}{_instead(kl, 'K3')}")
        level = one_of("importance_sampling_level", importance_sampling_level, LEVELS)
        if level != "sequence":
            _refuse_at_other_levels(surrogate, kl, level)
        if trust_region is not None:
            _refuse_unless_region(trust_region, level)
        return super().__new__(
            cls,
            surrogate,
            kl,
            level,
            one_of("aggregation", aggregation, AGGREGATIONS),
            None if normalizer is None else not_negative("normalizer", normalizer),
            trust_region,
        )

    @property
    def mean_within(self) -> bool:
        """Whether a sequence's sum is divided by the number of its tokens before it is added to others."""
        return self.aggregation == "seq-mean-token-mean"

    def denominator(self, tokens: int, sequences: int | None) -> float:
        """What the sum over all is divided by, for so many unmasked tokens and sequences; at least 1 unless given.

        Raises
        ------
        ValueError
            The normalizer is 0 although there are tokens. Where there are none, 1 serves as well.
        """
        if self.normalizer == 0 and tokens:
            raise ValueError(f"normalizer must be above 0 where a token counts, got {self.normalizer!r}")
        if self.normalizer:
            return self.normalizer
        if self.aggregation == "token-sum":
            return 1.0
        counted = tokens if self.aggregation == "token-mean" else sequences
        return float(max(counted or 0, 1))  # to a kernel an int would be another type

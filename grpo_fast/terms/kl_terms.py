"""The KL term k(l), whose ratio multiplies it and what its gradient is: `K1`, `K2`, `K3`."""

from typing import Literal, NamedTuple, Self, TypeAlias, get_args

import numpy as np

from .._checks import not_negative, one_of
from .option import Option, kept

#: Whether a KL term is multiplied by a ratio: the token's own, or that of its sequence.
ImportanceWeighted: TypeAlias = bool | Literal["sequence"]
KLGradient: TypeAlias = Literal["own", "score", "k2"]
KL_GRADIENTS: tuple[str, ...] = get_args(KLGradient)
#: The default of β, wherever it is a parameter of a call or an option of the command.
BETA = 0.01


@kept
class _KL(
    Option,
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


@kept
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


@kept
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


@kept
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


KL: TypeAlias = K1 | K2 | K3

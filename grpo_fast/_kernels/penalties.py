"""The KL term on vectors of tokens, as penalised: the classes of its estimator and its weighting pick the formula.

As in `formulas`, while a kernel is compiled. Sources are in `terms`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from ..terms import K1, K2, K3, KL
from .compiling import inlined, inlined_by_type, inlined_or_none
from .simd import constant, fma, full_like, wide
from .ways import k3_in, plus_in, plus_product_in, times_in


class K1Penalty(NamedTuple):
    """What kernels know of a K1."""

    beta: float


class K2Penalty(NamedTuple):
    """What kernels know of a K2."""

    beta: float


class K3Penalty(NamedTuple):
    """What kernels know of a K3."""

    beta: float


class Unweighted(NamedTuple):
    """k as it is."""


class Weighted(NamedTuple):
    """k, times the token's own ρ."""


class WeightedBySequence(NamedTuple):
    """k, times the ρ of its sequence."""


class Score(NamedTuple):
    """k as it is, with the gradient of k times the token's own ρ."""


class SlopeOfK2(NamedTuple):
    """k as it is, with the gradient of k2."""


_PENALTIES = {K1: K1Penalty, K2: K2Penalty, K3: K3Penalty}
_WEIGHTED = {True: Weighted(), "sequence": WeightedBySequence()}
_BY_GRADIENT = {"own": Unweighted(), "score": Score(), "k2": SlopeOfK2()}


@lru_cache(maxsize=64)
def kl_for_kernels(kl: KL | None) -> tuple[Any, Any]:
    """What kernels know of a KL term: its β, of a class for each estimator, or None; and how it is weighted.

    Each is a class, which picks the formula when a kernel is compiled: asked for in a loop, a bool keeps LLVM from
    making the loop's constants before it.
    """
    if kl is None:
        return None, Unweighted()
    weighting = _WEIGHTED.get(kl.importance_weighted, _BY_GRADIENT[kl.gradient])
    return _PENALTIES[type(kl)](kl.beta), weighting


class KLTerm(NamedTuple):
    """k; ∂k/∂l; and, written down instead of summed, k + ∂k/∂l, which is what the token's own ρ multiplies."""

    value: Any
    slope: Any
    value_and_slope: Any


@inlined_by_type
def kl_term(way, kl, l):
    """The `KLTerm` of each token, without β and ρ."""
    option = kl.instance_class

    if option is K1Penalty:

        def term(way, kl, l):
            one = full_like(l, 1.0)
            return KLTerm(l, one, l + one)

    elif option is K2Penalty:

        def term(way, kl, l):
            half = constant(l, 0.5) * l
            return KLTerm(half * l, l, fma(half, l, l))

    else:
        assert option is K3Penalty

        def term(way, kl, l):
            d = k3_in(way, -l)
            return KLTerm(d.k3, -d.expm1, l)

    return term


@inlined_by_type
def has_own_ratio(weighting):
    """Whether the token's own ρ multiplies k, or its gradient."""
    answer = weighting.instance_class in (Weighted, Score)
    return lambda weighting: answer


@inlined_by_type
def has_ratio_of_sequence(weighting):
    """Whether the ρ of its sequence multiplies k, which is in neither of the following."""
    answer = weighting.instance_class is WeightedBySequence
    return lambda weighting: answer


@inlined_by_type
def penalty(way, weighting, rho, term):
    """The KL term as penalised, of a `KLTerm` and the token's own ρ."""
    if weighting.instance_class is Weighted:
        return lambda way, weighting, rho, term: times_in(way, rho, term.value)
    return lambda way, weighting, rho, term: term.value


@inlined_by_type
def plus_penalty(way, weighting, rho, term, total):
    """``total`` + `penalty`; of a product, in one rounding."""
    if weighting.instance_class is Weighted:
        return lambda way, weighting, rho, term, total: plus_product_in(way, total, rho, term.value)
    return lambda way, weighting, rho, term, total: plus_in(way, total, term.value)


@inlined_by_type
def penalty_slope(way, weighting, rho, l, term):
    """The derivative by log π_θ that goes with `penalty`."""
    kind = weighting.instance_class
    if kind in (Weighted, Score):
        return lambda way, weighting, rho, l, term: times_in(way, rho, term.value_and_slope)
    if kind is SlopeOfK2:
        return lambda way, weighting, rho, l, term: l
    return lambda way, weighting, rho, l, term: term.slope


class Penalised(NamedTuple):
    """The KL term of a vector as penalised, without β and the ρ of its sequence."""

    term: KLTerm
    value: Any
    slope: Any  # by log π_θ


@inlined_or_none
def penalised_term(kl, way, weighting, rho, l):
    """The `Penalised` KL term, of l and the token's own ρ, where that is needed; None without one."""
    term = kl_term(way, kl, l)
    return Penalised(term, penalty(way, weighting, rho, term), penalty_slope(way, weighting, rho, l, term))


@inlined
def plus_weighted_penalty(u, way, penalised, total):
    """``total``, in float64, with the `Penalised` term times the loss weights; as it was without one of them."""
    if u is None:
        return total
    return _plus_times(penalised, way, u, total)


@inlined
def _plus_times(penalised, way, u, total):
    if penalised is None:
        return total
    return total + wide(times_in(way, u, penalised.value))

"""The terms of the loss on vectors of tokens: one function for each idea, whose formula the class of the option picks.

While a kernel is compiled, `inlined_by_type` looks at that class and takes the one body for it; the option's numbers
stay run-time values. Formulas and sources are in `terms`; what an overflow becomes is in the header of `reference`.
"""

from typing import Any, NamedTuple

from ..terms import CISPO, K1, K2, K3, SAPO, TV, Band, BinaryKL, Clip, Unclipped
from .compiling import inlined, inlined_by_type
from .elementary import NEAR_RATIO, exp, exp_of_any, k3_of_any_log, layout, log_of_any
from .simd import constant, fma, full_like, tally, where
from .sums import Clipped
from .ways import Near, k3_in, plus_in, plus_product_in, times_in


# --- the policy term --------------------------------------------------------------------------------------------------
class PolicyTerm(NamedTuple):
    """s, and its derivative: by log ρ if it `passes_through_ratio`, else by log π_θ with ρ held constant."""

    value: Any
    slope: Any


@inlined_by_type
def surrogate_term(way, surrogate, rho, a, logp):
    """The `PolicyTerm` of each token."""
    option = surrogate.instance_class

    if option is Clip and way.instance_class is Near:

        def term(way, surrogate, rho, a, logp):
            low = full_like(rho, 1.0 - surrogate.epsilon)
            high = full_like(rho, 1.0 + surrogate.epsilon_high)
            bounded = where(a < 0.0, where(rho < low, low, rho), where(rho > high, high, rho))
            value = bounded * a
            return PolicyTerm(value, where(rho * a == value, value, full_like(rho, 0.0)))

    elif option is Clip:

        def term(way, surrogate, rho, a, logp):
            low = full_like(rho, 1.0 - surrogate.epsilon)
            high = full_like(rho, 1.0 + surrogate.epsilon_high)
            delta = full_like(rho, surrogate.delta)
            # The sign of A picks the one of the two operands that can be the lesser, and δ can only matter where A < 0.
            raised = where(rho < low, low, rho)
            bounded = where(a < 0.0, where(raised > delta, delta, raised), where(rho > high, high, rho))
            value = bounded * a
            unbound = (rho * a == value) & (rho <= delta)
            return PolicyTerm(value, where(unbound, value, full_like(rho, 0.0)))

    elif option is CISPO:

        def term(way, surrogate, rho, a, logp):
            low = full_like(rho, surrogate.ratio_min)
            high = full_like(rho, surrogate.ratio_max)
            weight = times_in(way, where(rho < low, low, where(rho > high, high, rho)), a)
            return PolicyTerm(times_in(way, weight, logp), weight)

    elif option is Unclipped:

        def term(way, surrogate, rho, a, logp):
            value = times_in(way, rho, a)
            return PolicyTerm(value, value)

    else:
        assert option is SAPO

        def term(way, surrogate, rho, a, logp):
            tau = where(a > 0.0, full_like(rho, surrogate.tau_pos), full_like(rho, surrogate.tau_neg))
            x = tau * (rho - 1.0)
            limit = full_like(rho, layout(rho).exp_limit)
            closed = x > limit  # the gate, so far that nothing is left of its slope
            x = where(closed, limit, where(x < -limit, -limit, x))
            decay = exp(-x)
            gate = 1.0 / (1.0 + decay)  # σ(x), and decay·gate is 1 − σ(x) without the cancellation
            slope = where(closed, full_like(rho, 0.0), 4.0 * gate * (decay * gate) * (rho * a))
            height = where(a > 0.0, full_like(rho, 4.0 / surrogate.tau_pos), full_like(rho, 4.0 / surrogate.tau_neg))
            return PolicyTerm(height * gate * a, slope)

    return term


@inlined_by_type
def linear_factor(surrogate, a, logp):
    """The factor in which s is linear, for a given ρ and a given sign of A: A, or A·log π_θ."""
    if surrogate.instance_class is CISPO:
        return lambda surrogate, a, logp: a * logp
    assert surrogate.instance_class in (Clip, SAPO, Unclipped)
    return lambda surrogate, a, logp: a


@inlined_by_type
def passes_through_ratio(surrogate):
    """Whether the slope of `surrogate_term` is by log ρ, and not by log π_θ with ρ held constant."""
    answer = surrogate.instance_class is not CISPO
    assert surrogate.instance_class in (Clip, CISPO, SAPO, Unclipped)
    return lambda surrogate: answer


@inlined_by_type
def count_clipped(way, surrogate, rho, a, counts):
    """The counts, a `Clipped` in lanes, with those of these tokens added that are clipped."""
    option = surrogate.instance_class

    # Selected first and compared then: of two comparisons, joined, LLVM makes 16-bit lanes and back (AVX2), some 50
    # instructions for three counts of 8 tokens. It joins them itself if it can see that what stands in for ρ, here 1,
    # is within the bounds.
    if option is Clip and way.instance_class is Near:

        def count(way, surrogate, rho, a, counts):
            losing = where(a < 0.0, rho, full_like(rho, 1.0))
            winning = where(a > 0.0, rho, full_like(rho, 1.0))
            return Clipped(
                tally(counts.low, losing < full_like(rho, 1.0 - surrogate.epsilon)),
                tally(counts.high, winning > full_like(rho, 1.0 + surrogate.epsilon_high)),
                counts.hard,
                counts.dropped,
            )

    elif option is Clip:

        def count(way, surrogate, rho, a, counts):
            losing = where(a < 0.0, rho, full_like(rho, 1.0))
            winning = where(a > 0.0, rho, full_like(rho, 1.0))
            return Clipped(
                tally(counts.low, losing < full_like(rho, 1.0 - surrogate.epsilon)),
                tally(counts.high, winning > full_like(rho, 1.0 + surrogate.epsilon_high)),
                tally(counts.hard, losing > full_like(rho, surrogate.delta)),
                counts.dropped,
            )

    elif option is CISPO:

        def count(way, surrogate, rho, a, counts):
            winning = where(a > 0.0, rho, full_like(rho, 0.0))
            hard = tally(counts.hard, winning > full_like(rho, surrogate.ratio_max))
            return Clipped(counts.low, counts.high, hard, counts.dropped)

    else:
        assert option in (SAPO, Unclipped)

        def count(way, surrogate, rho, a, counts):
            return counts

    return count


@inlined_by_type
def near_holds(surrogate):
    """Whether the near way, in which nothing is said of δ, may be tried: whether no ρ that is near is beyond it."""
    if surrogate.instance_class is Clip:
        return lambda surrogate: surrogate.delta > NEAR_RATIO
    return lambda surrogate: True


@inlined_by_type
def gradient_may_be_nan(surrogate):
    """Whether a slope may be infinite though the policy term is finite: then ∞ − ∞ may be in the gradient."""
    answer = surrogate.instance_class is SAPO
    return lambda surrogate: answer


# --- the trust region -------------------------------------------------------------------------------------------------
@inlined_by_type
def excess(trust_region, rho, a, logp, old):
    """What is above 0 where the trust region drops a token of such ρ, A, log π_θ and log π_old; 0 or less elsewhere."""
    option = trust_region.instance_class

    if option is Band:

        def beyond(trust_region, rho, a, logp, old):
            one, zero = full_like(rho, 1.0), full_like(rho, 0.0)
            outside = where(rho < full_like(rho, trust_region.ratio_min), one, zero)
            outside = where(rho > full_like(rho, trust_region.ratio_max), one, outside)
            return where(a == 0.0, zero, outside)

    elif option is TV:

        def beyond(trust_region, rho, a, logp, old):
            moved = exp_of_any(_at_most_0(logp)) - exp_of_any(_at_most_0(old))
            return _beyond_bounds(trust_region, a, moved, -moved)

    else:
        assert option is BinaryKL

        def beyond(trust_region, rho, a, logp, old):
            logp, old = _at_most_0(logp), _at_most_0(old)
            zero, none = full_like(rho, 0.0), full_like(rho, -1.0)
            other, other_old = zero - k3_of_any_log(logp).expm1, zero - k3_of_any_log(old).expm1
            rest = where(other_old == 0.0, zero, other_old * log_of_any(other_old / other))
            divergence = exp_of_any(old) * (old - logp) + rest
            rises, falls = where(logp > old, divergence, none), where(logp < old, divergence, none)
            return _beyond_bounds(trust_region, a, rises, falls)

    return beyond


@inlined
def _at_most_0(logp):
    return where(logp > 0.0, full_like(logp, 0.0), logp)


@inlined
def _beyond_bounds(trust_region, a, rise, fall):
    """1 where a rise is beyond δ and A > 0, or a fall beyond δ_low and A < 0; 0 elsewhere."""
    one, zero = full_like(a, 1.0), full_like(a, 0.0)
    up = where(rise > full_like(a, trust_region.delta), one, zero)
    down = where(fall > full_like(a, trust_region.delta_low), one, zero)
    return where(a > 0.0, up, where(a < 0.0, down, zero))


# --- the KL term ------------------------------------------------------------------------------------------------------
class KLTerm(NamedTuple):
    """k; ∂k/∂l; and, written down instead of summed, k + ∂k/∂l, which is what ρ multiplies at token level."""

    value: Any
    slope: Any
    value_and_slope: Any


@inlined_by_type
def kl_term(way, kl, l):
    """The `KLTerm` of each token, without β and ρ."""
    option = kl.instance_class

    if option is K1:

        def term(way, kl, l):
            one = full_like(l, 1.0)
            return KLTerm(l, one, l + one)

    elif option is K2:

        def term(way, kl, l):
            half = constant(l, 0.5) * l
            return KLTerm(half * l, l, fma(half, l, l))

    else:
        assert option is K3

        def term(way, kl, l):
            d = k3_in(way, -l)
            return KLTerm(d.k3, -d.expm1, l)

    return term


class Unweighted(NamedTuple):
    """k as it is."""


class Weighted(NamedTuple):
    """k, times the token's ρ."""


#: By ``importance_weighted``, what picks the formula when a kernel is compiled: asked for in a loop, a bool keeps LLVM
#: from making the loop's constants before it.
WEIGHTINGS = (Unweighted(), Weighted())


@inlined_by_type
def is_weighted(weighting):
    """Whether ρ multiplies k."""
    answer = weighting.instance_class is Weighted
    return lambda weighting: answer


@inlined_by_type
def add_weighted(way, weighting, rho, term, total):
    """``total`` with the KL term as penalised, of a `KLTerm`, and its derivative by log π_θ at token level."""
    if weighting.instance_class is Weighted:
        return lambda way, weighting, rho, term, total: (
            plus_product_in(way, total, rho, term.value),
            times_in(way, rho, term.value_and_slope),
        )
    return lambda way, weighting, rho, term, total: (plus_in(way, total, term.value), term.slope)

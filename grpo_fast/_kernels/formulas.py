"""The policy term on vectors of tokens: one function for each idea, whose formula the class of the option picks.

While a kernel is compiled, `inlined_by_type` looks at that class and takes the one body for it; the option's numbers
stay run-time values. Formulas and sources are in `terms`; what an overflow becomes is in the header of `reference`.
"""

import math
from typing import Any, NamedTuple

from ..terms import CISPO, GMPO, SAPO, TV, VESPO, Band, BinaryKL, Clip, Unclipped
from .compiling import inlined, inlined_by_type
from .elementary import NEAR_RATIO, exp, exp_of_any, k3_of_any_log, layout, log_of_any
from .simd import every, full_like, tally, where
from .sums import Clipped
from .ways import Near, times_in

# --- the policy term --------------------------------------------------------------------------------------------------
#: Surrogates with a slope by log π_θ, whose ratio is held constant; that of the others is by log ρ.
HELD_CONSTANT = (CISPO, VESPO)


class PolicyTerm(NamedTuple):
    """s, and its derivative: by log ρ, or by log π_θ if the surrogate is among those of `HELD_CONSTANT`."""

    value: Any
    slope: Any


@inlined_by_type
def surrogate_term(way, surrogate, rho, a, logp):
    """The `PolicyTerm` of each token; of VESPO and GMPO, ρ is what `ratio_of_sequence` puts in its place."""
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

    elif option is VESPO:

        def term(way, surrogate, rho, a, logp):
            weight = times_in(way, rho, a)
            return PolicyTerm(times_in(way, weight, logp), weight)

    elif option in (Unclipped, GMPO):

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
    if surrogate.instance_class in HELD_CONSTANT:
        return lambda surrogate, a, logp: a * logp
    assert surrogate.instance_class in (Clip, SAPO, Unclipped, GMPO)
    return lambda surrogate, a, logp: a


# --- ... of a sequence whose log-ratios are bounded one by one --------------------------------------------------------
_LOG_RATIO_LIMIT = 20.0  # of VESPO, of each token and of their sum
_LEAST_LOG_WEIGHT = math.log(1e-8)


@inlined_by_type
def bounded_log_ratio(surrogate, log_rho, a):
    """The log-ratio of each token as the surrogate bounds it; 0 if it bounds none."""
    option = surrogate.instance_class

    if option is VESPO:

        def bounded(surrogate, log_rho, a):
            limit = full_like(log_rho, _LOG_RATIO_LIMIT)
            return where(log_rho > limit, limit, where(log_rho < -limit, -limit, log_rho))

    elif option is GMPO:

        def bounded(surrogate, log_rho, a):
            low, high = full_like(log_rho, -surrogate.epsilon), full_like(log_rho, surrogate.epsilon_high)
            return where(a > 0.0, where(log_rho > high, high, log_rho), where(log_rho < low, low, log_rho))

    else:

        def bounded(surrogate, log_rho, a):
            return full_like(log_rho, 0.0)

    return bounded


@inlined_by_type
def ratio_of_sequence(surrogate, rho, a, bounded, tokens):
    """What stands in `surrogate_term` for a sequence of so many tokens: ρ; or what its bounded log-ratios make.

    ``bounded`` is their sum: of GMPO the exp of their mean, of VESPO φ for the sign of A.
    """
    option = surrogate.instance_class

    if option is VESPO:

        def ratio(surrogate, rho, a, bounded, tokens):
            log_weight = full_like(rho, min(max(bounded, _LEAST_LOG_WEIGHT), _LOG_RATIO_LIMIT))
            k = where(a < 0.0, full_like(rho, surrogate.k_neg), full_like(rho, surrogate.k_pos))
            slope = where(a < 0.0, full_like(rho, surrogate.lambda_neg), full_like(rho, surrogate.lambda_pos))
            return exp_of_any(slope + k * log_weight - slope * exp_of_any(log_weight))

    elif option is GMPO:

        def ratio(surrogate, rho, a, bounded, tokens):
            return exp_of_any(full_like(rho, bounded / tokens))

    else:

        def ratio(surrogate, rho, a, bounded, tokens):
            return rho

    return ratio


@inlined_by_type
def tokens_are_cut(surrogate):
    """Whether the gradient by a sequence's ρ reaches only those tokens whose log-ratio is not bounded."""
    answer = surrogate.instance_class is GMPO
    return lambda surrogate: answer


@inlined_by_type
def count_bounded(surrogate, log_rho, a, counts):
    """The counts, a `Clipped` in lanes, with those of these tokens added whose own log-ratio is beyond its bound."""
    if surrogate.instance_class is not GMPO:
        return lambda surrogate, log_rho, a, counts: counts

    def count(surrogate, log_rho, a, counts):
        losing = where(a < 0.0, log_rho, full_like(log_rho, 0.0))
        winning = where(a > 0.0, log_rho, full_like(log_rho, 0.0))
        return Clipped(
            tally(counts.low, losing < full_like(log_rho, -surrogate.epsilon)),
            tally(counts.high, winning > full_like(log_rho, surrogate.epsilon_high)),
            counts.hard,
            counts.dropped,
        )

    return count


# --- ... which tokens it clips ----------------------------------------------------------------------------------------
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
        assert option in (SAPO, Unclipped, VESPO, GMPO)

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


@inlined_by_type
def unless_all_kept(trust_region):
    """The trust region where `keeps_all` is true: None; that itself where it never is, so as to be no other type."""
    if getattr(trust_region, "instance_class", None) is TV:
        return lambda trust_region: None
    return lambda trust_region: trust_region


#: More than the errors of two exps of numbers below 0 and of their difference, in float32.
_ROUNDINGS = 1e-6


@inlined_by_type
def keeps_all(trust_region, least, most):
    """Whether tokens of log ρ from ``least`` to ``most``, in each lane, are surely kept, for any π and A.

    Of TV: with d = |log ρ| < 2, π_θ − π_old ≤ e^d − 1 ≤ 2d/(2 − d) and π_old − π_θ ≤ 1 − e^(−d) ≤ 2d/(2 + d), which
    is found without the exps of both policies; of a policy in training nearly all runs are.
    """
    if getattr(trust_region, "instance_class", None) is not TV:
        return lambda trust_region, least, most: False

    def by_ratio(trust_region, least, most):
        upper = 2.0 * trust_region.delta / (2.0 + trust_region.delta) - _ROUNDINGS
        lower = _ROUNDINGS - 2.0 * trust_region.delta_low / (2.0 - trust_region.delta_low)
        return every(most <= full_like(most, upper)) and every(least >= full_like(least, lower))

    return by_ratio


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

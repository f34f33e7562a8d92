"""The policy term where π_θ = π_old: its sign, what it makes of A, and whether ρ is 1 there at all.

There s is ρA = A with the slope A for every policy term that `grpo_loss` has. What is not so, is told here; where
nothing can be read along log ρ then, `AtOne.readable` is False.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .calling import batch
from .curves import GRID, NEAR, Kind, Tokens
from .measuring import power
from .numbers import bisect, tidy
from .report import Finding, number

_ADVANTAGES = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 1000.0)


class AtOne(NamedTuple):
    """What was read where ρ = 1."""

    scale: float  # of the loss: the slope of s/A, negative where the loss is maximised
    factor: float  # how much A = −1 counts beside A = 1
    findings: tuple[Finding, ...]
    readable: bool  # along log ρ
    unit: float = 1.0  # what an advantage of 1 counts, where advantages are clamped


def read(tokens: Tokens) -> AtOne:
    """Read it; the kind of the policy term is settled in ``tokens`` on the way."""
    first = tokens.of(0.0, 1.0)
    tokens.kind = _kind(tokens)
    scale = first[0] / tokens.far if tokens.kind == "weight" else first[1] or first[0]
    found = AtOne(scale, 1.0, (), False)
    if tokens.kind == "ratio":
        other = tuple(_other_ratio(tokens, first))
        if other:
            return found._replace(findings=other)
        silent = _without_gradient(tokens)
        if silent is not None:
            return silent
        if first[0] * first[1] < 0:
            _, nonlinear = _linearity(tokens)
            scale = first[1] if nonlinear else first[0]
            return found._replace(scale=scale, findings=tuple(nonlinear) or (_opposite(tokens, first),))
    findings = [*_sign(tokens, scale)]
    unit, more = _linearity(tokens)
    findings += more
    factor, more = _other_sign(tokens)
    return AtOne(scale, factor, (*findings, *more), factor > 0, unit)


def no_reaction(tokens: Tokens) -> Finding:
    """The finding about a loss that does not react to an advantage of 1."""
    tokens.width = 3
    where = "one sequence, A = 1 beside A = 0, at ρ = 1"
    example = tokens.at(0.0, 1.0)
    for A in (1.0, -1.0, 0.0):
        at = example._replace(advantages=np.array([A]))
        found = tokens.loss(at)
        assert found.grad is not None
        for what, value in (("", found.loss), ("the gradient ", np.sum(found.grad))):
            if not math.isfinite(value):
                text = f"{what}is NaN or infinite for one sequence with an advantage of {A:g}"
                amount = "as of 0·∞ in the branch that is not taken" if what else ""
                return Finding("differs", text, "ρ = 1", amount, at)
    if "mask" in tokens.loss.takes:
        masked = [tokens.loss(tokens.at(0.0, A)._replace(mask=np.zeros((1, 3), bool))) for A in (1.0, 0.0)]
        if all(math.isfinite(x.loss) for x in masked) and masked[0].loss != masked[1].loss:
            what = "the mask is inverted: what is masked counts, and nothing else"
            at = example._replace(mask=np.zeros((1, 3), bool))
            return Finding("differs", what, "A = 1 beside A = 0", "only where the mask is 0 does it matter", at)
    for x in (0.1, -0.1, 0.4, -0.4, 1.0, -1.0, 3.0, -3.0):
        value, _ = tokens.of(x, 1.0)
        if value:
            what = "the policy term is nothing at ρ = 1, where π_θ = π_old"
            return Finding("differs", what, where, f"s/A = {number(value)} at log ρ = {x:g}", example)
    if any(tokens.of(0.0, -1.0)):
        return Finding("differs", "tokens with A > 0 are left out", where, "those with A < 0 count", example)
    return Finding("differs", "does not depend on the advantages", where, "neither loss nor gradient changes", example)


def _kind(tokens: Tokens) -> Kind:
    """Whether s is proportional to log π_θ, as those with a weight that is held constant."""
    near, far = tokens.of(0.0, 1.0, NEAR)[0], tokens.of(0.0, 1.0, 100 * NEAR)[0]
    return "weight" if near and abs(far / near - 100) < 0.01 else "ratio"


# --- the ratio --------------------------------------------------------------------------------------------------------
def _other_ratio(tokens: Tokens, first: tuple[float, float]) -> Iterable[Finding]:
    """What ρ is instead, if it is not 1 where π_θ = π_old, however probable the token is."""
    if "old_logps" not in tokens.loss.takes:
        return
    error = max(1e-6, 100 * tokens.loss.exactness)
    if first[0] == 0 and first[1]:
        x = -0.1
        value = tokens.of(x, 1.0)[0] / first[1]
        for expected, what in (
            (x, "the ratio is log ρ: its exp is missing"),
            (math.expm1(x), "the policy term is (ρ − 1)·A: A less than ρA, with the same gradient"),
        ):
            if abs(value - expected) <= 1e-4 * abs(x):
                amount = f"s/A = 0 at ρ = 1, {number(value)} at log ρ = {x:g}"
                yield Finding("differs", what, "A = 1, ρ = 1", amount, tokens.at(0.0, 1.0))
                return

    s = tokens.value_at
    values = [s(logp, logp) for logp in (-0.05, -0.1, -0.2)]
    if not all(values) or max(abs(value / values[0] - 1) for value in values[1:]) <= error:
        return
    at = values[0]
    with np.errstate(all="ignore"):
        of_new, of_old = np.log(np.divide([at, s(-0.05, -0.08)], [s(-0.08, -0.05), at])) / 0.03
        fits = abs(s(-0.1, -0.07) / at - math.exp(-0.05 * of_new + 0.02 * of_old)) <= 10 * error
    example = batch([[-0.2]], [[-0.2]], [1.0])
    amount = ", ".join(
        f"{number(v / values[0])} at log π = {x:g}" for x, v in zip((-0.1, -0.2), values[1:], strict=True)
    )
    amount = f"s/A is {amount}, in units of that at log π = −0.05"
    what = "where π_θ = π_old the policy term depends on how probable the token is: ρ is not 1 there"
    if fits:
        of_new, of_old = (tidy(float(x), 1e-6) if abs(x) > 1e-6 else 0.0 for x in (of_new, of_old))
        what = f"the ratio is {power('π_θ', of_new)}/{power('π_old', of_old)}, not π_θ/π_old"
        if of_new == 0:
            what = "the policy term does not depend on logps"
        elif of_old == 0:
            what = f"the ratio is {power('π_θ', of_new)}, not π_θ/π_old: old_logps are not used"
        elif 1 in (of_new, of_old):
            one, other, by = ("θ", "old", of_new) if of_old == 1 else ("old", "θ", of_old)
            by = tidy(1 / by, 1e-5)
            what += f": log π_{one} is divided by {number(by)}, as by a temperature, and log π_{other} is not"
    yield Finding("differs", what, "π_θ = π_old", amount, example)


def _opposite(tokens: Tokens, first: tuple[float, float]) -> Finding:
    """Of a policy term and a gradient of opposite signs."""
    x = 0.1  # where a clip leaves 1/ρ alone, and −x where it leaves ρ
    up, down = (tokens.of(signed, 1.0)[0] / first[0] for signed in (x, -x))
    what = "value and gradient of the policy term have opposite signs at ρ = 1"
    if abs(up - math.exp(-x)) < 1e-4:
        what = "the ratio is upside down, π_old/π_θ: its gradient lowers the probability of what is rewarded"
        if first[1] > 0:
            what = "the ratio is upside down, π_old/π_θ, and so is the sign of the loss"
    elif abs(down - math.exp(-x)) < 1e-4:
        what = "the gradient of the policy term has the wrong sign: it is −1 times that of its value"
    elif abs(first[1] / first[0] * tokens.far - 1) < 1e-3:
        what = "the ratio is of log-probabilities, log π_θ/log π_old, not of probabilities: the exp is missing"
    amount = f"s/A = {number(first[0])} and its gradient {number(first[1])}, instead of the same number"
    return Finding("differs", what, "A = 1, ρ = 1", amount, tokens.at(0.0, 1.0), "steep")


# --- the advantage ----------------------------------------------------------------------------------------------------
def _sign(tokens: Tokens, scale: float) -> Iterable[Finding]:
    if scale < 0:
        what = "the sign of the policy term is reversed: minimising this lowers the probability of what is rewarded"
        amount = f"∂loss/∂logp = {number(abs(scale))} where it should be {number(-abs(scale))}"
        yield Finding("differs", what, "A = 1, ρ = 1", amount, tokens.at(0.0, 1.0))


def _without_gradient(tokens: Tokens) -> AtOne | None:
    """Of a loss that has a gradient at ρ = 1 for one sign of A only, though a value for both."""
    if not tokens.loss.gives_gradient:
        return None
    of = {sign: tokens.of(0.0, float(sign)) for sign in (1, -1)}
    silent = [sign for sign in of if of[sign][0] and not of[sign][1] and of[-sign][1]]
    if not silent:
        return None
    sign = silent[0]
    scale = -sign * of[-sign][1]
    s = of[sign][0] / (sign * scale)

    def is_flat(x: float) -> bool:
        return tokens.of(x, float(sign))[1] == 0

    ends = []
    for side in (-1, 1):
        first = next((float(x) for x in sorted(GRID * side) if x > 0 and not is_flat(side * float(x))), None)
        if first is not None:
            edge = bisect(lambda x, side=side: not is_flat(side * x), 0.0, first)  # type: ignore[misc]
            ends.append(f"{'down' if side < 0 else 'up'} to ρ = {number(tidy(math.exp(side * edge), 1e-6))}")
    which = f"A {'>' if sign > 0 else '<'} 0"
    where = " and ".join(ends) or "at any ρ"
    what = f"tokens with {which} have no gradient at ρ = 1: their policy term is {number(tidy(s, 1e-6))}·A, {where}"
    others = f"those with A {'<' if sign > 0 else '>'} 0 have one"
    finding = Finding("differs", what, which, others, tokens.at(0.0, sign), "no gradient")
    return AtOne(scale, 0.0, (*_sign(tokens, scale), finding), False)


def _other_sign(tokens: Tokens) -> tuple[float, list[Finding]]:
    """How much A = −1 counts beside A = 1, which should be as much."""
    positive, negative = (tokens.of(0.0, A) for A in (1.0, -1.0))
    which = 1 if positive[1] else 0
    if not positive[which]:  # which it was: it is another number every time
        return 0.0, []
    factor = -negative[which] / positive[which] + 0.0
    if abs(factor - 1) <= 1e-4:
        return 1.0, []
    what = f"tokens with A < 0 count {number(factor)} times as much as those with A > 0"
    if factor == 0:
        what = "tokens with A < 0 are left out"
    elif abs(factor + 1) <= 1e-4:
        what = "the sign of A does not matter"
    amount = f"{number(negative[which])} at A = −1, {number(positive[which])} at A = 1"
    return factor, [Finding("differs", what, "at ρ = 1", amount, tokens.at(0.0, -1.0), "other sign")]


def _linearity(tokens: Tokens) -> tuple[float, list[Finding]]:
    """How much A = 1 counts beside small advantages, and whether twice the advantage counts twice."""
    unit = 0.01
    ones = {sign: tokens.of(0.0, sign * unit) for sign in (1, -1)}

    def factors(A: float) -> list[float]:
        """A, in value and gradient, as it counts in units of a small one."""
        one, many = ones[1 if A > 0 else -1], tokens.of(0.0, A)
        return [unit * m / o for m, o in zip(many, one, strict=True) if o]

    def wrong(A: float) -> bool:
        return any(abs(f / abs(A) - 1) > 1e-4 for f in factors(A))

    clamped: dict[int, float] = {}
    bounded: dict[int, float] = {}
    for sign in (1, -1):
        at = next((A for A in _ADVANTAGES if wrong(sign * A)), None)
        if at is None:
            continue
        most, more = factors(sign * 1e4), factors(sign * 2e4)
        if most and most[0] > 0 and np.allclose(most, more, rtol=1e-6, atol=0) and not wrong(sign * 0.9 * most[0]):
            no_gradient = len(most) == 2 and most[1] == 0
            if no_gradient or np.allclose(most, most[0], rtol=1e-5):
                (bounded if no_gradient else clamped)[sign] = tidy(sign * most[0], 1e-5)
                continue
        told = " and ".join(map(number, dict.fromkeys(x / unit for x in factors(sign * at))))
        amount = f"A = {sign * at:g} counts {told} times as much as A = {sign * unit:g}"
        finding = Finding(
            "differs", "is not linear in the advantage", "at ρ = 1", amount, tokens.at(0.0, sign * at), "nonlinear"
        )
        return 1.0, [finding]
    findings = []
    for limits, what in (
        (clamped, "advantages are clamped at {}"),
        (bounded, "the policy term is clamped at {}, as a whole: there is no gradient beyond"),
    ):
        if limits:
            both = len(limits) == 2 and limits[1] == -limits[-1]
            bounds = f"±{number(limits[1])}" if both else " and ".join(map(number, limits.values()))
            A = 2 * next(iter(limits.values()))
            amount = f"A = {number(A)} counts as {number(A / 2)}"
            findings.append(Finding("differs", what.format(bounds), "at ρ = 1", amount, tokens.at(0.0, A), "clamped"))
    return min(1.0, clamped.get(1, 1.0)), findings

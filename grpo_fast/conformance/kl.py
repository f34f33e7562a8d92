"""The KL term of one token, read where A = 0: β·k over l = log π_θ − log π_ref and log ρ, value and gradient apart.

With A = 0 nothing is left but c·β·k. The estimator is the function of l that is proportional to the value, the weight
the one of ρ, and the gradient is compared with those that a KL term has been given.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import reference
from ..terms import K1, K2, K3, KL
from . import kl_weights
from .calling import Batch, CallFailed, Loss
from .kl_weights import NEAR, Floats, token
from .numbers import bisect, is_round, tidy
from .report import Finding, Topic, about, number

_FAR = np.array([2.5, 3, 3.5, 4, 4.5, 5, 6, 8, 9, 11, 14, 16, 19, 21, 24, 30])
#: log ρ, near 0 so that no clip is met.
_RATIOS = np.array([-0.04, 0.0, 0.03])


class KLTerm(NamedTuple):
    """What was read of the KL term; ``option`` is None where there is none, or none that `grpo_loss` has."""

    option: Any
    there: bool
    findings: tuple[Finding, ...] = ()


def estimate(kind: type[KL], l: Any) -> tuple[reference.Floats, reference.Floats]:
    """k(l) of an estimator, and dk/dl."""
    k, _, slope = reference.kl_term(kind(1.0, False), l, l, l)
    return k, slope


#: The option, k(l) and dk/dl, and what it is called where it is none of `grpo_loss`.
_ESTIMATORS: dict[str, tuple[Any, Callable[[Any], tuple[Any, Any]], str]] = {
    "k1": (K1, partial(estimate, K1), ""),
    "k2": (K2, partial(estimate, K2), ""),
    "k3": (K3, partial(estimate, K3), ""),
    "k3 of −l": (
        K3,
        lambda l: (estimate(K3, -l)[0], -estimate(K3, -l)[1]),
        "KL of the other direction: k3 of log π_θ − log π_ref, that is e^l − l − 1, where π_θ is sampled from",
    ),
    "|l|": (
        K1,
        lambda l: (np.abs(l), np.sign(l)),
        "the KL term is |log π_θ − log π_ref|, which estimates no KL divergence",
    ),
    "e^(−l) − 1": (
        K3,
        lambda l: (np.expm1(-l), -np.exp(-l)),
        "the KL term lacks its + l: it is e^(−l) − 1",
    ),
    "e^(−l) − l − 1": (
        K3,
        lambda l: (np.expm1(-l) - l, -np.exp(-l) - 1),
        "the KL term has the sign of its log-ratio wrong: it is e^(−l) − l − 1, where k3 is e^(−l) + l − 1",
    ),
    "max(l, 0)": (
        K1,
        lambda l: (np.maximum(l, 0), (np.asarray(l) > 0) * 1.0),
        "the KL estimate k1 is clamped at 0 from below, so that it estimates no KL divergence",
    ),
}


def read(loss: Loss, scale: float, width: int) -> KLTerm:
    """Read the KL term of a loss whose policy term has this scale, as that of so many equal tokens."""
    if "ref_logps" not in loss.takes:
        return KLTerm(None, False)
    failed: list[CallFailed] = []

    def at_0(at: Batch) -> tuple[float, float]:
        try:
            found = loss(at)
        except CallFailed as error:
            failed.append(error)
            return math.nan, math.nan
        assert found.grad is not None
        return found.loss / scale, float(np.sum(found.grad)) / scale

    rest = any(at_0(_same(token(0.0, l, 0.0, width)))[0] for l in (1.0, -1.0, 2.0))

    def of(x: float, l: float) -> tuple[float, float]:
        """Value and slope, less those of π_ref = π_θ if there is more than the KL term."""
        at = token(x, l, 0.0, width)
        here, without = at_0(at), at_0(_same(at)) if rest else (0.0, 0.0)
        return here[0] - without[0], here[1] - without[1]

    ratios = _RATIOS if "old_logps" in loss.takes else np.zeros(1)
    table = np.array([[of(x, l) for l in NEAR] for x in ratios])
    value, slope = table[..., 0], table[..., 1]
    tol = loss.exactness * 100
    if failed:
        finding = Finding("differs", f"raises {failed[0]}", "A = 0 beside a reference", "", failed[0].at)
        return KLTerm(None, True, (finding,))
    if np.abs(table).max() <= max(tol * 1e-6, 1e-15 * rest) or not np.isfinite(table).all():
        if np.isfinite(table).all():
            return KLTerm(None, False)
        finding = Finding("differs", "is not finite at A = 0 beside a reference", "", "", token(0.0, 0.5, 0.0, width))
        return KLTerm(None, True, (finding,))
    if max(np.ptp(x, axis=1).max() for x in (value, slope)) <= tol * np.abs(table).max():
        return KLTerm(None, False)  # nothing of the reference: `remainder` tells what it is
    term = _named(loss, of, ratios, value, slope, tol, width, rest)
    if tol < 1e-4 and about("unclear", term.findings):
        rough = _named(loss, of, ratios, value, slope, 1e-4, width, rest)
        if len(rough.findings) < len(term.findings) or (rough.option and not term.option):
            text = "the KL term agrees to some digits only: it is computed in float32, or holds a small constant"
            return rough._replace(
                findings=(*rough.findings, Finding("fragile", text, "A = 0", "", term.findings[0].example, "digits"))
            )
    return term


def of_advantages(loss: Loss, scale: float, width: int) -> list[Finding]:
    """Whether the KL term is another one for another advantage, at ρ = 1."""
    if "ref_logps" not in loss.takes:
        return []

    def cost(A: float) -> float:
        """What distance from the reference adds."""
        return (loss(token(0.0, 1.0, A, width)).loss - loss(_same(token(0.0, 1.0, A, width))).loss) / scale

    try:
        costs = {A: cost(A) for A in (0.0, 1.0, -1.0)}
    except CallFailed:
        return []
    if not np.isfinite(list(costs.values())).all() or np.ptp(list(costs.values())) <= 1e-5 + 16 * loss.eps:
        return []
    text = "the KL term depends on the advantage"
    amount = "β·k = " + ", ".join(f"{number(cost)} at A = {A:g}" for A, cost in costs.items())
    return [Finding("differs", text, "l = 1, ρ = 1", amount, token(0.0, 1.0, 1.0, width))]


def _same(at: Batch) -> Batch:
    return at._replace(ref_logps=at.logps.copy())


def _named(
    loss: Loss, of: Any, ratios: Floats, value: Floats, slope: Floats, tol: float, width: int, rest: bool
) -> KLTerm:
    here = value[len(ratios) // 2]  # at ρ = 1
    x = ratios[:, None]
    found: tuple[str, float] | None = None
    for name, (_, estimator, _) in _ESTIMATORS.items():
        near, _ = estimator(NEAR)
        beta = float(np.dot(here, near) / np.dot(near, near))
        if beta and np.all(np.abs(here - beta * near) <= tol * abs(beta) * np.maximum(np.abs(near), 1e-3)):
            found = name, beta
            break
    if found is None:
        return KLTerm(None, True, (_unknown(here, width),))
    name, beta = found
    option, estimator, wrong = _ESTIMATORS[name]

    def k(l: Any) -> Any:
        return estimator(l)[0]

    findings = []
    if wrong:
        findings.append(Finding("differs", wrong, "", _rows(here), token(0.0, 1.0, 0.0, width)))
    if beta < 0:
        what = "the sign of the KL term is reversed: it rewards distance from the reference"
        findings.append(Finding("differs", what, "A = 0", f"β = {number(beta)}", token(0.0, 1.0, 0.0, width)))
        beta, value, slope = -beta, -value, -slope
    there = here != 0
    relative = value[:, there] / here[there]
    weighted = kl_weights.near_one(relative / math.copysign(1.0, float(relative[len(ratios) // 2, 0])), x, tol)
    if weighted is None:
        left_out = kl_weights.left_out(of, (float(ratios[0]), float(ratios[-1])), tol, width)
        findings += left_out or [kl_weights.otherwise(value / beta, ratios, k, tol, width)]
    rho = np.exp(x) if weighted else np.ones_like(x)
    gradient: Literal["own", "score", "k2"] = "own"
    if loss.gives_gradient and weighted is not None:
        near, steep = estimator(NEAR)
        if rest:  # the slope is that less its own where l = 0
            steep = steep - estimator(np.zeros_like(NEAR))[1]
        gradient, more = _gradient(beta, name, near, steep, rho, np.exp(x), slope, bool(weighted), tol, width)
        findings += more
    if gradient == "score" and len(ratios) == 1:  # where ρ is 1, that is what the weight makes of the gradient
        weighted, gradient = True, "own"
    if weighted is not None and len(ratios) > 1 and not about("reward", findings):
        findings += kl_weights.far_away(of, beta * float(k(np.float64(1.0))), weighted, tol, width)
    findings += _clamps(of, beta, name, k, tol, width, -loss.least)
    return KLTerm(option(tidy(beta, tol / 1000), bool(weighted), gradient), True, tuple(findings))


def _gradient(
    beta: float,
    name: str,
    k: Floats,
    dk: Floats,
    rho: Floats,
    ratio: Floats,
    slope: Floats,
    weighted: bool,
    tol: float,
    width: int,
) -> tuple[Any, list[Finding]]:
    """Which gradient it has, and what is wrong with it."""
    size = beta * ratio * (np.abs(k) + np.abs(dk) + 1e-3)

    def is_(expected: Floats) -> bool:
        return bool(np.all(np.abs(slope - beta * expected) <= tol * size))

    if is_(rho * (dk + (k if weighted else 0))):
        return "own", []
    if not weighted and is_(ratio * (k + dk)):
        return "score", []
    if not weighted and is_(NEAR + 0 * ratio):
        return "k2", []
    i = (len(slope) // 2, 6)
    amount = f"∂(βk)/∂logp = {number(slope[i])} instead of {number(float((beta * (rho * (dk + weighted * k)))[i]))}"
    example = token(0.0, float(NEAR[6]), 0.0, width)
    topic: Topic = ""
    if not slope.any():
        what = "the KL term has no gradient: it is detached (a stop-gradient too many)"
    elif weighted and is_(ratio * dk):
        what = "KL gradient without the sampling term: its ratio is held constant"
    elif is_(ratio * k) or is_(k + 0 * ratio):
        what = "KL gradient is the sampling term alone: the KL is held constant within the advantage, as in a reward"
        topic = "reward"
    elif is_(-(rho * (dk + weighted * k))):
        what = "the KL term's gradient has the wrong sign"
    elif is_(np.broadcast_to(ratio * (k + dk), slope.shape)):
        what = "KL gradient with the sampling term, where the value has no ratio"
    else:
        what = f"the gradient of the KL term is not that of its value, {name}"
        topic = "unclear"
    return "own", [Finding("differs", what, "A = 0, l = 1, ρ = 1", amount, example, topic)]


def _clamps(of: Any, beta: float, name: str, k: Any, tol: float, width: int, depth: float) -> list[Finding]:
    """Where the estimate or its log-ratio is clamped, of log-probabilities that are not: above −``depth``."""
    distances = _FAR[depth - 0.05 > _FAR]
    findings: list[Finding] = []
    bounds = []
    for sign in (1, -1):

        def off(l: float, sign: int = sign) -> bool:
            expected = beta * float(k(np.float64(sign * l)))
            return not abs(abs(of(0.0, sign * l)[0]) - abs(expected)) <= 10 * tol * abs(expected)

        first = next((i for i, l in enumerate(distances) if off(float(l))), None)
        if first is not None:
            edge = bisect(off, float(distances[first - 1]) if first else 2.0, float(distances[first]))
            bounds.append((sign * edge, abs(of(0.0, sign * 1.2 * edge)[0] / beta)))
    if not bounds:
        return findings
    edge, most = min(bounds, key=lambda pair: abs(pair[0]))
    if not math.isfinite(most):
        what = "the KL term is not finite, or raises an error, far from the reference"
        return [Finding("differs", what, f"l = {number(1.2 * edge)}", "", token(0.0, round(1.2 * edge, 1), 0.0, width))]
    severity: Any = "fragile" if all(abs(b[0]) >= 19.99 for b in bounds) else "differs"
    lone = f" (only where l is {'above' if edge > 0 else 'below'} 0)" if len(bounds) == 1 else ""
    if is_round(edge, 1e-3) and (len(bounds) == 1 or abs(abs(bounds[0][0]) - abs(bounds[1][0])) < 1e-3):
        at = f"±{abs(tidy(edge, 1e-3)):g}" if len(bounds) == 2 else f"{tidy(edge, 1e-3):g}"
        what = f"log π_θ − log π_ref is clamped at {at} in the KL term: no gradient beyond{lone}"
    else:
        what = f"the KL estimate is clamped at {number(tidy(most, 1e-3))}: no gradient beyond{lone}"
    where = ", ".join(f"l {'>' if b[0] > 0 else '<'} {number(b[0])}" for b in bounds)
    amount = f"{number(most)} where {name} is {number(abs(float(k(np.float64(1.2 * edge)))))}"
    findings.append(Finding(severity, what, where, amount, token(0.0, round(1.2 * edge, 1), 0.0, width), "clamped"))
    return findings


def _rows(value: Floats) -> str:
    return "β·k = " + ", ".join(
        f"{number(v)} at l = {number(l)}" for l, v in zip(NEAR[[0, 2, 5, 7]], value[[0, 2, 5, 7]], strict=True)
    )


def _unknown(value: Floats, width: int) -> Finding:
    what = "the KL term is none that grpo_loss has"
    return Finding("differs", what, "A = 0, ρ = 1", _rows(value), token(0.0, 1.0, 0.0, width), "unclear")

"""The policy term of one token: whether there is one, what it is where ρ = 1, and then along log ρ.

Value and gradient are read each for itself: that tells a weight which is held constant from one that is not.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..terms import CISPO, SAPO, Unclipped
from . import at_one, curves, depth, precision, regions, slopes, surrogates
from .calling import Loss
from .curves import NEAR, Curve, Kind, Tokens
from .numbers import tidy
from .report import Finding, Severity, number

#: log π of a token that no loss leaves out for being improbable.
_PROBABLE = -0.5


class Policy(NamedTuple):
    """What was read of the policy term."""

    scale: float  # of the loss: the slope of s/A at ρ = 1, not negative
    sign: float  # −1 where the loss is maximised
    surrogate: Any  # an option of `grpo_loss`, or None
    trust_region: Any
    kind: Kind
    width: int  # of the batch of equal tokens that stood for one
    inside: tuple[float, float]  # an interval of log ρ in which nothing is bounded for A > 0
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def read(loss: Loss) -> Policy:
    """Read the policy term of a loss."""
    tokens = Tokens(loss)
    nothing = Policy(1.0, 1.0, None, None, "none", 1, (-0.1, 0.1))
    for tokens.width in (1, 3, 6):
        first = tokens.of(0.0, 1.0, _PROBABLE)
        if all(map(math.isfinite, (*first, *tokens.of(0.0, -1.0, _PROBABLE)))) and any(first):
            break
    else:
        return _padded(loss, tokens) or nothing._replace(findings=(at_one.no_reaction(tokens),))
    too_rough, notes = precision.read(tokens)
    if too_rough:
        return nothing._replace(findings=tuple(too_rough))
    loss.least, of_depth = depth.read(tokens)
    if not any(tokens.of(0.0, 1.0)):
        return nothing._replace(findings=(*of_depth, at_one.no_reaction(tokens)))
    scale, factor, of_one, readable, unit = at_one.read(tokens)
    findings = [*of_depth, *of_one]
    found = nothing._replace(scale=abs(scale) / unit, kind=tokens.kind, width=tokens.width)
    found = found._replace(sign=math.copysign(1.0, scale), findings=tuple(findings))
    if not readable:
        return found
    tokens.scale = {1: scale, -1: scale * factor}
    if "old_logps" not in loss.takes:
        note = "it takes no old_logps: on-policy, ρ = 1, which is old_logps=None"
        surrogate = CISPO(math.inf) if tokens.kind == "weight" else Unclipped()
        if not tokens.of(0.0, 1.0)[1]:
            findings.append(slopes.none(tokens))
        return found._replace(surrogate=surrogate, findings=tuple(findings), notes=(note,))
    read = {sign: tokens.curve(sign) for sign in (1, -1)}
    findings += _raised(tokens)
    bound = _weight_at_1(read[1]) if tokens.kind == "weight" else 1.0
    if bound != 1:  # ρ = 1 is beyond it
        tokens.scale = {sign: x / bound for sign, x in tokens.scale.items()}
        found = found._replace(scale=found.scale / bound)
        read = {
            sign: curve._replace(value=curve.value * bound, slope=curve.slope * bound) for sign, curve in read.items()
        }
    factor = _too_steep(tokens)
    if factor != 1:
        what = f"the gradient of the policy term is {number(factor)} times that of its value"
        findings.append(Finding("differs", what, "at ρ = 1", "", tokens.at(0.0, 1.0), "steep"))
        tokens.scale = {sign: x / factor for sign, x in tokens.scale.items()}
        tokens.slope_scale = 1 / factor
        found = found._replace(scale=found.scale / factor)
        read = {sign: curve._replace(value=curve.value * factor) for sign, curve in read.items()}
    named = _named(tokens, read, found)
    tau = _missing_temperature(named.surrogate, tokens)
    if tau:
        findings = [x for x in findings if x.topic != "other sign"]
        what = "SAPO's factor 1/τ is missing: the slope at ρ = 1 is A·τ, and not A"
        findings.append(Finding("differs", what, "everywhere", "", tokens.at(0.0, -1.0), "temperature"))
        named = named._replace(scale=named.scale / tau)
    return named._replace(findings=(*findings, *named.findings), notes=(*notes, *named.notes))


def _missing_temperature(surrogate: Any, tokens: Tokens) -> float:
    """τ of A > 0 where the slopes of SAPO for either sign of A are to each other as its temperatures are; or 0."""
    if not isinstance(surrogate, SAPO) or surrogate.tau_pos == surrogate.tau_neg:
        return 0.0
    factor = tokens.scale[-1] / tokens.scale[1]
    return surrogate.tau_pos if math.isclose(factor, surrogate.tau_neg / surrogate.tau_pos, rel_tol=1e-4) else 0.0


def _padded(loss: Loss, tokens: Tokens) -> Policy | None:
    """The policy term of a loss that leaves rows out which fill the width, read from rows that do not."""
    if loss.padded or "mask" not in loss.takes:
        return None
    tokens.width = 1
    example = tokens.at(0.0, 1.0)
    loss.padded = True
    found = read(loss)
    if found.kind == "none" or not np.any(loss(example).grad):  # it is the masked token that counts
        loss.padded = False
        return None
    what = "rows that fill the width are left out, as by a filter of what is overlong"
    amount = "neither loss nor gradient changes with A; with one masked token more both do"
    finding = Finding("differs", what, "a row without padding", amount, example)
    return found._replace(findings=(finding, *found.findings))


# --- before the curves ------------------------------------------------------------------------------------------------
def _raised(tokens: Tokens) -> Iterable[Finding]:
    """The error that is raised nearest to ρ = 1."""
    if tokens.failed:
        x = min(tokens.failed, key=abs)
        severity: Severity = "fragile" if abs(x) > 20 else "differs"
        yield Finding(severity, f"raises {tokens.failed[x]}", f"log ρ = {number(x)}", "", tokens.failed[x].at)


def _weight_at_1(curve: Curve) -> float:
    """The weight at ρ = 1 in units of ρ, by where it is in proportion to ρ: another than 1 where a bound is."""
    with np.errstate(all="ignore"):
        units = curve.value / np.exp(curve.x)
    same = np.abs(np.diff(units)) <= 1e-7 * np.abs(units[1:])
    long = np.flatnonzero(same[:-2] & same[1:-1] & same[2:])
    if not long.size or np.isclose(units[long], 1, rtol=1e-6).any():
        return 1.0
    unit = float(np.median(units[long]))
    return 1 / unit if np.allclose(units[long], unit, rtol=1e-6) and unit > 0 else 1.0


def _too_steep(tokens: Tokens) -> float:
    """By what the gradient is too large for a value that grows as ρ does, where ρ = 1."""
    if tokens.kind != "ratio" or not tokens.loss.gives_gradient or tokens.loss.eps > 1e-10:
        return 1.0
    (low, _), (value, slope), (high, _) = (tokens.relative(x, 1) for x in (-1e-5, 0.0, 1e-5))
    if not value or not slope or abs((high - low) / (2e-5 * value) - 1) > 1e-3 or abs(slope / value - 1) < 1e-6:
        return 1.0
    return tidy(slope / value, 1e-6)


# --- along the ratio --------------------------------------------------------------------------------------------------
def _named(tokens: Tokens, read: dict[int, Curve], policy: Policy) -> Policy:
    tol = tokens.loss.exactness * 10
    policy = policy._replace(findings=())
    both = np.concatenate([read[1].value, read[-1].value])
    if tokens.kind == "ratio" and np.allclose(both, both[0], rtol=1e-6, atol=0):
        return _constant(tokens, read, policy)
    edges = {sign: curves.dropped(tokens, curve, sign) for sign, curve in read.items()}
    kept = {
        sign: (edges[sign][0] < c.x) & (c.x < edges[sign][1]) & ~np.isin(c.x, list(tokens.failed))
        for sign, c in read.items()
    }
    near = {sign: curves.dropped(tokens, tokens.curve(sign, NEAR), sign, NEAR) for sign in read}
    region, findings = regions.read(tokens, edges, near)
    smooth = surrogates.smooth(tokens, read, kept, tol)
    if smooth is not None:
        findings += slopes.wrong(tokens, read, kept, {}, smooth)
        inside = (max(-1.0, edges[1][0] / 2), min(1.0, edges[1][1] / 2))
        return policy._replace(surrogate=smooth, trust_region=region, inside=inside, findings=tuple(findings))
    flat = {sign: curves.flat(tokens, read[sign], sign, tol, edges[sign]) for sign in read}
    clamp, bounds = curves.clamps(flat, tokens.kind, tokens.loss.exactness)
    for sign, curve in read.items():
        expected = np.clip(np.exp(np.clip(curve.x, *clamp)), bounds[sign].low, bounds[sign].high)
        room = tol * expected * (1 + np.abs(curve.x)) + curve.noise
        # As in ρ + sg[clip(ρ) − ρ], whose sum is of numbers as large as ρ.
        room += np.where(expected == bounds[sign].high, 16 * tokens.loss.eps * np.exp(curve.x), 0)
        off = kept[sign] & ~(np.abs(curve.value - expected) <= room)
        if off.any():
            return policy._replace(findings=(*findings, surrogates.unknown(tokens, curve, sign, off)))
    surrogate, more = surrogates.bounded(tokens, bounds)
    findings += more
    findings += slopes.wrong(tokens, read, kept, bounds, None, clamp)
    if any(map(math.isfinite, clamp)):
        findings.append(_clamped(tokens, clamp))
    notes = [*surrogates.notes(bounds, tokens.loss.exactness)]
    if surrogate == CISPO(1.0, 1.0):
        notes.append("its weight is 1 whatever old_logps are: the plain policy gradient, REINFORCE")
    return policy._replace(
        surrogate=surrogate,
        trust_region=region,
        inside=(
            max(-1.0, _log(bounds[1].low) / 2, edges[1][0] / 2),
            min(1.0, _log(bounds[1].high) / 2, edges[1][1] / 2),
        ),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _constant(tokens: Tokens, read: dict[int, Curve], policy: Policy) -> Policy:
    """Of a value that is the same for every π_old."""
    if not any(curve.slope.any() for curve in read.values()):
        return policy._replace(surrogate=Unclipped(), kind="constant", findings=(slopes.none(tokens),))
    if not np.allclose(np.concatenate([read[1].slope, read[-1].slope]), read[1].slope[0], rtol=1e-6, atol=0):
        what = "the value of the policy term is the same for every ρ, and its gradient is not"
        some = [f"{number(v)} at ρ = {number(math.exp(x))}" for x, v in zip(read[1].x, read[1].slope, strict=True)]
        amount = f"s/A = {number(read[1].value[0])}, its gradient {', '.join(some[len(some) // 2 :: 10][:4])}"
        return policy._replace(findings=(Finding("differs", what, "every ρ but 1", amount, tokens.at(1.0, 1.0)),))
    if "ref_logps" in tokens.loss.takes:
        at = tokens.at(0.0, 1.0)
        moved = at._replace(ref_logps=at.logps - 0.05)
        value = tokens.loss.policy_value(moved) / tokens.scale[1]
        if abs(value - math.exp(0.05)) < 1e-4:
            what = "the ratio is to the reference: π_θ/π_ref in place of π_θ/π_old, and old_logps is not used"
            example = at._replace(ref_logps=at.logps - 0.05)
            finding = Finding(
                "differs", what, "π_ref is not π_old", f"s/A = {number(value)} = π_θ/π_ref", example, "to reference"
            )
            return policy._replace(kind="constant", findings=(finding,))
    what = "the ratio is against its own detached self: it is 1 always, and never clips; old_logps is not used"
    amount = f"s/A = {number(read[1].value[0])} at ρ = {number(math.exp(3))} as at ρ = 1"
    finding = Finding("differs", what, "every ρ but 1", amount, tokens.at(1.0, 1.0))
    return policy._replace(surrogate=Unclipped(), kind="constant", findings=(finding,))


def _clamped(tokens: Tokens, clamp: tuple[float, float]) -> Finding:
    low, high = clamp
    bounds = f"±{high:g}" if -low == high else f"{high:g}" if low == -math.inf else f"−{-low:g}"
    where = f"log ρ > {high:g}" if low == -math.inf else f"log ρ < {low:g}" if high == math.inf else ""
    beyond, A = (high + 1, -1.0) if high < math.inf else (low - 1, 1.0)
    return Finding(
        "fragile" if min(abs(low), abs(high)) >= 20 else "differs",
        f"the log-ratio is clamped at {bounds}: no gradient beyond",
        where or f"|log ρ| > {min(abs(low), abs(high)):g}",
        "",
        tokens.at(beyond, A),
        "clamped",
    )

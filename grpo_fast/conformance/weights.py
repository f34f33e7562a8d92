"""How much each token weighs: c_i, read from the gradient at ρ = 1, where every policy term has the slope A.

The weights of tokens in batches of many shapes are fitted by a product of powers of the counts they may depend on:
log c = log K − a·log n_i − b·log N − …. Exponents that are whole numbers, with a residual of nothing, are the formula;
anything else is looked into: whose tokens a row's weight depends on, and whether it differs within a row.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import irregular
from .calling import Batch, Loss
from .measuring import Floats, Normalizer, Weights, measured, power, ragged, sizes
from .numbers import tidy
from .report import Finding, number

_LENGTHS = (
    [3, 5],
    [2, 7, 4],
    [6],
    [1, 2, 5, 8],
    [4, 4, 9],
    [7, 3],
    [0, 3, 5],
    [2, 0, 6, 0, 5],
    [0, 4],
    [1, 6, 2],
    [2, 3, 1, 4, 2, 6, 3, 5, 2],
    [1],
    [2],
    [1, 1],
)
_PADDING = (0, 2, 1, 0, 4, 3, 1, 0, 2, 5, 1, 2, 0, 1)


def read(loss: Loss, made: Callable[[NDArray[np.bool_]], Batch], unit: float, what: str = "") -> Weights:
    """Read c_i; ``unit`` is the gradient of a token with weight 1 in what is ``made`` of a mask."""
    rows, finite = [], True
    for lengths, padding in zip(_LENGTHS, _PADDING, strict=True):
        mask = ragged(lengths, padding)
        if "mask" not in loss.takes:
            mask = np.ones_like(mask)
        weights = measured(loss, made(mask), unit)
        if weights is None or not np.isfinite(weights).all():
            if weights is None and mask.any(axis=1).all():
                loss(made(mask))  # raises what it raised
            finite = finite and not mask.any(axis=1).all()
            continue
        rows.append((mask, weights))
    if not rows or not finite:
        return Weights(None, None, None, 1.0, (Finding("differs", f"the weights of tokens{what} are not finite"),))
    full = [(m, w) for m, w in rows if m.any(axis=1).all()]
    names = ("n_i", "N", "B", "T", "max n") if "mask" in loss.takes else ("B", "T")  # without a mask n_i is T
    fitted = _fit(full, loss.exactness, names)
    if fitted is None:
        return irregular.read(loss, made, unit, full, what)
    powers, constant = fitted
    whole = _fit_of_empties(rows, powers, loss.exactness)
    findings: list[Finding] = []
    if whole is None and len(rows) > len(full):
        example = made(ragged([0, 2]))
        finding = f"a sequence without a token changes the weights of the others{what} in no simple way"
        findings.append(Finding("differs", finding, "beside an empty sequence", "", example, "empty sequence"))
    elif whole is not None:
        powers = whole
    return _named(loss, made, powers, constant, findings, what)


def for_values(loss: Loss, found: Weights, made: Any, divisor: str) -> Weights:
    """The weights of values, where those that were read are of a gradient that goes through a sequence's ratio.

    That ratio is exp of a sum of log-ratios over ``divisor``, so that the gradient has n_i over it as a factor.
    """
    if divisor == "n_i" or found.powers is None:
        return found
    powers = dict(found.powers)
    powers["n_i"] = powers.get("n_i", 0) - 1
    if divisor == "T":
        powers["T"] = powers.get("T", 0) + 1
    kept = {name: p for name, p in powers.items() if p}
    return _named(loss, made, kept, found.constant, [], "")


def _fit(rows: list[tuple[NDArray[np.bool_], Floats]], error: float, names: tuple[str, ...]) -> Any:
    """Whole powers of the counts, and the constant, of which all weights are made; None if they are of no such."""
    system, target = [], []
    for mask, weights in rows:
        if (weights[mask] <= 0).any():
            return None
        counts = sizes(mask)
        columns = [np.broadcast_to(np.log(counts[name]), mask.shape)[mask] for name in names]
        system.append(np.stack([*columns, np.ones(int(mask.sum()))], axis=1))
        target.append(np.log(weights[mask]))
    A, b = np.concatenate(system), np.concatenate(target)
    found, *_ = np.linalg.lstsq(A, b, rcond=None)
    powers = np.round(2 * found[:-1]) / 2
    rest = b - A[:, :-1] @ powers
    if np.abs(rest - rest.mean()).max() > max(1e-5, 100 * error):
        return None
    kept = {name: int(p) if p == int(p) else float(p) for name, p in zip(names, powers, strict=True) if p}
    return kept, float(np.exp(np.median(rest)))


def _fit_of_empties(rows: Any, powers: dict[str, float], error: float) -> dict[str, float] | None:
    """The powers with B in place of B′, or B′ in place of B, as batches with empty sequences have it."""
    choices = [powers]
    if "B" in powers:
        choices.append({("B′" if name == "B" else name): p for name, p in powers.items()})
    for choice in choices:
        rest = []
        for mask, weights in rows:
            counts = sizes(mask)
            total = sum((p * np.log(counts[name]) for name, p in choice.items() if name != "n_i"), 0.0)
            with np.errstate(all="ignore"):
                total = total + choice.get("n_i", 0) * np.log(counts["n_i"])
                rest.append((np.log(weights) - total)[mask])
        flat = np.concatenate(rest)
        if np.abs(flat - flat.mean()).max() <= max(1e-5, 100 * error):
            return choice
    return None


# --- names ------------------------------------------------------------------------------------------------------------
def _named(
    loss: Loss, made: Any, powers: dict[str, float], constant: float, findings: list[Finding], what: str
) -> Weights:
    error = max(1e-7, 10 * loss.exactness)
    within = powers.get("n_i", 0)
    rest = {name: -p for name, p in powers.items() if name != "n_i"}
    scale = 1 / constant
    scale = tidy(scale, error)
    formula = _formula(powers, scale)
    example = made(np.array([[True, True, False]]))
    notes: list[str] = []
    if within not in (0, -1):
        power = "" if within == 1 else f" to the power {within:g}".replace("-", "−")
        text = f"weighs each token of a sequence{what} by the number of its tokens{power}: neither a sum nor a mean"
        finding = Finding("differs", text, "sequences of unequal length", f"c_i = {formula}", example)
        return Weights(None, None, powers, constant, (*findings, finding))
    mean = within == -1
    if rest == {"B": 1} and scale == 1:
        aggregation, normalizer = ("seq-mean-token-mean" if mean else "seq-mean-token-sum"), None
    elif rest == {"N": 1} and scale == 1 and not mean:
        aggregation, normalizer = "token-mean", None
    else:
        aggregation = "seq-mean-token-mean" if mean else "token-sum"
        normalizer = scale if not rest else Normalizer(scale, tuple(rest.items()))
        if not mean and not rest and scale == 1:
            normalizer = None
    findings += _wrong(made, rest, mean, scale, formula, what)
    if rest.get("N") or rest.get("B′") or (rest.get("B") and mean):
        counted = "tokens" if rest.get("N") else "sequences"
        notes.append(
            f"it divides by the {counted} of its own call{what}: micro-batches do not add, their mean is a mean of "
            "means; a normalizer for all of them would add"
        )
    if "mask" not in loss.takes:
        notes.append("it takes no mask: whether it divides by tokens or by the width of the padding is the same to it")
        if rest == {"B": 1, "T": 1} or rest == {"N": 1}:
            aggregation, normalizer, findings = "token-mean", None, []
    return Weights(aggregation, normalizer, powers, constant, tuple(findings), tuple(notes))


def _wrong(made: Any, rest: dict[str, float], mean: bool, scale: float, formula: str, what: str) -> list[Finding]:
    findings = []
    amount = f"a token's weight is {formula}"
    if rest.get("T"):
        text = f"divides{what} by the padded width, not by the number of tokens: masked places are counted"
        example = made(np.array([[True, False]]))
        findings.append(Finding("differs", text, "every batch with padding", amount, example, "denominator"))
    if rest.get("max n"):
        text = f"divides{what} by the length of the longest sequence, not by the number of tokens"
        findings.append(
            Finding("differs", text, "sequences of unequal length", amount, made(ragged([1, 2])), "denominator")
        )
    if rest.get("B′"):
        text = f"sequences without a token are not counted{what}: divides by the number of the others"
        findings.append(
            Finding("differs", text, "beside an empty sequence", amount, made(ragged([0, 1])), "denominator")
        )
    usual = rest in ({"B": 1}, {"N": 1}, {}, {"B": 1, "T": 1}, {"B": 1, "max n": 1}, {"B′": 1}, {"T": 1})
    if (not usual and not findings) or (mean and rest.get("N")):
        text = f"the denominator{what} is none of the usual ones"
        if mean and rest.get("N") == 1 and len(rest) == 1:
            text = f"divides{what} by the tokens of the sequence and by those of the batch"
        findings.append(Finding("differs", text, "", amount, made(ragged([1, 2])), "denominator"))
    elif scale != 1 and (rest == {"N": 1} or (rest == {"B": 1} and mean) or rest == {"B′": 1}):
        text = (
            f"the loss is {number(1 / scale)} times as large{what} as the mean it is"
            if scale < 1
            else (f"divides{what} by {number(scale)} besides (such as gradient accumulation steps)")
        )
        findings.append(Finding("differs", text, "every batch", amount, made(np.ones((1, 1), bool)), "factor"))
    return findings


def formula(found: Weights) -> str:
    """The weight of a token as it is written, of weights that are a product of powers."""
    return _formula(found.powers or {}, tidy(1 / found.constant, 1e-6))


def _formula(powers: dict[str, float], scale: float) -> str:
    above = [power(name, p) for name, p in powers.items() if p > 0]
    below = [power(name, -p) for name, p in powers.items() if p < 0]
    if scale != 1 or not below:
        below.insert(0, number(scale))
    return f"{' · '.join(above) or '1'}/({' · '.join(below)})" if below != ["1"] else (" · ".join(above) or "1")

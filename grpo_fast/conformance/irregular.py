"""Weights of tokens that are no product of powers of counts: what they are instead."""

from typing import Any

import numpy as np

from .calling import Loss
from .measuring import Weights, measured, ragged, sizes
from .numbers import tidy
from .report import Finding, number, rounded


def read(loss: Loss, made: Any, unit: float, rows: Any, what: str) -> Weights:
    """Look into weights that are no product of powers."""
    none = Weights(None, None, None, 1.0)
    idle = next(((m, w, i) for m, w in rows for i in range(len(m)) if m[i].any() and not w[i].any()), None)
    if idle is not None:
        mask, weights, i = idle
        text = f"some rows do not count{what}: their tokens have no gradient"
        amount = f"row {i} of {len(mask)}" + (", and all behind it" if not weights[i:].any() else "")
        return none._replace(findings=(Finding("differs", text, f"{len(mask)} rows", amount, made(mask)),))
    uneven = next(
        ((m, w) for m, w in rows if any(np.ptp(w[i][m[i]]) > 1e-4 * abs(w[i][m[i]]).max() for i in range(len(m)))), None
    )
    if uneven is not None:
        mask, weights = uneven
        columns = mask.sum(axis=0)
        product = (weights * columns)[mask]
        text = f"tokens of one sequence weigh differently{what}"
        if np.ptp(product) <= 1e-4 * product.max():
            text = f"averages over the rows of each position first{what}, then over positions: a mean of means"
        i = next(i for i in range(len(mask)) if np.ptp(weights[i][mask[i]]) > 1e-4 * abs(weights[i][mask[i]]).max())
        amount = "c = " + ", ".join(map(number, weights[i][mask[i]][:6]))
        return none._replace(findings=(Finding("differs", text, f"row {i}", amount, made(mask)),))
    floor = _floor(made, rows, what)
    if floor is not None:
        return floor
    chunk = _chunks(loss, made, unit)
    if chunk:
        text = f"micro-batches do not add{what}: mean of means over {chunk} rows at a time"
        where = f"more than {chunk} rows; or it is a mean over prompts of {chunk} rows each, as by prompt_mean_weights"
        return none._replace(findings=(Finding("differs", text, where, "", made(ragged([1] * chunk + [2] * chunk))),))
    offset = _offset(loss, made, unit)
    if offset is not None:
        return offset._replace(findings=tuple(x._replace(what=x.what + what) for x in offset.findings))
    rest = _table(rows)
    return none._replace(
        findings=(
            Finding("differs", f"the weights of tokens{what} are none of the usual ones", "", rest, None, "irregular"),
        )
    )


def _table(rows: Any) -> str:
    parts = []
    for mask, weights in rows[:3]:
        c = [rounded(w[m][0]) for m, w in zip(mask, weights, strict=True)]
        parts.append(f"lengths {mask.sum(axis=1).tolist()}, width {mask.shape[1]}: c = {c}")
    return "; ".join(parts)


def _floor(made: Any, rows: Any, what: str) -> Weights | None:
    """A floor within reach of these batches: 1/max(n, C), n the tokens of the batch, or of each of B sequences."""
    for name, aggregation in (("N", "token-mean"), ("n_i", "seq-mean-token-mean")):
        counts = np.concatenate([np.broadcast_to(sizes(mask)[name], mask.shape)[mask] for mask, _ in rows])
        divided = np.concatenate([1 / (w * (len(mask) if name == "n_i" else 1))[mask] for mask, w in rows])
        constant = tidy(float(divided.min()), 1e-5)
        if np.allclose(divided, np.maximum(counts, constant), rtol=1e-5) and (divided > counts + 1e-3).any():
            of = "the batch" if name == "N" else "a sequence"
            text = f"divides{what} by {number(constant)} where {of} has fewer tokens: a floor, as by clamp(min=…)"
            amount = f"1/max({name}, {number(constant)})"
            finding = Finding(
                "differs", text, f"fewer than {number(constant)} tokens", amount, made(ragged([1])), "denominator"
            )
            return Weights(aggregation, None, None, 1.0, (finding,))
    return None


def _chunks(loss: Loss, made: Any, unit: float) -> int | None:
    """How many rows are averaged together, where the weights of a row depend on those of its neighbours alone."""
    lengths = [3, 5, 4, 6, 2, 7, 5, 3]
    mask = ragged(lengths)
    base = measured(loss, made(mask), unit)
    if base is None:
        return None
    depends = np.zeros((8, 8), bool)
    for j in range(8):
        fewer = mask.copy()
        fewer[j, lengths[j] - 1] = False
        moved = measured(loss, made(fewer), unit)
        if moved is None:
            return None
        depends[:, j] = np.abs(moved[:, 0] - base[:, 0]) > 1e-6 * np.abs(base[:, 0])
    for size in (2, 3, 4):  # that a row depends on itself alone is as it should be
        block = np.arange(8)[:, None] // size == np.arange(8) // size
        if np.array_equal(depends, block):
            return size
    return None


def _offset(loss: Loss, made: Any, unit: float) -> Weights | None:
    """A constant added to a denominator that is a number of tokens: 1/(n + ε)."""
    sizes = np.array([1, 2, 3, 5, 8])
    inverse = []
    for n in sizes:
        weights = measured(loss, made(ragged([n, 3])), unit)
        if weights is None:
            return None
        inverse.append(1 / weights[0, 0])
    for name, aggregation, more, rows in (("n_i", "seq-mean-token-mean", 0, 2), ("N", "token-mean", 3, 1)):
        constants = np.array(inverse) / rows - sizes - more
        constant = float(np.median(constants))
        if np.ptp(constants) < 1e-6 and constant > 1e-6:
            text = f"adds {number(tidy(constant, 1e-5))} to the number of tokens it divides by"
            finding = Finding("differs", text, "", f"1/({name} + {number(constant)})", made(ragged([1])))
            return Weights(aggregation, None, None, 1.0, (finding,))
    return None

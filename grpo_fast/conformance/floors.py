"""A floor on a denominator: max(number of tokens, C), which is the constant C in every small batch."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calling import CallFailed, Loss
from .measuring import Normalizer, Weights, of_policy, ragged, sizes
from .report import Finding, number

#: How many tokens the batches have at most in which a constant is looked for.
_MOST = 24_000


def read(loss: Loss, found: Weights) -> Weights:
    """The weights, after batches with more tokens, and with more sequences, than the constant they are divided by."""
    constant = found.normalizer.constant if isinstance(found.normalizer, Normalizer) else found.normalizer
    if found.powers is None or constant is None or constant <= 1:
        return found
    notes = []
    counted: list[tuple[str, dict[str, Any]]] = []
    of_tokens = not {"n_i", "N"} & set(found.powers)
    if of_tokens:
        length = min(2 * math.ceil(constant) + 8, _MOST * 2 // 3)
        counted.append(("tokens", {"lengths": [length, length // 2]}))
        if length // 2 <= constant:
            notes.append(f"the denominator was seen to be constant for up to {3 * length // 2} tokens, and no more")
    rows = 2 * math.ceil(constant) + 8
    if not {"B", "B′"} & set(found.powers) and rows <= _MOST:
        counted.append(("sequences", {"lengths": [1] * rows}))
    for name, made in counted:
        mask = ragged(**made)
        text, nearest = _floor(loss, found, mask, constant, name)
        if text:
            one_more = math.ceil(constant) + 1
            example = of_policy(ragged([one_more] if name == "tokens" else [1] * one_more))
            amount = f"{one_more} {name} are not divided by {number(constant)}"
            finding = Finding("differs", text, f"more than {number(constant)} {name}", amount, example, "denominator")
            aggregation, normalizer = nearest or (found.aggregation, found.normalizer)
            findings = (*found.findings, finding)
            return found._replace(aggregation=aggregation, normalizer=normalizer, findings=findings, notes=())
    return found._replace(notes=(*found.notes, *notes))


def of_options(loss: Loss, options: Mapping[str, Any]) -> Weights:
    """The same for a loss that is to have these options, and has them in small batches."""
    aggregation, normalizer = options.get("aggregation", "seq-mean-token-mean"), options.get("normalizer")
    constant = None if normalizer is None or callable(normalizer) else float(normalizer)
    powers = {"n_i": -1.0} if aggregation == "seq-mean-token-mean" else {}
    return read(loss, Weights(aggregation, constant, powers, 1.0))


def _floor(loss: Loss, found: Weights, mask: NDArray[np.bool_], constant: float, name: str) -> tuple[str, Any]:
    """What the denominator of this batch is, if it is not what it is in small ones; and the nearest aggregation."""
    small = ragged([3, 5])
    if "mask" not in loss.takes:  # every token counts
        small, mask = np.ones_like(small), np.ones_like(mask)
    try:
        one, many = loss.policy_value(of_policy(small)), loss.policy_value(of_policy(mask))
    except CallFailed:
        return "", None
    if not one or not np.isfinite([one, many]).all():
        return "", None
    relative = many / one * _sum(found, small) / _sum(found, mask)
    error = max(1e-4, loss.exactness)
    if abs(relative - 1) <= error:
        return "", None
    counts = mask.sum(axis=1)
    divided = found.powers or {}
    choices: dict[str, tuple[float, Any]] = {}
    if name == "sequences":
        choices["the number of sequences"] = constant / len(mask), None
    else:
        only_b = {x: p for x, p in divided.items() if p} == {"B": -1}
        of_rows = float(np.sum(counts * constant / np.maximum(counts, constant)) / counts.sum())
        choices["the number of tokens of the batch"] = (
            constant / counts.sum(),
            None if divided else ("token-mean", None),
        )
        choices["the number of tokens of a sequence"] = of_rows, ("seq-mean-token-mean", None) if only_b else None
        choices["the width, or the length of the longest sequence"] = constant / mask.shape[1], None
    floor = f"the denominator {number(constant)} is a floor"
    for text, (expected, nearest) in choices.items():
        if abs(relative / expected - 1) <= error:
            return f"{floor}: with more {name} it is {text}, as by clamp(min={number(constant)})", nearest
    return f"the denominator {number(constant)} is a constant for few {name} only", None


def _sum(found: Weights, mask: NDArray[np.bool_]) -> float:
    """The sum of the weights of all tokens, up to a factor."""
    logs = sum((p * np.log(sizes(mask)[name]) for name, p in (found.powers or {}).items()), np.zeros(mask.shape))
    return float(np.exp(logs)[mask].sum())

"""Whether every unmasked token counts in the denominators: those with A = 0, and those that a trust region drops, too.

Seen from a token beside them: its gradient is larger where they are not counted.
"""

from typing import Any

import numpy as np

from ..terms import Band
from .calling import Batch, CallFailed, Loss, batch
from .measuring import LOGP
from .report import Finding, number

#: Of the row that is looked at, and of those beside it.
_LENGTHS = (1, 2, 4)
#: A log-ratio beyond the bounds of any region, and the log-probability of the more probable of the two.
_BEYOND, _PROBABLE = 6.0, -0.01


def read(loss: Loss) -> list[Finding]:
    """The finding that rows with A = 0 are left out of a denominator."""
    A = np.array([1.0, 0.0, 0.0])
    at = batch(np.full((3, 4), LOGP), advantages=A, mask=_mask(loss))
    factor = _factor(loss, at, at._replace(advantages=np.ones(3)))
    if factor is None or factor < 1:
        return []
    text = f"rows with A = 0 are left out: it divides by the number of {_of(loss, factor)}"
    where = "a row with A = 0 beside others, as in dynamic sampling"
    amount = f"a token of 7, in one of 3 rows, weighs {number(factor)} times as much where the other rows have A = 0"
    return [Finding("differs", text, where, amount, batch([[LOGP], [LOGP]], advantages=[1.0, 0.0]), "denominator")]


def beside_dropped(loss: Loss, region: Any, of_tokens: bool) -> list[Finding]:
    """What becomes of the others where this region drops tokens: they are to count as before."""
    if "old_logps" not in loss.takes:
        return []
    which = "clipped" if region is None else "dropped"
    down = isinstance(region, Band) and region.ratio_max > np.exp(_BEYOND)
    found: list[Finding] = []
    one, beyond = np.zeros((3, 4)), np.zeros((3, 4))
    beyond[1:] = -_BEYOND if down else _BEYOND
    mask = _mask(loss)
    at, usual = _drifted(beyond, mask), _drifted(one, mask)
    factor = _factor(loss, at, usual)
    if factor is not None and factor > 1:
        text = f"{which} tokens are not counted: it divides by the number of {_of(loss, factor)}"
        amount = (
            f"a token of 7, in one of 3 rows, weighs {number(factor)} times as much where the other rows are {which}"
        )
        small = _drifted(beyond[:2, :1], np.ones((2, 1), bool))
        found.append(Finding("differs", text, "log-ratios far from 0", amount, small))
    if of_tokens and region is not None:
        x = np.array([[0.0, beyond[1, 0]]])
        at = _drifted(x, np.ones((1, 2), bool))
        factor = _factor(loss, at, at._replace(old_logps=at.logps.copy()))
        if factor == 0:
            text = "a whole sequence is dropped where one of its tokens is outside of the region"
            balanced = _drifted(np.array([[_BEYOND, -_BEYOND]]), np.ones((1, 2), bool))
            if _of_advantages(loss, balanced):
                text = (
                    "a whole sequence is dropped where the geometric mean of its ratios is outside of the region, and "
                    "the ratio is each token's own"
                )
            amount = f"no gradient for a token with ρ = 1 beside one with ρ = {number(np.exp(x[0, 1]))}"
            found.append(Finding("differs", text, "tokens outside of the trust region", amount, at))
    return found


def _mask(loss: Loss) -> Any:
    if "mask" not in loss.takes:
        return np.ones((3, 4), bool)
    return np.arange(4) < np.array(_LENGTHS)[:, None]


def _drifted(x: Any, mask: Any) -> Batch:
    """A batch with these log-ratios, A = 1."""
    return batch(_PROBABLE + np.minimum(x, 0), _PROBABLE - np.maximum(x, 0), 1.0, mask=mask)


def _factor(loss: Loss, at: Batch, usual: Batch) -> float | None:
    """How much more the first token weighs in one batch than in the other, if that is not as much."""
    try:
        one, other = (_of_advantages(loss, x) for x in (at, usual))
    except CallFailed:
        return None
    if not other or not np.isfinite([one, other]).all() or abs(one / other - 1) <= 1e-4:
        return None
    return one / other


def _of_advantages(loss: Loss, at: Batch) -> float:
    """The gradient of the first token, less that of the same batch with A = 0 in every row."""
    grads = [loss(x).grad for x in (at, at._replace(advantages=0 * at.advantages))]
    return float(np.subtract(*grads)[0, 0])  # type: ignore[arg-type]


def _of(loss: Loss, factor: float) -> str:
    if abs(factor - 3) < 1e-3:
        return "the other rows" if "mask" in loss.takes else "the other rows, or of their tokens"
    return "the other rows' tokens" if abs(factor - 7) < 1e-3 else "others"

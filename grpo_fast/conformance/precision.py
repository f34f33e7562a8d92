"""In which precision the policy term is computed: how many binary digits its values have."""

import numpy as np

from .calling import CallFailed
from .curves import Tokens
from .report import Finding

#: Binary digits of a number, and how many decimal ones they are.
_FORMATS = {8: ("bfloat16", "2 to 3"), 11: ("float16", "3"), 24: ("float32", "7")}
_X = np.array([-0.31, -0.17, -0.071, -0.013, -3e-4, 3e-4, 0.011, 0.053, 0.093, 0.17])


def read(tokens: Tokens) -> tuple[list[Finding], tuple[str, ...]]:
    """What is to be told of a precision that is lower than that of the answer: a finding, or of float32 a note.

    A loss that is computed in float32 is taken as one from then on, whatever the dtype of its answer.
    """
    try:
        found = np.array([tokens.of(x, A)[0] / A for x in _X for A in (1.0, -1.0)])
        one = tokens.of(0.0, 1.0)[0]
    except CallFailed:
        return [], ()
    values = found / one if one else found
    if not np.isfinite(values).all():
        return [], ()
    # Bounds may be of a higher precision, and short numbers: several others are looked for.
    least = 24 if tokens.loss.eps > 1e-10 else 53
    digits = next((n for n in _FORMATS if n < least and any(_short(n, x) >= 5 for x in (values, found))), None)
    if digits is None:
        return [], ()
    name, decimals = _FORMATS[digits]
    if digits == 24:
        tokens.loss.eps = float(np.finfo(np.float32).eps)
        return [], ("the ratio is computed in float32: about 7 digits of the policy term mean something",)
    text = f"the ratio is computed in {name}: it has {decimals} digits, so that what it bounds cannot be told"
    amount = f"s/A = {found[10] / (one or 1.0):.8g} at ρ = {np.exp(_X[5]):.8g}"
    return [Finding("differs", text, "everywhere", amount, tokens.at(float(_X[5]), 1.0), "digits")], ()


def _short(digits: int, values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> int:
    """For how many different ones of them so many binary digits are enough."""
    mantissa = np.frexp(values)[0] * 2.0**digits
    return int(np.unique(values[mantissa == np.round(mantissa)]).size)

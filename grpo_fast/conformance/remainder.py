"""What a loss holds beside its policy term and its KL term: what is left where A = 0 and π_ref = π_θ.

That should be nothing. A KL term to π_old, an entropy bonus or a constant are told by how it changes.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ..terms import K1, K2, K3
from .calling import Batch, CallFailed, Loss, batch
from .kl import KLTerm, estimate
from .numbers import tidy
from .report import Finding, about, number

Floats = NDArray[np.float64]
_X = np.array([-0.5, -0.2, 0.0, 0.1, 0.4])
_LOGPS = np.array([-1.0, -2.0, -0.3, -4.0])


def read(loss: Loss, scale: float, width: int, term: KLTerm) -> list[Finding]:
    """What is left, in units of the policy term, beside this KL term."""
    option = term.option
    if about("of old", term.findings):
        return []

    def at(x: float, logp: float) -> Batch:
        shape = (1, width)
        return batch(np.full(shape, logp), np.full(shape, logp - x), [0.0])

    def of(x: float, logp: float) -> tuple[float, float]:
        found = loss(at(x, logp))
        assert found.grad is not None
        return found.loss / scale, float(np.sum(found.grad)) / scale

    try:
        along_x = np.array([of(float(x), -1.5) for x in _X])
        along_logp = np.array([of(0.0, float(logp)) for logp in _LOGPS])
    except CallFailed:
        return []
    if term.there:  # whose gradient need not be 0 where π_ref = π_θ
        along_x[:, 1] = along_logp[:, 1] = 0.0
    both = np.concatenate([along_x, along_logp])
    error = max(loss.exactness, 1e-9)
    if not np.isfinite(both).all() or np.abs(both).max() <= 10 * error:
        return []
    example = batch([[-1.5]], [[-1.9]], [0.0])
    where = "A = 0, π_ref = π_θ"
    value = along_x[:, 0]
    constant = float(value[2])
    moves_x, moves_logp = (np.ptp(values) > 10 * error for values in (value, along_logp[:, 0]))
    if not moves_x and not moves_logp and not both[:, 1].any():
        several = {n: loss(batch(np.full((1, n), -1.5), advantages=[0.0])).loss / scale for n in (1, 2, 6)}
        if np.ptp(list(several.values())) > 10 * error:
            amount = ", ".join(f"{number(value)} for {n} tokens" for n, value in several.items())
            what = "adds a term of the number of tokens alone, such as a cost of length"
            return [Finding("differs", what, where, amount, example)]
        what = f"adds a constant, {number(tidy(constant, 1e-6))}"
        if isinstance(option, K3) and math.isclose(option.beta, constant, rel_tol=1e-6):
            what = "the KL term lacks its − 1: it is e^(−l) + l, β more than k3"
        return [Finding("differs", what, where, "", example)]
    if moves_x and not moves_logp:
        for name, kind, x in (("k1", K1, _X), ("k2", K2, _X), ("k3", K3, _X), ("k3 of −log ρ", K3, -_X)):
            k, _ = estimate(kind, x)
            for weight, word in ((np.ones_like(_X), ""), (np.exp(_X), "ρ·")):
                beta = float(np.dot(value, weight * k) / np.dot(weight * k, weight * k))
                if np.abs(value - beta * weight * k).max() <= 100 * error * abs(beta):
                    text = (
                        f"a KL term to the old policy, π_old, beside the policy term: {number(tidy(beta, 1e-6))}·"
                        f"{word}{name}, of log π_θ − log π_old"
                    )
                    return [Finding("differs", text, where, _numbers(_X, value, "log ρ"), example)]
    if moves_logp and not moves_x:
        p = np.exp(_LOGPS)
        for factor, word in ((_LOGPS, "log π_θ"), (p * _LOGPS, "π_θ·log π_θ")):
            c = float(np.dot(along_logp[:, 0], factor) / np.dot(factor, factor))
            if np.abs(along_logp[:, 0] - c * factor).max() <= 100 * error * abs(c):
                text = (
                    f"adds {number(tidy(c, 1e-6))}·{word} of each token, beside policy and KL term: an entropy bonus "
                    "of the sampled tokens"
                )
                return [Finding("differs", text, where, _numbers(_LOGPS, along_logp[:, 0], "log π_θ"), example)]
    text = "holds something that depends neither on the advantages nor on the reference"
    amount = _numbers(_X, value, "log ρ") if moves_x else _numbers(_LOGPS, along_logp[:, 0], "log π_θ")
    return [Finding("differs", text, where, amount, example)]


def _numbers(at: Floats, value: Floats, name: str) -> str:
    return "; ".join(f"{number(v)} at {name} = {number(x)}" for x, v in zip(at, value, strict=True))

"""The battery: inputs on which losses have been seen to differ, each with what a difference there means."""

import math
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..terms import CISPO, GMPO, Band, Clip
from .calling import Batch, Loss, batch, each
from .report import Severity

Mask = NDArray[np.bool_]


class Case(NamedTuple):
    """An input, and how severe it is if a loss differs there."""

    name: str
    at: Batch
    severity: Severity = "differs"
    kind: str = "ordinary"  # or A = 0, per token, many, ratios, tie, masked, empty sequence, empty, far, tiny
    array: str = ""  # the one that is not finite where masked; none where all are
    value: float = 0.0  # what it holds there


def cases(options: Mapping[str, Any], loss: Loss, per_token: bool) -> Iterator[Case]:
    """The cases for a loss that is to have these options, and takes advantages one per token if told so."""
    rng = np.random.default_rng(20)
    right = np.arange(6) < np.array([[3], [6], [1], [4]])
    left = right[:, ::-1]
    holes = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]], bool)
    masked = "mask" in loss.takes
    for A in (1.0, -1.0, 0.0):
        for x in (0.0, 0.07, -0.07):
            yield Case("one token", _single(x, 0.3, A))
    for shape in ((1, 5), (4, 1), (3, 3), (2, 7)):
        yield Case(f"{shape[0]} × {shape[1]} without padding", made(rng, np.ones(shape, bool)))
        yield Case(
            f"{shape[0]} × {shape[1]}, ratios far apart", made(rng, np.ones(shape, bool), 1.2, 1.0), kind="ratios"
        )
    yield Case("many rows", made(rng, np.ones((65, 2), bool), 0.3), kind="many")
    yield Case("many tokens in a row", made(rng, np.ones((2, 130), bool), 0.3), kind="many")
    yield Case("A = 0", made(rng, np.ones((2, 3), bool))._replace(advantages=np.zeros(2)))
    yield Case(
        "a row with A = 0",
        made(rng, np.ones((3, 2), bool))._replace(advantages=np.array([0.7, 0.0, -1.2])),
        kind="A = 0",
    )
    yield Case("log-probabilities of 0", batch(np.zeros((1, 2)), [[-0.1, -0.4]], 1.0, [[-0.2, 0.0]]))
    yield Case("improbable tokens", batch([[-41.0, -37.5]], [[-41.2, -37.6]], -1.0, [[-40.5, -37.9]]))
    if masked:
        yield from _masked(rng, right, left, holes)
    if per_token and not isinstance(options.get("surrogate"), GMPO):
        for mask in (np.ones((2, 3), bool), *([right, holes] if masked else [])):
            for drift, far in ((0.1, ""), (0.8, ", ratios far apart")):
                yield Case(f"advantages one per token{far}", made(rng, mask, drift, per_token=True), kind="per token")
    for x in kinks(options):
        for A in (1.0, -1.0):
            yield Case(f"a tie at log ρ = {x:.6g}", _single(x, 0.1, A), "fragile", "tie")
    yield from _scales("old_logps" in loss.takes)


def _masked(rng: Any, right: Mask, left: Mask, holes: Mask) -> Iterator[Case]:
    for name, mask in (("right", right), ("left", left), ("holes", holes)):
        yield Case(f"padding: {name}", made(rng, mask))
        yield Case(f"padding: {name}, ratios far apart", made(rng, mask, 0.8, 0.8), kind="ratios")
    at = made(rng, right, 0.3)
    order = [2, 0, 3, 1]
    yield Case("rows permuted", each(at, itemgetter(order)))
    wider = each(at, lambda x: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, 3))))
    yield Case("a copy with more padding", wider)
    for i in range(len(right)):
        yield Case("a micro-batch of it", each(at, itemgetter(slice(i, i + 1))))
    yield Case("nine rows", made(rng, np.arange(8) < rng.integers(1, 9, (9, 1)), 0.4))
    empty = right.copy()
    empty[1] = False
    yield Case("a sequence without a token", made(rng, empty), "differs", "empty sequence")
    yield Case("no token at all", made(rng, np.zeros((2, 3), bool)), "fragile", "empty")
    for name in ("logps", "old_logps", "ref_logps"):
        for value in (math.nan, math.inf, -math.inf):
            at = made(rng, right)
            values = np.where(at.mask, getattr(at, name), value)
            yield Case(
                f"{name} = {value} where masked", at._replace(**{name: values}), "fragile", "masked", name, value
            )
    yield Case("−inf in all where masked", _everywhere(made(rng, right), -math.inf), "fragile", "masked", "", -math.inf)


def _everywhere(at: Batch, value: float) -> Batch:
    logps, old, ref = (np.where(at.mask, x, value) for x in (at.logps, at.old_logps, at.ref_logps))
    return Batch(logps, old, at.advantages, ref, at.mask)


def _scales(with_old: bool) -> Iterator[Case]:
    for size in (1e-7, 1e-5):
        for sign in (1, -1):
            if with_old:
                yield Case("tiny log-ratios", _single(sign * size, 0.2, 1.0))
            yield Case("a tiny KL", _single(0.01, sign * size, 1.0), "fragile", "tiny")
    for size in (3.0, 7.0, 12.0, 19.0, 25.0, 50.0, 80.0):
        for sign in (1, -1):
            far = size > 20
            severity: Severity = "fragile" if far else "differs"
            of_kl, of_ratio = ("far", "far") if far else ("ordinary", "ratios")
            for A in (1.0, -1.0) if with_old else ():
                yield Case(f"log ρ = {sign * size:g}", _single(sign * size, 0.1, A), severity, of_ratio)
            if size <= 30:
                yield Case(f"log π_θ − log π_ref = {sign * size:g}", _single(0.01, sign * size, 1.0), severity, of_kl)


def _single(x: float, l: float, A: float) -> Batch:
    """One token with these log ρ and log π_θ − log π_ref, and none of its log-probabilities above 0."""
    logp = -0.02 - max(0.0, -x) - max(0.0, -l)
    return batch([[logp]], [[logp - x]], A, [[logp - l]])


def made(rng: Any, mask: Mask, drift: float = 0.1, ref_drift: float = 0.4, per_token: bool = False) -> Batch:
    """A random batch with this mask, and other finite numbers where it is 0."""
    x, l = drift * rng.normal(size=mask.shape), ref_drift * rng.normal(size=mask.shape)
    x, l = np.where(mask, x, 0.5), np.where(mask, l, -0.6)
    # None of the three is a probability above 1.
    logps = -rng.exponential(size=mask.shape) - 0.05 - np.maximum(0, np.maximum(-x, -l))
    advantages = rng.normal(size=mask.shape if per_token else len(mask))
    return Batch(logps, logps - x, advantages, logps - l, mask.copy())


def kinks(options: Mapping[str, Any]) -> Iterable[float]:
    """The log-ratios at which these options are bent or broken."""
    surrogate, region = options.get("surrogate", Clip()), options.get("trust_region")
    ratios: list[float] = []
    match surrogate:
        case Clip(low, high, delta):
            ratios += [1 - low, 1 + high, delta]
        case CISPO(most, least):
            ratios += [most, least]
        case GMPO(low, high):
            ratios += [math.exp(-low), math.exp(high)]
    # The bounds of the other regions are of probabilities: which side a rounding falls on is nobody's fault.
    if isinstance(region, Band):
        ratios += list(region)
    return [math.log(r) for r in ratios if 0 < r < math.inf]

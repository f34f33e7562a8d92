"""The options of `rollout_correction` as values: `Reject`, and all of them together, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self, TypeAlias, TypedDict, get_args

from ._checks import did_you_mean, number, one_of
from .terms.option import Option, kept

WeightLevel: TypeAlias = Literal["token", "sequence", "geometric"]
WeightMode: TypeAlias = Literal["truncate", "mask", "raw"]
Statistic: TypeAlias = Literal["ratio", "k2", "k3"]
RejectLevel: TypeAlias = Literal["token", "sequence", "geometric", "seq_min", "seq_max", "seq_sum", "seq_mean"]
WEIGHT_LEVELS: tuple[str, ...] = get_args(WeightLevel)
WEIGHT_MODES: tuple[str, ...] = get_args(WeightMode)
#: The levels of each statistic.
REJECT_LEVELS: dict[str, tuple[str, ...]] = {
    "ratio": ("token", "sequence", "geometric", "seq_min", "seq_max"),
    "k2": ("token", "seq_sum", "seq_mean", "seq_max"),
    "k3": ("token", "seq_sum", "seq_mean", "seq_max"),
}
#: The bounds of the weights, where there are some and others are not given.
LOWER, UPPER = 0.0, 2.0


@kept
class Reject(Option, NamedTuple("Reject", [("statistic", str), ("level", str), ("lower", float), ("upper", float)])):
    """A criterion of `rollout_correction`: kept is what has lower ≤ statistic ≤ upper, the bounds included.

    ::

        "ratio"   r = π_old/π_rollout
        "k2"      ½·log²r
        "k3"      r − 1 − log r

    of a token at level "token", which rejects that token. All other levels are of a sequence, over its unmasked tokens,
    and reject all of it: of the ratio "sequence" is exp Σ log r, the product, "geometric" exp mean log r, "seq_min" and
    "seq_max" the least and the largest r; of k2 and k3 "seq_sum", "seq_mean", "seq_max".

    Parameters
    ----------
    statistic : "ratio", "k2" or "k3"
        verl ``rollout_rs``; of its ``…_k1`` the bounds are those of a ratio, of 1/r: ``"seq_mean_k1"`` with
        ``"0.99_1.02"`` is ``Reject("ratio", "geometric", 1 / 1.02, 1 / 0.99)``.
    level : str
        See above.
    lower, upper : float, in [-inf, inf], lower ≤ upper
        What is exactly at a bound is kept.

    Raises
    ------
    TypeError, ValueError
        A word is none of those allowed, or a bound not a number, or ``lower`` above ``upper``.

    References
    ----------
    Masked importance sampling (MIS) and IcePop, arXiv:2510.18855; the geometric mask of NeMo-RL
    (``truncated_importance_sampling_type="seq-mask-tis"``) and of OpenRLHF; a veto is ``Reject("ratio", "seq_min",
    1e-4)``.
    """

    __slots__ = ()

    def __new__(
        cls, statistic: Statistic, level: RejectLevel, lower: float = -math.inf, upper: float = math.inf
    ) -> Self:
        one_of("statistic", statistic, tuple(REJECT_LEVELS))
        if level not in REJECT_LEVELS[statistic]:
            one_of(f"level of {statistic!r}", level, REJECT_LEVELS[statistic])
        low = number("lower", lower, "in [-inf, inf]", lambda x: x == x)
        return super().__new__(
            cls, statistic, level, low, number("upper", upper, f"in [lower = {low}, inf]", lambda x: x >= low)
        )


@kept
class RolloutOptions(
    Option,
    NamedTuple(
        "RolloutOptions",
        [
            ("level", str),
            ("mode", str),
            ("lower", float | None),
            ("upper", float | None),
            ("reject", tuple[Reject, ...]),
        ],
    ),
):
    """What `rollout_correction` computes: its options, checked. Only `RolloutStats` of the same ones can be added.

    With mode "raw" both bounds are None.

    Raises
    ------
    TypeError, ValueError
        An option is of another type, not one of the words allowed, or outside its interval.
    """

    __slots__ = ()

    def __new__(
        cls,
        level: WeightLevel = "token",
        mode: WeightMode = "truncate",
        lower: float | None = None,
        upper: float | None = None,
        reject: Reject | Iterable[Reject] = (),
    ) -> Self:
        one_of("level", level, WEIGHT_LEVELS)
        one_of("mode", mode, WEIGHT_MODES)
        rejects = _checked_rejects(reject)
        if mode == "raw":
            for name, value in (("lower", lower), ("upper", upper)):
                if value is not None:
                    raise ValueError(f"{name} must be None with mode='raw', which has no bounds, got {value!r}")
            return super().__new__(cls, level, mode, None, None, rejects)
        low = number("lower", LOWER if lower is None else lower, "in [0, inf]", lambda x: x >= 0)
        high = number("upper", UPPER if upper is None else upper, f"in [lower = {low}, inf]", lambda x: x >= low)
        return super().__new__(cls, level, mode, low, high, rejects)

    def __repr__(self) -> str:  # all of it: the bounds depend on each other
        return f"RolloutOptions({', '.join(f'{name}={x!r}' for name, x in zip(self._fields, self, strict=True))})"

    @property
    def bounds(self) -> tuple[float, float]:
        """Between what weights are bounded; with mode "raw", which has no bounds, all that there are."""
        if self.lower is None or self.upper is None:
            return 0.0, math.inf
        return self.lower, self.upper

    @property
    def needs_sequences(self) -> bool:
        """Whether weights or rejections are of whole sequences."""
        return self.level != "token" or any(each.level != "token" for each in self.reject)

    def band(self, statistic: str, level: str) -> tuple[float, float]:
        """Between what a statistic must lie at that level: within the bounds of all that are about it."""
        about = [r for r in self.reject if (r.statistic, r.level) == (statistic, level)]
        return max((r.lower for r in about), default=-math.inf), min((r.upper for r in about), default=math.inf)


class RolloutKeywords(TypedDict, total=False):
    """The options of `rollout_correction` as `evaluate` takes them, for who checks types."""

    level: WeightLevel
    mode: WeightMode
    lower: float | None
    upper: float | None
    reject: Reject | Iterable[Reject]


def options_of(keywords: Mapping[str, Any]) -> RolloutOptions:
    """The options that ``rollout_correction`` of `evaluate` says, or a TypeError or ValueError."""
    allowed = RolloutOptions._fields
    if not isinstance(keywords, Mapping):
        raise TypeError(f"rollout_correction must be a dict of {', '.join(allowed)}, got {keywords!r}")
    for name in keywords:
        if name == "normalize":
            raise ValueError(
                "rollout_correction must be without normalize over files: the mean of all weights is known only when "
                "all are read"
            )
        if name not in allowed:
            meant = did_you_mean(str(name), allowed)
            raise ValueError(f"rollout_correction must be a dict of {', '.join(allowed)}, got {name!r}{meant}")
    return RolloutOptions(**keywords)


def _checked_rejects(reject: object) -> tuple[Reject, ...]:
    """``reject`` as a tuple, or the TypeError."""
    if type(reject) is Reject:
        return (reject,)
    try:
        rejects = tuple(reject) if isinstance(reject, Iterable) and not isinstance(reject, (str, bytes)) else (reject,)
    except TypeError:  # an array without dimensions says that it can be iterated
        rejects = (reject,)
    for each in rejects:
        if type(each) is not Reject:
            raise TypeError(f"reject must be any number of Reject(…), got {each!r}")
    return rejects

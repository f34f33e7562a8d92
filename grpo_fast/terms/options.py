"""All options of a loss, checked together: `Options`."""

from typing import Literal, NamedTuple, Self, TypeAlias, get_args

from .._checks import not_negative, one_of
from .kl_terms import KL
from .option import Option, kept
from .surrogates import DEFAULT_SURROGATE, OF_SEQUENCES, Surrogate
from .trust_regions import TV, Band, TrustRegion

Level: TypeAlias = Literal["token", "sequence", "sequence_token"]
Aggregation: TypeAlias = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]
LEVELS: tuple[str, ...] = get_args(Level)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)

_SURROGATES, _TRUST_REGIONS, _KLS = get_args(Surrogate), get_args(TrustRegion), get_args(KL)


def _instead(value: object, option: str) -> str:
    """The end of a message: what was meant by a number, or by a class, in place of an option."""
    if isinstance(value, type) and value in (*_SURROGATES, *_KLS, *_TRUST_REGIONS):
        numbers = "" if value in _SURROGATES else "0.5, 2" if value is Band else "0.2" if value is TV else "0.04"
        return f": make one, such as {value.__name__}({numbers})"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f": did you mean {option}({value!r})?" if is_number else ""


def _refuse_unless_region(trust_region: object, level: Level) -> None:
    """Raise the error for what is no trust region, or is of single tokens where ρ is one for a sequence."""
    if type(trust_region) not in _TRUST_REGIONS:
        allowed = "a TV, BinaryKL, Band or None"
        raise TypeError(f"trust_region must be {allowed}, got {trust_region!r}{_instead(trust_region, 'TV')}")
    if type(trust_region) is not Band and level != "token":
        raise ValueError(
            f"trust_region must be a Band or None at importance_sampling_level={level!r}, as a "
            f"{type(trust_region).__name__} is of single tokens; got {trust_region!r}"
        )


def _refuse_at_other_levels(surrogate: Surrogate, kl: KL | None, level: Level) -> None:
    """Raise the ValueError for what is known at sequence level only."""
    if type(surrogate) in OF_SEQUENCES:
        raise ValueError(
            f"importance_sampling_level must be 'sequence' with a {type(surrogate).__name__}, which is of whole "
            f"sequences; got {level!r}"
        )
    if kl is not None and kl.importance_weighted == "sequence":
        raise ValueError(
            f"importance_sampling_level must be 'sequence' with importance_weighted='sequence' in the KL term, got "
            f"{level!r}"
        )


@kept
class Options(
    Option,
    NamedTuple(
        "Options",
        [
            ("surrogate", Surrogate),
            ("kl", KL | None),
            ("importance_sampling_level", Level),
            ("aggregation", Aggregation),
            ("normalizer", float | None),
            ("trust_region", TrustRegion | None),
        ],
    ),
):
    """What `grpo_loss` computes: all its options, checked. Only `Stats` of the same options can be added.

    Raises
    ------
    TypeError, ValueError
        An option is of another type, not one of the words allowed, or outside its interval.
    """

    __slots__ = ()

    def __new__(
        cls,
        surrogate: Surrogate = DEFAULT_SURROGATE,
        kl: KL | None = None,
        importance_sampling_level: Level = "token",
        aggregation: Aggregation = "seq-mean-token-mean",
        normalizer: float | None = None,
        trust_region: TrustRegion | None = None,
    ) -> Self:
        if type(surrogate) not in _SURROGATES:
            names = f"{', '.join(x.__name__ for x in _SURROGATES[:-1])} or {_SURROGATES[-1].__name__}"
            raise TypeError(f"surrogate must be a {names}, got {surrogate!r}{_instead(surrogate, 'Clip')}")
        if kl is not None and type(kl) not in _KLS:
            raise TypeError(f"kl must be a K1, K2, K3 or None, got {kl!r}{_instead(kl, 'K3')}")
        level = one_of("importance_sampling_level", importance_sampling_level, LEVELS)
        if level != "sequence":
            _refuse_at_other_levels(surrogate, kl, level)
        if trust_region is not None:
            _refuse_unless_region(trust_region, level)
        return super().__new__(
            cls,
            surrogate,
            kl,
            level,
            one_of("aggregation", aggregation, AGGREGATIONS),
            None if normalizer is None else not_negative("normalizer", normalizer),
            trust_region,
        )

    @property
    def mean_within(self) -> bool:
        """Whether a sequence's sum is divided by the number of its tokens before it is added to others."""
        return self.aggregation == "seq-mean-token-mean"

    def denominator(self, tokens: int, sequences: int | None) -> float:
        """What the sum over all is divided by, for so many unmasked tokens and sequences; at least 1 unless given.

        Raises
        ------
        ValueError
            The normalizer is 0 although there are tokens. Where there are none, 1 serves as well.
        """
        if self.normalizer == 0 and tokens:
            raise ValueError(f"normalizer must be above 0 where a token counts, got {self.normalizer!r}")
        if self.normalizer:
            return self.normalizer
        if self.aggregation == "token-sum":
            return 1.0
        counted = tokens if self.aggregation == "token-mean" else sequences
        return float(max(counted or 0, 1))  # to a kernel an int would be another type

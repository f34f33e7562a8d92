"""What is told of a loss: findings, and the report that holds them."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .calling import Batch

Severity: TypeAlias = Literal["differs", "fragile"]
_WIDTH = 100
_LETTERS = (
    "s: a token's policy term, ρ = π_θ/π_old; k: its KL estimate, l = log π_θ − log π_ref; c: its weight in the mean"
)


#: What findings are about on which it depends what is probed, or told, beside them.
Topic: TypeAlias = Literal[
    "",
    "no gradient",
    "steep",  # a gradient that is a multiple of its value's
    "other sign",  # A < 0 counts otherwise
    "nonlinear",
    "both bounds",  # what GMPO looks like for one token, with both bounds or the wrong one
    "clamped",
    "digits",
    "to reference",
    "other arrays",  # π_ref in place of π_old, or a KL within the advantages
    "of old",  # a KL term of the old policy
    "reward",  # a KL that is held constant, as in a reward
    "unclear",
    "leak",
    "masked advantages",
    "mixed rows",
    "denominator",
    "factor",
    "temperature",  # of SAPO, missing as a factor
    "irregular",
    "empty sequence",
]


class Finding(NamedTuple):
    """One thing that a loss does otherwise.

    Parameters
    ----------
    severity : "differs" or "fragile"
        Another formula on finite inputs with finite padding; or something that breaks where they are not, where
        |log ρ| is above 20, where a KL term is tiny, or where there is no token.
    what : str
        What it does, in the words of the field.
    where : str
        On which inputs.
    amount : str
        How much: numbers, found and expected.
    example : Batch or None
        The smallest input found that shows it: float64 arrays by the names of the arguments, the mask of bools.
    topic : str
        What it is about, where another reading depends on that.
    """

    severity: Severity
    what: str
    where: str = ""
    amount: str = ""
    example: Batch | None = None
    topic: Topic = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Finding) and (self.severity, str(self)) == (other.severity, str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.severity, str(self)))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.amount:
            lines.append(f"how much: {self.amount}")
        if self.example is not None:
            lines.append(f"smallest input: {shown(self.example)}")
        return "\n".join(lines)


def about(topic: Topic, findings: Iterable[Finding]) -> bool:
    """Whether one of the findings is about this."""
    return any(finding.topic == topic for finding in findings)


class Report(NamedTuple):
    """What a loss computes, and what it does wrong; printed, it is a page for people.

    Parameters
    ----------
    name, framework, dtype : str
        What the loss is called, what it is written in, and the dtype of its answer.
    options : dict or None
        Keyword arguments of `grpo_loss`: those that it computes, or, of `check`, those that it was compared with; None
        where what it computes is none of them. Where the denominator is a function of the batch for which there is no
        word, ``normalizer`` is a `Normalizer`: call it with the mask.
    findings : tuple of Finding
        What differs first.
    notes : tuple of str
        What is no fault, and good to know.
    compared : int
        How many inputs were compared with the reference.
    disagreed : int
        On how many of them it differs, beyond rounding.
    strict : bool
        Whether what is fragile counts, too.
    asked : bool
        Whether the options are those that it was compared with, as of `check`.
    parts : Mapping
        What of the keyword arguments was read where ``options`` is None.
    """

    name: str
    framework: str
    dtype: str
    options: dict[str, Any] | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    compared: int = 0
    disagreed: int = 0
    strict: bool = False
    asked: bool = False
    parts: Mapping[str, Any] = {}

    @property
    def ok(self) -> bool:
        """Whether nothing differs; with ``strict`` whether nothing is fragile either."""
        return self.options is not None and not (self.findings if self.strict else self.differs)

    @property
    def differs(self) -> tuple[Finding, ...]:
        """The findings that make it another loss."""
        return tuple(x for x in self.findings if x.severity == "differs")

    @property
    def fragile(self) -> tuple[Finding, ...]:
        """The findings on inputs that are no ordinary ones."""
        return tuple(x for x in self.findings if x.severity == "fragile")

    def as_dict(self) -> dict[str, Any]:
        """The report in strings, numbers and lists, as JSON has them; options as they are printed."""
        return {
            "loss": self.name,
            "framework": self.framework,
            "dtype": self.dtype,
            "ok": self.ok,
            "options": None if self.options is None else {name: repr(x) for name, x in self.options.items()},
            "parts": {name: repr(x) for name, x in self.parts.items()},
            "findings": [
                {name: getattr(x, name) for name in ("severity", "what", "where", "amount")}
                | {"example": None if x.example is None else shown(x.example)}
                for x in self.findings
            ],
            "notes": list(self.notes),
            "compared": self.compared,
            "disagreed": self.disagreed,
        }

    def __bool__(self) -> bool:
        raise TypeError("a Report is neither true nor false: ask for its .ok")

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "NOT OK"
        lines = [f"{verdict}: {self.name} ({self.framework}, answers in {self.dtype})", ""]
        if self.options is None:
            lines += ["What it computes is none of grpo_loss' options.", ""]
            if self.parts:
                lines += [f"of it are   {_call(self.parts)}", ""]
        else:
            word = "compared with" if self.asked else "nearest to" if self.differs else "computes"
            lines += [f"{word}  grpo_loss({', '.join(filter(None, ('…', _call(self.options))))})", ""]
        for title, found in (("differs", self.differs), ("fragile", self.fragile)):
            for number, finding in enumerate(found, 1):
                text = str(finding).splitlines()
                head = f"{title} {number}.  "
                lines += _wrapped(text[0], head)
                for line in text[1:]:
                    lines += _wrapped(line, " " * len(head))
                lines.append("")
        for note in self.notes:
            lines += _wrapped(note, "note  ")
        if self.findings and self.options is None:
            lines += _wrapped(_LETTERS, "note  ")
        lines += [*([""] if self.notes else []), self._verdict()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _verdict(self) -> str:
        compared = f"{self.compared} inputs compared with the reference"
        fragile = ", all of them where it is fragile" if self.ok or not self.differs else ""
        compared += f", {self.disagreed} disagree{fragile}" if self.disagreed else ", all agree to rounding"
        if not self.compared:
            compared = "nothing to compare with"
        return f"{len(self.differs)} differ, {len(self.fragile)} fragile; {compared}"


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False)


def _call(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def shown(at: Batch) -> str:
    """A batch as in Python, with nan and inf, without what is as it is when left out; of large arrays the shape."""
    parts = [f"logps={_array(at.logps)}"]
    parts.append(
        "old_logps=logps"
        if np.array_equal(at.old_logps, at.logps, equal_nan=True)
        else f"old_logps={_array(at.old_logps)}"
    )
    parts.append(f"advantages={_array(at.advantages)}")
    if not np.array_equal(at.ref_logps, at.logps, equal_nan=True):
        parts.append(f"ref_logps={_array(at.ref_logps)}")
    if not at.mask.all():
        parts.append(f"mask={_array(at.mask.astype(int))}")
    return ", ".join(parts)


def _array(x: Any) -> str:
    if x.size > 40:
        return f"<{' × '.join(map(str, x.shape))}>"
    return str(np.round(x, 12).tolist() if x.dtype.kind == "f" else x.tolist())


def number(x: float) -> str:
    """A number for people."""
    return f"{x + 0.0:.6g}".replace("-", "−")


def rounded(x: float) -> float:
    """A number as `number` tells it."""
    return float(f"{x + 0.0:.6g}")

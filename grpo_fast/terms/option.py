"""What all options share: a class outlives a reload, equality asks for the class, and it prints as it is called."""

import inspect
import math
from typing import Any, ClassVar, TypeVar

_Class = TypeVar("_Class", bound=type)
#: All classes of options, by name. They outlive `importlib.reload`, and a notebook's autoreload: kernels and other
#: modules know an option by its class, and a second ``Clip`` would be unknown to them.
_FIRST: dict[str, Any] = globals().get("_FIRST", {})


def kept(option: _Class) -> _Class:
    """The decorator of each class of options: the first class of its name."""
    kept: _Class = _FIRST.setdefault(option.__name__, option)
    return kept


@kept
class Option(tuple[Any, ...]):
    """Makes a NamedTuple equal only to those of its class, and every way to make one go through its constructor."""

    __slots__ = ()

    # `_replace` calls it, too; the NamedTuple's own goes around `__new__`. Any: mypy knows that one by odd arguments.
    _make: ClassVar[Any] = classmethod(lambda cls, fields: cls(*fields))

    def __eq__(self, other: object) -> bool:  # K1(0.1) and K2(0.1) hold the same numbers and mean different terms
        return type(self) is type(other) and super().__eq__(other)

    def __ne__(self, other: object) -> bool:  # a tuple's own would be found otherwise
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), super().__hash__()))

    def __repr__(self) -> str:
        # Fields without a default, the first one, and others that are not what they are when left out.
        fields: Any = dict(zip(self._fields, self, strict=True))  # type: ignore[attr-defined]  # of NamedTuples
        parameters = inspect.signature(type(self)).parameters
        shown = {name: x for name, x in fields.items() if parameters[name].default is inspect.Parameter.empty}
        for name, value in fields.items():
            if not shown or (name not in shown and getattr(type(self)(**shown), name) != value):
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={_literal(value)}' for name, value in shown.items())})"


def _literal(value: object) -> str:
    """What makes the value in Python's source; of infinity, which has no literal, a call."""
    return "float('inf')" if value == math.inf else repr(value)

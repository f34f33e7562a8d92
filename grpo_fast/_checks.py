"""What arguments may be, or the error that says so: numbers, words, and array-likes, made into what kernels can read.

Values in arrays are looked at here only after a kernel has found that something is wrong with them.
"""

import inspect
import math
import operator
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np

# Numba looks at it when a kernel is first called. Imported then, it can be the end of a process forked at that moment:
# nobody would let go of the import's lock there.
from numpy.ma import MaskedArray
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Chosen = TypeVar("Chosen", bound=str)
Function = TypeVar("Function", bound=Callable[..., Any])

FLOAT64 = np.dtype(np.float64)
FLOAT32 = np.dtype(np.float32)
_SEARCH = 1 << 16  # elements looked at together when a bad one is searched


# --- numbers and words ------------------------------------------------------------------------------------------------
def number(name: str, value: object, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """``value`` as a float, or an error that says what is allowed; NaN fails every comparison, hence every check."""
    if type(value) is float and is_allowed(value):  # nearly always; spares the slow isinstance below
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar or 0-d array of NumPy, JAX, torch
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        call_it = ": call it for the number" if callable(value) else ""
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}{call_it}")
    try:
        result = float(value)
    except OverflowError:  # an int beyond float64
        result = math.nan
    if not is_allowed(result):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return result


def positive(name: str, value: object) -> float:
    """``value`` as a float above 0 and finite, or the error, as in `number`."""
    return number(name, value, "in (0, inf)", lambda x: 0 < x < math.inf)


def whole(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least that; or the ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return number


def not_negative(name: str, value: object) -> float:
    """``value`` as a float, at least 0 and finite, or the error, as in `number`."""
    return number(name, value, "in [0, inf)", lambda x: 0 <= x < math.inf)


def flag(name: str, value: object) -> bool:
    """``value`` as a bool, or the TypeError if it is none, such as 0 or 1."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def one_of(name: str, value: Chosen, allowed: tuple[str, ...]) -> Chosen:
    """``value``, or the ValueError if it is none of the words allowed."""
    if not isinstance(value, str) or value not in allowed:
        meant = did_you_mean(str(value), allowed)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{meant}")
    return value


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about a word that is unknown: the one it is like, if any."""
    return "".join(f": did you mean {like!r}?" for like in closest(word, allowed))


def closest(word: str, allowed: Iterable[str]) -> list[str]:
    """The word allowed that begins with another one, or is most like it; none if none is like it."""
    from difflib import get_close_matches

    words = sorted(allowed, key=len)
    begun = [known for known in words if known.startswith(word) and len(word.strip("-")) > 1]
    return begun[:1] or get_close_matches(word.lower(), words, 1)


# --- keywords ---------------------------------------------------------------------------------------------------------
def hides_unknown(function: Function) -> Function:
    """The decorator of a function whose ``**unknown`` is there for `refuse_unknown`: no signature shows it."""
    signature = inspect.signature(function)
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]  # as `inspect` reads it
    return function


def refuse_unknown(function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise the TypeError for the first keyword that ``function`` does not have, with the one that was meant."""
    known = inspect.signature(function).parameters
    for name in unknown:
        hint = part_of(name, known) or did_you_mean(name, known)
        raise TypeError(f"{function.__name__} has no argument {name!r}{hint}")


def part_of(name: str, known: Container[str]) -> str:
    """The end of a message about an argument that belongs into one of an option that is ``known``; empty if none."""
    if name in ("epsilon", "epsilon_high", "delta") and "surrogate" in known:
        return f": it is a part of surrogate, as in surrogate=Clip({name}=…)"
    if name in ("beta", "importance_weighted") and "kl" in known:
        return f": it is a part of kl, as in kl=K3({'' if name == 'beta' else 'beta, '}{name}=…)"
    return ""


# --- arrays -----------------------------------------------------------------------------------------------------------
class _Alias:
    """What makes NumPy see the memory of a read-only array as that of a writeable one.

    For Numba a read-only array is another type, hence another kernel to compile; and kernels write to no input.
    """

    def __init__(self, array: Array) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def same_shape(
    names: Sequence[str], values: tuple[Any, ...], ndarray: Any = np.ndarray
) -> tuple[tuple[Array, ...], tuple[int, ...]]:
    """The named arguments as one-dimensional arrays of one dtype, float64 or float32, and the shape they all have.

    C-contiguous arrays of that dtype are not copied. Other dtypes are promoted by NumPy's rules, integers to float64.

    Raises
    ------
    TypeError
        An argument is not an array of real numbers.
    ValueError
        The shapes differ, or there is nothing in them.
    """
    # Nearly always there is nothing to convert, and looking whether is a third of a call on a few samples: a loop takes
    # half the time of all(…), size and ndim are had for less than a shape, and np.ndarray has been looked up.
    first: Any = values[0]
    if type(first) is ndarray:
        dtype, size = first.dtype, first.size
        if (dtype is FLOAT64 or dtype is FLOAT32) and size:
            for a in values:
                if (
                    type(a) is not ndarray
                    or a.dtype is not dtype
                    or a.size != size
                    or a.ndim != 1
                    or not a.flags.carray
                ):
                    break
            else:
                return values, (size,)
    converted = {name: real(name, value) for name, value in zip(names, values, strict=True)}
    shapes = {name: a.shape for name, a in converted.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(shapes)} must have the same shape, got {', '.join(map(str, shapes.values()))}")
    shape = next(iter(shapes.values()))
    if 0 in shape:
        raise ValueError(
            f"{', '.join(shapes)} must hold at least one sample, got shape {shape}: the mean of none is no number"
        )
    dtype = FLOAT32 if np.result_type(*converted.values()) in (FLOAT32, np.float16) else FLOAT64
    return tuple(flat(a, dtype) for a in converted.values()), shape


def as_array(name: str, value: ArrayLike | None, of: str = "real numbers") -> Array:
    """The named argument as an array, or a TypeError; bfloat16, whoever's, as float32."""
    if type(value) is np.ndarray and value.dtype.kind != "V":  # nearly always; the rest takes some µs
        return value
    if isinstance(value, MaskedArray):
        raise TypeError(f"{name} must be a plain array: take a masked array's .compressed() or .filled() first")
    if type(value).__module__.partition(".")[0] == "torch":
        value = _readable_tensor(name, value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{name} must be an array of {of}, got a ragged or mixed sequence") from error
    is_bfloat16 = array.dtype.kind == "V" and array.dtype.name == "bfloat16"  # of ml_dtypes, as JAX's are
    return array.astype(np.float32) if is_bfloat16 else array


def _readable_tensor(name: str, tensor: Any) -> Any:
    """A tensor of PyTorch as one that NumPy can read, or a TypeError that says how to make one."""
    if getattr(tensor, "requires_grad", False):
        raise TypeError(
            f"{name} must not require a gradient here: grpo_fast.torch.grpo_loss is the loss for autograd, and "
            f"{name}.detach() an array like any other"
        )
    if getattr(tensor, "is_nested", False):
        raise TypeError(f"{name} must not be nested: {name}.values() is packed, with cu_seqlens={name}.offsets()")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} must be on the CPU, got a tensor on {tensor.device}: {name}.cpu() brings it there")
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor


def float_dtype(array: Array) -> np.dtype[Any]:
    """The dtype of the array if it is one of floats, else float64."""
    return array.dtype if array.dtype.kind == "f" else FLOAT64


def as_given(value: Any, result: Array) -> Array:
    """``result``, as a tensor if ``value`` is one of PyTorch."""
    if type(value).__module__.partition(".")[0] != "torch":
        return result
    tensor: Array = sys.modules["torch"].from_numpy(result)
    return tensor


def real(name: str, value: ArrayLike | None) -> Array:
    """The named argument as an array of real numbers, or a TypeError."""
    array = as_array(name, value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must hold real numbers of at most 64 bits, got dtype {array.dtype}")
    return array


def refuse_unless_mask(array: Array, shape: tuple[int, ...], where: str = "") -> None:
    """Raise the ValueError for the first element that is neither 0 nor 1, if any; ``where`` ends its message."""
    if array.dtype == np.bool_:
        return
    message = "mask must hold bools or 0/1, got mask[{i}] = {values[0]!r}"
    problem = first_problem(lambda mask: {message: (mask != 0) & (mask != 1)}, [array.reshape(-1)], shape)
    if problem:
        raise ValueError(problem + where)


def unmasked(name: str, array: Array, mask: ArrayLike | None) -> Array:
    """Which elements of the named array count, as bools; a TypeError or ValueError if the mask is none for it."""
    if mask is None:
        return np.ones(array.shape, np.bool_)
    given = real("mask", mask)
    if given.shape != array.shape:
        raise ValueError(f"mask must have shape {array.shape} as {name}, got {given.shape}")
    refuse_unless_mask(given, array.shape)
    return given.astype(np.bool_)


def counts_of(keep: Array, bounds: Array) -> NDArray[np.int64]:
    """How many of the flat bools are set between each two of the bounds."""
    counts: NDArray[np.int64] = np.diff(np.append(0, np.cumsum(keep, dtype=np.int64))[bounds])
    return counts


def refuse_unless_finite(name: str, array: Array, keep: Array, below: float = math.inf) -> None:
    """Raise the ValueError for the first element of the named array that counts and is not finite, or too large."""
    limit = "" if below == math.inf else f" and below {below:g} in magnitude"
    message = f"{name} must be finite{limit} where it is not masked, got {name}[{{i}}] = {{values[0]!r}}"
    problem = first_problem(
        lambda x, counts: {message: ~(np.abs(x) < below) & counts}, [array.reshape(-1), keep.reshape(-1)], array.shape
    )
    if problem:
        raise ValueError(problem)


def flat(array: Array, dtype: np.dtype[Any]) -> Array:
    """A one-dimensional array for a kernel; the same memory if that is C-contiguous, aligned and of that dtype."""
    if type(array) is np.ndarray and array.dtype is dtype and array.flags.carray:
        return array.reshape(-1)
    with np.errstate(all="ignore"):  # what float32 does not hold becomes inf, which a kernel refuses where it counts
        array = np.require(array, dtype, ["C", "A"]).reshape(-1)
    if type(array) is not np.ndarray:  # a subclass such as memmap
        array = array.view(np.ndarray)
    return array if array.flags.writeable else np.asarray(_Alias(array))


def first_problem(
    problems: Callable[..., Mapping[str, NDArray[np.bool_]]], arrays: Sequence[Array], shape: tuple[int, ...]
) -> str | None:
    """The message about the first element of ``arrays`` that has a problem; None if there is none.

    ``problems(*arrays)`` maps each possible message, with ``{i}`` for the index in ``shape`` and ``{values}`` for the
    element of each array, to where it holds; of several that hold for the element, the first is returned.
    """
    with np.errstate(all="ignore"):
        for start in range(0, arrays[0].size, _SEARCH):
            holds = problems(*(a[start : start + _SEARCH] for a in arrays))
            anywhere = np.logical_or.reduce(list(holds.values()))
            if anywhere.any():
                at = int(anywhere.argmax())
                index = np.unravel_index(start + at, shape)
                i = ", ".join(map(str, index)) or "()"  # as NumPy writes the index of a 0-d array
                message = next(message for message, where in holds.items() if where[at])
                return message.format(i=i, values=[a[start + at].item() for a in arrays])
    return None

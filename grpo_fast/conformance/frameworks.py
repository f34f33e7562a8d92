"""Losses of NumPy, PyTorch and JAX: which of them a loss is written in, and its value and gradient.

Nothing but NumPy is imported here unless a loss is of that framework.
"""

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Framework: TypeAlias = Literal["numpy", "torch", "jax"]
FRAMEWORKS: tuple[str, ...] = get_args(Framework)
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class NoGradient(TypeError):  # noqa: N818 - of users it is a TypeError
    """A loss in NumPy returned an array that may be meant as its gradient, and is not of its shape or in its place."""


class Answer(NamedTuple):
    """What a loss returned."""

    loss: float
    grad: NDArray[np.float64] | None  # ∂loss/∂logps; None where the loss gives none, in NumPy
    dtype: str


# --- which one --------------------------------------------------------------------------------------------------------
def framework_of(loss: Callable[..., Any]) -> Framework | None:
    """The framework of the first module, function or class that the loss names, looking into what it calls; or None."""
    for root in _roots(loss):
        if root in ("torch", "jax"):
            return "torch" if root == "torch" else "jax"
    return None


def _roots(loss: Callable[..., Any]) -> Iterator[str]:
    """The top-level package of everything that the code of the loss mentions, nearest first."""
    waiting: list[Any] = [loss]
    seen: set[int] = set()
    while waiting and len(seen) < 300:
        thing = waiting.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
            continue
        home = getattr(thing, "__name__" if inspect.ismodule(thing) else "__module__", None)
        if isinstance(home, str):
            yield home.partition(".")[0]
        if inspect.ismodule(thing):
            continue
        if not inspect.isclass(thing) and not inspect.isroutine(thing):
            kind = type(thing)
            yield from (base.__module__.partition(".")[0] for base in kind.__mro__)
            waiting += [method for name in ("forward", "__call__") if (method := getattr(kind, name, None))]
        function: Any = inspect.unwrap(thing) if callable(thing) else thing
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        names = getattr(function, "__globals__", {})
        for name in _names_in(code):
            if name in names:
                waiting.append(names[name])
            elif name in ("torch", "jax"):  # imported within
                yield name
        for cell in getattr(function, "__closure__", None) or ():
            try:
                waiting.append(cell.cell_contents)
            except ValueError:  # empty as yet
                continue


def _names_in(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names_in(constant)


def candidates(loss: Callable[..., Any]) -> list[Framework]:
    """The frameworks to try, likeliest first: the one that the loss names, or NumPy and those that are there."""
    named = framework_of(loss)
    if named is not None:
        return [named]
    others: tuple[Framework, ...] = ("torch", "jax")
    return ["numpy", *(name for name in others if name in sys.modules or find_spec(name) is not None)]


# --- calling ----------------------------------------------------------------------------------------------------------
def evaluator(loss: Callable[..., Any], framework: Framework, device: Any = None) -> Callable[[Arrays], Answer]:
    """A function of arrays: the loss of them, as those of its framework, and its gradient by the framework's autograd.

    It raises a TypeError where what the loss returns is no scalar, and an ImportError where the framework is not
    installed, besides what the loss raises.
    """
    if framework == "torch":
        return lambda arrays: _evaluate_torch(loss, arrays, device)
    if framework == "jax":
        return _JaxLoss(loss)
    return lambda arrays: _evaluate_numpy(loss, arrays)


def _evaluate_numpy(loss: Callable[..., Any], arrays: Arrays) -> Answer:
    with np.errstate(all="ignore"):
        result = loss(**{name: x.copy() for name, x in arrays.items()})
    grad = None
    if isinstance(result, tuple) and len(result) >= 2 and np.shape(result[1]) == arrays["logps"].shape:
        grad = np.asarray(result[1], np.float64)
    elif isinstance(result, tuple):
        _refuse_other_gradient(result[1:], arrays["logps"].shape)
    value = np.asarray(result[0] if isinstance(result, tuple) else result)
    _refuse_unless_scalar(value.shape)
    return Answer(float(value), grad, value.dtype.name if value.dtype.kind == "f" else "float64")


def _evaluate_torch(loss: Callable[..., Any], arrays: Arrays, device: Any) -> Answer:
    torch = importlib.import_module("torch")
    with torch.inference_mode(False), torch.enable_grad():
        tensors = {name: torch.tensor(x, device=device or "cpu") for name, x in arrays.items()}
        logps = tensors["logps"].requires_grad_()
        result = loss(**tensors)
        value = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(value, (int, float)):  # as of a sum over nothing
            return Answer(float(value), np.zeros(logps.shape), "float64")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the loss must return a scalar tensor, got {type(value).__name__}")
        _refuse_unless_scalar(tuple(value.shape))
        grad, dtype = None, str(value.dtype).rpartition(".")[2]
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.reshape(()), logps, allow_unused=True)
        found = np.zeros(logps.shape) if grad is None else grad.detach().cpu().double().numpy()
        return Answer(float(value.detach().double()), found, dtype)


def _refuse_other_gradient(others: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    """Refuse an array that may be meant as the gradient: as large as it is, in another place or of another shape."""
    for place, other in enumerate(others, 1):
        if isinstance(other, np.ndarray) and other.size == math.prod(shape) > 1:
            raise NoGradient(
                f"the gradient must be the second thing that is returned, of shape {shape}, got shape {other.shape} "
                f"in place {place + 1}"
            )


class _JaxLoss:
    """A loss in JAX, compiled for each shape once, or, if it cannot be traced, called as it is."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        self._jax = importlib.import_module("jax")

        def scalar(logps: Any, others: Mapping[str, Any]) -> Any:
            result = loss(logps=logps, **others)
            value = result[0] if isinstance(result, (tuple, list)) else result
            _refuse_unless_scalar(tuple(np.shape(value)))
            return self._jax.numpy.reshape(value, ())

        self._plain = self._jax.value_and_grad(scalar)
        self._compiled: Any = self._jax.jit(self._plain)

    def __call__(self, arrays: Arrays) -> Answer:
        with _float64_of(self._jax):
            given = {name: self._jax.numpy.asarray(x) for name, x in arrays.items()}
            logps = given.pop("logps")
            if self._compiled is not None:
                try:
                    return self._answer(*self._compiled(logps, given))
                except self._jax.errors.JAXTypeError:  # it looks at values, in an `if` or an index
                    self._compiled = None
            return self._answer(*self._plain(logps, given))

    @staticmethod
    def _answer(value: Any, grad: Any) -> Answer:
        return Answer(float(value), np.asarray(grad, np.float64), str(value.dtype))


def _float64_of(jax: Any) -> Any:
    """A context in which JAX computes in float64 on this thread, whatever the process has set."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()


def _refuse_unless_scalar(shape: tuple[int, ...]) -> None:
    if shape not in ((), (1,), (1, 1)):
        raise TypeError(f"the loss must return a scalar, got shape {shape}: is it the loss of each token?")

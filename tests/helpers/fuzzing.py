"""Arguments such as programs by mistake or malice hand over, and a judge who says which of them are to be refused.

`FORMS` change what an array is, but not what it says; `HOSTILE` is what is no array of real numbers, or of no shape
that fits. The judge restates the documented rules with NumPy alone: what it returns are the plain arrays that the call
is about, for the reference; what it raises is `Refused`.
"""

import array
import itertools
import warnings

import numpy as np
from combinations import ARRAYS, batch
from hypothesis import strategies as st

PER_SEQUENCE = ("advantages", "rollout_is_weights", "loss_weights")
NAMES = [*ARRAYS, "mask", "cu_seqlens", "grad"]
PROBABILITIES = ["rhos", "A", "pi_theta_old", "pi_theta_ref"]


class Refused(Exception):  # noqa: N818 - a verdict, not an error
    """The named argument, or one of several, is against the rules."""


# --- forms ------------------------------------------------------------------------------------------------------------
class Mine(np.ndarray):
    """A subclass."""


class Wrapped:
    """Something that NumPy can make an array of."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x if dtype is None else self.x.astype(dtype)


def misaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
    memory[:] = np.frombuffer(x.tobytes(), np.uint8)
    return memory.view(x.dtype).reshape(x.shape)


def read_only(x):
    return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


def matrix(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.asmatrix(x) if x.ndim == 2 else x


FORMS = {
    "as it is": lambda x: x,
    "list": np.ndarray.tolist,
    "tuple": lambda x: tuple(x.tolist()),
    "list of arrays": list,
    "Fortran": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "byte order": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "misaligned": misaligned,
    "read-only": read_only,
    "subclass": lambda x: x.view(Mine),
    "record array": lambda x: x.view(np.recarray),
    "matrix": matrix,
    "memory view": lambda x: memoryview(x) if x.size else x,
    "buffer": lambda x: array.array("d", x.tolist()) if x.ndim == 1 and x.dtype == float else x,
    "wrapped": Wrapped,
    **{kind: lambda x, kind=kind: x.astype(kind) for kind in ("f2", "f4", "f8", ">f4", "i1", "u1", "i8", "?")},
}
HOSTILE = {
    "objects": lambda x: x.astype(object),
    "masked": lambda x: np.ma.masked_array(x, np.zeros(x.shape)),
    "structured": lambda x: np.zeros(x.shape, "f8, i4"),
    "complex": lambda x: x.astype(complex),
    "text": lambda x: x.astype(str),
    "bytes": lambda x: x.astype("S8"),
    "dates": lambda x: np.zeros(x.shape, "M8[s]"),
    "long double": lambda x: x.astype(np.longdouble),
    "ragged": lambda x: [[1.0], *x.tolist()] if x.ndim == 1 else [*x.tolist(), [1.0]],
    "with None": lambda x: [None, *x.reshape(-1).tolist()[1:]],
    "shorter": lambda x: x[:-1],
    "longer": lambda x: np.concatenate([x, x]),
    "flat": lambda x: x.reshape(-1),
    "another axis": lambda x: x[None],
    "column": lambda x: x[..., None],
    "turned": lambda x: x.T,
    "empty": lambda x: x[:0],
    "one": lambda x: x.reshape(-1)[:1],
    "0-d": lambda x: np.array(x.reshape(-1)[:1].sum()),
    "scalar": lambda x: 1.0,
    "None": lambda x: None,
    "dict": lambda x: dict(enumerate(x.reshape(-1).tolist())),
    "set": lambda x: {1.0, 2.0},
    "generator": lambda x: (value for value in x.reshape(-1).tolist()),
    "string": lambda x: "1.0",
    "object": lambda x: object(),
    "class": lambda x: np.ndarray,
}
VALUES = [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1.0, 2.0, 0.5, 1e300, -1e300, 1e-300, 5e-324, 1e39, 1e-46, 65505.0]
BOUNDS = [-1, 0, 1, 2, 7, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63)]


@np.errstate(all="ignore")
def changed(draw, x):
    """An array in another form, with other values, or no such array."""
    how = draw(st.sampled_from(["form", "form", "value", "value", "hostile"]))
    if how == "form":
        return FORMS[draw(st.sampled_from(sorted(FORMS)))](x)
    if how == "hostile" or not x.size:
        return HOSTILE[draw(st.sampled_from(sorted(HOSTILE)))](x)
    x = x.copy()
    at = draw(st.integers(0, x.size - 1))
    x.reshape(-1)[at] = np.array(draw(st.sampled_from(BOUNDS if x.dtype.kind in "iu" else VALUES))).astype(x.dtype)
    return x


# --- what is real -----------------------------------------------------------------------------------------------------
def real(name, value):
    if isinstance(value, np.ma.MaskedArray):
        raise Refused(name)
    try:
        x = np.asarray(value)
    except ValueError as error:  # ragged
        raise Refused(name) from error
    if x.dtype.kind not in "biuf" or x.dtype.itemsize > 8:
        raise Refused(name)
    return np.array(x, x.dtype.newbyteorder("="))  # plain


# --- of grpo_loss -----------------------------------------------------------------------------------------------------
#: Of sequences: any, none with a token, as many as tokens, and none.
LENGTHS = st.one_of(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(0, 4).map(lambda n: [0] * n),
    st.integers(2, 5).flatmap(lambda n: st.permutations([n, *[0] * (n - 1)])),
)


@st.composite
def loss_calls(draw, rows):
    """The arguments of a call, of which up to three are changed."""
    row = draw(st.sampled_from(rows))
    lengths = draw(LENGTHS)
    arguments = batch(row, lengths, seed=draw(st.integers(0, 2**32 - 1)), said=draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0:
        arguments["normalizer"] = 0
    arguments["grad"] = bool(row.grad)
    if row.grad == "array":
        arguments["grad"] = np.full_like(arguments["logps"], np.nan)
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)):
        x = arguments[name]
        if name == "grad" and draw(st.booleans()):  # the memory of another argument
            other = arguments[draw(st.sampled_from(ARRAYS))]
            arguments[name] = other if isinstance(other, np.ndarray) else x
        elif isinstance(x, np.ndarray):
            arguments[name] = changed(draw, x)
        elif draw(st.booleans()):
            arguments[name] = draw(st.sampled_from([None, 0, 1.0, "x", [], [0], np.zeros(3), True]))
    return arguments


@np.errstate(all="ignore")
def judge_loss(arguments):
    """What a call is about, or `Refused`."""
    logps = real("logps", arguments["logps"])
    if logps.ndim not in (1, 2):
        raise Refused("logps")
    dtype, shape = (np.float32 if logps.dtype in (np.float32, np.float16) else np.float64), logps.shape
    bounds = judge_bounds(arguments["cu_seqlens"], shape)
    sequences = np.repeat(np.arange(bounds.size - 1), np.diff(bounds)).reshape(shape)  # of each token
    found = arguments | {"logps": logps.astype(dtype)}
    if arguments["cu_seqlens"] is not None:
        found["cu_seqlens"] = bounds

    keep = judge_mask(arguments["mask"], shape)
    if arguments["mask"] is not None:
        found["mask"] = keep
    for name in ARRAYS:
        value = arguments[name]
        if name == "ref_logps" and arguments["kl"] is None:
            found[name] = None
            continue
        if value is None:
            if name in ("old_logps", "rollout_is_weights", "loss_weights"):
                continue
            raise Refused(name)
        x = np.atleast_1d(real(name, value))
        per_token, per_sequence = x.shape == shape, False
        if name in PER_SEQUENCE:
            per_token = per_token or x.shape == (1, *shape)  # of a packed batch
            per_sequence = x.shape in ((bounds.size - 1,), (bounds.size - 1, 1))
        if per_token == per_sequence and not (per_token and (np.diff(bounds) == 1).all()):  # neither, or who knows
            raise Refused(name)
        x = x.astype(dtype)
        x = x.reshape(shape if per_token else -1)
        of_tokens = (x if per_token else x[sequences])[keep]
        if not np.isfinite(of_tokens).all() or (name == "loss_weights" and (of_tokens < 0).any()):
            raise Refused(name)
        found[name] = x
        if name in PER_SEQUENCE and len(shape) == 1:  # say which
            found[name] = x.reshape((1, -1) if per_token else (-1, 1))
    if arguments["normalizer"] == 0 and keep.any():
        raise Refused("normalizer")
    found["grad"] = _judge_place(arguments, shape, dtype)
    return found


def judge_mask(value, shape):
    """Which tokens count."""
    if value is None:
        return np.ones(shape, bool)
    mask = real("mask", value)
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        raise Refused("mask")
    return mask.astype(bool)


def judge_bounds(value, shape):
    """Where sequences begin and end."""
    size, width = int(np.prod(shape)), shape[-1]
    if value is None:
        return np.arange((shape[0] if len(shape) == 2 else 1) + 1) * width
    bounds = real("cu_seqlens", value)
    if len(shape) != 1 or bounds.ndim != 1 or bounds.dtype.kind not in "iu" or not bounds.size:
        raise Refused("cu_seqlens")
    exact = [int(bound) for bound in bounds]
    if exact[0] != 0 or exact[-1] != size or any(b < a for a, b in itertools.pairwise(exact)):
        raise Refused("cu_seqlens")
    return np.array(exact)


def _judge_place(arguments, shape, dtype):
    place = arguments["grad"]
    if isinstance(place, (bool, np.bool_)):
        return bool(place)
    if not isinstance(place, np.ndarray) or place.shape != shape or place.dtype != dtype or not place.flags.writeable:
        raise Refused("grad")
    for name in [*ARRAYS, "mask", "cu_seqlens"]:
        value = arguments[name]
        if value is None or isinstance(value, (list, tuple)) or (name == "ref_logps" and arguments["kl"] is None):
            continue
        if np.shares_memory(place, np.asarray(value)):
            raise Refused("grad")
    return place


# --- of probabilities -------------------------------------------------------------------------------------------------
@st.composite
def probability_calls(draw):
    """Four arrays, of which up to three are changed."""
    dtype, n = draw(st.sampled_from([np.float64, np.float32])), draw(st.sampled_from([1, 3, 16, 70]))
    form, rng = np.finfo(dtype), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rho, old = rng.lognormal(0, 0.3, n), rng.uniform(0.001, 1, n)
    values = rho, rng.normal(size=n) * (rng.random(n) < 0.9), old, rho * old * rng.lognormal(0, 0.3, n)
    arguments = dict(zip(PROBABILITIES, (x.astype(dtype) for x in values), strict=True))
    limits = [form.tiny, form.smallest_subnormal, np.nextafter(form.tiny, dtype(0)), form.max, form.max / 8, form.eps]
    if draw(st.booleans()):
        at = draw(st.integers(0, n - 1))
        for x in arguments.values():
            x[at] = draw(st.sampled_from([*limits, dtype(1), dtype(1), dtype(2), dtype(0.5)]))
    for name in draw(st.lists(st.sampled_from(PROBABILITIES), max_size=3, unique=True)):
        arguments[name] = changed(draw, arguments[name])
    return arguments


@np.errstate(all="ignore")
def judge_probabilities(arguments, with_kl):
    """The flat arrays that a call is about, in the dtype that computes, or `Refused`."""
    names = PROBABILITIES if with_kl else PROBABILITIES[:2]
    arrays = [real(name, arguments[name]) for name in names]
    if len({x.shape for x in arrays}) > 1 or not arrays[0].size:
        raise Refused(names)
    dtype = np.float32 if np.result_type(*arrays) in (np.float32, np.float16) else np.float64
    rho, a, *rest = (x.astype(dtype).reshape(-1) for x in arrays)
    form = np.finfo(dtype)
    good = (rho >= form.tiny) & (rho <= form.max) & np.isfinite(a)
    if with_kl:
        old, ref = rest
        pi = rho * old
        good &= (old > 0) & (ref > 0) & np.isfinite(old) & np.isfinite(ref) & (pi >= form.tiny) & (pi <= form.max)
        good &= (ref / pi >= form.tiny) & (ref / pi <= form.max / 8)
    if not good.all():
        raise Refused(names)
    return rho, a, *rest

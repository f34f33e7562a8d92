"""What `grpo_loss` refuses: with the argument's name, what is allowed, what came, and the first bad index."""

import itertools
import re

import numpy as np
import pytest
from samples import DTYPES

from grpo_fast import CISPO, K1, K2, K3, SAPO, Clip, grpo_loss

INF, NAN = float("inf"), float("nan")
BAD = [NAN, INF, -INF]
FLOATS = ["logps", "old_logps", "advantages", "ref_logps", "rollout_is_weights"]
OPTIONS = {  # of the kernels that test_loss_same_bits.py compiles, too
    "clip": {"surrogate": Clip(0.2, 0.28, 3), "kl": K3(0.04)},
    "sapo": {"surrogate": SAPO(), "kl": K2(0.1, False), "importance_sampling_level": "sequence"},
    "cispo": {"surrogate": CISPO()},
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_case = pytest.mark.parametrize("case", OPTIONS)


def call(case="clip", dtype=np.float64, shape=(2, 3)):
    """The arguments of a call that nothing is wrong with."""
    rng = np.random.default_rng(0)
    arguments = {name: rng.normal(-1, 0.1, shape).astype(dtype) for name in FLOATS}
    if case == "cispo":
        del arguments["ref_logps"]
    return arguments | {"mask": np.ones(shape, bool), "grad": True} | OPTIONS[case]


def refuses(arguments, *message, error=(ValueError, TypeError)):
    """Check that the call fails with a message that begins with the first of these and goes on with the others."""
    with pytest.raises(error, match="^" + ".*".join(map(re.escape, message))):
        grpo_loss(**arguments)


def accepts(arguments):
    with np.errstate(all="raise"):  # the package's own limits, whatever the caller's are
        result = grpo_loss(**arguments)
        assert result.stats.as_dict()
    return result


def spoilt(x, places, value):
    x = x.copy()
    for place in places:
        x[place] = value
    return x


# --- values -----------------------------------------------------------------------------------------------------------
LAYOUTS = {  # shape, cu_seqlens, number of sequences, first bad place and another, the first one's sequence
    "padded": ((2, 3), None, 2, [(1, 1), (1, 2)], 1),
    "padded, long": ((3, 5100), None, 3, [(1, 5000), (2, 0)], 1),
    "plain": ((5100,), None, 1, [(5000,), (5099,)], 0),
    "packed": ((5100,), [0, 5, 5, 4999, 5100], 4, [(5000,), (5099,)], 3),
    "one to share out": ((150_000,), None, 1, [(140_001,), (149_999,)], 0),
    "many to share out": ((150_000,), [*range(0, 150_001, 10)], 15_000, [(140_001,), (140_010,)], 14_000),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@every_case
@every_dtype
def test_a_bad_value_is_named_with_its_index(layout, case, dtype):
    shape, cu_seqlens, sequences, places, sequence = LAYOUTS[layout]
    arguments = call(case, dtype, shape) | {"cu_seqlens": cu_seqlens}
    index = ", ".join(map(str, places[0]))
    for bad in BAD:
        for name in set(FLOATS) & set(arguments):
            message = f"{name} must be finite", f"got {name}[{index}] = {bad}"
            refuses(arguments | {name: spoilt(arguments[name], places, bad)}, *message, error=ValueError)
        for name in ("advantages", "rollout_is_weights"):
            values = spoilt(np.ones(sequences), range(sequence, sequences), bad)
            message = f"{name} must be finite", f"got {name}[{sequence}] = {bad}"
            refuses(arguments | {name: values}, *message, error=ValueError)


@every_layout
@every_case
@every_dtype
def test_what_is_masked_may_hold_anything(layout, case, dtype):
    shape, cu_seqlens, sequences, places, sequence = LAYOUTS[layout]
    arguments = call(case, dtype, shape) | {"cu_seqlens": cu_seqlens}
    arguments["mask"] = spoilt(arguments["mask"], places, False)
    expected = accepts(arguments)
    for bad in BAD:
        holes = {name: spoilt(arguments[name], places, bad) for name in set(FLOATS) & set(arguments)}
        result = accepts(arguments | holes)
        assert result.loss == expected.loss
        assert np.array_equal(result.grad, expected.grad)
    # Nor is a number of a sequence looked at that has no tokens.
    arguments["mask"][slice(*cu_seqlens[sequence:][:2]) if cu_seqlens else sequence if len(shape) == 2 else ...] = False
    for name, bad in itertools.product(("advantages", "rollout_is_weights"), BAD):
        ones = np.ones(sequences)
        expected = accepts(arguments | {name: ones})
        assert accepts(arguments | {name: spoilt(ones, [sequence], bad)}).loss == expected.loss


@every_dtype
@pytest.mark.parametrize("case", ["clip", "sapo"])
@pytest.mark.parametrize("n", [1, 7, 16, 37])
def test_wherever_it_stands(n, case, dtype):
    arguments = call(case, dtype, n)
    for name, at in itertools.product(FLOATS, range(n)):
        if (n, name) not in ((1, "advantages"), (1, "rollout_is_weights")):
            bad = spoilt(arguments[name], [at], NAN)
            refuses(arguments | {name: bad}, f"{name} must be finite", f"got {name}[{at}] = nan")


@every_dtype
@pytest.mark.parametrize(
    "form",
    [
        np.ndarray.tolist,
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        lambda x: x.astype("f2"),
    ],
    ids=["list", "Fortran", "strided", "big-endian", "half"],
)
def test_the_index_is_the_callers(form, dtype):
    arguments = call("clip", dtype)
    for name in FLOATS:
        bad = form(spoilt(arguments[name], [(1, 0)], INF))
        refuses(arguments | {name: bad}, f"{name} must be finite", f"got {name}[1, 0] = inf", error=ValueError)


@every_case
@every_dtype
def test_hidden_behind_a_zero(case, dtype):
    # A NaN that would not reach the result, as what it is multiplied with is 0.
    arguments = call(case, dtype, 40)
    vanishing = {"old_logps": np.full(40, 3e4, dtype)}  # ρ = e^−30001
    zeros = {"advantages": np.zeros(40, dtype)}, {"rollout_is_weights": np.zeros(40, dtype)}, vanishing
    for zero, name, bad in itertools.product([*zeros, zeros[0] | zeros[1] | vanishing], set(FLOATS), BAD):
        if name in arguments and name not in zero:
            accepts(arguments | zero)
            refuses(arguments | zero | {name: spoilt(arguments[name], [17], bad)}, f"{name} must be finite", "[17]")
    if "ref_logps" in arguments:
        switched_off = arguments | {"kl": arguments["kl"]._replace(beta=0)}
        refuses(switched_off | {"ref_logps": spoilt(arguments["logps"], [17], NAN)}, "ref_logps must be finite", "[17]")


def test_what_is_not_needed_is_not_looked_at():
    arguments = call("cispo")
    expected = accepts(arguments)
    result = accepts(arguments | {"ref_logps": np.full((2, 3), NAN)})
    assert (result.loss, result.stats) == (expected.loss, expected.stats)


@every_case
@every_dtype
def test_finite_numbers_are_not_refused(case, dtype):
    # The result may be infinite or not a number; its parts were neither.
    large = np.finfo(dtype).max
    columns = np.array([*itertools.product([-large, 0, large], repeat=len(FLOATS))], dtype).T
    ordinary = call(case, dtype, columns.shape[1])
    arguments = ordinary | {
        name: np.stack([column, ordinary[name]], axis=1)  # two tokens a sequence
        for name, column in zip(FLOATS, columns, strict=True)
        if name in ordinary
    }
    arguments["mask"] = np.ones(arguments["logps"].shape)
    accepts(arguments)
    for i in range(columns.shape[1]):
        accepts({name: x[i : i + 1] if isinstance(x, np.ndarray) else x for name, x in arguments.items()})


def test_what_float32_does_not_hold():
    arguments = call("clip", np.float32)
    for name in FLOATS[1:]:
        large = spoilt(arguments[name].astype(float), [(1, 1)], 1e300)
        accepts(arguments | {name: large, "mask": spoilt(arguments["mask"], [(1, 1)], False)})
        try:
            accepts(arguments | {name: large})
        except ValueError as error:  # for what it is in float32; but a warning it is not
            refusal = str(error)
        else:
            continue
        assert refusal.startswith(f"{name} must be finite")
        assert "[1, 1]" in refusal


# --- shapes and dtypes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(), (1, 1, 1)])
def test_shape_of_logps(shape):
    refuses({"logps": np.zeros(shape), "old_logps": None, "advantages": 1.0}, "logps must be", "got", str(shape))


NOT_2_3 = [(3, 2), (6,), (1, 2, 3), (2, 1), (1, 3), (3,), (1,), ()]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *itertools.product(["old_logps", "ref_logps", "mask"], [*NOT_2_3, (2,)]),
        *itertools.product(["advantages", "rollout_is_weights"], [shape for shape in NOT_2_3 if shape != (2, 1)]),
    ],
)
def test_shapes(name, shape):
    for case in OPTIONS:
        if not (case == "cispo" and name == "ref_logps"):
            refuses(call(case) | {name: np.ones(shape)}, f"{name} must have shape (2, 3)", "got", str(shape or "("))


@pytest.mark.parametrize("name", ["advantages", "rollout_is_weights"])
def test_one_per_sequence_is_one_for_each(name):
    packed = call(shape=6) | {"cu_seqlens": [0, 2, 2, 6]}
    for n in (1, 2, 4, 5, 7):
        refuses(packed | {name: np.ones(n)}, f"{name} must have shape (6,)", "(3,)", "got", f"({n},)")
    refuses(call(shape=6) | {name: np.ones(2)}, f"{name} must have shape (6,)", "(1,)", "got", "(2,)")


@pytest.mark.parametrize("name", ["logps", "advantages"])
def test_what_must_be_there(name):
    refuses(call() | {name: None}, f"{name} must")


@pytest.mark.parametrize("name", [*FLOATS, "mask", "cu_seqlens"])
@pytest.mark.parametrize(
    "bad",
    [
        np.ma.masked_array([0, 1], [0, 1]),
        [1.0, 2j],
        ["1", "2"],
        "12",
        [None, 1.0],
        np.array(["2020", "2021"], "M8[Y]"),
        [[1.0], [1.0, 2.0]],
        {0: 1.0, 1: 2.0},
    ],
    ids=str,
)
def test_what_is_no_array_of_real_numbers(name, bad):
    refuses(
        call(shape=2) | {name: bad},
        f"{name} must",
        error=(TypeError, ValueError) if name == "cu_seqlens" else TypeError,
    )


# --- mask and cu_seqlens ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bad",
    [2, -1, 0.5, 1e-30, NAN, INF, np.int64(256), np.int64(1 << 32), np.uint8(255), np.float32(0.1), np.int8(-1)],
    ids=lambda x: repr(x)[:60],
)
def test_values_of_the_mask(bad):
    for shape, place in [((2, 3), (1, 1)), ((5100,), (5000,))]:
        mask = spoilt(np.ones(shape, np.asarray(bad).dtype), [place], bad)
        mask.flat[-1] = bad  # not the first
        refuses(call(shape=shape) | {"mask": mask}, "mask must", "0", f"[{', '.join(map(str, place))}]", f"{bad}")


@pytest.mark.parametrize(
    "bad",
    [
        *([], [0], [6], [1, 6], [-1, 6], [0, 5], [0, 7], [0, 4, 3, 6], [0, 7, 6], [0, -1, 6], [0, 3, 6, 0], [6, 0]),
        *(6, [[0, 6]], [0.0, 6.0], [0.5, 6], [0, NAN], [False, True]),
        *([0, 1 << 62], [0, (1 << 32) + 6], [0, (1 << 32) + 3, 6], [0, 10**30], [0, -(1 << 63), 6]),
        *(np.array(bounds, np.uint64) for bounds in ([0, 4, 3, 6], [0, (1 << 64) - 1, 6], [0, 1 << 63])),
        np.array([0, -128, 6], np.int8),
    ],
    ids=lambda x: repr(x)[:60],
)
def test_cu_seqlens(bad):
    arguments = call(shape=6) | {"advantages": 1.0, "rollout_is_weights": None}
    for one_each in ({}, {"advantages": np.ones(6)}):
        refuses(arguments | one_each | {"cu_seqlens": bad}, "cu_seqlens must", "got")


def test_padding_behind_the_last_sequence_has_a_remedy():
    packed = call(shape=6) | {"advantages": np.ones(1)}
    refuses(packed | {"cu_seqlens": [0, 4]}, "cu_seqlens must go from 0 to 6", "without padding at the end: logps[:4]")
    with pytest.raises(ValueError, match=r"got 0 to 8$"):
        grpo_loss(**packed | {"cu_seqlens": [0, 8]})


def test_where_cu_seqlens_fall():
    for bounds, where in (([0, 4, 3, 6], "[2] = 3 after 4"), ([0, 1, 5, 2, 1, 6], "[3] = 2 after 5")):
        refuses(call(shape=6) | {"advantages": np.ones(6), "cu_seqlens": bounds}, "cu_seqlens must not fall", where)


def test_cu_seqlens_beside_padded_ones():
    refuses(call() | {"cu_seqlens": [0, 6]}, "cu_seqlens must", "(2, 3)")


@pytest.mark.parametrize("kind", [tuple, *(np.dtype(kind).type for kind in "bBhHiIlLqQ"), ">i4"], ids=str)
def test_cu_seqlens_of_any_integer_type(kind):
    arguments = call(shape=6)
    expected = accepts(arguments | {"cu_seqlens": [0, 2, 2, 6]})
    given = (0, 2, 2, 6) if kind is tuple else np.array([0, 2, 2, 6], kind)
    assert accepts(arguments | {"cu_seqlens": given}).stats == expected.stats


# --- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *itertools.product(["normalizer"], [0, -1, -0.0, NAN, INF, -INF, 10**400, "3", True, 2j, [3.0], np.ones(1)]),
        *itertools.product(["surrogate"], [None, 0.2, "clip", (0.2, 0.2, 3.0), Clip, K3(0.1), [Clip()]]),
        *itertools.product(["kl"], [0.1, "k3", (0.1, True), K3, Clip(), False]),
        *itertools.product(["importance_sampling_level"], ["word", "Token", "", None, 1, ["token"], {}]),
        *itertools.product(["aggregation"], ["mean", "TOKEN-MEAN", "", None, 0, ["token-mean"], np.ones(3)]),
    ],
    ids=lambda x: repr(x)[:60],
)
def test_options(name, bad):
    refuses(call() | {name: bad}, f"{name} must be", "got", f"{bad!r}"[:100])


def test_a_kl_needs_its_reference():
    for kl in (K1(0.1), K2(0.1), K3(0.0)):
        refuses(call("cispo") | {"kl": kl}, "ref_logps must", "None")


@pytest.mark.parametrize("number", [3, np.float32(3), np.int8(3), np.float64(3)], ids=repr)
def test_normalizers_of_any_real_type(number):
    expected, result = (accepts(call() | {"normalizer": x}) for x in (3.0, number))
    assert (result.loss, result.stats) == (expected.loss, expected.stats)


# --- where the gradient goes ------------------------------------------------------------------------------------------
READ_ONLY = np.zeros((2, 3))
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "bad",
    [
        *(np.zeros(shape) for shape in ((6,), (3, 2), (1, 2, 3), (2, 1), (0,), ())),
        *(np.zeros((2, 3), kind) for kind in ("f4", "i8", "c16", ">f8", "O")),
        *(READ_ONLY, [[0.0] * 3] * 2, "yes", 0.5),
    ],
    ids=lambda x: repr(x)[:60],
)
def test_no_place_for_the_gradient(bad):
    refuses(call() | {"grad": bad}, "grad must")


def test_the_gradient_has_the_dtype_of_the_computation():
    refuses(call("clip", np.float32) | {"grad": np.zeros((2, 3))}, "grad must", "float32", "float64")
    halves = call("clip", np.float16) | {"grad": np.zeros((2, 3), np.float32)}
    assert accepts(halves).grad is halves["grad"]


def test_the_gradient_does_not_overlap_what_is_read():
    arguments, memory = call(shape=6), np.ones(12)
    for name in [*FLOATS, "mask"]:
        for part in (slice(0, 6), slice(5, 11), slice(5, None, -1)):
            refuses(arguments | {name: memory[:6], "grad": memory[part]}, "grad must not overlap")
        accepts(arguments | {name: memory[:6].copy(), "grad": memory[6:]})
        accepts(arguments | {name: memory[:6].copy(), "grad": memory[:6]})
        memory[:] = 1
        assert accepts(arguments | {name: memory[:6], "grad": memory[6:]}).grad.base is memory
        memory[:] = 1
        accepts(arguments | {name: memory[::2], "grad": memory[1::2]})  # between each other
        assert (memory[::2] == 1).all()
        memory[:] = 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("advantages", lambda memory: memory.view(np.float32)[4:10]),  # converted before it is read
        ("old_logps", lambda memory: memoryview(memory[:6])),  # no array, but its memory is used
        ("cu_seqlens", lambda memory: memory.view(np.int64)[:2]),
    ],
)
def test_nor_does_it_overlap_other_kinds_of_arrays(name, part):
    memory = np.array([0, 6] + [0] * 10).view(np.float64)
    refuses(call(shape=6) | {name: part(memory), "grad": memory[:6]}, "grad must not overlap")
    assert memory.view(np.int64)[:2].tolist() == [0, 6]


# --- and nothing else happens -----------------------------------------------------------------------------------------
@every_layout
@every_case
@every_dtype
def test_inputs_are_not_written(layout, case, dtype):
    shape, cu_seqlens, _, places, _ = LAYOUTS[layout]
    arguments = call(case, dtype, shape)
    arguments["mask"][places[1]] = False
    if cu_seqlens:
        arguments["cu_seqlens"] = np.array(cu_seqlens)
    for name in set(FLOATS) & set(arguments):
        arguments[name][places[1]] = NAN
    before = {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    grpo_loss(**arguments)
    assert all(arguments[name].tobytes() == x for name, x in before.items())
    arguments["old_logps"][places[0]] = INF
    before["old_logps"] = arguments["old_logps"].tobytes()
    refuses(arguments, "old_logps must be finite")
    assert all(arguments[name].tobytes() == x for name, x in before.items())

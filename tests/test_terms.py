"""An option is a checked value: floats and bools only, equal to its own kind only, however it was made."""

import copy
import math
import pickle
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_fast.terms import CISPO, K1, K2, K3, SAPO, Clip

OPTIONS = [Clip(), Clip(0.1, 0.3, 3), CISPO(), CISPO(2, 0.5), SAPO(), SAPO(2, 3), K1(0.1), K2(0.1), K3(0.1, False)]


def test_defaults():
    assert tuple(Clip()) == (0.2, 0.2, math.inf)
    assert tuple(Clip(0.1)) == (0.1, 0.1, math.inf)  # epsilon_high follows epsilon
    assert tuple(CISPO()) == (5.0, 0.0)
    assert tuple(SAPO()) == (1.0, 1.05)
    assert [tuple(K(0.1)) for K in (K1, K2, K3)] == [(0.1, True, "own")] * 3


@pytest.mark.parametrize("one", [1, np.int8(1), np.float32(1), np.float64(1), np.longdouble(1), Fraction(1)])
def test_any_real_number_becomes_a_float(one):
    for option in (Clip(0, one, 3 * one), CISPO(one, one), SAPO(one, one), K3(one, np.True_)):
        assert {type(field) for field in option} <= {float, bool, str}
        assert 1.0 in option


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_is_an_immutable_value(option):
    assert (
        copy.copy(option) == copy.deepcopy(option) == pickle.loads(pickle.dumps(option)) == option._replace() == option
    )
    assert type(pickle.loads(pickle.dumps(option))) is type(option._replace()) is type(option)
    assert hash(copy.copy(option)) == hash(option)
    assert not hasattr(option, "__dict__")
    with pytest.raises(AttributeError):
        setattr(option, option._fields[0], 1.0)


def test_equality_includes_the_type():
    assert len(set(OPTIONS)) == len(OPTIONS)
    assert K1(0.1) != K2(0.1)
    assert (K1(0.1) == K2(0.1)) is False
    assert hash(K1(0.1)) != hash(K2(0.1))
    assert CISPO() != tuple(CISPO())
    assert tuple(CISPO()) != CISPO()


@pytest.mark.parametrize(
    ("option", "changes", "message"),
    [
        (Clip(0.2), {"epsilon": -1e-9}, r"epsilon must be a number in \[0, inf\]"),
        (Clip(0.2), {"epsilon": math.nan}, r"epsilon must be a number in \[0, inf\], got nan"),
        (Clip(0.2), {"epsilon_high": -1e-9}, r"epsilon_high must be a number in \[0, inf\]"),
        (Clip(0.2), {"epsilon_high": math.nan}, r"epsilon_high must be a number in \[0, inf\]"),
        (Clip(0.2), {"delta": 1.2}, r"delta must be a number above 1 \+ epsilon_high = 1.2, got 1.2"),
        (Clip(0.2, delta=2), {"epsilon_high": 1.0}, r"delta must be a number above 1 \+ epsilon_high = 2.0, got 2.0"),
        (Clip(0.2), {"delta": math.nan}, "delta must be a number above"),
        (CISPO(), {"ratio_max": 0}, r"ratio_max must be a number in \(0, inf\]"),
        (CISPO(), {"ratio_min": -0.1}, r"ratio_min must be a number in \[0, ratio_max = 5.0\], got -0.1"),
        (CISPO(), {"ratio_min": 5.1}, r"ratio_min must be a number in \[0, ratio_max = 5.0\], got 5.1"),
        (CISPO(), {"ratio_max": -(10**400)}, r"ratio_max must be a number in \(0, inf\]"),
        (SAPO(), {"tau_pos": 0}, r"tau_pos must be a number in \(0, inf\), got 0"),
        (SAPO(), {"tau_neg": math.inf}, r"tau_neg must be a number in \(0, inf\), got inf"),
        (K1(1), {"beta": -0.1}, r"beta must be a number in \[0, inf\), got -0.1"),
        (K2(1), {"beta": math.nan}, r"beta must be a number in \[0, inf\), got nan"),
        (K3(1), {"beta": 10**400}, r"beta must be a number in \[0, inf\), got 1000"),
    ],
)
def test_refuses_a_value_outside_its_interval(option, changes, message):
    with pytest.raises(ValueError, match=message):
        type(option)(**(option._asdict() | changes))
    with pytest.raises(ValueError, match=message):
        option._replace(**changes)


@pytest.mark.parametrize("value", [True, np.True_, "0.2", None, 0.2j, [0.2], np.array([0.2])], ids=repr)
def test_refuses_what_is_no_number(value):
    for make, name in ((Clip, "epsilon"), (CISPO, "ratio_max"), (SAPO, "tau_neg"), (K1, "beta"), (K2, "beta")):
        with pytest.raises(TypeError, match=f"{name} must be a number .*, got "):
            make(**{name: value})


@pytest.mark.parametrize("value", [0, 1, 1.0, None, "yes"])
def test_refuses_what_is_no_bool(value):
    with pytest.raises(TypeError, match=f"importance_weighted must be True, False or 'sequence', got {value!r}"):
        K3(0.1, value)


@given(st.floats(0, 10), st.floats(0, 10), st.none() | st.floats(11.5, allow_infinity=True))
def test_the_numbers_never_change_the_type_that_a_kernel_sees(epsilon, epsilon_high, delta):
    assert numba.typeof(Clip(epsilon, epsilon_high, delta)) == numba.typeof(Clip())


def test_the_class_is_part_of_the_type_that_a_kernel_sees():
    assert len({numba.typeof(option) for option in OPTIONS}) == len({type(option) for option in OPTIONS})

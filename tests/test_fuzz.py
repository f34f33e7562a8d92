"""Whatever is handed over, the answer is the reference's or the documented error; and nothing out of bounds is touched.

Three of many arguments are changed at a time; `fuzzing` says what may come, and which of it is to be refused. How many
inputs to try, `tried` is told; `pytest -m exhaustive tests/test_fuzz.py -s` tries the numbers that the README tells.
"""

import os
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import corrections
import mpmath
import numpy as np
import pytest
from combinations import ARRAYS, COMBINATIONS
from comparison import compare
from fuzzing import (
    NAMES,
    PROBABILITIES,
    Refused,
    changed,
    judge_loss,
    judge_probabilities,
    loss_calls,
    probability_calls,
)
from hosts import HOSTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import python
from test_against_reference import exact_terms, tolerance

from grpo_fast import (
    CISPO,
    GMPO,
    K1,
    K2,
    K3,
    SAPO,
    VESPO,
    Clip,
    group_advantages,
    grpo_loss,
    grpo_objective,
    grpo_stats,
    grpo_sweep,
    rollout_correction,
)
from grpo_fast._kernels.threads import WORTH_SHARING

exhaustive = pytest.mark.exhaustive
FEW = 300


def tried(strategy, look, examples):
    """Look at so many inputs; how many were answered, and how many refused."""
    counts = Counter()

    @given(strategy)
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    def each(value):
        counts[look(value)] += 1

    each()
    return counts


def raised_for(error, names):
    """Check that an error is one of those documented: it names an argument and says what is allowed."""
    assert type(error) in (ValueError, TypeError), repr(error)
    assert error.__cause__ is None or isinstance(error.__cause__, (ValueError, TypeError))
    assert re.match(rf"({'|'.join(names)})\b.* must ", str(error), re.DOTALL), repr(error)
    return "refused"


# --- grpo_loss --------------------------------------------------------------------------------------------------------
def look_at_a_loss(arguments):
    """Answered as by the reference, or refused."""
    try:
        plain = judge_loss(arguments)
    except Refused as verdict:
        try:
            grpo_loss(**arguments)
        except Exception as error:
            return raised_for(error, [*NAMES, "normalizer"])
        raise AssertionError(f"{verdict} was not refused, of {arguments}") from None
    arrays = {name: arguments[name] for name in [*ARRAYS, "mask", "cu_seqlens"]}
    before = {name: x.tobytes() for name, x in arrays.items() if isinstance(x, np.ndarray)}
    result = grpo_loss(**arguments)
    assert {name: x.tobytes() for name, x in arrays.items() if isinstance(x, np.ndarray)} == before
    place = plain.pop("grad")
    assert result.grad is place if isinstance(place, np.ndarray) else (result.grad is None) is not place
    if all(float(np.abs(x[np.isfinite(x)]).max(initial=0)) < 30 for name in ARRAYS if (x := plain[name]) is not None):
        compare(result, plain)  # beyond, the reference in float64 tells nothing of float32: see test_loss.py
    return "answered"


def fuzz_losses(examples, rows=COMBINATIONS):
    return tried(loss_calls(rows), look_at_a_loss, examples)


# --- rollout_correction -----------------------------------------------------------------------------------------------
def look_at_a_correction(call):
    """Answered as by the reference, or refused."""
    arguments, option, value = call
    if option is not None:
        try:
            rollout_correction(**arguments | {option: value})
        except Exception as error:
            return raised_for(error, [*corrections.ARRAYS, "level", "mode", "lower", "upper", "reject", "normalize"])
        return "answered"
    try:
        plain = corrections.judge(arguments)
    except Refused as verdict:
        try:
            rollout_correction(**arguments)
        except Exception as error:
            return raised_for(error, corrections.ARRAYS)
        raise AssertionError(f"{verdict} was not refused, of {arguments}") from None
    before = {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    result = rollout_correction(**arguments)
    assert {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)} == before
    assert not np.isnan(result.weights).any()
    finite = [x[np.isfinite(x)] for x in (plain["old_logps"], plain["rollout_logps"])]
    if all(float(np.abs(x).max(initial=0)) < 200 for x in finite):
        corrections.compare(result, plain)
    return "answered"


def fuzz_corrections(examples):
    options = st.sampled_from([*[None] * 9, "level", "mode", "lower", "upper", "reject", "normalize"])
    calls = st.tuples(corrections.any_calls(), options, st.sampled_from(ODD))
    return tried(calls, look_at_a_correction, examples)


# --- hosts ------------------------------------------------------------------------------------------------------------
def outcome_of(arguments):
    """All bits of an answer, but for those that Python rounds in the end; or the error."""
    try:
        result = grpo_loss(**arguments)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    stats = result.stats
    return (
        *(stats.tokens, stats.sequences, *stats.sums, *stats.numerator, *stats.clipped),
        *(stats.least_ratio.hex(), stats.largest_ratio.hex(), None if result.grad is None else result.grad.tobytes()),
    )


def look_at_a_host(call):
    """The same bits, or the same error, whatever the host has set."""
    arguments, host, samples = call
    if host in ("subnormal numbers flushed", "rounding upward"):  # NumPy's conversions are done as the host wants them
        dtype = getattr(arguments["logps"], "dtype", None)
        if any(getattr(arguments[name], "dtype", dtype) != dtype for name in ARRAYS):
            return "left out"
    if samples:
        four = np.abs(np.random.default_rng(samples).normal(size=(4, samples))) + 1e-3

        def outcome():
            total = grpo_stats(*four), grpo_sweep(*four, [0.1, 0.3], 0.1).surrogate_numerators
            return *total[0].sums, *total[1]
    else:

        def outcome():
            return outcome_of(arguments)

    expected = outcome()
    with HOSTS[host]():
        found = outcome()
    assert found == expected
    return "refused" if isinstance(expected[0], type) else "answered"


def fuzz_hosts(examples):
    calls = st.tuples(
        loss_calls(COMBINATIONS), st.sampled_from(list(HOSTS)), st.just(0) | st.sampled_from([3, 5000, WORTH_SHARING])
    )
    return tried(calls, look_at_a_host, examples)


# --- probabilities ----------------------------------------------------------------------------------------------------
EPSILON, BETA = 0.2, 0.5


@np.errstate(all="ignore")
def look_at_probabilities(call):
    arguments, with_kl, weighted = call
    beta = BETA if with_kl else 0
    option = {"importance_weighted": weighted} if with_kl else {}
    values = list(arguments.values()) if with_kl else [arguments["rhos"], arguments["A"], None, None]
    functions = [
        lambda: grpo_objective(*values, EPSILON, beta, **option),
        lambda: grpo_stats(*values, EPSILON, beta, **option).objective,
        lambda: grpo_sweep(*values, [0.1, EPSILON], beta, **option).objective[1, 0],
    ]
    try:
        arrays = judge_probabilities(arguments, with_kl)
    except Refused:
        for function in functions:
            try:
                function()
            except Exception as error:
                raised_for(error, PROBABILITIES)
            else:
                raise AssertionError(f"not refused: {arguments}") from None
        return "refused"
    found = [function() for function in functions]
    assert found[0] == found[1] == found[2] or np.isnan(found).all(), found
    rho, a, *rest = arrays
    old, ref = rest or (np.ones_like(rho), rho)
    terms = [exact_terms(*sample, EPSILON, weighted) for sample in zip(rho, a, old, ref, strict=True)]
    size, kl = (float(mpmath.fsum(abs(term[i]) for term in terms)) for i in (0, 1))
    if size + kl < np.finfo(rho.dtype).max / 4:  # no term overflows
        exact = float(mpmath.fsum(s - beta * k for s, k in terms) / rho.size)
        limit = tolerance(rho.size, rho.dtype.type, size / rho.size, beta * kl / rho.size)
        assert abs(found[0] - exact) <= limit + 2**-52 * abs(exact), (found[0], exact, limit)
    return "answered"


def fuzz_probabilities(examples):
    return tried(st.tuples(probability_calls(), st.booleans(), st.booleans()), look_at_probabilities, examples)


# --- options ----------------------------------------------------------------------------------------------------------
ODD = [None, True, "0.1", b"1", [0.1], (), {}, 1j, np.nan, np.inf, -np.inf, -1, -0.0, 0, 1, 10**400, -(10**400)]
ODD += [np.float32(0.1), np.float64(1.5), np.int8(3), np.bool_(True), np.array(0.1), np.array([0.1]), np.str_("1")]
ODD += ["score", "k2", "sequence", Fraction(1, 3), Decimal("0.1"), 0.2, 0.999, 1.5, 2.0, 5e-324, 1e308, object(), float]
TYPES = {Clip: (1, 3), CISPO: (0, 2), SAPO: (0, 2), VESPO: (0, 4), GMPO: (0, 2), K1: (1, 3), K2: (1, 3), K3: (1, 3)}


def look_at_an_option(call):
    option, values = call
    try:
        made = option(*values)
    except Exception as error:
        return raised_for(error, option._fields)
    assert all(type(field) in (float, bool, str) for field in made)
    assert not any(field != field for field in made)
    assert option(*made) == made
    assert hash(option(*made)) == hash(made)
    return "answered"


def fuzz_options(examples):
    def values(option):
        least, most = TYPES[option]
        value = st.floats(0, 1) | st.floats(0, 100) | st.booleans() | st.sampled_from(ODD)
        return st.tuples(st.just(option), st.lists(value, min_size=least, max_size=most))

    return tried(st.sampled_from(list(TYPES)).flatmap(values), look_at_an_option, examples)


# --- advantages -------------------------------------------------------------------------------------------------------
@st.composite
def advantage_calls(draw):
    rewards = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 3, (2, 3))
    rewards = rewards.astype(draw(st.sampled_from("dfel")))
    flat = draw(st.booleans())
    arguments = {"rewards": rewards.reshape(-1) if flat else rewards}
    if flat:
        way = draw(st.sampled_from(["group_size", "group_ids"]))
        arguments[way] = 3 if way == "group_size" else np.array([0, 0, 0, 1, 1, 1])
    for name in draw(st.lists(st.sampled_from(list(arguments)), max_size=2, unique=True)):
        x = arguments[name]
        arguments[name] = changed(draw, x) if isinstance(x, np.ndarray) else draw(st.sampled_from(ODD))
    if draw(st.booleans()):
        option = draw(st.sampled_from(["scale", "leave_one_out", "missing", "lengths", "ddof", "eps"]))
        arguments[option] = draw(st.sampled_from([*ODD, "none", "batch", "mean", "skip"]))
    return arguments


@np.errstate(all="ignore")
def look_at_advantages(arguments):
    names = ["rewards", "group_size", "group_ids", "scale", "leave_one_out", "missing", "lengths", "ddof", "eps"]
    try:
        found = group_advantages(**arguments)
    except Exception as error:
        return raised_for(error, names)
    rewards = np.asarray(arguments["rewards"])
    skipped = arguments.get("missing") == "skip"
    assert (np.isfinite(rewards.astype(float)) | (skipped & np.isnan(rewards.astype(float)))).all()
    assert found.shape == rewards.shape
    assert np.isfinite(found).all() or rewards.dtype.itemsize < 8
    return "answered"


def fuzz_advantages(examples):
    return tried(advantage_calls(), look_at_advantages, examples)


# --- how many ---------------------------------------------------------------------------------------------------------
FUZZERS = {
    "losses": fuzz_losses,
    "probabilities": fuzz_probabilities,
    "options": fuzz_options,
    "advantages": fuzz_advantages,
    "corrections": fuzz_corrections,
    "hosts": fuzz_hosts,
}


@pytest.mark.parametrize("name", FUZZERS)
@pytest.mark.parametrize("examples", [FEW, pytest.param(50_000, marks=exhaustive)])
def test_answered_or_refused(name, examples, capsys):
    counts = FUZZERS[name](examples)
    assert min(counts["answered"], counts["refused"]) > examples / 10
    if examples > FEW:
        with capsys.disabled():
            print(f"\n{name}: {counts['answered']:,} answered, {counts['refused']:,} refused")


# --- bounds -----------------------------------------------------------------------------------------------------------
OUT_OF_BOUNDS = """
import corrections
import fuzzing
import numba
import numpy as np
import test_fuzz
from combinations import COMBINATIONS
from guarded import guarded
from hypothesis import strategies as st

assert numba.config.BOUNDSCHECK

def fenced(arguments, ends):
    "The same arguments; arrays that are not copied begin or end where nobody may go on."
    for (name, x), end in zip(list(arguments.items()), ends):
        if type(x) is np.ndarray and x.dtype.kind in "biuf" and x.flags.c_contiguous:
            arguments[name] = guarded(x, end)
    return arguments

ends = st.lists(st.booleans(), min_size=20, max_size=20)
calls = st.tuples(fuzzing.loss_calls([COMBINATIONS[i] for i in {rows}]), ends)
print(test_fuzz.tried(calls, lambda call: test_fuzz.look_at_a_loss(fenced(*call)), {examples}))
calls = st.tuples(corrections.any_calls(), ends)
look = lambda call: test_fuzz.look_at_a_correction((fenced(*call), None, None))
print(test_fuzz.tried(calls, look, {examples}))
if len({rows}) > 1:
    calls = st.tuples(st.tuples(fuzzing.probability_calls(), ends), st.booleans(), st.booleans())
    look = lambda call: test_fuzz.look_at_probabilities((fenced(*call[0]), *call[1:]))
    print(test_fuzz.tried(calls, look, {examples}))
"""
ALL = range(len(COMBINATIONS))


@pytest.mark.skipif(os.name != "posix", reason="needs mprotect")
@pytest.mark.parametrize(
    ("cpu", "rows", "examples"),
    [
        pytest.param("native", [21], 200, marks=pytest.mark.slow),
        *(pytest.param(cpu, ALL, 10_000, marks=exhaustive) for cpu in ("native", "generic", "haswell")),
    ],
)
def test_nothing_out_of_bounds(cpu, rows, examples, tmp_path, capsys):
    environment = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    if cpu != "native":
        environment |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    printed = python(OUT_OF_BOUNDS.format(rows=list(rows), examples=examples), 3000, **environment)
    assert "answered" in printed
    if examples > FEW:
        with capsys.disabled():
            print(f"\nbetween forbidden pages, {cpu}: {printed}")

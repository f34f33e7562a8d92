"""Arguments of `rollout_correction`, good ones and such as `fuzzing` hands over; the comparison with the reference."""

import math

import numpy as np
from fuzzing import LENGTHS, Refused, changed, judge_bounds, judge_mask, real
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from samples import DTYPES

from grpo_fast import Reject, reference
from grpo_fast.rollout_stats import ROLLOUT_KEYS
from grpo_fast.rollout_terms import REJECT_LEVELS

ARRAYS = ["old_logps", "rollout_logps", "mask", "cu_seqlens"]
REJECTS = st.sampled_from([(statistic, level) for statistic, levels in REJECT_LEVELS.items() for level in levels])


# --- calls ------------------------------------------------------------------------------------------------------------
#: Of sequences: any, and mostly short ones.
OF_MANY_LENGTHS = st.sampled_from([9, 300]).flatmap(lambda n: st.lists(st.integers(0, n), min_size=1, max_size=5))


@st.composite
def calls(draw, lengths=OF_MANY_LENGTHS):
    """The arguments of a call: packed, padded or one sequence; in masked places stands anything."""
    lengths, layout = draw(lengths), draw(st.sampled_from(["packed", "padded", "plain"]))
    if layout == "padded":
        lengths = lengths[:1] * len(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, n = draw(st.sampled_from(DTYPES)), sum(lengths)
    sd = draw(st.sampled_from([0.01, 0.3, 1.0, 20.0]))
    rollout = np.minimum(-rng.exponential(size=n), 0)
    old = rollout + rng.normal(0, sd, n)
    if draw(st.booleans()):
        rollout[rng.random(n) < 0.2] = math.nan
    arguments = {"old_logps": old.astype(dtype), "rollout_logps": rollout.astype(dtype)}
    if layout == "packed":
        arguments["cu_seqlens"] = np.append(0, np.cumsum(lengths))
    if draw(st.booleans()):
        arguments["mask"] = rng.random(n) < draw(st.sampled_from([0.1, 0.9]))
        for name in ("old_logps", "rollout_logps"):
            arguments[name][~arguments["mask"]] = draw(st.sampled_from([0.0, math.nan, math.inf]))
    if layout == "padded":
        arguments = {name: x.reshape(len(lengths), (*lengths, 0)[0]) for name, x in arguments.items()}
    arguments["level"] = draw(st.sampled_from(["token", "sequence", "geometric"]))
    arguments["mode"] = draw(st.sampled_from(["truncate", "mask", "raw"]))
    if arguments["mode"] != "raw":
        arguments |= {"lower": draw(st.floats(0, 1)), "upper": draw(st.floats(1.01, 9))}
    arguments["reject"] = [
        Reject(*which, *sorted([draw(st.floats(-0.2, 1.2)), draw(st.floats(0.3, 30))]))
        for which in draw(st.lists(REJECTS, max_size=2))
    ]
    arguments["normalize"] = draw(st.booleans())
    return arguments


@st.composite
def any_calls(draw):
    """The same, of which up to three arrays are changed."""
    arguments = draw(calls(LENGTHS))
    for name in draw(st.lists(st.sampled_from(ARRAYS), max_size=3, unique=True)):
        x = arguments.get(name)
        if isinstance(x, np.ndarray):
            arguments[name] = changed(draw, x)
        elif draw(st.booleans()):
            arguments[name] = draw(st.sampled_from([None, 0, 1.0, "x", [], [0], np.zeros(3), True]))
    return arguments


@np.errstate(all="ignore")
def judge(arguments):
    """What a call is about, or `Refused`."""
    old = real("old_logps", arguments["old_logps"])
    if old.ndim not in (1, 2):
        raise Refused("old_logps")
    dtype = np.float32 if old.dtype in (np.float32, np.float16) else np.float64
    found = arguments | {"old_logps": old.astype(dtype)}
    bounds = judge_bounds(arguments.get("cu_seqlens"), old.shape)
    if arguments.get("cu_seqlens") is not None:
        found["cu_seqlens"] = bounds
    keep = judge_mask(arguments.get("mask"), old.shape)
    if arguments.get("mask") is not None:
        found["mask"] = keep
    rollout = np.atleast_1d(real("rollout_logps", arguments["rollout_logps"]))
    if rollout.shape != old.shape:
        raise Refused("rollout_logps")
    found["rollout_logps"] = rollout.astype(dtype)
    if not np.isfinite(found["old_logps"][keep]).all() or np.isinf(found["rollout_logps"][keep]).any():
        raise Refused(["old_logps", "rollout_logps"])
    return found


# --- the comparison ---------------------------------------------------------------------------------------------------
def stats_of(result):
    """The diagnostics by their names."""
    if isinstance(result.stats, dict):
        return result.stats
    return {name: float(getattr(result.stats, name)) for name in ROLLOUT_KEYS.values()}


def compare(found, arguments):
    """Assert that it is what the reference makes of the arguments, to rounding.

    Where that decides whether a bound is met, nothing is said of the rest: it is between what the reference says with
    bounds a little wider and a little narrower.
    """
    expected = reference.rollout_correction(**arguments)
    assert found.weights.dtype == expected.weights.dtype
    form = np.finfo(found.weights.dtype)
    by = 1e-9 if form.bits == 64 else 1e-4
    wide, narrow = (reference.rollout_correction(**arguments | moved(arguments, way)) for way in (by, -by))
    for of in (lambda result: result.mask, lambda result: result.weights > 0):
        assert not (of(narrow) & ~of(found)).any()
        assert not (of(found) & ~of(wide)).any()
        if not np.array_equal(of(narrow), of(wide)):
            return
    assert_array_equal(found.mask, expected.mask)
    of_sums = rounding_of_sums(arguments)
    token = arguments.get("level", "token") == "token" and not arguments.get("normalize")
    rtol = 40 * form.eps + (0 if token else of_sums)
    assert_allclose(found.weights, expected.weights, rtol=rtol, atol=4 * form.tiny)
    mine = stats_of(found)
    for name, value in expected.stats.items():
        # Terms differ by 4 ulp; a sum of terms of either sign by so many of its largest term.
        scale = 1.0 if name in ("k1", "chi2_token", "chi2_sequence", "prob_diff") else 0.0
        rtol, atol = 1000 * form.eps + 3 * of_sums, 1000 * form.eps * scale + 4 * form.tiny
        assert_allclose(mine[name], value, rtol=rtol, atol=atol, err_msg=name)


def rounding_of_sums(arguments):
    """How far e to the sum of log r over a sequence may be off, relatively, since each addition is rounded: twice."""
    tokens = reference._Tokens.of(arguments["old_logps"], arguments.get("mask"), arguments.get("cu_seqlens"))
    old, rollout = (tokens.each(name, arguments[name]) for name in ARRAYS[:2])
    size = np.nan_to_num(np.abs(old) + np.abs(rollout))  # of log r, and of what perplexities are made of
    return 2 * (tokens.counts.max(initial=0) + 10) * 2**-53 * tokens.sums(size).max(initial=0)


def moved(arguments, by):
    """The bounds, moved outward by so much of them; inward, where it is below 0, as far as they do not cross."""
    result = {}
    if arguments.get("mode") == "mask":
        result["lower"], result["upper"] = apart(arguments["lower"], arguments["upper"], by)
    rejects = arguments.get("reject", ())
    rejects = [rejects] if isinstance(rejects, Reject) else rejects
    result["reject"] = [Reject(r.statistic, r.level, *apart(r.lower, r.upper, by)) for r in rejects]
    return result


def apart(lower, upper, by):
    low = lower - by * abs(lower) if math.isfinite(lower) else lower
    high = upper + by * abs(upper) if math.isfinite(upper) else upper
    return (low, high) if low <= high else (lower, upper)

"""Adding is exact: the results of shards, in any order and grouping, are the result of the whole to the last bit."""

import itertools
import math
import pickle
import re
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial, reduce

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import DTYPES, samples

from grpo_fast import BLOCK, grpo_objective, grpo_stats, grpo_sweep, reference
from grpo_fast._kernels import exact
from grpo_fast._kernels.exact import ROW, Exact
from grpo_fast._kernels.sums import empty_accumulators, merged
from grpo_fast.terms import K2

N = 5 * BLOCK + 77


def small_sweep(*arrays, **option):
    return grpo_sweep(*arrays, [0.1, 0.3], [0, 0.04], **option)


def same(a, b):
    """Whether all fields of two Stats or Sweeps are equal, arrays element by element."""
    return type(a) is type(b) and all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name not in ("options", "grid")
    )


# --- Stats and Sweep --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [grpo_stats, small_sweep])
@given(cuts=st.sets(st.integers(1, 5)), order=st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_shards_cut_at_blocks_add_to_the_whole(call, dtype, cuts, order):
    arrays = samples(N, dtype)
    edges = [0, *(BLOCK * cut for cut in sorted(cuts)), N]
    shards = [call(*(x[i:j] for x in arrays)) for i, j in itertools.pairwise(edges)]
    order.shuffle(shards)
    while len(shards) > 1:  # add any two neighbours: any grouping
        i = order.randrange(len(shards) - 1)
        shards[i : i + 2] = [shards[i] + shards[i + 1]]
    whole = call(*arrays)
    assert same(shards[0], whole)
    assert np.array_equal(shards[0].objective, whole.objective)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_cut_anywhere_add_to_rounding(dtype):
    arrays = samples(1000, dtype)
    total = sum(grpo_stats(*(x[i : i + 77] for x in arrays)) for i in range(0, 1000, 77))
    # Two sums of the same terms, each as good as float32's sums of 16 or as float64's of 1000/8 + 8.
    terms = np.abs(arrays[0] * arrays[1]).mean() + total.kl
    rounding = 17 * 2**-24 if dtype is np.float32 else 133 * 2**-53
    assert total.tokens == 1000
    assert abs(total.objective - grpo_objective(*arrays)) <= 2 * rounding * terms


def test_sum_starts_from_nothing():
    stats, sweep = grpo_stats(*samples(10)), small_sweep(*samples(10))
    assert same(sum([stats]), stats)
    assert same(sum([stats, stats]), stats + stats)
    assert same(sum([sweep, sweep]), sweep + sweep)
    assert (stats + stats).objective == stats.objective


def test_extremes_and_counts_are_those_of_all():
    low, high = grpo_stats([0.1], [-1.0], [1.0], [1.0]), grpo_stats([9.0, 9.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0])
    total = low + high
    assert (total.tokens, total.ratio_min, total.ratio_max) == (3, 0.1, 9.0)
    assert (total.clip_ratio_low, total.clip_ratio_high, total.clip_ratio_region) == (1 / 3, 1 / 3, 2 / 3)


def test_different_options_do_not_add():
    arrays = samples(10)
    stats = grpo_stats(*arrays)
    for option, other in (("surrogate", {"epsilon": 0.3}), ("kl", {"beta": 0.02})):
        with pytest.raises(ValueError, match=f"Stats of different {option} cannot be added: .* and .*"):
            stats + grpo_stats(*arrays, **other)
    with pytest.raises(ValueError, match=r"different kl cannot be added: K3\(beta=0.01\) and K2\(beta=0.01\)"):
        stats + replace(stats, options=stats.options._replace(kl=K2(0.01)))
    with pytest.raises(ValueError, match="Sweep of different grid"):
        grpo_sweep(*arrays, [0.1], [0.1]) + grpo_sweep(*arrays, [0.2], [0.1])


@pytest.mark.parametrize("call", [grpo_stats, small_sweep])
def test_weighted_and_unweighted_do_not_add(call):
    found = [call(*samples(10), importance_weighted=weighted) for weighted in (True, False)]
    assert found[0].kl != found[1].kl
    for a, b in itertools.permutations(found):
        message = rf"{type(a).__name__} of different kl cannot be added: {re.escape(str(a.options.kl))} and "
        with pytest.raises(ValueError, match=message + re.escape(str(b.options.kl))):
            a + b
    assert "importance_weighted=False" in str(found[1].options.kl)
    assert (found[1] + found[1]).kl == found[1].kl


def test_without_a_kl_term_all_add():
    rho, a, *_ = samples(10)
    for call in (partial(grpo_stats, beta=0), partial(grpo_sweep, epsilons=[0.1, 0.3], betas=0)):
        found = [call(rho, a, None, None, importance_weighted=weighted) for weighted in (True, False)]
        assert same(*found)
        assert found[0] + found[1] == found[0] + found[0]


@pytest.mark.parametrize("other", [1, 1.5, None, "stats", [0]])
def test_only_its_own_kind_adds(other):
    stats = grpo_stats(*samples(10))
    for add in (lambda: stats + other, lambda: other + stats, lambda: stats + grpo_sweep(*samples(10), 0.1, 0.1)):
        with pytest.raises(TypeError):
            add()


def test_pickles_and_compares():
    for result in (grpo_stats(*samples(100)), small_sweep(*samples(100))):
        again = pickle.loads(pickle.dumps(result))
        assert again == result
        assert same(again, result)
        assert same(again + again, result + result)
        assert again + again != result


def test_shards_of_an_enormous_run_lose_nothing():
    # A float64 sum of these would lose the small one altogether.
    large, small = grpo_stats([1.0], [2.0**80], [1.0], [1.0]), grpo_stats([1.0], [2.0**-80], [1.0], [1.0])
    negative = grpo_stats([1.0], [-(2.0**80)], [1.0], [1.0])
    assert (large + small + negative).objective == 2.0**-80 / 3
    assert reference.grpo_objective([1, 1, 1], [2.0**80, 2.0**-80, -(2.0**80)], [1, 1, 1], [1, 1, 1]) == 0


def test_sweeps_of_other_terms_do_not_add():
    sweep = grpo_sweep([1.1], [1.0], [0.5], [0.5], [0.1, 0.2], [0.0, 0.1])
    assert (sweep + sweep).tokens == 2
    for option, value in (("kl", K2(1.0)), ("aggregation", "token-sum"), ("normalizer", 3.0)):
        other = replace(sweep, options=sweep.options._replace(**{option: value}))
        message = f"Sweep of different {option} cannot be added: {getattr(sweep.options, option)} and {value}"
        with pytest.raises(ValueError, match=re.escape(message)):
            sweep + other


@pytest.mark.parametrize("numerator_apart", [False, True])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_every_field_of_an_accumulator_is_merged(tasks, numerator_apart):
    rng = np.random.default_rng(tasks)
    accumulators = empty_accumulators(tasks)
    expected = {}
    for name, (form, _) in accumulators.dtype.fields.items():
        if name in ("sums", "numerator"):
            numbers = rng.normal(size=(tasks, form.shape[0]))
            for task, i in np.ndindex(numbers.shape):
                add_up(numbers[task, i : i + 1], accumulators[name][task, i])
            expected[name] = [sum(map(Exact.of_float, column), Exact()) for column in numbers.T.tolist()]
        else:
            accumulators[name] = rng.integers(1, 1000, tasks)
            how = {"least_ratio": min, "largest_ratio": max}.get(name, sum)
            expected[name] = how(accumulators[name].tolist())
    numerators = map(float, expected["numerator" if numerator_apart else "sums"][:2])
    expected["surrogate_numerator"], expected["kl_numerator"] = numerators
    expected["numerator_apart"] = numerator_apart
    totals = merged(accumulators, numerator_apart)._asdict()
    limbs = totals.pop("limbs")
    totals |= {name: Exact.of_limbs(limbs[name][0]) for name in ("sums", "numerator")}
    assert totals == expected


# --- the exact sum ----------------------------------------------------------------------------------------------------
@numba.njit
def add_up(numbers, row):
    for x in numbers:
        exact.add(row, x)


@numba.njit
def merge(rows):
    for row in rows[1:]:
        exact.join(rows[0], row)
    exact.carry(rows[0])


def exact_sum(numbers, tasks=3):
    """The sum as kernels find it: each task adds to limbs of its own, which are then merged."""
    rows = np.zeros((tasks, ROW), np.int64)
    for task in range(tasks):
        add_up(np.array(numbers[task::tasks], np.float64), rows[task])
    merge(rows)
    (total,) = Exact.of_limbs(rows[:1])
    return total


HUGE, TINY = 1.7976931348623157e308, 5e-324


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
@example([HUGE] * 3 + [TINY] + [-HUGE] * 3)
@example([-HUGE] * 9)
@example([HUGE] * 9)
@example([1.0, 2.0**-53, TINY])  # just above half way
@example([-TINY, -TINY, 3 * TINY])
def test_a_sum_is_that_of_the_fractions_rounded_once(numbers):
    total = exact_sum(numbers)
    assert Fraction(total.units, 1 << 1074) == sum(map(Fraction, numbers))
    assert total == reduce(Exact.__add__, map(Exact.of_float, numbers), Exact())
    try:
        assert float(total) == float(sum(map(Fraction, numbers)))
    except OverflowError:  # of the fraction
        assert float(total) == (math.inf if total.units > 0 else -math.inf)


@given(st.lists(st.floats(), max_size=5), st.lists(st.sampled_from([math.inf, -math.inf, math.nan]), min_size=1))
def test_infinities_and_nan_sum_as_in_ieee(finite, special):
    numbers = [x for x in finite if math.isfinite(x)] + special
    expected = math.nan if math.inf in special and -math.inf in special else sum(special)
    for total in (exact_sum(numbers), reduce(Exact.__add__, map(Exact.of_float, numbers))):
        assert np.array_equal(float(total), expected, equal_nan=True)


def test_limbs_hold_many_of_the_largest():
    # What a limb takes in before the merge grows with the count; after a merge it can go on.
    numbers = np.full(1 << 20, HUGE)
    rows = np.zeros((1, ROW), np.int64)
    for _ in range(2):
        add_up(numbers, rows[0])
        merge(rows)
    (total,) = Exact.of_limbs(rows)
    assert Fraction(total.units, 1 << 1074) == (1 << 21) * Fraction(HUGE)

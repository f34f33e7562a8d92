"""Importance weights between trainer and sampler: what a block of tokens says, a sequence decides, and is written.

One pass over a sequence collects its sums (`collect`) and, where each token has a weight of its own, writes them.
`conclude` makes of the sums what is one for the sequence: its ratios, whether it is rejected, its weight. Only where
that matters, `spread` goes over the sequence again, while it is still in the cache.

The tokens are a `Batch` whose ``logps`` are log π_old, whose ``old_logps`` are log π_rollout, NaN where one is missing,
and whose ``grad`` is where the weights go. The formulas are those of `rollout_correction`. One file, though a long one:
what the three leave for each other is in no other.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from .blocks import BLOCK, RUN, block_count, share
from .compiling import compiled, inlined, inlined_by_type, subroutine
from .elementary import exp, exp_of_any, k3_of_any_log, layout
from .float_mode import begin_ordinary_floats, end_ordinary_floats
from .rollout_sums import RolloutCounts, RolloutExtremes, RolloutSums, accumulate
from .runs import (
    Scratch,
    absent_lanes,
    begin_block,
    end_block,
    load_vector,
    mask_of,
    mask_or_ones,
    nan_where,
    prefetch_vector,
    scratch_for,
    store_gradient,
    tokens_from,
    zero_beyond,
    zero_where,
)
from .simd import (
    WIDTH,
    abs_of,
    align_stack,
    bits,
    every,
    full,
    full_like,
    is_finite,
    lane_max,
    lane_min,
    lane_sum,
    lanes,
    load,
    store,
    store_flags,
    tally,
    where,
    wide,
)
from .tasks import run
from .tokens import Batch, begin_sequence
from .ways import (
    CAREFUL,
    FAR,
    NEAR,
    Careful,
    exp_in,
    far_enough,
    k3_in,
    near_enough,
    plus_in,
    plus_square_in,
    zero_in,
)


class Bounds(NamedTuple):
    """What becomes of a raw weight that is below ``low`` or above ``high``."""

    low: float
    high: float
    weight_below: float
    weight_above: float


class TokenBands(NamedTuple):
    """Between what the statistics of a token must lie."""

    ratio_low: float
    ratio_high: float
    k2_low: float
    k2_high: float
    k3_low: float
    k3_high: float


class SequenceStatistics(NamedTuple):
    """The statistics of a sequence; and, as two arrays of their length, between what they must lie."""

    ratio: Any
    geometric_ratio: Any
    least_ratio: Any
    largest_ratio: Any
    k2: Any
    mean_k2: Any
    largest_k2: Any
    k3: Any
    mean_k3: Any
    largest_k3: Any


#: The level of the weights, as kernels know it.
TOKEN, SEQUENCE, GEOMETRIC = range(3)


class Rules(NamedTuple):
    """What is computed: how weights are made, and what is rejected."""

    level: int
    bounds: Any  # `Bounds`
    weighs_tokens: Any  # the `Bounds` again if each token has a weight of its own, or else None
    bands: Any  # `TokenBands`, or None: no token is rejected alone
    lows: Any  # of `SequenceStatistics`
    highs: Any


# --- collect ----------------------------------------------------------------------------------------------------------
#: What is collected from each block of a sequence; the last five only where each token has a weight of its own.
COLLECTED = np.dtype(
    [
        ("log_ratio", np.float64),
        ("old", np.float64),  # log π_old where log π_rollout is not missing
        ("rollout", np.float64),
        ("k2", np.float64),
        ("k3", np.float64),
        ("ratio_squared", np.float64),
        ("prob_diff", np.float64),
        ("least", np.float64),  # log r
        ("most", np.float64),
        ("missing", np.int64),
        ("rejected", np.int64),
        ("suspect", np.int64),
        ("low", np.int64),
        ("high", np.int64),
        ("raw", np.float64),
        ("weight", np.float64),
        ("weight_squared", np.float64),
        ("least_weight", np.float64),
        ("most_weight", np.float64),
    ]
)


class _RunLanes(NamedTuple):
    """What is collected from a run, in lanes."""

    log_ratio: Any
    old: Any
    rollout: Any
    k2: Any
    k3: Any
    ratio_squared: Any
    prob_diff: Any
    least: Any
    most: Any
    missing: Any
    rejected: Any
    check: Any  # not finite if a log-probability is not; in the careful way alone
    highest: Any  # log-probability
    lowest: Any
    weights: Any  # `_WeightLanes`


class _WeightLanes(NamedTuple):
    raw: Any
    weight: Any
    weight_squared: Any
    least: Any
    most: Any
    low: Any
    high: Any


@inlined_by_type
def _bounded(way, x):
    """x, but what overflowed, or could when it is summed, as the largest number of its sign that cannot."""
    if way.instance_class is not Careful:
        return lambda way, x: x

    def bounded(way, x):
        most = full_like(x, min(layout(x).largest, 1e300))
        return where(x > most, most, where(x < -most, -most, x))

    return bounded


@inlined_by_type
def _probability_difference(way, old, rollout, expm1):
    """|π_old − π_rollout|; ``expm1`` is π_old/π_rollout − 1, of which it is made unless the way is careful."""
    if way.instance_class is not Careful:
        return lambda way, old, rollout, expm1: exp(rollout) * abs_of(expm1)

    def difference(way, old, rollout, expm1):
        zero = full_like(old, 0.0)
        old, rollout = where(old > 0.0, zero, old), where(rollout > 0.0, zero, rollout)
        return abs_of(exp_of_any(old) - exp_of_any(rollout))

    return difference


@inlined_by_type
def _check(way, check, old, rollout):
    """``check``, NaN if one of the log-probabilities is infinite or NaN: in the careful way, whose sums hide it."""
    if way.instance_class is not Careful:
        return lambda way, check, old, rollout: check
    return lambda way, check, old, rollout: check + (old - old) + (rollout - rollout)


@inlined
def _outside(x, low, high, otherwise):
    """1 where x is below ``low`` or above ``high``; elsewhere ``otherwise``."""
    one = full_like(x, 1.0)
    return where(x < full_like(x, low), one, where(x > full_like(x, high), one, otherwise))


@inlined_by_type
def _rejected(bands, r, log_ratio, k3):
    """What is above 0 where a token is rejected alone; None if none is."""
    if bands is types.none:
        return lambda bands, r, log_ratio, k3: None

    def rejected(bands, r, log_ratio, k3):
        outside = _outside(r, bands.ratio_low, bands.ratio_high, full_like(r, 0.0))
        k2 = full_like(r, 0.5) * log_ratio * log_ratio
        outside = _outside(k2, bands.k2_low, bands.k2_high, outside)
        return _outside(k3, bands.k3_low, bands.k3_high, outside)

    return rejected


@inlined
def _weight(bounds, raw):
    """The weight that the bounds leave of the raw one."""
    below = where(raw < full_like(raw, bounds.low), full_like(raw, bounds.weight_below), raw)
    return where(raw > full_like(raw, bounds.high), full_like(raw, bounds.weight_above), below)


@inlined_by_type
def _plus_weights(way, bounds, total, r, absent, rejected, grad, v):
    """The `_WeightLanes` with those of vector number ``v``, whose weights are written; as they are without any."""
    if bounds is types.none:
        return lambda way, bounds, total, r, absent, rejected, grad, v: total

    def plus(way, bounds, total, r, absent, rejected, grad, v):
        weight = zero_where(absent, zero_beyond(rejected, _weight(bounds, r)))
        store_gradient(grad, v, weight)
        r, edge = nan_where(absent, r), nan_where(absent, weight)
        return _WeightLanes(
            plus_in(way, total.raw, zero_where(absent, r)),
            plus_in(way, total.weight, weight),
            plus_square_in(way, total.weight_squared, weight),
            where(edge < total.least, edge, total.least),
            where(edge > total.most, edge, total.most),
            tally(total.low, r < full_like(r, bounds.low)),
            tally(total.high, r > full_like(r, bounds.high)),
        )

    return plus


@inlined_by_type
def _count_rejected(rejected, absent, count):
    if rejected is types.none:
        return lambda rejected, absent, count: count
    return lambda rejected, absent, count: tally(count, zero_where(absent, rejected) > 0.0)


@inlined_by_type
def _store_kept(rejected, absent, kept, start):
    """Write into the bytes ``kept`` from ``start`` on which tokens of a vector are unmasked and not rejected."""
    if rejected is types.none:
        return lambda rejected, absent, kept, start: None

    def store_kept(rejected, absent, kept, start):
        keeps = zero_where(absent, where(rejected > 0.0, full_like(rejected, 0.0), full_like(rejected, 1.0)))
        store_flags(kept, start, keeps > 0.0)

    return store_kept


@inlined
def _copy_kept(bands, flags, kept, start, stop):
    """Copy what the first ``flags`` say to the bytes from ``start`` to ``stop``, if tokens are rejected alone."""
    if bands is not None:
        for i in range(start, stop):
            kept[i] = flags[i - start]


@inlined
def _run(way, rules, tokens, kept, i, vectors, like):
    """The `_RunLanes` of so many vectors, in one of the `ways`; writes weights, and which tokens are ``kept``.

    The run begins at byte number ``i`` of these.
    """
    zero = full(like, 0.0)
    log_ratio_sum = old_sum = rollout_sum = wide(zero)  # on which the weights of sequences rest
    k2_sum = k3_sum = squared = prob_diff = zero_in(way, zero)
    least, most = full_like(zero, np.inf), full_like(zero, -np.inf)
    highest = lowest = check = zero
    none = bits(zero)
    missing = rejected_count = none
    weights = _WeightLanes(k2_sum, k2_sum, k2_sum, least, most, none, none)
    v = 0
    while True:  # as in `token_level`
        prefetch_vector(tokens.logps, v)
        prefetch_vector(tokens.old_logps, v)
        absent = absent_lanes(tokens.mask, v, zero)
        old = zero_where(absent, load_vector(tokens.logps, v))
        rollout = zero_where(absent, load_vector(tokens.old_logps, v))
        is_missing = rollout != rollout
        rollout = where(is_missing, old, rollout)
        missing = tally(missing, is_missing)
        log_ratio = _bounded(way, old - rollout)
        edge = nan_where(absent, log_ratio)
        least = where(edge < least, edge, least)
        most = where(edge > most, edge, most)
        highest = where(old > highest, old, highest)
        highest = where(rollout > highest, rollout, highest)
        lowest = where(rollout < lowest, rollout, lowest)
        check = _check(way, check, old, rollout)
        log_ratio_sum += wide(log_ratio)
        old_sum += wide(where(is_missing, zero, _bounded(way, old)))
        rollout_sum += wide(where(is_missing, zero, _bounded(way, rollout)))

        r = exp_in(way, log_ratio)
        k = k3_in(way, log_ratio)
        k2_sum = plus_in(way, k2_sum, full_like(zero, 0.5) * log_ratio * log_ratio)
        k3_sum = plus_in(way, k3_sum, k.k3)
        squared = plus_square_in(way, squared, zero_where(absent, r))
        prob_diff = plus_in(way, prob_diff, _probability_difference(way, old, rollout, k.expm1))
        rejected = _rejected(rules.bands, r, log_ratio, k.k3)
        rejected_count = _count_rejected(rejected, absent, rejected_count)
        _store_kept(rejected, absent, kept, i + v * lanes(like))
        weights = _plus_weights(way, rules.weighs_tokens, weights, r, absent, rejected, tokens.grad, v)
        v += 1
        if v >= vectors:
            break
    return _RunLanes(
        log_ratio_sum,
        old_sum,
        rollout_sum,
        k2_sum,
        k3_sum,
        squared,
        prob_diff,
        least,
        most,
        missing,
        rejected_count,
        check,
        highest,
        lowest,
        weights,
    )


@inlined
def _plus_run(block, run):
    """The `_RunLanes` of a block, sums in float64, with those of a run."""
    a, b = block.weights, run.weights
    return _RunLanes(
        block.log_ratio + run.log_ratio,
        block.old + run.old,
        block.rollout + run.rollout,
        block.k2 + wide(run.k2),
        block.k3 + wide(run.k3),
        block.ratio_squared + wide(run.ratio_squared),
        block.prob_diff + wide(run.prob_diff),
        where(run.least < block.least, run.least, block.least),
        where(run.most > block.most, run.most, block.most),
        block.missing + run.missing,
        block.rejected + run.rejected,
        block.check + run.check,
        block.highest,
        block.lowest,
        _WeightLanes(
            a.raw + wide(b.raw),
            a.weight + wide(b.weight),
            a.weight_squared + wide(b.weight_squared),
            where(b.least < a.least, b.least, a.least),
            where(b.most > a.most, b.most, a.most),
            a.low + b.low,
            a.high + b.high,
        ),
    )


@inlined
def _farthest(run):
    """The largest |log r| of a run, in lanes."""
    return where(-run.least > run.most, -run.least, run.most)


@inlined
def _is_ordinary(run):
    """Whether the quick ways' |π_old − π_rollout| is right for a run, and nothing in it is infinite or NaN."""
    ordinary = every(run.highest <= 0.0) and every(run.lowest >= -layout(run.lowest).exp_limit)
    return ordinary and is_finite(run.log_ratio)


@subroutine(allocates=False)
def collect_block(batch, rules, kept, sequence, start, stop, scratch, flags, collected):
    """Fill one record of ``collected``; write the weights of tokens and which are ``kept``, where that is known.

    A run is up to RUN whole vectors, or the ragged end, which is always computed in the careful way.
    """
    align_stack()
    begin_block(batch, sequence, start, stop, scratch)
    like = scratch.vectors
    step = lanes(like)
    zero = full(like, 0.0)
    none, sums = bits(zero), wide(zero)
    least, most = full_like(zero, np.inf), full_like(zero, -np.inf)
    weights = _WeightLanes(sums, sums, sums, least, most, none, none)
    block = _RunLanes(sums, sums, sums, sums, sums, sums, sums, least, most, none, none, zero, zero, zero, weights)
    near = True
    end = stop - (stop - start) % step
    i = start
    while i < end:
        while near and i < end:
            vectors = min(RUN, (end - i) // step)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _run(NEAR, rules, tokens, kept, i, vectors, like)
            near = near_enough(_farthest(run)) and _is_ordinary(run)
            if near:
                block = _plus_run(block, run)
                i += vectors * step
        while not near and i < end:
            vectors = min(RUN, (end - i) // step)
            tokens = tokens_from(batch, mask_of(batch.mask, i, stop, scratch), i, stop, scratch)
            run = _run(FAR, rules, tokens, kept, i, vectors, like)
            near = near_enough(_farthest(run)) and _is_ordinary(run)
            if far_enough(_farthest(run)) and _is_ordinary(run):
                block = _plus_run(block, run)
            else:
                tokens = tokens_from(batch, mask_or_ones(batch.mask, i, stop, scratch), i, stop, scratch)
                block = _plus_run(block, _run(CAREFUL, rules, tokens, kept, i, vectors, like))
            i += vectors * step
    if end < stop:
        tokens = tokens_from(batch, mask_or_ones(batch.mask, end, stop, scratch), end, stop, scratch)
        block = _plus_run(block, _run(CAREFUL, rules, tokens, flags, 0, 1, like))
        _copy_kept(rules.bands, flags, kept, end, stop)
        if rules.weighs_tokens is not None:
            end_block(batch.grad, start, stop, scratch)
    collected.log_ratio = lane_sum(block.log_ratio)
    collected.old = lane_sum(block.old)
    collected.rollout = lane_sum(block.rollout)
    collected.k2 = lane_sum(block.k2)
    collected.k3 = lane_sum(block.k3)
    collected.ratio_squared = lane_sum(block.ratio_squared)
    collected.prob_diff = lane_sum(block.prob_diff)
    collected.least = lane_min(block.least)
    collected.most = lane_max(block.most)
    collected.missing = np.int64(lane_sum(block.missing))
    collected.rejected = np.int64(lane_sum(block.rejected))
    collected.suspect = not np.isfinite(collected.log_ratio + lane_sum(block.check))
    collected.low = np.int64(lane_sum(block.weights.low))
    collected.high = np.int64(lane_sum(block.weights.high))
    collected.raw = lane_sum(block.weights.raw)
    collected.weight = lane_sum(block.weights.weight)
    collected.weight_squared = lane_sum(block.weights.weight_squared)
    collected.least_weight = lane_min(block.weights.least)
    collected.most_weight = lane_max(block.weights.most)


@subroutine
def collect(batch, rules, kept, sequence, start, stop, scratch, flags, collected):
    """`collect_block` for each of the blocks of a sequence from ``start`` to ``stop``, as many as ``collected`` has."""
    for block in range(len(collected)):
        first = start + block * BLOCK
        collect_block(batch, rules, kept, sequence, first, min(first + BLOCK, stop), scratch, flags, collected[block])


# --- conclude ---------------------------------------------------------------------------------------------------------
@inlined
def _total_of(collected):
    """The sum of the records, written into the first; in this order, since some of it is rounded."""
    total = collected[0]
    for block in range(1, len(collected)):
        other = collected[block]
        total.log_ratio += other.log_ratio
        total.old += other.old
        total.rollout += other.rollout
        total.k2 += other.k2
        total.k3 += other.k3
        total.ratio_squared += other.ratio_squared
        total.prob_diff += other.prob_diff
        total.least = min(total.least, other.least)
        total.most = max(total.most, other.most)
        total.missing += other.missing
        total.rejected += other.rejected
        total.suspect += other.suspect
        total.low += other.low
        total.high += other.high
        total.raw += other.raw
        total.weight += other.weight
        total.weight_squared += other.weight_squared
        total.least_weight = min(total.least_weight, other.least_weight)
        total.most_weight = max(total.most_weight, other.most_weight)
    return total


@inlined
def _times_count(count, x):
    """``count``·x with 0·∞ = 0."""
    return 0.0 if count == 0 else count * x


@inlined
def _of_sequence(total, tokens, known, numbers):
    """The `SequenceStatistics`; and in ``numbers`` e to its logarithms: see there. In float64, whatever computes."""
    some = max(known, 1)
    numbers[0] = total.log_ratio
    numbers[1] = total.log_ratio / tokens
    numbers[2] = total.least
    numbers[3] = total.most
    numbers[_TRAIN] = -total.old / some
    numbers[_ROLLOUT] = -total.rollout / some
    numbers[_PPL_RATIO] = (total.rollout - total.old) / some
    numbers[7] = 0.0
    logs = load(numbers, 0)
    # k3 is convex, with its least at 0: over a sequence it is largest at one of the extremes.
    store(numbers, 0, k3_of_any_log(logs).k3)
    largest_k3 = max(numbers[2], numbers[3])
    store(numbers, 0, exp_of_any(logs))
    farthest = max(total.most, -total.least)
    return SequenceStatistics(
        ratio=numbers[0],
        geometric_ratio=numbers[1],
        least_ratio=numbers[2],
        largest_ratio=numbers[3],
        k2=total.k2,
        mean_k2=total.k2 / tokens,
        largest_k2=0.5 * farthest * farthest,
        k3=total.k3,
        mean_k3=total.k3 / tokens,
        largest_k3=largest_k3,
    )


#: Places of the perplexities in the numbers of `_of_sequence`, of which there are eight.
_TRAIN, _ROLLOUT, _PPL_RATIO, _NUMBERS = 4, 5, 6, 8


@inlined
def _weight_of_sequence(bounds, raw):
    """`_weight` of one number."""
    if raw < bounds.low:
        return bounds.weight_below
    return bounds.weight_above if raw > bounds.high else raw


@subroutine
def conclude(batch, rules, tokens, collected, accumulators, task, numbers):
    """Add a sequence of so many tokens to the task's accumulator; return whether it is kept, and its weight.

    Both are made of what was ``collected`` from its blocks, of which the first record is written to.
    """
    align_stack()
    total = _total_of(collected)
    known = tokens - total.missing
    statistics = _of_sequence(total, tokens, known, numbers)
    keeps = True
    for i in range(len(statistics)):
        keeps = keeps and rules.lows[i] <= statistics[i] <= rules.highs[i]
    kept_tokens = tokens - total.rejected if keeps else 0

    if rules.level == TOKEN:
        weight = 0.0
        weight_sum, squares = (total.weight, total.weight_squared) if keeps else (0.0, 0.0)
        least, largest = (total.least_weight, total.most_weight) if keeps else (0.0, 0.0)
        raw = total.raw
        # As the weights are: what is infinite there is so here.
        least_raw = np.float64(batch.logps.dtype.type(statistics.least_ratio))
        largest_raw = np.float64(batch.logps.dtype.type(statistics.largest_ratio))
        low, high = total.low, total.high
    else:
        raw = statistics.ratio if rules.level == SEQUENCE else statistics.geometric_ratio
        least_raw = largest_raw = raw
        low, high = np.int64(raw < rules.bounds.low), np.int64(raw > rules.bounds.high)
        weight = np.float64(batch.logps.dtype.type(_weight_of_sequence(rules.bounds, raw)))
        weight_sum, squares = _times_count(kept_tokens, weight), _times_count(kept_tokens, weight * weight)
        least = weight if kept_tokens == tokens else 0.0
        largest = weight if kept_tokens > 0 else 0.0
    has_ppl = known > 0
    sums = RolloutSums(
        weight=weight_sum,
        weight_squared=squares,
        weight_of_sequence=weight_sum / tokens,
        raw=raw,
        log_ratio=total.log_ratio,
        k3=total.k3,
        ratio_squared=total.ratio_squared,
        ratio_squared_of_sequence=statistics.ratio * statistics.ratio,
        prob_diff=total.prob_diff,
        train_ppl=numbers[_TRAIN] if has_ppl else 0.0,
        rollout_ppl=numbers[_ROLLOUT] if has_ppl else 0.0,
        ppl_ratio=numbers[_PPL_RATIO] if has_ppl else 0.0,
    )
    counts = RolloutCounts(
        filled=np.int64(1),
        known=np.int64(has_ppl),
        missing=total.missing,
        low=low,
        high=high,
        rejected_tokens=tokens - kept_tokens,
        rejected_sequences=np.int64(kept_tokens == 0),
        suspect=total.suspect,
    )
    accumulate(accumulators[task], sums, counts, RolloutExtremes(least, largest, least_raw, largest_raw))
    return keeps, weight


# --- spread -----------------------------------------------------------------------------------------------------------
@subroutine(allocates=False)
def spread(batch, rules, kept, start, stop, keeps, weight):
    """Write the weights of a sequence from ``start`` to ``stop``, and of a rejected one that nothing is kept."""
    if not keeps:
        _fill(batch.grad, None, None, start, stop, 0.0)
        _clear_kept(kept, start, stop)
    elif rules.weighs_tokens is None:
        _fill(batch.grad, kept, batch.mask, start, stop, weight)


@inlined
def _fill(weights, kept, mask, start, stop, weight):
    """The weight for what is kept, or without that for what is unmasked, and 0 elsewhere."""
    if kept is not None:
        for i in range(start, stop):
            weights[i] = weight if kept[i] != 0 else 0.0
    elif mask is not None:
        for i in range(start, stop):
            weights[i] = weight if mask[i] != 0 else 0.0
    else:
        for i in range(start, stop):
            weights[i] = weight


@inlined
def _clear_kept(kept, start, stop):
    if kept is not None:
        for i in range(start, stop):
            kept[i] = 0


# --- all of it --------------------------------------------------------------------------------------------------------
@subroutine
def _task(task, batch, rules, kept, ranges, limit, accumulators):
    scratch = Scratch(*scratch_for(batch.logps, 0))
    blocks = np.empty(block_count(min(limit, len(batch.logps))), COLLECTED)  # before the host's mode is another
    flags, numbers = np.empty(WIDTH, np.uint8), np.empty(_NUMBERS, np.float64)
    host_mode = begin_ordinary_floats()
    for r in range(task, len(ranges), len(accumulators)):
        for sequence in range(ranges[r, 0], ranges[r, 1]):
            first, last = batch.bounds[sequence], batch.bounds[sequence + 1]
            if last - first <= limit:
                extent = begin_sequence(batch.mask, batch.grad, first, last, accumulators[task])
                if extent.tokens > 0:
                    collected = blocks[: block_count(extent.stop - extent.start)]
                    collect(batch, rules, kept, sequence, extent.start, extent.stop, scratch, flags, collected)
                    keeps, weight = conclude(batch, rules, extent.tokens, collected, accumulators, task, numbers)
                    spread(batch, rules, kept, extent.start, extent.stop, keeps, weight)
    end_ordinary_floats(host_mode)


@compiled
def rollout(
    old_logps,
    rollout_logps,
    mask,
    weights,
    bounds,
    level,
    weight_bounds,
    weighs_tokens,
    bands,
    lows,
    highs,
    kept,
    ranges,
    limit,
    accumulators,
    room,
):
    """An entry, see `tasks`: adds the ranges of each task to its accumulator; writes the weights, and what is kept.

    A row of ``ranges`` is a range of sequences, of which those longer than ``limit`` are left out. Tasks, of which each
    has an accumulator, take the ranges in turns. ``kept``, bytes, is a copy of the mask before; None, if nothing can be
    rejected.
    """
    batch = Batch(old_logps, rollout_logps, None, None, mask, None, None, weights, bounds, False, False, False)
    rules = Rules(level, weight_bounds, weighs_tokens, bands, lows, highs)
    return run(_task, (batch, rules, kept, ranges, limit, accumulators), room)


# --- one long sequence, on all threads --------------------------------------------------------------------------------
@subroutine
def _collect_share(task, batch, rules, kept, sequence, extent, collected, tasks):
    first, last = share(len(collected), task, tasks)
    start, stop = extent.start + first * BLOCK, min(extent.start + last * BLOCK, extent.stop)
    scratch = Scratch(*scratch_for(batch.logps, 0))
    flags = np.empty(WIDTH, np.uint8)
    host_mode = begin_ordinary_floats()
    collect(batch, rules, kept, sequence, start, stop, scratch, flags, collected[first:last])
    end_ordinary_floats(host_mode)


@compiled
def collect_long(batch, rules, kept, sequence, extent, collected, tasks, room):
    """An entry, see `tasks`: as `collect` for the extent of a sequence, to the bit."""
    return run(_collect_share, (batch, rules, kept, sequence, extent, collected, tasks), room)


@compiled
def conclude_long(batch, rules, tokens, collected, accumulators):
    """As `conclude`, for the first of the accumulators and a caller in Python."""
    numbers = np.empty(_NUMBERS, np.float64)
    host_mode = begin_ordinary_floats()
    concluded = conclude(batch, rules, tokens, collected, accumulators, 0, numbers)
    end_ordinary_floats(host_mode)
    return concluded


@subroutine
def _spread_share(task, batch, rules, kept, extent, keeps, weight, tasks):
    first, last = share(extent.stop - extent.start, task, tasks)
    spread(batch, rules, kept, extent.start + first, extent.start + last, keeps, weight)


@compiled
def spread_long(batch, rules, kept, extent, keeps, weight, tasks, room):
    """An entry, see `tasks`: as `spread` for the extent of a sequence."""
    return run(_spread_share, (batch, rules, kept, extent, keeps, weight, tasks), room)


# --- normalize --------------------------------------------------------------------------------------------------------
@subroutine
def _divide_share(task, weights, mean, tasks):
    first, last = share(len(weights), task, tasks)
    host_mode = begin_ordinary_floats()
    for i in range(first, last):
        if weights[i] != np.inf:
            weights[i] /= mean
    end_ordinary_floats(host_mode)


@compiled
def divide(weights, mean, tasks, room):
    """An entry, see `tasks`: divides the weights by their mean, in place, but for infinite ones."""
    return run(_divide_share, (weights, mean, tasks), room)

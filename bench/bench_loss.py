"""grpo_loss with its gradient beside everything else: ``pytest bench/bench_loss.py``.

One table of cases; what is timed is first checked against the reference in float64. Compare within a group. The large
batches take several GB of memory; all of it, a quarter of an hour and more (with ``--quick``, a minute or two).
"""

import itertools
from functools import partial

import numpy as np
import pytest
from batches import KINDS, packed_long, packed_short, packed_single
from loss_check import check, expected
from loss_peers import LEVELS, PEERS, fast
from roofs import read_and_write
from timing import clock, hand_over, measure, present, skip_if_missing

#: Sequences and their length: a micro-batch, a batch, and one that fits no cache.
SIZES = ((16, 256), (256, 512), (4096, 4096))
#: Small ones, of which a call costs more than its tokens.
SMALL = ((16, 16), (16, 64), (16, 1024))
CASES = [
    *itertools.product(SMALL, ("full", "padded"), ("float64",), ("token",)),
    *itertools.product(SIZES, ("full", "padded"), ("float64", "float32"), LEVELS),
]
OTHERS = ("without gradient", "read-and-write roof")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "{0[0]} of {0[1]}, {1}, {2}, {3}".format(*case))
def case(request, quick):
    (sequences, length), kind, dtype, level = request.param
    if quick and sequences > 256:
        pytest.skip("--quick")
    peers, missing = present(PEERS)
    batch = KINDS[kind](sequences, length, dtype)
    right = expected(batch, level)
    calls = {name: bind(batch, level, True) for name, bind in peers.items()}
    for call in calls.values():
        check(call(), right, batch)
    del right
    calls["without gradient"] = partial(fast, batch, level, False)
    calls["read-and-write roof"] = partial(read_and_write, *batch[:3], np.empty_like(batch.logps))
    facts = {"n": batch.logps.size, "tokens": batch.tokens, "kind": kind, "dtype": dtype, "level": level}
    return facts, measure(calls, request.config, steady=["grpo_fast", "grpo_fast, in place"]), missing


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own; an error, it would stop torch.compile
@pytest.mark.parametrize("name", [*PEERS, *OTHERS])
def test_speed(benchmark, case, name):
    facts, times, missing = case
    skip_if_missing(name, missing)
    group = f"loss, {facts['n']:,} {facts['kind']}, {facts['dtype']}, {facts['level']} level"
    hand_over(benchmark, times, name, group, missing, work="loss", **facts)


@pytest.fixture(scope="module", params=itertools.product(("float64", "float32"), LEVELS), ids=", ".join)
def packed(request, quick):
    dtype, level = request.param
    sequences = 64 if quick else 4096
    batches = {"long": packed_long(sequences, 4096, dtype), "short": packed_short(sequences, 4096, dtype)}
    batches["single"] = packed_single(sequences * 512, dtype)
    calls = {name: partial(fast, batch, level, np.empty_like(batch.logps)) for name, batch in batches.items()}
    return dtype, level, {name: batch.tokens for name, batch in batches.items()}, measure(calls, request.config)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", ["long", "short", "single"])
def test_packed(benchmark, packed, name):
    """Sequences of 5 … 900 tokens, and of a single one, beside sequences of 1 … 4096."""
    dtype, level, tokens, times = packed
    group = f"packed, {dtype}, {level} level"
    hand_over(benchmark, times, name, group, work="packed", tokens=tokens[name], dtype=dtype, level=level)

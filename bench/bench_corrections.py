"""rollout_correction beside torch doing the same, and beside the roof: ``pytest bench/bench_corrections.py``.

What is timed is first checked against the reference in float64. The large batches take some GB of memory; all of it,
some minutes (with ``--quick``, half a minute).
"""

import itertools
from functools import partial

import numpy as np
import pytest
from correction_peers import OPTIONS, PEERS, check, pair
from roofs import read_two_and_write
from timing import clock, hand_over, measure, present, skip_if_missing

#: Sequences and their length: a micro-batch, a batch, and one that fits no cache.
SIZES = ((16, 256), (256, 512), (4096, 4096))
CASES = list(itertools.product(SIZES, ("full", "padded"), ("float64", "float32"), OPTIONS))
ROOF = "read-and-write roof"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "{0[0]} of {0[1]}, {1}, {2}, {3}".format(*case))
def case(request, quick):
    (sequences, length), kind, dtype, level = request.param
    if quick and sequences > 16:
        pytest.skip("--quick")
    peers, missing = present(PEERS)
    batch = pair(kind, sequences, length, dtype)
    calls = {name: bind(batch, level) for name, bind in peers.items()}
    for call in calls.values():
        check(call(), batch, level)
    calls[ROOF] = partial(read_two_and_write, *batch[:2], np.empty_like(batch.old_logps))
    facts = {"n": batch.old_logps.size, "tokens": batch.tokens, "kind": kind, "dtype": dtype, "level": level}
    return facts, measure(calls, request.config, steady=["grpo_fast"]), missing


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own; an error, it would stop torch.compile
@pytest.mark.parametrize("name", [*PEERS, ROOF])
def test_speed(benchmark, case, name):
    facts, times, missing = case
    skip_if_missing(name, missing)
    group = f"correction, {facts['n']:,} {facts['kind']}, {facts['dtype']}, {facts['level']} level"
    hand_over(benchmark, times, name, group, missing, work="correction", **facts)

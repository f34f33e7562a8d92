"""grpo_loss beside the same loss by other means: ``pytest bench/bench_loss.py --benchmark-enable --benchmark-only``.

One table of cases, of which ``-k 512x512`` takes the ones of one size; what is timed is first checked against the
reference. Compare within a group: the groups hold the contestants of one case. For ratios from interleaved rounds,
which noise disturbs less, see loss_targets.py.
"""

import itertools

import pytest
from losses import DTYPES, KINDS, LEVELS, check, contestants, expected

SIZES = [(16, 256), (512, 512), (4096, 4096)]  # the last takes long, and several GB of memory
CASES = list(itertools.product(SIZES, KINDS, DTYPES, LEVELS))
NAMES = ["grpo_fast", "numpy", "torch eager", "torch.compile"]


@pytest.fixture(scope="module")
def who():
    return contestants()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0][0]}x{case[0][1]}, {', '.join(case[1:])}")
def case(request):
    (sequences, length), kind, dtype, level = request.param
    batch = KINDS[kind](sequences, length, dtype)
    return f"{batch.tokens:,} tokens, {kind}, {dtype}, {level} level", batch, level, expected(batch, level)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own; an error, it would stop torch.compile
@pytest.mark.parametrize("grad", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_speed(benchmark, who, case, name, grad):
    found, missing = who
    if name in missing:
        pytest.skip(f"{name} is missing: {missing[name]}")
    label, batch, level, right = case
    benchmark.group = f"{label}, {'value and gradient' if grad else 'value'}"
    check(found[name](batch, level, grad), right, batch)
    benchmark(found[name], batch, level, grad)

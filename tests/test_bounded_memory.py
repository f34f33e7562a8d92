"""Files several times larger than the memory that a process may have, in row groups that are too."""

import os
import sys

import numpy as np
import pytest
from interpreter import python

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from pyarrow import parquet  # noqa: E402
from rollout_files import PROBABILITIES, lists  # noqa: E402

pytestmark = pytest.mark.slow

# RLIMIT_DATA counts memory that a process may write to, unlike RLIMIT_AS, in which libraries and reserved addresses
# would drown a file. The first call compiles, so that only reading and computing is under the limit.
SCRIPT = """
import resource
import pyarrow as pa
from grpo_fast import evaluate

evaluate({small!r})
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + ({allowed} << 20), -1))
try:
    bytearray({size})
    print("no limit")
except MemoryError:
    print(evaluate({large!r}).tokens)
"""


def write(path, lengths, times):
    """A row group of ``times`` · 8 MiB per column, in lists of the lengths in turn if there are any."""
    rng = np.random.default_rng(0)
    n = 1 << 20
    x = rng.uniform(0.5, 1, n)
    names = ("logps", "old_logps") if lengths else PROBABILITIES
    tables = [pa.table({name: x for name in names})]
    if lengths:
        tables = [
            pa.table({name: lists(-x, np.arange(0, n + 1, k)) for name in names} | {"advantages": np.ones(n // k)})
            for k in lengths
        ]
    whole = pa.concat_tables(tables * times)
    with parquet.ParquetWriter(path, whole.schema, use_dictionary=False, compression="none") as file:
        file.write_table(whole, row_group_size=len(whole))
    tokens = n * times * len(tables)
    return str(path), tokens, tokens * 8 * len(names)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA as Linux counts it")
@pytest.mark.parametrize(
    ("lengths", "times"),
    # What comes first must not decide for what comes later.
    [([], 10), ([1 << 10], 20), ([1 << 3] + [1 << 14] * 20, 1), ([1 << 14] * 20 + [1 << 3], 1)],
    ids=["samples", "sequences", "short ones first", "long ones first"],
)
def test_a_row_group_larger_than_memory(lengths, times, tmp_path):
    small, _, _ = write(tmp_path / "small.parquet", lengths[:1], 1)
    large, tokens, size = write(tmp_path / "large.parquet", lengths, times)
    allowed = 100  # MiB: three batches of 16, one of them growing, and what allocators keep
    assert size > 3 * (allowed << 20)
    script = SCRIPT.format(small=small, large=large, allowed=allowed, size=size)
    try:
        assert python(script, ARROW_DEFAULT_MEMORY_POOL="system", MALLOC_ARENA_MAX="2") == f"{tokens}\n"
    finally:
        os.remove(large)  # pytest keeps what tests leave

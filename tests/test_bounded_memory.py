"""Files several times larger than the memory that a process may have, in row groups that are too."""

import os
import sys

import numpy as np
import pytest
from conftest import python

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from pyarrow import parquet  # noqa: E402
from rollout_files import PROBABILITIES, lists  # noqa: E402

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


def write(path, of_lists, times):
    """A row group of ``times`` · 8 MiB per column, written in a little memory."""
    rng = np.random.default_rng(0)
    n = 1 << 20
    x = rng.uniform(0.5, 1, n)
    names = ("logps", "old_logps") if of_lists else PROBABILITIES
    columns = {name: lists(-x, np.arange(0, n + 1, 1 << 10)) if of_lists else x for name in names}
    columns |= {"advantages": np.ones(n >> 10)} if of_lists else {}
    table = pa.table(columns)
    with parquet.ParquetWriter(path, table.schema, use_dictionary=False, compression="none") as file:
        file.write_table(pa.concat_tables([table] * times), row_group_size=n * times)
    return str(path), n * times, n * times * 8 * len(names)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA as Linux counts it")
@pytest.mark.parametrize("of_lists", [False, True], ids=["samples", "sequences"])
def test_a_row_group_larger_than_memory(of_lists, tmp_path):
    small, _, _ = write(tmp_path / "small.parquet", of_lists, 1)
    large, tokens, size = write(tmp_path / "large.parquet", of_lists, 20 if of_lists else 10)
    allowed = 100  # MiB: three batches of 16, one of them growing, and what allocators keep
    assert size > 3 * (allowed << 20)
    script = SCRIPT.format(small=small, large=large, allowed=allowed, size=size)
    try:
        assert python(script, ARROW_DEFAULT_MEMORY_POOL="system", MALLOC_ARENA_MAX="2") == f"{tokens}\n"
    finally:
        os.remove(large)  # pytest keeps what tests leave

"""Write a realistic rollout log as Parquet: groups of completions, heavy-tailed lengths, a policy that drifts.

``python bench/rollouts.py OUT.parquet [--rows 8192] [--tokens 400] [--seed 0]``. A row is a completion; its per-token
columns are lists. Row groups are made and written one after the other, so that any size fits into memory. It takes
a second for every two million tokens or so.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from grpo_fast import group_advantages

GROUP = 8  # completions of one prompt
ROW_GROUP = 2048  # rows; about 10 MB of float32 at 400 tokens a completion
LONGEST = 8192  # tokens, as generation is cut off somewhere


def row_groups(rows: int, tokens: int, seed: int) -> Iterator[pa.Table]:
    """Yield the log, row group by row group; ``tokens`` is the median length of its completions."""
    for first in range(0, rows, ROW_GROUP):
        yield _row_group(min(ROW_GROUP, rows - first), tokens, first / rows, np.random.default_rng([seed, first]))


def _row_group(rows: int, tokens: int, progress: float, rng: np.random.Generator) -> pa.Table:
    """A table of so many completions; ``progress`` is how far into training they are from, 0 … 1."""
    lengths = np.clip(rng.lognormal(np.log(tokens), 0.8, rows), 1, LONGEST).astype(np.int64)
    bounds = np.append(0, np.cumsum(lengths))
    n = int(bounds[-1])
    # Most tokens are nearly certain, a few are choices: half a point mass near 0, half exponential.
    sampled = -rng.exponential(np.where(rng.random(n) < 0.5, 0.01, 1.2)).astype(np.float32)
    # Where the model hesitates it has been moved most; a completion moves as a whole, too. The reference is ever
    # farther behind.
    freedom = np.sqrt(-sampled)

    def moved(scale: float) -> Any:
        """The log-probabilities of the same tokens under a policy that has moved so far from the sampling one."""
        whole = np.repeat(rng.normal(0, 0.3, rows), lengths)
        step = scale * freedom * (whole + rng.standard_normal(n))
        return np.minimum(sampled + step, 0).astype(np.float32)

    solved = rng.random(-(-rows // GROUP)).repeat(GROUP)[:rows]  # a prompt's difficulty
    rewards = (rng.random(rows) < solved).astype(np.float64)
    columns = {"logps": moved(0.15), "old_logps": sampled, "ref_logps": moved(0.15 + 0.35 * progress)}
    offsets = pa.array(bounds, pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
    prompts = np.arange(rows) // GROUP
    return pa.table(lists | {"advantages": group_advantages(rewards, group_ids=prompts), "rewards": rewards})


def write(path: str | Path, rows: int = 8192, tokens: int = 400, seed: int = 0) -> None:
    """Write a log to ``path``, with checksums, so that a reader notices flipped bits."""
    tables = row_groups(rows, tokens, seed)
    first = next(tables)
    with parquet.ParquetWriter(path, first.schema, use_dictionary=False, write_page_checksum=True) as file:
        file.write_table(first)
        for table in tables:
            file.write_table(table)


def main() -> None:
    """Write the log that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.parquet")
    parser.add_argument("--rows", type=int, default=8192, help="completions (%(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="median length of a completion (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rows < 1 or arguments.tokens < 1:
        parser.error("--rows and --tokens must be at least 1")
    write(arguments.out, arguments.rows, arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()

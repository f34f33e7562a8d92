"""What the tests about files share: rollouts as arrays and as tables, and the ways to write a table."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from samples import samples

from grpo_fast import K3, Clip, evaluate

FORMATS = ["parquet", "arrow"]
OPTIONS = {"surrogate": Clip(0.2), "kl": K3(0.04)}
GRID = {"epsilons": [0.1, 0.2], "betas": [0, 0.04]}
PROBABILITIES = ("rhos", "A", "pi_theta_old", "pi_theta_ref")
PER_TOKEN = ("logps", "old_logps", "ref_logps", "mask", "rollout_is_weights", "rollout_logps")


def probabilities(n, dtype=np.float64):
    """The arguments of grpo_objective."""
    return dict(zip(PROBABILITIES, samples(n, dtype), strict=True))


def tokens(sequences, seed=0, longest=300, optional=False):
    """Packed arguments of grpo_loss for sequences of 0 … ``longest`` tokens; some masked and weighted, if asked for."""
    rng = np.random.default_rng([sequences, seed])
    lengths = rng.integers(0, longest + 1, sequences)
    n = int(lengths.sum())
    old = -rng.exponential(size=n)
    arrays = {
        "logps": old + rng.normal(0, 0.2, n),
        "old_logps": old,
        "advantages": rng.normal(size=sequences),
        "ref_logps": old + rng.normal(0, 0.2, n),
        "cu_seqlens": np.append(0, np.cumsum(lengths)),
    }
    if optional:
        arrays |= {"mask": rng.random(n) < 0.9, "rollout_is_weights": rng.uniform(0.5, 2, n)}
    return arrays


def lists(values, bounds, list_type=pa.large_list):
    """Sequences as an Arrow array of lists."""
    make = pa.LargeListArray if list_type is pa.large_list else pa.ListArray
    offsets = pa.array(bounds, pa.int64() if list_type is pa.large_list else pa.int32())
    return make.from_arrays(offsets, pa.array(values))


def table(arrays, list_type=pa.large_list):
    """Arguments of grpo_loss or grpo_stats as a table: lists where there are sequences."""
    bounds = arrays.get("cu_seqlens")
    return pa.table(
        {
            name: lists(array, bounds, list_type) if bounds is not None and name in PER_TOKEN else pa.array(array)
            for name, array in arrays.items()
            if name != "cu_seqlens"
        }
    )


def write(path, *tables):
    """Write a file in the format of its suffix; each table becomes a row group or record batch. Returns ``path``."""
    if path.suffix == ".arrow":
        with pa.ipc.new_file(path, tables[0].schema) as file:
            for rows in tables:
                file.write_table(rows)
    else:
        with parquet.ParquetWriter(path, tables[0].schema, write_page_checksum=True) as file:
            for rows in tables:
                file.write_table(rows, row_group_size=max(len(rows), 1))
    return path


def refused(message, *args, error=ValueError, call=evaluate, **kwargs):
    """Assert that a call raises an error whose message matches."""
    with pytest.raises(error, match=message):
        call(*args, **kwargs)

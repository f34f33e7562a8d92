"""`evaluate` over a Parquet file beside merely reading it, and beside the same objective by other libraries.

``pytest bench/bench_files.py`` (a minute). What is timed is first checked; the file is one of probabilities,
float64, with checksums, which all readers verify that can. It lies in the page cache: no disk is measured.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from objective_peers import BETA, EPSILON
from timing import clock, hand_over, measure, present, skip_if_missing

from grpo_fast import evaluate, reference
from grpo_fast._demonstration import synthetic_samples

NAMES = ["rhos", "A", "pi_theta_old", "pi_theta_ref"]


def _evaluate() -> Callable[[str], float]:
    import pyarrow  # noqa: F401 - or it is missing

    return lambda path: evaluate(path, epsilon=EPSILON, beta=BETA).objective


def _pyarrow() -> Callable[[str], float]:
    """Row group by row group, as a reader does who cannot hold the file; no objective."""
    from pyarrow import parquet

    def read(path: str) -> float:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        for index in range(file.num_row_groups):
            file.read_row_group(index, columns=NAMES)
        return math.nan

    return read


def _pandas() -> Callable[[str], float]:
    import pandas

    def objective(path: str) -> float:
        frame = pandas.read_parquet(path, columns=NAMES, page_checksum_verification=True)
        return reference.grpo_objective(*(frame[name].to_numpy() for name in NAMES), EPSILON, BETA)

    return objective


def _polars() -> Callable[[str], float]:
    import polars as pl

    rho, a, old, ref = map(pl.col, NAMES)
    r = ref / (rho * old)
    clipped = pl.min_horizontal(rho * a, rho.clip(1 - EPSILON, 1 + EPSILON) * a)
    objective = (clipped - BETA * rho * (r - r.log() - 1)).mean()
    return lambda path: float(pl.scan_parquet(path).select(objective).collect(engine="streaming").item())


PEERS: dict[str, Callable[[], Callable[[str], float]]] = {
    "grpo_fast": _evaluate,
    "pyarrow, read only": _pyarrow,
    "pandas + NumPy": _pandas,
    "Polars": _polars,
}


def write(path: Path, samples: int, row_group: int = 1 << 20) -> str:
    """A file of synthetic samples, with checksums."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(dict(zip(NAMES, synthetic_samples(samples, "float64", seed=0), strict=True)))
    parquet.write_table(table, path, row_group_size=row_group, use_dictionary=False, write_page_checksum=True)
    return str(path)


@pytest.fixture(scope="module")
def case(request, quick, tmp_path_factory):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    peers, missing = present(PEERS)
    n = 1 << 20 if quick else 10 << 20
    path = Path(write(tmp_path_factory.mktemp("bench") / "rollouts.parquet", n))
    calls = {name: partial(peer, str(path)) for name, peer in peers.items()}
    right = calls["grpo_fast"]()
    for name, call in calls.items():  # sums of n terms of about 1 in float64, in whichever order
        objective = call()
        assert math.isnan(objective) or abs(objective - right) <= n * np.finfo(float).eps, name
    yield n, measure(calls, request.config, steady=["grpo_fast"]), missing
    path.unlink()


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", PEERS)
def test_speed(benchmark, case, name):
    n, times, missing = case
    skip_if_missing(name, missing)
    group = f"files, {n:,} samples, float64, Parquet"
    hand_over(benchmark, times, name, group, missing, work="files", n=n)

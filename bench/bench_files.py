"""`evaluate` over a Parquet file beside merely reading it, and beside the same objective by other libraries.

``pytest bench/bench_files.py --benchmark-enable --benchmark-only``. Every contestant is a function of a path that gives
the objective (what only reads gives NaN), and is checked first. The file is one of probabilities, float64, with
checksums, which all readers verify that can.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from pyarrow import parquet  # noqa: E402

from grpo_fast import evaluate, reference  # noqa: E402
from grpo_fast.__main__ import synthetic_samples  # noqa: E402

NAMES = ("rhos", "A", "pi_theta_old", "pi_theta_ref")
EPSILON, BETA = 0.2, 0.01


def _evaluate(path: str) -> float:
    return evaluate(path, epsilon=EPSILON, beta=BETA).objective


def _read(path: str) -> float:
    """Row group by row group, as a reader does who cannot hold the file."""
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    for index in range(file.num_row_groups):
        file.read_row_group(index, columns=list(NAMES))
    return math.nan


def _pandas(path: str) -> float:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(path, columns=list(NAMES), page_checksum_verification=True)
    return reference.grpo_objective(*(frame[name].to_numpy() for name in NAMES), EPSILON, BETA)


def _polars(path: str) -> float:
    pl = pytest.importorskip("polars")
    rho, a, old, ref = map(pl.col, NAMES)
    r = ref / (rho * old)
    clipped = pl.min_horizontal(rho * a, rho.clip(1 - EPSILON, 1 + EPSILON) * a)
    objective = (clipped - BETA * rho * (r - r.log() - 1)).mean()
    return float(pl.scan_parquet(path).select(objective).collect(engine="streaming").item())


CONTESTANTS: dict[str, Callable[[str], float]] = {
    "evaluate": _evaluate,
    "pyarrow, read only": _read,
    "pandas + NumPy": _pandas,
    "polars": _polars,
}


def write(path: Path, samples: int = 10 << 20, row_group: int = 1 << 20) -> str:
    """A file of synthetic samples, with checksums."""
    table = pa.table(dict(zip(NAMES, synthetic_samples(samples, "float64", seed=0), strict=True)))
    parquet.write_table(table, path, row_group_size=row_group, use_dictionary=False, write_page_checksum=True)
    return str(path)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("bench") / "rollouts.parquet")
    yield path
    Path(path).unlink()


@pytest.mark.parametrize("name", CONTESTANTS)
def test_speed(benchmark, rollouts, name):
    found, right = CONTESTANTS[name](rollouts), _evaluate(rollouts)
    # Sums of 10⁷ terms of about 1 in float64, in whichever order.
    assert math.isnan(found) or abs(found - right) <= 1e7 * np.finfo(float).eps
    benchmark.group = "10 M samples, float64, Parquet"
    benchmark(CONTESTANTS[name], rollouts)

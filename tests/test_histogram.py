"""Counts of log-ratios are those of NumPy on the same edges, add over shards, and leave out what is masked."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from grpo_fast.files import Histogram, histogram

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from hypothesis import example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from rollout_files import FORMATS, lists, probabilities, refused, table, tokens, write  # noqa: E402

from grpo_fast._histograms import EDGES, counted, magnitudes, quantile  # noqa: E402

finite = st.floats(allow_nan=False, allow_infinity=True)


def by_numpy(values):
    """Each number in the bin whose edge towards 0 is the last that it has reached."""
    x = np.asarray(values, float)
    above = EDGES[len(EDGES) // 2 :]
    size = np.searchsorted(above, np.minimum(np.abs(x), np.finfo(float).max), "right")
    return np.bincount(np.where(x < 0, -size, size) + len(above) - 1, minlength=len(EDGES) - 1)


def test_edges():
    assert np.array_equal(EDGES, -EDGES[::-1])
    inner = EDGES[len(EDGES) // 2 : -1]
    assert (inner[0], inner[-1], EDGES[-1]) == (2.0**-16, 2.0**5, np.inf)
    assert np.all(np.diff(inner) / inner[:-1] <= 1 / 32)
    with pytest.raises(ValueError, match="read-only"):
        EDGES[0] = 0


@given(st.lists(st.one_of(finite, st.sampled_from(EDGES.tolist())), max_size=50))
@example([0.0, -0.0, 2.0**-16, -(2.0**-16), np.nextafter(2.0**-16, 0), 32.0, np.nextafter(32.0, 0), -np.inf, 5e-324])
def test_each_number_is_counted_once_in_its_bin(values):
    assert np.array_equal(counted(np.array(values, float)), by_numpy(values))


def test_many_numbers_of_float32():
    x = np.random.default_rng(0).normal(0, 0.1, 100_000).astype(np.float32)
    assert np.array_equal(counted(x), by_numpy(x))
    inner = EDGES[1:-1]
    assert np.abs(counted(x)[1:-1] - np.histogram(x.astype(float), inner)[0]).sum() <= 2  # which has edges elsewhere


def test_quantiles_are_right_to_the_width_of_a_bin():
    x = np.random.default_rng(0).normal(0, 0.1, 100_001)
    for q in (0.0005, 0.01, 0.25, 0.5, 0.9, 0.999):
        expected = np.quantile(x, q)
        assert quantile(counted(x), q) == pytest.approx(expected, rel=1 / 32, abs=2.0**-15)
        assert quantile(magnitudes(counted(x)), q) == pytest.approx(np.quantile(np.abs(x), q), rel=1 / 32, abs=2.0**-15)
    assert np.isnan(quantile(counted(x[:0]), 0.5))
    assert quantile(counted(np.array([0.5])), 1.0) == pytest.approx(0.5, rel=1 / 32)


def with_rollout(arrays, seed=0):
    rng = np.random.default_rng(seed)
    rollout = arrays["old_logps"] + rng.normal(0, 0.05, arrays["old_logps"].size)
    rollout[::7] = np.nan
    return table(arrays).append_column("rollout_logps", lists(rollout, arrays["cu_seqlens"])), rollout


@pytest.mark.parametrize("suffix", [*FORMATS])
def test_of_files(suffix, tmp_path):
    arrays = tokens(50, optional=True)
    whole, rollout = with_rollout(arrays)
    whole = whole.append_column("step", pa.array(np.arange(50) % 3))
    paths = [write(tmp_path / f"{i}.{suffix}", whole[i : i + 20]) for i in (0, 20, 40)]
    found = histogram(paths)
    keep = arrays["mask"]
    mismatch = (arrays["old_logps"] - rollout)[keep]
    assert found.tokens == keep.sum()
    assert np.array_equal(found.log_ratio, by_numpy((arrays["logps"] - arrays["old_logps"])[keep]))
    assert np.array_equal(found.ref_log_ratio, by_numpy((arrays["logps"] - arrays["ref_logps"])[keep]))
    assert np.array_equal(found.mismatch, by_numpy(mismatch[~np.isnan(mismatch)]))
    assert found == sum(histogram(path) for path in paths) == sum(histogram(paths, by="step").values())
    assert found != histogram(paths[0])
    with ThreadPoolExecutor(2) as executor:
        assert histogram(paths, executor=executor, batch_size=3) == found
    assert "quantiles of" in repr(found)
    assert found.as_dict()["log_ratio"] == found.log_ratio.tolist()


def test_what_a_file_has_not(tmp_path):
    arrays = tokens(5)
    rows = table({name: x for name, x in arrays.items() if name in ("logps", "old_logps", "advantages", "cu_seqlens")})
    path = write(tmp_path / "a.parquet", rows)
    found = histogram(path)
    assert isinstance(found, Histogram)
    assert (found.ref_log_ratio, found.mismatch) == (None, None)
    assert list(found.as_dict()) == ["tokens", "edges", "log_ratio"]
    as_read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert as_read["edges"] == [None, *EDGES[1:-1].tolist(), None]
    assert len(as_read["log_ratio"]) == len(EDGES) - 1
    on_policy = histogram(path, columns={"old_logps": None})
    assert on_policy.log_ratio[len(on_policy.log_ratio) // 2] == on_policy.tokens == len(arrays["logps"])


def test_of_sequences(tmp_path):
    arrays = tokens(20, optional=True)
    path = write(tmp_path / "a.parquet", table(arrays))
    found = histogram(path, importance_sampling_level="sequence")
    shifts, keep, bounds = arrays["logps"] - arrays["old_logps"], arrays["mask"], arrays["cu_seqlens"]
    expected = np.zeros(len(EDGES) - 1, int)
    for i, j in pairwise(bounds):
        if keep[i:j].any():
            expected += by_numpy([shifts[i:j][keep[i:j]].mean()] * keep[i:j].sum())
    assert np.array_equal(found.log_ratio, expected)
    with pytest.raises(ValueError, match="Histogram of different level cannot be added"):
        found + histogram(path)


def test_bad_input(tmp_path):
    samples = write(tmp_path / "a.parquet", table(probabilities(5)))
    refused("histogram is of files of log-probabilities", samples, call=histogram)
    arrays = tokens(3)
    arrays["logps"][4] = np.nan
    path = write(tmp_path / "b.parquet", table(arrays))
    refused(r"b.parquet, row group 0, row 0: logps must be finite .* logps\[4\] = .*nan", path, call=histogram)
    arrays = tokens(3)
    rollout = arrays["old_logps"].copy()
    rollout[1] = -np.inf
    rows = table(arrays).append_column("rollout_logps", lists(rollout, arrays["cu_seqlens"]))
    refused(r"row 0: rollout_logps must be finite, or NaN", write(tmp_path / "c.parquet", rows), call=histogram)
    refused("importance_sampling_level must be", path, call=histogram, importance_sampling_level="tokens")
    refused("beta", path, call=histogram, error=TypeError, beta=1)
    flat = write(tmp_path / "d.parquet", pa.table({"logps": [-1.0], "old_logps": [-1.0]}))
    assert histogram(flat).tokens == 1
    refused("the columns are flat", flat, call=histogram, importance_sampling_level="sequence")

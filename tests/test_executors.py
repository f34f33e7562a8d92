"""Any executor gives the bits of one array, also when a worker dies in the middle, and passes errors on."""

import multiprocessing
import os
import signal
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import pytest

from grpo_fast import K3, Clip, evaluate, grpo_loss
from grpo_fast.files import sweep

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import table, tokens, write  # noqa: E402

pytestmark = pytest.mark.slow

OPTIONS = {"surrogate": Clip(0.2), "kl": K3(0.04)}
GRID = {"epsilons": [0.1, 0.2], "betas": [0, 0.04]}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """Two files of twelve row groups each, and what they hold together."""
    arrays = tokens(240)
    whole = table(arrays)
    folder = tmp_path_factory.mktemp("rollouts")
    for name, first in (("a", 120), ("b", 0)):
        write(folder / f"{name}.parquet", *(whole.slice(row, 10) for row in range(first, first + 120, 10)))
    return folder, grpo_loss(**arrays, **OPTIONS).stats


def check(rollouts, executor):
    """Both functions over an executor; then a file with a bad row among good ones."""
    folder, expected = rollouts
    paths = str(folder / "?.parquet")
    assert evaluate(paths, executor=executor, progress=True, **OPTIONS) == expected
    assert sweep(paths, executor=executor, **GRID) == sweep(paths, **GRID)
    good = table(tokens(10, longest=9), pa.list_)
    rows = good.to_pydict()
    rows["advantages"][7] = None
    bad = write(folder / "bad.parquet", good, pa.table(rows))
    with pytest.raises(ValueError, match=r"bad.parquet, row group 1, row 7: column 'advantages' has a null"):
        evaluate([*sorted(folder.glob("?.parquet")), bad], executor=executor, **OPTIONS)


class _DyingOnce:
    """An executor one of whose workers is killed when it has a result, before it can hand it back."""

    def __init__(self, executor, marker):
        self.submit = lambda work, row_group: executor.submit(_work_or_die, work, row_group, str(marker))


def _work_or_die(work, row_group, marker):
    result = work(row_group)
    if row_group.number == 5:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return result
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows the same
    return result


def test_threads(rollouts):
    with ThreadPoolExecutor(3) as executor:
        check(rollouts, executor)


def test_processes(rollouts, tmp_path):
    pool = partial(ProcessPoolExecutor, 2, multiprocessing.get_context("spawn"))
    with pool() as executor:
        check(rollouts, executor)
        with pytest.raises(BrokenExecutor):  # and no sum of what was done by then
            evaluate(str(rollouts[0] / "?.parquet"), executor=_DyingOnce(executor, tmp_path / "died"), **OPTIONS)
    assert (tmp_path / "died").exists()


@pytest.mark.filterwarnings("ignore")  # of another project
def test_a_cluster_of_two_workers(rollouts, tmp_path):
    distributed = pytest.importorskip("distributed", reason="a cluster needs pip install 'grpo_fast[dask]'")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        check(rollouts, client.get_executor())
        pids = client.run(os.getpid)
        dying = _DyingOnce(client.get_executor(), tmp_path / "died")
        assert evaluate(str(rollouts[0] / "?.parquet"), executor=dying, **OPTIONS) == rollouts[1]
        assert (tmp_path / "died").exists()
        client.wait_for_workers(2)
        assert client.run(os.getpid) != pids  # one of them is another


def test_what_was_not_begun_is_cancelled(rollouts):
    class Recording(ThreadPoolExecutor):
        def submit(self, *args):
            futures.append(super().submit(*args))
            return futures[-1]

    futures = []
    with Recording(1) as executor, pytest.raises(ValueError, match="out of reach"):
        evaluate(str(rollouts[0] / "?.parquet"), executor=_Failing(executor), **OPTIONS)
    assert len(futures) == 24
    assert any(future.cancelled() for future in futures)


class _Failing:
    def __init__(self, executor):
        self.submit = lambda work, row_group: executor.submit(_fail, row_group)


def _fail(row_group):
    raise ValueError(f"{row_group} is out of reach")

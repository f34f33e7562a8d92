"""Compiling is told: a record for each kernel, a line on a terminal, a word in the bar; and can be done beforehand."""

import io
import logging
import re
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from interpreter import python

import grpo_fast
from grpo_fast import CISPO, K1, K3, Clip, _command, _warm_up, evaluate, grpo_loss, reference, warm_up
from grpo_fast.__main__ import main
from grpo_fast._kernels import compiling, notices
from grpo_fast._kernels.threads import WORTH_SHARING
from grpo_fast.terms import Options

PAGES = [Path(__file__).parent.parent / path for path in ("README.md", "grpo_fast/README.md")]


@pytest.fixture(autouse=True)
def nobody_told_yet(monkeypatch):
    monkeypatch.setattr(notices, "_told", False)
    monkeypatch.setattr(notices, "_spent", 0.0)
    monkeypatch.setattr(notices, "_watchers", [])


class Stream(io.StringIO):
    """What is written to, as a terminal is."""

    def isatty(self):
        return True


def stderr_is(monkeypatch, stream):
    """For the package alone, with nobody's patience."""
    monkeypatch.setattr(notices, "_PATIENCE", 0.0)
    monkeypatch.setattr(notices, "sys", types.SimpleNamespace(stderr=stream, modules={}))


@pytest.fixture
def terminal(monkeypatch):
    stream = Stream()
    stderr_is(monkeypatch, stream)
    return stream


def kernel():
    """A kernel that was never compiled, and is kept nowhere."""

    def twice(x):
        return 2 * x

    return uncached(twice)


def uncached(function, parallel=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling.cache, "use_disk_cache", lambda dispatcher: None)
        return compiling.compiled(function, parallel=parallel)


# --- each kernel is a record ------------------------------------------------------------------------------------------
def test_each_kernel_that_is_compiled_is_a_record(caplog):
    caplog.set_level(logging.INFO, "grpo_fast")
    twice = kernel()
    assert (twice(1), twice(2), twice(1.5)) == (2, 4, 3.0)
    records = [record for record in caplog.records if record.name == "grpo_fast"]
    assert [record.levelname for record in records] == ["INFO", "INFO"]  # of ints and of floats
    for record in records:
        assert re.fullmatch(r"compiled test_announcing\.kernel\.<locals>\.twice in \d+\.\d\d s", record.getMessage())


def test_what_a_kernel_calls_is_one_too_and_watchers_hear_of_the_outermost(caplog):
    caplog.set_level(logging.INFO, "grpo_fast")
    twice = kernel()

    def four_times(x):
        return twice(twice(x))

    heard = []
    with notices.watched_by(heard.append):
        assert uncached(four_times)(1) == 4
    assert heard == [True, False]
    assert [r.getMessage().split(" in ")[0].rpartition(".")[2] for r in caplog.records] == ["twice", "four_times"]
    assert not notices.is_compiling()


def test_what_cannot_be_compiled_is_no_record(caplog):
    caplog.set_level(logging.INFO, "grpo_fast")
    heard = []

    def wrong(x):
        return x.nothing

    with notices.watched_by(heard.append), pytest.raises(numba.TypingError):
        uncached(wrong)(1)
    assert heard == [True, False]
    assert caplog.records == []
    assert not notices.is_compiling()


@pytest.mark.slow
def test_what_comes_from_disk_is_none(tmp_path):
    script = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import grpo_fast
grpo_fast.grpo_objective([1.0], [1.0], [1.0], [1.0])
"""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert "INFO:grpo_fast:compiled sample_blocks.objective_block in " in python(script, **environment)
    assert python(script, **environment) == ""


# --- a terminal is told once ------------------------------------------------------------------------------------------
def test_a_terminal_is_told_once(terminal):
    for _ in range(3):
        kernel()(1)
    assert terminal.getvalue() == notices._LINE + "\n"


def test_not_before_it_takes_long(terminal, monkeypatch):
    monkeypatch.setattr(notices, "_PATIENCE", 1000.0)
    kernel()(1)
    assert terminal.getvalue() == ""


def test_on_another_thread_too(terminal):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(kernel(), 1).result()
    assert terminal.getvalue() == notices._LINE + "\n"


def test_a_notebook_is_told(terminal, monkeypatch):
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    kernel()(1)
    assert terminal.getvalue() == ""
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(notices.sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    kernel()(1)
    assert terminal.getvalue() == notices._LINE + "\n"


@pytest.mark.parametrize("stderr", [None, types.SimpleNamespace()])
def test_nobody_is_told_where_there_is_nobody(stderr, monkeypatch):
    stderr_is(monkeypatch, stderr)
    assert kernel()(1) == 2


@pytest.mark.parametrize("context", [lambda: notices.watched_by(lambda _: None), notices.untold])
def test_who_watches_tells(context, terminal):
    with context():
        kernel()(1)
    assert terminal.getvalue() == ""
    kernel()(1)
    assert terminal.getvalue() == notices._LINE + "\n"


def test_a_worker_tells_nobody(terminal):
    notices.never_tell()
    kernel()(1)
    assert terminal.getvalue() == ""


# --- a notice is no part of the call ----------------------------------------------------------------------------------
def raises(*_, **__):
    raise OSError("the terminal is gone")


def test_a_watcher_that_fails_is_nothing_to_the_call():
    heard = []
    with notices.watched_by(raises), notices.watched_by(heard.append):
        assert kernel()(1) == 2
    assert heard == [True, False]
    assert not notices.is_compiling()


def test_interrupted_while_it_is_announced_nothing_is_compiling(monkeypatch):
    monkeypatch.setattr(notices, "_call_watchers", lambda compiling: raises() if compiling else None)
    with pytest.raises(OSError, match="gone"):
        notices.announced("x", int)(1)
    assert not notices.is_compiling()


def test_a_terminal_that_is_gone_is_nothing_to_the_call(terminal, monkeypatch):
    monkeypatch.setattr(terminal, "write", raises)
    assert kernel()(1) == 2
    monkeypatch.setattr(notices, "_told", False)
    monkeypatch.setattr(terminal, "isatty", raises)
    assert kernel()(1) == 2


def test_a_log_that_fails_is_nothing_to_the_call(monkeypatch):
    monkeypatch.setattr(notices.logger, "info", raises)
    assert kernel()(1) == 2


# --- the bar says it --------------------------------------------------------------------------------------------------
def test_the_bar_says_it_and_its_clock_stands_still(capsys):
    tqdm = pytest.importorskip("tqdm", reason="the bar needs pip install 'grpo_fast[data]'")
    from grpo_fast._workers import Progress

    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm.std, "time", lambda: now[0])
        progress = Progress(10, shown=True)
        with progress as advance:
            notices._call_watchers(True)
            assert "compiling:   0%" in capsys.readouterr().err
            now[0] += 100
            notices._call_watchers(False)
            assert "compiling" not in capsys.readouterr().err
            now[0] += 1
            advance(5)
            assert progress._bar.format_dict["elapsed"] == 1  # 5 rows a second, 1 second to go
    notices._call_watchers(True)
    assert capsys.readouterr().err.count("compiling") == 0


def test_the_bar_of_an_executor_says_what_it_waits_for(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from rollout_files import table, tokens, write

    path = write(tmp_path / "a.parquet", table(tokens(5)))
    with ThreadPoolExecutor(1) as executor:
        evaluate(path, executor=executor, progress=True)
    said = capsys.readouterr().err
    assert "first row groups:   0%" in said
    assert "first row groups" not in said.rpartition("\r")[2]


# --- beforehand -------------------------------------------------------------------------------------------------------
def kind(options):
    """What decides of the options which kernels a call needs."""
    checked = Options(**{name: options[name] for name in Options._fields if name in options})
    arrays = [options.get(name, default) for name, default in _warm_up.ARRAYS.items() if name != "mask"]
    kinds = map(type, (checked.surrogate, checked.kl, checked.trust_region))
    return *kinds, checked.kl and checked.kl[1:], checked.importance_sampling_level, *arrays


def test_the_calls_of_all_papers_are_compiled_beforehand():
    guide = PAGES[1].read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S) if "arXiv:2402.03300" in b)
    calls = []

    def record(logps, old_logps, *_, mask, rollout_is_weights=None, loss_weights=None, **options):
        has = {"old_logps": old_logps is not None, "rollout_is_weights": rollout_is_weights is not None}
        has["loss_weights"] = loss_weights is not None
        calls.append(options | has)
        return types.SimpleNamespace(loss=0.0)

    before = {}
    exec(re.search(r"^```python\n(.*?)^```", guide, re.M | re.S)[1], before)
    exec(block, before | {"grpo_loss": record})
    rows = re.findall(r"^\| .*arXiv:\S+ \| `(.*?)`", PAGES[0].read_text(encoding="utf-8"), re.M)
    names = vars(grpo_fast) | {"B": 2, "max_length": 3, "prompt_mean_weights": lambda _: True}
    calls += [eval(f"dict({row.replace('…', '...')})", names) for row in rows]
    assert len(calls) >= 18
    assert {kind(call) for call in calls} <= {kind(options) for options in _warm_up.PAPERS.values()}


@pytest.mark.parametrize(
    "options",
    [
        {"kl": K3(0.04), "grad": True, "dtype": "float32"},
        {"surrogate": CISPO(), "importance_sampling_level": "sequence", "mask": False, "grad": False},
        {"old_logps": False, "rollout_is_weights": True},
    ],
    ids=str,
)
def test_one_call(options, monkeypatch):
    calls = []
    monkeypatch.setattr(_warm_up, "grpo_loss", lambda *arrays, **rest: calls.append((arrays, rest)))
    warm_up(**options)
    dtypes = {arrays[0].dtype.name for arrays, _ in calls}
    assert dtypes == {options["dtype"]} if "dtype" in options else {"float64", "float32"}
    assert {rest["grad"] for _, rest in calls} == ({options["grad"]} if "grad" in options else {True, False})
    for (_, old, advantages, ref), rest in calls:
        assert (old is None) == (not options.get("old_logps", True))
        assert (ref is None) == ("kl" not in options)
        assert (rest["mask"] is None) == (not options.get("mask", True))
        assert (rest["rollout_is_weights"] is None) == (not options.get("rollout_is_weights", False))
        assert rest["kl"] == options.get("kl")
        assert rest["surrogate"] == options.get("surrogate", Clip())
        assert rest["importance_sampling_level"] == options.get("importance_sampling_level", "token")
        assert len(advantages) == 2
    sizes = {arrays[0].size for arrays, _ in calls}  # few tokens; many; a sequence that is shared out
    assert len(sizes) == 3
    assert min(sizes) < 10


@pytest.mark.slow
def test_afterwards_nothing_is_compiled(tmp_path):
    script = """
import logging, sys
import numpy as np
import grpo_fast
from grpo_fast import K3
from grpo_fast._kernels import threads
grpo_fast.warm_up(kl=K3(0.04), grad=True, dtype="float32")
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
for lengths in ((3, 5), (40_000, 40_000), (100_000, 7)):
    n = sum(lengths)
    x = np.full(n, -1, "f4")
    for kl in (K3(0.1), K3(0.2)):
        grpo_fast.grpo_loss(x, x, [[1.0], [2.0]], x, mask=np.ones(n), cu_seqlens=np.append(0, np.cumsum(lengths)),
                            kl=kl, grad=True)
    if n < 10:
        grpo_fast.grpo_loss(x[None], x[None], [1.0], x[None], mask=np.ones((1, n)), kl=kl, grad=True)
"""
    assert python(script, NUMBA_CACHE_DIR=str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"surrogate": 0.2}, TypeError, "surrogate must be a Clip, CISPO, SAPO, Unclipped, VESPO or GMPO, got 0.2"),
        ({"kl": K3}, TypeError, "kl must be a K1, K2, K3 or None"),
        ({"importance_sampling_level": "tokens"}, ValueError, "must be one of .*did you mean 'token'"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of 'float64', 'float32', got 'float16'"),
        ({"mask": 1}, TypeError, "mask must be True or False, got 1"),
        ({"grad": "yes"}, TypeError, "grad must be True or False, got 'yes'"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        warm_up(**options)


def test_the_command(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(_warm_up, "_compile_loss", lambda *arguments, **options: calls.append((arguments, options)))
    monkeypatch.setattr(_warm_up, "_compile_objective", lambda dtype: calls.append(dtype))
    monkeypatch.setattr(_warm_up, "_compile_rollout_correction", lambda dtype: calls.append(f"rollout {dtype}"))
    monkeypatch.setattr(_command, "read", lambda a, b, c, d: calls.append((a.dtype.name, a.size)))
    assert main(["compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(calls) - 1 == 2 * len(_warm_up.PAPERS) + 7
    of_samples = calls[2 * len(_warm_up.PAPERS) :]
    dtypes = ["float64", "float32"]
    demo = [(dtype, n) for dtype in dtypes for n in (1, WORTH_SHARING)]
    assert of_samples == [name for dtype in dtypes for name in (dtype, f"rollout {dtype}")] + demo
    assert [line.partition(" ...")[0] for line in lines[-3:-1]] == [f"grpo-fast demo, {x}" for x in dtypes]
    assert lines[-1].startswith("compiled, or found compiled, in ")
    calls.clear()
    line = "compile --surrogate cispo --kl k1 --level sequence --no-mask --no-grad --dtype float32"
    assert main(line.split()) == 0
    ((arguments, options),) = calls
    assert arguments == ((False,), "float32")
    assert options == {
        "surrogate": CISPO(),
        "kl": K1(0.01),
        "importance_sampling_level": "sequence",
        "old_logps": True,
        "mask": False,
        "rollout_is_weights": False,
        "loss_weights": False,
    }
    assert main(["compile", "--kl", "k3", "--no-importance-weighted", "--grad", "--dtype", "float64"]) == 0
    assert calls[-1][1]["kl"] == K3(0.01, importance_weighted=False)
    assert len(calls) == 2


def test_the_tiny_calls_are_right():
    """What is computed to be compiled is computed, too: nothing is special about it."""
    _warm_up._compile_loss((False,), "float64", kl=K3(0.1))
    x = np.full(3, -1.0)
    result = grpo_loss(x, x, [[1.0], [1.0]], x, cu_seqlens=[0, 2, 3], kl=K3(0.1), mask=np.ones(3))
    assert result.loss == reference.grpo_loss(x, x, [[1.0], [1.0]], x, cu_seqlens=[0, 2, 3], kl=K3(0.1)).loss
    assert grpo_fast.warm_up is warm_up

"""Whoever calls, from however many threads and processes, on whatever layer: nothing aborts or hangs, no bit differs.

Scripts run in processes of their own, which an abort would end. What they compute is compared with ``recorded.json``.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module

import numba
import pytest
import recorded
from interpreter import python

from grpo_fast._kernels import threads

LARGE = ["objective near f8 70003", "stats far f4 70003", "sweep near f8 70003", "loss usual 21 long"]
SMALL = ["objective near f8 127", "sweep far f4 127", "loss usual 21"]
MORE = ["loss usual 27 short", "loss usual 19 long", "stats extreme f8 70003", "loss usual 20"]

LAYERS = ["omp", "workqueue", "tbb"]

exhaustive, slow = pytest.mark.exhaustive, pytest.mark.slow
every_layer = pytest.mark.parametrize(
    "layer", ["default", *(pytest.param(x, marks=[] if x == "workqueue" else exhaustive) for x in LAYERS)]
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
posix_signals = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

PRELUDE = """
import os, signal, sys, threading, time
import numba
import recorded
from grpo_fast._kernels import threads

def wrong(cases):
    return list(recorded.different(cases))

def child(work):
    "The exit code of a forked child that does this."
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(1 if work() else 0)
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def skip_without(layer):
    """Skip a test of a threading layer that Numba cannot load here."""
    if layer != "default":
        try:
            import_module(f"numba.np.ufunc.{layer if layer == 'workqueue' else f'{layer}pool'}")
        except ImportError as error:
            pytest.skip(f"{error}; for tbb: pip install tbb, and LD_LIBRARY_PATH where it is")


def run(script, layer="default", threads=4, **environment):
    """What a script prints on a threading layer, with more threads than there may be CPUs."""
    skip_without(layer)
    layer = {} if layer == "default" else {"NUMBA_THREADING_LAYER": layer}
    return python(PRELUDE + script, 900, NUMBA_NUM_THREADS=str(threads), **layer, **environment)


# --- threads ----------------------------------------------------------------------------------------------------------
THREADS = """
results = []

def work(k):
    start.wait()
    for round in range({rounds}):
        case = {cases}[(k + round) % len({cases})]
        results.append((case, wrong([case])))

start = threading.Barrier({threads})
workers = [threading.Thread(target=work, args=(k,)) for k in range({threads})]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert len(results) == {threads} * {rounds}
assert not any(found for _, found in results), results
assert not threads._inside
print(numba.threading_layer())
"""


@every_layer
@pytest.mark.parametrize(
    ("threads", "rounds"), [pytest.param(8, 6, marks=slow), pytest.param(16, 2000, marks=exhaustive)]
)
def test_threads_at_once(threads, rounds, layer):
    # Numba's workqueue ends the process when two threads are inside parallel regions.
    script = THREADS.format(threads=threads, rounds=rounds, cases=LARGE + SMALL + (MORE if rounds > 100 else []))
    printed = run(script, layer).strip()
    assert printed in ("omp", "workqueue", "tbb") if layer == "default" else printed == layer


@exhaustive
def test_threads_that_all_come_first(tmp_path):
    run(THREADS.format(threads=8, rounds=2, cases=SMALL + LARGE), NUMBA_CACHE_DIR=str(tmp_path))


@exhaustive  # fewer rounds would not fail
def test_threads_that_others_run_between():
    # A collector's callback lets another thread go on wherever an object is made.
    def collected(phase, info):
        time.sleep(0)

    def work(_):
        for _ in range(20_000):
            with threads.tasks(1 << 20) as many:
                assert many >= 1

    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(collected)
    try:
        gc.set_threshold(1, 1000, 1000)
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
        gc.callbacks.remove(collected)
    assert not threads._inside


def test_threads_of_this_process():
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda case: list(recorded.different([case])), (LARGE + SMALL) * 2))


# --- forks ------------------------------------------------------------------------------------------------------------
FORKS = {
    "after use": """
assert not wrong(cases)
assert child(lambda: wrong(cases)) == 0
assert not wrong(cases)
""",
    "before use": """
assert child(lambda: wrong(cases)) == 0
assert not wrong(cases)
assert child(lambda: wrong(cases)) == 0
""",
    "a child's child": """
assert not wrong(cases)
assert child(lambda: child(lambda: wrong(cases)) or wrong(cases)) == 0
""",
    "in the middle": """
assert not wrong(cases)
threads._inside[object()] = None  # another thread, which is not there in the child
assert child(lambda: wrong(cases)) == 0
""",
    "of a parent that computes": """
stop = threading.Event()
computed = []

def compute():
    while not stop.is_set():
        computed.append(wrong(cases))

threads = [threading.Thread(target=compute) for _ in range(2)]
for thread in threads:
    thread.start()
assert [child(lambda: wrong(cases[:1])) for _ in range(3)] == [0] * 3
stop.set()
for thread in threads:
    thread.join()
assert computed and not any(computed)
""",
}


@pytest.mark.slow
@needs_fork
@every_layer
@pytest.mark.parametrize("when", FORKS)
def test_forks(when, layer):
    script = f"cases = {[LARGE[0], SMALL[1], LARGE[3]]}\n{FORKS[when]}\nprint('done')"
    assert run(script, layer, threads=2) == "done\n"


IMPORTED_IN_THE_CHILD = """
import logging, os
import numba, numpy as np

@numba.njit(parallel=True)
def total(x):
    result = 0.0
    for i in numba.prange(x.size):
        result += x[i]
    return result

assert total(np.ones(100_000)) == 100_000

class Record(logging.LogRecord):
    def __init__(self, name, *rest, **more):
        super().__init__(name.upper(), *rest, **more)

logging.setLogRecordFactory(Record)  # no business of ours

def work():
    import recorded
    assert {forked} == __import__("grpo_fast")._kernels.threads._forked
    return any(recorded.different({cases}))

if {forked}:
    pid = os.fork()
    if pid == 0:
        os._exit(work())
    assert os.waitpid(pid, 0)[1] == 0
else:
    assert not work()
print(numba.threading_layer())
"""


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("forked", [True, False])
def test_a_child_that_imports_what_its_parent_did_not(forked):
    # Under GNU OpenMP Numba ends a forked child that would use its parent's threads.
    script = IMPORTED_IN_THE_CHILD.format(forked=forked, cases=[LARGE[0]])
    assert python(script, NUMBA_NUM_THREADS="2").strip() in ("omp", "workqueue", "tbb")


WHILE_COMPILING = """
from grpo_fast import grpo_objective

def work():
    return grpo_objective([1.0], [3.0], None, None, beta=0) != 3

first = threading.Thread(target=lambda: compiled.append(work()))
compiled = []
lock = numba.core.compiler_lock.global_compiler_lock
first.start()
while lock._lock.acquire(blocking=False):  # until it compiles
    lock._lock.release()
    time.sleep(0.001)
assert child(lambda: signal.alarm(60) or work()) == 0
first.join()
assert compiled == [False]
print("not stuck")
"""


CTRL_C_MEANWHILE = """
for _ in range(3):
    threading.Thread(target=time.sleep, args=(3,), daemon=True).start()  # so that identities are taken
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
assert child"""


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_fork_while_another_thread_compiles(ctrl_c, tmp_path):
    # Python only reports what is raised by hooks that run before a fork.
    script = WHILE_COMPILING.replace("\nassert child", CTRL_C_MEANWHILE) if ctrl_c else WHILE_COMPILING
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "not stuck\n"


# --- pools ------------------------------------------------------------------------------------------------------------
def wrong(case):
    """What a worker does."""
    return list(recorded.different([case]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=exhaustive if m == "forkserver" else ()) for m in multiprocessing.get_all_start_methods()],
)
def test_pools(method):
    context = multiprocessing.get_context(method)
    assert not wrong(LARGE[0])  # after use
    with context.Pool(2) as pool:
        assert not any(pool.map(wrong, [LARGE[0], SMALL[0]] * 2))
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert not any(executor.map(wrong, [LARGE[0], SMALL[0]] * 2))
    assert not wrong(LARGE[0])


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------
# Python drops what a handler raises while an object is deleted ("Exception ignored in"), so the handlers take a note.
class SignalError(Exception):
    """What the signal raises here."""


def enter_and_leave(came):
    # A function, since Python 3.13 leaves a loop's jump inside a `with` out of what that catches.
    while not came:
        with threads.tasks(1 << 20):
            pass
        with threads.serially():
            pass


@posix_signals
def test_whenever_a_signal_comes_nobody_is_left_inside():
    def interrupt(*_):
        came.append(True)
        raise SignalError

    numba.get_num_threads()  # Numba's threads are started
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for k in range(4000):
            came = []
            with suppress(SignalError):
                signal.setitimer(signal.ITIMER_REAL, 20e-6 + k % 100 * 1e-6)
                enter_and_leave(came)
            assert came
            assert not threads._inside
            assert not getattr(threads._thread, "serial", False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CTRL_C = """
import random

def interrupt(*_):
    came.append(True)
    raise KeyboardInterrupt

def press():
    time.sleep(random.uniform(0, {patience}))
    os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, interrupt)
for _ in range({times}):
    came = []
    try:
        threading.Thread(target=press).start()
        while not came:
            wrong({cases})
    except KeyboardInterrupt:
        pass
    assert came and not threads._inside
assert not wrong({cases})
print("done")
"""


@posix_signals
@every_layer
@pytest.mark.parametrize("times", [pytest.param(60, marks=slow), pytest.param(500, marks=exhaustive)])
def test_ctrl_c(times, layer):
    assert run(CTRL_C.format(times=times, patience=0.05, cases=[*LARGE, "loss usual 27 long"]), layer) == "done\n"


@posix_signals
@exhaustive
def test_ctrl_c_while_compiling(tmp_path):
    script = CTRL_C.format(times=30, patience=1, cases=["loss usual 20", "stats near f8 70003"])
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "done\n"


def test_no_thread_of_ours_is_left():
    assert not [thread for thread in threading.enumerate() if "grpo_fast" in thread.name]

"""What test files share: ordinary samples, the lengths at which something changes, Python in a process of its own."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import settings

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # what is scripts there, tests use

from grpo_fast import BLOCK
from grpo_fast._kernels import threads
from grpo_fast._kernels.blocks import RUN
from grpo_fast._kernels.threads import WORTH_SHARING

settings.register_profile("grpo_fast", deadline=None)  # the first example may compile
settings.load_profile("grpo_fast")

DTYPES = [np.float64, np.float32]
LANES = {np.float64: 8, np.float32: 16}

#: Every length up to some vectors, and those around a run, a block, two blocks and the parallel driver's least.
LENGTHS = [
    *range(1, 71),
    *(edge + d for edge in (RUN * 8, RUN * 16, 2 * RUN * 16) for d in (-1, 0, 1)),
    *(edge + d for edge in (BLOCK, 2 * BLOCK, WORTH_SHARING) for d in (-17, -16, -8, -1, 0, 1, 8, 17)),
]


def samples(n, dtype=np.float64, seed=0, drift=0.3):
    """ρ, A, π_old, π_ref of n samples whose policy has drifted a little from both others; some A are 0."""
    rng = np.random.default_rng([n, seed])
    rho = rng.lognormal(0, drift, n)
    a = rng.normal(size=n) * (rng.random(n) < 0.9)
    old = rng.uniform(0.001, 1, n)
    ref = rho * old * rng.lognormal(0, drift, n)
    return tuple(x.astype(dtype) for x in (rho, a, old, ref))


@contextmanager
def someone_else_computes():
    """As if another thread were in a parallel region."""
    other = object()
    threads._inside[other] = None
    yield
    del threads._inside[other]


def python(script, timeout=300, inside=(), **environment):
    """Run a script in a fresh interpreter that sees what this one sees; its output, unless it fails."""
    done = subprocess.run(
        [*inside, sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout

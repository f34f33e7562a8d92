"""Ordinary samples, in both dtypes, and the lengths at which something changes."""

import numpy as np

from grpo_fast import BLOCK
from grpo_fast._kernels.blocks import RUN
from grpo_fast._kernels.threads import WORTH_SHARING

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

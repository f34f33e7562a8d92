"""The objective in plain NumPy, in the notation of the paper.

What the kernels are tested against, what the benchmarks call "NumPy", and what you can compare with in one line.
"""

import numpy as np
from numpy.typing import ArrayLike


def grpo_objective(
    rhos: ArrayLike,
    A: ArrayLike,
    pi_theta_old: ArrayLike,
    pi_theta_ref: ArrayLike,
    epsilon: float = 0.2,
    beta: float = 0.01,
) -> float:
    """mean( min(ρA, clip(ρ, 1−ε, 1+ε)·A) − β·ρ·(r − log r − 1) ), r = π_ref/(ρ·π_old); nothing is checked.

    DeepSeekMath, arXiv:2402.03300, Eq. 3 and 4; the KL term weighted as in DeepSeek-V3.2, arXiv:2512.02556, Eq. 7.
    """
    ρ, A, π_old, π_ref = (np.asarray(x) for x in (rhos, A, pi_theta_old, pi_theta_ref))
    r = π_ref / (ρ * π_old)
    surrogate = np.minimum(ρ * A, np.clip(ρ, 1 - epsilon, 1 + epsilon) * A)
    kl = ρ * (r - np.log(r) - 1)
    return float(np.mean(surrogate - beta * kl))

"""What a user writes who checks types: `test_types` runs mypy --strict over it; what it refuses is marked so."""

from functools import partial
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from grpo_fast import (
    CISPO,
    K3,
    SAPO,
    Clip,
    LossResult,
    Reject,
    RolloutStats,
    Stats,
    Sweep,
    evaluate,
    group_advantages,
    grpo_loss,
    grpo_objective,
    grpo_stats,
    grpo_sweep,
    high_entropy_mask,
    off_policy_sequence_mask,
    rollout_correction,
    warm_up,
)
from grpo_fast.files import Histogram, Outlier, histogram, sweep, worst

logps: NDArray[np.float32] = np.zeros((2, 3), np.float32)
advantages = group_advantages([[1, 0]])

# --- the gradient is there if it was asked for ------------------------------------------------------------------------
without = grpo_loss(logps, None, advantages, mask=logps == 0, surrogate=Clip(0.2))
assert_type(without, LossResult[None])
assert_type(grpo_loss(logps, logps, [1.0, 2.0], grad=False).grad, None)
made = grpo_loss(logps, logps, [1.0, 2.0], logps, kl=K3(0.04), normalizer=7, grad=True)
assert_type(made.grad, NDArray[Any])
written = grpo_loss(logps, logps, [1.0, 2.0], grad=np.empty_like(logps), importance_sampling_level="sequence")
norm = float(np.linalg.norm(written.grad) + np.linalg.norm(made.grad))


def step(want: bool) -> LossResult:
    return grpo_loss(logps, logps, [1.0, 2.0], surrogate=CISPO(5) if want else SAPO(), grad=want)


maybe = step(True)
print(maybe.grad.sum())  # type: ignore[union-attr]
loss, grad, stats = step(False)
assert_type(loss, float)
assert_type(stats, Stats)
assert_type(stats.ess, float)
print(stats.clip_ratio_hihg)  # type: ignore[attr-defined]
assert_type(stats + stats, Stats)
log: dict[str, float] = stats.as_dict()

# --- what is no option is refused -------------------------------------------------------------------------------------
grpo_loss(logps, None, [1.0], aggregation="mean")  # type: ignore[call-overload]
grpo_loss(logps, None, [1.0], kl=0.04)  # type: ignore[call-overload]
grpo_loss(logps, None, [1.0], epsilon=0.2)  # type: ignore[call-overload]
grpo_objective([1.0], [1.0], [1.0], [1.0], epslon=0.2)  # type: ignore[arg-type]
evaluate("rollouts.parquet", epsilom=0.2)  # type: ignore[call-overload]
evaluate("rollouts.parquet", importance_sampling_level="tokens")  # type: ignore[call-overload]
evaluate(3)  # type: ignore[call-overload]
evaluate("rollouts.parquet", rollout_correction={"levle": "token"})  # type: ignore[call-overload]
rollout_correction(logps, logps, level="seq_min")  # type: ignore[arg-type]
rollout_correction(logps, logps, uper=2.0)  # type: ignore[arg-type]
Reject("k1", "token")  # type: ignore[arg-type]


# --- the other functions ----------------------------------------------------------------------------------------------
def others() -> None:
    assert_type(grpo_objective([1.0], [1.0], None, None, beta=0), float)
    assert_type(grpo_stats([1.0], [1.0], [1.0], [1.0], 0.2, 0.01, importance_weighted=False), Stats)
    grid = grpo_sweep([1.0], [1.0], [1.0], [1.0], epsilons=[0.1, 0.2], betas=0.04)
    assert_type(grid, Sweep)
    assert_type(grid.objective, NDArray[np.float64])
    assert_type(
        evaluate(["a.parquet", b"b.arrow"], epsilon=0.2, columns={"mask": ["a", "b"], "old_logps": None}), Stats
    )
    assert_type(evaluate("a.parquet", surrogate=Clip(0.2), kl=K3(0.04), aggregation="token-mean", progress=True), Stats)
    assert_type(
        sweep("a.parquet", epsilons=np.linspace(0.1, 0.3, 3), betas=0, kl=partial(K3, importance_weighted=False)), Sweep
    )
    assert_type(sweep("a.parquet", epsilons=0.1, betas=[0], kl=K3, epsilon_high=0.3, delta=4), Sweep)
    assert_type(evaluate("run", by="step", kl=K3(0.04)), dict[int | str | None, Stats])
    assert_type(sweep("run", by="step", epsilons=0.1, betas=0), dict[int | str | None, Sweep])
    assert_type(histogram("run"), Histogram)
    assert_type(histogram("run", by="step"), dict[int | str | None, Histogram])
    assert_type(worst("run", rank="kl", n=3), list[Outlier])
    correction = rollout_correction(
        logps, logps, level="sequence", mode="mask", upper=3, reject=Reject("k2", "seq_max")
    )
    assert_type(correction.mask, NDArray[np.bool_])
    assert_type(correction.stats.k3, float)
    weights = correction.weights * off_policy_sequence_mask(logps, logps, [1, 2], 0.1) * high_entropy_mask(logps, 0.8)
    assert_type(grpo_loss(logps, logps, [1.0, 2.0], rollout_is_weights=weights), LossResult[None])
    assert_type(evaluate("a.parquet", rollout_correction={"level": "token", "upper": 3}).rollout, RolloutStats | None)
    warm_up(kl=K3(0.04), dtype="float32", grad=True)

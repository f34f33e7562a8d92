"""Write a run to try things on: ``python bench/rollouts.py run`` (a few seconds).

With ``--steps 64 --rows 128 --tokens 400 --seed 0`` a run is that of a policy in training, written as a training loop
would, by `grpo_fast.files.RolloutWriter`: a file for each step, of groups of completions with heavy-tailed lengths. The
policy drifts ever farther from its reference, and in the last quarter, as it does in runs that end badly, from the one
that sampled; completions get longer; and the sampler, another engine in a narrower dtype, tells other log-probabilities
than the trainer. One step after the other is made, so that any size fits into memory.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fast import group_advantages
from grpo_fast.files import RolloutWriter

GROUP = 8  # completions of one prompt
LONGEST = 8192  # tokens, as generation is cut off somewhere


def step_of(progress: float, rows: int, tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    """What the loss of a step is given, of so many completions; ``progress`` is how far into training it is, 0 … 1."""
    lengths = np.clip(rng.lognormal(np.log(tokens * (0.6 + 0.8 * progress)), 0.8, rows), 1, LONGEST).astype(np.int64)
    bounds = np.append(0, np.cumsum(lengths))
    n = int(bounds[-1])
    # Most tokens are nearly certain, a few are choices: half a point mass near 0, half exponential.
    old = -rng.exponential(np.where(rng.random(n) < 0.5, 0.01, 1.2)).astype(np.float32)
    # Where the model hesitates it has been moved most; a completion moves as a whole, too.
    freedom = np.sqrt(-old)

    def moved(scale: float, together: float = 0.3) -> Any:
        """The log-probabilities of the same tokens under a policy that has moved so far from this one."""
        whole = np.repeat(rng.normal(0, together, rows), lengths)
        step = scale * freedom * (whole + rng.standard_normal(n))
        return np.minimum(old + step, 0).astype(np.float32)

    prompts = np.arange(rows) // GROUP
    solved = rng.beta(1 + 3 * progress, 2, -(-rows // GROUP)).repeat(GROUP)[:rows]  # how easy a prompt has become
    rewards = (rng.random(rows) < solved).astype(np.float64)
    return {
        "logps": moved(0.1 + 0.05 * progress + 0.8 * max(0.0, progress - 0.75)),
        "old_logps": old,
        "ref_logps": moved(0.15 + 0.35 * progress),
        "rollout_logps": moved(0.01 + 0.02 * progress, together=0.0),
        "advantages": group_advantages(rewards, group_ids=prompts),
        "cu_seqlens": bounds,
        "prompt_id": rng.choice(1_000_000, -(-rows // GROUP), replace=False).repeat(GROUP)[:rows],
        "columns": {"reward": rewards},
    }


def write(folder: str | Path, steps: int = 64, rows: int = 128, tokens: int = 400, seed: int = 0) -> None:
    """Write a run of so many steps; ``tokens`` is the median length of its completions, over all steps."""
    writer = RolloutWriter(folder)
    for step in range(steps):
        writer.write(step=step, **step_of(step / max(steps - 1, 1), rows, tokens, np.random.default_rng([seed, step])))


def main() -> None:
    """Write the run that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where its files go")
    parser.add_argument("--steps", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=128, help="completions in each step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="median length of a completion (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.rows, arguments.tokens) < 1:
        parser.error("--steps, --rows and --tokens must be at least 1")
    write(arguments.folder, arguments.steps, arguments.rows, arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()

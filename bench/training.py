"""A policy that learns to sort, with `grpo_fast.torch.grpo_loss`: ``python bench/training.py --plot curve.svg``.

A recurrent network is shown three digits and writes tokens until it writes END; its reward is the share of places at
which that is the sorted list. Groups of completions are sampled for each prompt, advantages made of their rewards, and
several optimiser steps taken on each batch, so that the policy leaves the one that sampled and the clip acts. The
reference of the KL term is the policy as it was at first. Some seconds on one core.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast import K3, Clip, group_advantages
from grpo_fast.torch import grpo_loss

DIGITS, LENGTH = 5, 3  # values of a digit; digits of a prompt
END, START, TOKENS = DIGITS, DIGITS + 1, DIGITS + 2
PLACES = LENGTH + 2  # of a completion, which so may also be too long
PROMPTS, GROUP = 16, 16  # of a batch; completions of each prompt
OPTIONS = {"surrogate": Clip(epsilon=0.2), "kl": K3(beta=0.001)}


class Policy(nn.Module):
    """Reads a prompt with one recurrent network, writes a completion with another."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.writer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, END + 1)

    def log_probabilities(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log π of each token of the completions, (B, PLACES)."""
        _, state = self.reader(self.embedding(prompts))
        before = torch.cat((torch.full_like(completions[:, :1], START), completions[:, :-1]), dim=1)
        hidden, _ = self.writer(self.embedding(before), state)
        return self.head(hidden).log_softmax(-1).gather(-1, completions.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """One completion for each prompt, (B, PLACES)."""
        _, state = self.reader(self.embedding(prompts))
        token, written = torch.full_like(prompts[:, :1], START), []
        for _ in range(PLACES):
            hidden, state = self.writer(self.embedding(token), state)
            token = torch.multinomial(self.head(hidden[:, -1]).softmax(-1), 1, generator=generator)
            written.append(token)
        return torch.cat(written, dim=1)


def until_end(completions: Tensor) -> Tensor:
    """Which tokens count: those up to the first END, (B, PLACES) bools."""
    ended = (completions == END).int().cumsum(1)
    return (ended == 0) | ((ended == 1) & (completions == END))


def reward(prompts: Tensor, completions: Tensor) -> Tensor:
    """The share of places at which a completion, its END too, is the sorted prompt, (B,); 1 is all."""
    right = torch.cat((prompts.sort(dim=1).values, torch.full_like(prompts[:, :1], END)), dim=1)
    met = (completions[:, : LENGTH + 1] == right) & until_end(completions)[:, : LENGTH + 1]
    return met.double().mean(dim=1)


class Record(NamedTuple):
    """One batch: the mean reward, and of each optimiser step on it the loss and the share of clipped tokens."""

    reward: float
    losses: list[float]
    clipped: list[float]


def ours(**arguments: Any) -> tuple[Tensor, float]:
    """The loss, and the share of tokens that the clip holds."""
    loss, stats = grpo_loss(**arguments, return_stats=True)
    return loss, stats.clip_ratio_region


def train(
    loss_of: Callable[..., tuple[Tensor, float]] = ours,
    batches: int = 40,
    steps: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Record]:
    """Train a policy from nothing; what happens depends on the seed and the loss alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy, reference = Policy().to(dtype), Policy().to(dtype)
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    records = []
    for _ in range(batches):
        prompts = torch.randint(DIGITS, (PROMPTS, LENGTH), generator=generator).repeat_interleave(GROUP, dim=0)
        completions = policy.sample(prompts, generator)
        rewards = reward(prompts, completions)
        advantages = torch.from_numpy(group_advantages(rewards.numpy(), GROUP)).to(dtype)
        with torch.no_grad():
            old_logps, ref_logps = (model.log_probabilities(prompts, completions) for model in (policy, reference))
        record = Record(rewards.mean().item(), [], [])
        for _ in range(steps):
            loss, clipped = loss_of(
                logps=policy.log_probabilities(prompts, completions),
                old_logps=old_logps,
                advantages=advantages,
                ref_logps=ref_logps,
                mask=until_end(completions),
                **OPTIONS,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record.losses.append(loss.item())
            record.clipped.append(clipped)
        records.append(record)
    return records


def main() -> None:
    """Train, tell what came of it, and draw the curve if asked to."""
    parser = argparse.ArgumentParser(description="Train a policy to sort digits.")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="where to draw the rewards and the share of clipped tokens")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    records = train(batches=arguments.batches, seed=arguments.seed)
    print(f"{time.perf_counter() - begin:.0f} s for {len(records)} batches")
    for i in range(0, len(records), max(len(records) // 10, 1)):
        print(f"batch {i:4d}: reward {records[i].reward:.3f}, clipped {max(records[i].clipped):.3f}")
    print(f"at last:    reward {records[-1].reward:.3f}")
    if arguments.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        axes.plot([record.reward for record in records], label="mean reward")
        axes.plot([max(record.clipped) for record in records], label="clipped tokens, last step of a batch")
        axes.set(xlabel="batch", ylim=(0, 1), title="A policy that learns to sort")
        axes.legend(frameon=False)
        figure.savefig(arguments.plot)


if __name__ == "__main__":
    main()

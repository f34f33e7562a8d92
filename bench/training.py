"""A policy that learns to sort, with `grpo_fast.torch.grpo_loss`: ``python bench/training.py``.

It takes a quarter of a minute on an idle machine, tells how far it is, and at the end which share of an optimiser step
the loss is. ``--plot curve.svg`` trains a second policy with the textbook's loss, written by hand in PyTorch, and draws
both: with ``--dtype float64`` their curves coincide, in float32 they do until roundings lead to another sample.

A recurrent network is shown three digits and writes tokens until it writes END; its reward is the share of places at
which that is the sorted list. Groups of completions are sampled for each prompt, advantages made of their rewards, and
several optimiser steps taken on each batch, so that the policy leaves the one that sampled and the clip acts. The
reference of the KL term is the policy as it was at first. ``--rollouts run`` keeps what the loss was given at each step
(``grpo-fast evaluate run --by step --beta 0.001 --plot run.svg``).
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast import K3, Clip, group_advantages
from grpo_fast._measure import side_by_side
from grpo_fast._pictures import picture
from grpo_fast.files import RolloutWriter
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


# --- the loss ---------------------------------------------------------------------------------------------------------
def ours(**arguments: Any) -> tuple[Tensor, float]:
    """The loss, and the share of tokens that the clip holds."""
    loss, stats = grpo_loss(**arguments, return_stats=True)
    return loss, stats.clip_ratio_region


def textbook(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, ref_logps: Tensor, mask: Tensor, surrogate: Clip, kl: K3
) -> tuple[Tensor, float]:
    """The same as it is written by hand."""
    ratio, A = torch.exp(logps - old_logps), advantages.unsqueeze(1)
    low, high = 1 - surrogate.epsilon, 1 + surrogate.epsilon_high
    s = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
    l = logps - ref_logps
    terms = kl.beta * ratio * (torch.exp(-l) + l - 1) - s
    held = (((ratio < low) & (A < 0)) | ((ratio > high) & (A > 0))) & mask
    loss = ((terms * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    return loss, (held.sum() / mask.sum()).item()


# --- training ---------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """What was sampled, and what the loss is given beside the log-probabilities of the policy as it then is."""

    prompts: Tensor
    completions: Tensor
    rewards: Tensor
    given: dict[str, Tensor]


def new_policies(seed: int, dtype: torch.dtype) -> tuple[Policy, Policy]:
    """A policy and its reference, which begin alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy, reference = Policy().to(dtype), Policy().to(dtype)
    reference.load_state_dict(policy.state_dict())
    return policy, reference


def sampled_batch(policy: Policy, reference: Policy, generator: torch.Generator) -> Batch:
    """Groups of completions of new prompts, sampled from the policy."""
    prompts = torch.randint(DIGITS, (PROMPTS, LENGTH), generator=generator).repeat_interleave(GROUP, dim=0)
    completions = policy.sample(prompts, generator)
    rewards = reward(prompts, completions)
    with torch.no_grad():
        old_logps, ref_logps = (model.log_probabilities(prompts, completions) for model in (policy, reference))
    advantages = torch.from_numpy(group_advantages(rewards.numpy(), GROUP)).to(old_logps.dtype)
    given = {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "mask": until_end(completions)}
    return Batch(prompts, completions, rewards, given)


def train(
    loss_of: Callable[..., tuple[Tensor, float]] = ours,
    batches: int = 40,
    steps: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tell: Callable[[int, Record], None] = lambda number, record: None,
    rollouts: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Train a policy from nothing; what happens depends on the seed and the loss alone.

    ``tell`` is called after each batch, with its number, from 0 on, and its record. What the loss is given at each
    optimiser step is written into a file in the folder ``rollouts``, if there is one.
    """
    writer = RolloutWriter(rollouts) if rollouts else None
    generator = torch.Generator().manual_seed(seed)
    policy, reference = new_policies(seed, dtype)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    records = []
    for number in range(batches):
        batch = sampled_batch(policy, reference, generator)
        record = Record(batch.rewards.mean().item(), [], [])
        prompt_ids = [" ".join(map(str, digits)) for digits in batch.prompts.tolist()]
        for step in range(number * steps, (number + 1) * steps):
            logps = policy.log_probabilities(batch.prompts, batch.completions)
            if writer:
                writer.write(step=step, logps=logps, **batch.given, prompt_id=prompt_ids)
            loss, clipped = loss_of(logps=logps, **batch.given, **OPTIONS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record.losses.append(loss.item())
            record.clipped.append(clipped)
        tell(number, record)
        records.append(record)
    return records


# --- the share of the loss --------------------------------------------------------------------------------------------
def step_times(dtype: torch.dtype = torch.float32, seconds: float = 3.0) -> dict[str, float]:
    """The median seconds of the parts of an optimiser step on one batch, measured in turns.

    Those are the policy, forward and backward, the optimiser, and the loss, forward and backward; once more by hand.
    """
    policy, reference = new_policies(0, dtype)
    batch = sampled_batch(policy, reference, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-6)
    logps = policy.log_probabilities(batch.prompts, batch.completions).detach().requires_grad_()

    def policy_step() -> None:
        optimizer.zero_grad()
        found = policy.log_probabilities(batch.prompts, batch.completions)
        found.backward(torch.ones_like(found))

    def loss_step(loss_of: Callable[..., tuple[Tensor, float]]) -> None:
        logps.grad = None
        loss_of(logps=logps, **batch.given, **OPTIONS)[0].backward()

    calls = {
        "policy": policy_step,
        "optimiser": optimizer.step,
        "loss": lambda: loss_step(ours),
        "loss by hand": lambda: loss_step(textbook),
    }
    return {name: median(times) for name, times in side_by_side(calls, seconds).items()}


def tell_share(times: dict[str, float]) -> None:
    """Print which share of a step the loss is, and of what kind of training that is true."""
    step = times["policy"] + times["optimiser"] + times["loss"]
    by_hand = times["loss by hand"] / (step - times["loss"] + times["loss by hand"])
    parameters = sum(x.numel() for x in Policy().parameters())
    print(
        f"An optimiser step takes {1e3 * step:.2f} ms: the policy, forward and backward, {1e3 * times['policy']:.2f},\n"
        f"Adam {1e3 * times['optimiser']:.2f}, the loss, forward and backward, {1e3 * times['loss']:.2f}.\n"
        f"The loss is {times['loss'] / step:.1%} of a step; written by hand in PyTorch it would be {by_hand:.1%}.\n"
        f"This policy has {parameters:,} parameters. A language model has 10⁴ to 10⁷ times as many, and as much more\n"
        "to do for each token; the loss has no more to do than here: its share is far smaller there."
    )


# --- the script -------------------------------------------------------------------------------------------------------
def tell_every_tenth(batches: int) -> Callable[[int, Record], None]:
    """Prints a line for one batch in ten, and for the last."""

    def tell(number: int, record: Record) -> None:
        if number % max(batches // 10, 1) == 0 or number == batches - 1:
            print(
                f"batch {number + 1:4d}/{batches}: loss {record.losses[-1]:+.4f}, reward {record.reward:.3f}, "
                f"clipped {max(record.clipped):.3f}",
                flush=True,
            )

    return tell


def draw(records: list[Record], by_textbook: list[Record], dtype: str, path: str) -> None:
    """Draw rewards and clipped tokens: ours as bands, the textbook's as dashes on top of them."""
    curves: dict[str, Callable[[Record], float]] = {
        "mean reward": lambda record: record.reward,
        "clipped tokens, the most in a step of the batch": lambda record: max(record.clipped),
    }
    numbers = range(1, len(records) + 1)
    with picture(path, 9, 3.6) as figure:
        axes = figure.subplots()
        for label, value in curves.items():
            (band,) = axes.plot(numbers, [value(record) for record in records], linewidth=6, alpha=0.4, label=label)
            dashes = {"color": band.get_color(), "linestyle": "--", "linewidth": 1.6}
            axes.plot(numbers, [value(record) for record in by_textbook], **dashes)
        title = "A policy that learns to sort: with grpo_fast (bands) and with the textbook's loss (dashes)"
        axes.set(xlabel="batch", ylim=(0, 1), title=f"{title}, {dtype}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        figure.legend(loc="outside lower center", ncols=2)


def main() -> None:
    """Train, telling how it goes; tell the share of the loss; draw the curves if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw rewards and clipped tokens, beside the textbook's")
    parser.add_argument("--rollouts", metavar="FOLDER", help="write what the loss is given (needs pyarrow)")
    arguments = parser.parse_args()
    if arguments.batches < 1:
        parser.error(f"--batches must be at least 1, got {arguments.batches}")
    torch.set_num_threads(1)  # for so small a policy more are no faster, and where others compute, too, much slower
    options = {"batches": arguments.batches, "seed": arguments.seed, "dtype": getattr(torch, arguments.dtype)}
    tell = tell_every_tenth(arguments.batches)
    begin = time.perf_counter()
    print("training with grpo_fast.torch.grpo_loss, which compiles at first", flush=True)
    records = train(**options, tell=tell, rollouts=arguments.rollouts)
    print(f"{time.perf_counter() - begin:.0f} s for {len(records)} batches\n")
    tell_share(step_times())
    if arguments.plot:
        print("\ntraining with the textbook's loss", flush=True)
        draw(records, train(textbook, **options, tell=tell), arguments.dtype, arguments.plot)


if __name__ == "__main__":
    main()

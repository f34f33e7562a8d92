"""A policy learns through the loss, and step for step as it does through the textbook's."""

import sys
from pathlib import Path

import pytest
from combinations import textbook

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

pytestmark = pytest.mark.slow

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import training  # noqa: E402 - where the script is


def from_the_textbook(**arguments):
    return textbook(**arguments), 0.0


def test_a_policy_learns_and_step_for_step_as_with_the_textbook():
    # In float64 two runs that each follow their own parameters stay together: training amplifies a rounding of 10⁻¹⁷ by
    # 10⁵ to 10⁶ in 40 batches, in float32 it would part them. The losses are means of terms of the size |A| = 1.
    records = training.train(dtype=torch.float64)
    others = training.train(from_the_textbook, dtype=torch.float64)
    rewards = [record.reward for record in records]
    assert rewards[0] < 0.25  # chance
    assert sum(rewards[-10:]) / 10 >= 0.9  # of 1, which is all right
    assert all(max(record.clipped) > 0 for record in records[:10])
    assert all(record.clipped[0] == 0 for record in records)  # on the policy that sampled, where ρ = 1
    assert rewards == [other.reward for other in others]
    for ours, theirs in zip(records, others, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=0, abs=2**-23)


def test_float32_losses_are_the_textbooks_at_every_step():
    # One run, and both losses at its parameters. A term is some 16 roundings from right, the textbook's sum 16 more.
    def both(**arguments):
        (loss, clipped), expected = training.ours(**arguments), textbook(**arguments).item()
        assert loss.dtype == torch.float32
        assert abs(loss.item() - expected) <= 32 * 2**-24 * arguments["advantages"].abs().max().item()
        return loss, clipped

    assert len(training.train(both, batches=8)) == 8

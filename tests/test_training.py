"""A policy learns through the loss, and step for step as it does through the textbook's."""

import sys

import pytest
from combinations import textbook

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import training  # noqa: E402 - which imports torch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    """More are no faster for so small a policy, and twenty times as slow where other processes compute, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_the_loss_written_by_hand_is_the_same():
    def both(**arguments):
        (loss, clipped), (by_hand, held) = training.ours(**arguments), training.textbook(**arguments)
        assert by_hand.item() == pytest.approx(loss.item(), rel=0, abs=2**-44)
        assert held == pytest.approx(clipped, rel=1e-6)  # of float32, which .item() widens
        clips.append(held)
        return by_hand, held

    clips = []
    training.train(both, batches=3, dtype=torch.float64)
    assert len(clips) == 12
    assert max(clips) > 0


@pytest.fixture
def script(monkeypatch):
    """Runs it on so few batches, and measures no longer than it must."""

    def once(calls, _):
        return {name: [call() or 1e-3] for name, call in calls.items()}

    monkeypatch.setattr(training, "side_by_side", once)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["training.py", "--batches", "3", *arguments])
        training.main()

    return run


def test_the_script_tells_how_far_it_is_and_the_share_of_the_loss(script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    script()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("batch")]
    assert [line.split(":")[0] for line in lines] == ["batch    1/3", "batch    2/3", "batch    3/3"]
    assert "The loss is 33.3% of a step; written by hand in PyTorch it would be 33.3%." in printed
    assert "its share is far smaller there" in printed


def test_both_runs_are_drawn(script, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    picture = tmp_path / "curve.svg"
    script("--dtype", "float64", "--plot", str(picture))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch")]
    assert len(lines) == 6
    assert lines[:3] == lines[3:]  # in float64 they coincide
    text = picture.read_text(encoding="utf-8")
    assert "with the textbook's loss (dashes), float64" in text
    assert "clipped tokens, the most in a step of the batch" in text

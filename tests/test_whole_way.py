"""The whole way: a policy is trained, its run written; the run says, step by step, what the training knew."""

import csv

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")

import training  # noqa: E402 - which imports torch

from grpo_fast import evaluate, grpo_loss  # noqa: E402
from grpo_fast.__main__ import main  # noqa: E402
from grpo_fast.files import worst  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and what the training knew of it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    seen = []

    def loss(**arguments):
        found = {name: x.detach().clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        seen.append(found)
        return training.ours(**arguments)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in test_training.py
    records = training.train(loss, batches=6, rollouts=folder)
    assert training.train(batches=6) == records  # writing changes nothing
    torch.set_num_threads(before)
    return folder, records, seen


def test_each_step_is_what_the_loss_was(run):
    folder, records, seen = run
    by_step = evaluate(folder, by="step", **training.OPTIONS)
    assert list(by_step) == list(range(24))
    assert [by_step[4 * i + k].clip_ratio_region for i in range(6) for k in range(4)] == [
        share for record in records for share in record.clipped
    ]
    losses = [loss for record in records for loss in record.losses]
    assert [float(np.float32(stats.loss)) for stats in by_step.values()] == losses
    for stats, arguments in zip(by_step.values(), seen, strict=True):
        assert stats == grpo_loss(**arguments, **training.OPTIONS).stats
    assert sum(by_step.values()) == evaluate(folder, **training.OPTIONS)


def test_it_is_drawn_and_told(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need pip install 'grpo_fast[plot]'")
    picture = tmp_path / "run.svg"
    line = [
        "evaluate",
        str(run[0]),
        "--by",
        "step",
        "--beta",
        "0.001",
        "--plot",
        str(picture),
        "--csv",
        "--no-progress",
    ]
    assert main(line) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["clip_ratio/region_mean"]) for row in rows] == [x for record in run[1] for x in record.clipped]
    assert "</svg>" in picture.read_text("utf-8")


def test_the_worst_is_where_it_was(run):
    folder, _, seen = run
    shifts = [((x["logps"].double() - x["old_logps"].double()) * x["mask"]).abs() for x in seen]
    step = int(np.argmax([x.max() for x in shifts]))
    first = worst(folder, rank="ratio", n=1)[0]
    assert first.shown["step"] == step
    assert abs(first.value) == shifts[step].max().item()
    row = int(shifts[step].max(dim=1).values.argmax())
    assert first.row == row
    assert first.tokens == int(seen[step]["mask"][row].sum())
    assert len(first.shown["prompt_id"].split()) == training.LENGTH

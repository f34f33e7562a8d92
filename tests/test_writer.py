"""`RolloutWriter`: what is written evaluates to the bits of what was given; whole files or none; errors by name."""

import os
import subprocess
import sys

import numpy as np
import pytest

from grpo_fast import evaluate, grpo_loss

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from pyarrow import parquet  # noqa: E402
from rollout_files import OPTIONS, refused, tokens  # noqa: E402

from grpo_fast import _writer  # noqa: E402
from grpo_fast.files import RolloutWriter  # noqa: E402


def padded(seed=0, rows=9, width=40):
    """Arguments of grpo_loss, padded on both sides, with masked tokens in the middle, and sequences of none."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(rows, width))
    first, last = np.sort(rng.integers(0, width, (2, rows, 1)), axis=0)
    place = np.arange(width)
    mask = (place >= first) & (place < last) & (rng.random((rows, width)) < 0.9)
    mask[rows // 2] = False
    arrays = {"logps": old + rng.normal(0, 0.2, old.shape), "old_logps": old, "ref_logps": old - 0.1}
    arrays = {name: np.where(mask, x, np.nan) for name, x in arrays.items()}
    return arrays | {"advantages": rng.normal(size=rows), "mask": mask}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("per_token", [False, True])
def test_padded_and_packed_give_the_bits_of_the_loss(dtype, per_token, tmp_path):
    arrays = padded()
    if per_token:
        arrays["advantages"] = np.random.default_rng(1).normal(size=arrays["logps"].shape)
    arrays = {name: x if name == "mask" else x.astype(dtype) for name, x in arrays.items()}
    arrays["rollout_is_weights"] = np.full(arrays["logps"].shape, 0.5, dtype)
    arrays["loss_weights"] = np.linspace(0, 1, 9, dtype=dtype).reshape((9, 1))
    if per_token:
        arrays["loss_weights"] = np.broadcast_to(arrays["loss_weights"], arrays["logps"].shape)
    writer = RolloutWriter(tmp_path)
    path = writer.write(step=1, **arrays)
    assert evaluate(path, **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats
    packed = tokens(12, optional=True)
    packed = {name: x.astype(dtype) if x.dtype == float else x for name, x in packed.items()}
    path = writer.write(step=2, **packed)
    assert evaluate(path, **OPTIONS) == grpo_loss(**packed, **OPTIONS).stats


def test_what_is_in_a_file(tmp_path):
    arrays = {name: np.nan_to_num(x) for name, x in padded().items()}
    arrays["mask"] = np.arange(40) < np.arange(1, 10)[:, None]
    path = RolloutWriter(tmp_path / "a" / "run", rank=3).write(
        step=12,
        **arrays,
        rollout_logps=arrays["logps"] + 0.01,
        prompt_id=list("aabbccdde"),
        columns={"reward": np.arange(9.0), "hard": np.arange(9) > 4},
    )
    assert path == tmp_path / "a" / "run" / "step-00000012-rank-00003.parquet"
    table = parquet.read_table(path)
    names = "logps old_logps ref_logps rollout_logps advantages prompt_id reward hard step rank"
    assert sorted(table.column_names) == sorted(names.split())  # no mask: nothing within the rows is masked
    assert [len(x) for x in table["logps"].to_pylist()] == list(range(1, 10))
    assert (set(table["step"].to_pylist()), set(table["rank"].to_pylist())) == ({12}, {3})
    assert table["prompt_id"].to_pylist() == list("aabbccdde")
    assert table.schema.field("logps").type == pa.list_(pa.float64())
    raw = path.read_bytes()
    at = len(raw) // 8  # of logps, which come first
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    refused("cannot be read|checksum|CRC", path)


def test_without_old_logps_all_is_on_policy(tmp_path):
    arrays = tokens(5) | {"old_logps": None}
    path = RolloutWriter(tmp_path).write(step=0, **arrays)
    assert evaluate(path, **OPTIONS).as_dict() == grpo_loss(**arrays, **OPTIONS).stats.as_dict()


def test_micro_batches_of_a_step_are_one_file(tmp_path):
    writer = RolloutWriter(tmp_path)
    parts = [padded(0), padded(1, width=17), padded(2, rows=2)]
    assert writer.write(step=7, complete=False, **parts[0]) is None
    assert writer.write(step=7, complete=False, **parts[1]) is None
    assert writer.write(step=7, **parts[2]).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007-rank-00000.parquet"]
    whole = sum(grpo_loss(**part, **OPTIONS).stats for part in parts)
    assert evaluate(next(tmp_path.iterdir()), **OPTIONS) == whole
    writer.write(step=8, complete=False, **parts[0])
    writer.write(step=9, **parts[1])  # of 8 no more can come
    writer.write(step=9, **parts[2])
    names = ["step-00000008-rank-00000", "step-00000009-rank-00000", "step-00000009-rank-00000-part-1"]
    assert sorted(path.stem for path in tmp_path.iterdir())[1:] == names
    RolloutWriter(tmp_path).write(step=9, **parts[0])  # another run replaces what there was of the step
    assert sorted(path.stem for path in tmp_path.iterdir())[1:] == names[:2]


def test_the_rank_is_that_of_torchrun(tmp_path, monkeypatch):
    assert RolloutWriter(tmp_path).rank == 0
    monkeypatch.setenv("RANK", "5")
    assert RolloutWriter(tmp_path).rank == 5
    assert RolloutWriter(tmp_path, rank=np.int64(2)).rank == 2


def test_tensors(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arrays = padded()
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    writer = RolloutWriter(tmp_path)
    path = writer.write(step=0, **tensors | {"logps": tensors["logps"].clone().requires_grad_()})
    assert evaluate(path, **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats
    path = writer.write(step=1, **half, prompt_id=torch.arange(9))
    assert parquet.read_schema(path).field("logps").type == pa.list_(pa.float32())
    expected = {name: x.float().numpy() if x.is_floating_point() else x.numpy() for name, x in half.items()}
    assert evaluate(path, **OPTIONS) == grpo_loss(**expected, **OPTIONS).stats


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"step": -1}, "step must be an int of at least 0, got -1"),
        ({"step": 1.5}, "step must be an int of at least 0, got 1.5"),
        ({"step": True}, "step must be an int of at least 0, got True"),
        ({"old_logps": np.zeros(3)}, r"old_logps must have shape \(9, 40\) as logps"),
        ({"rollout_logps": np.zeros(3)}, r"rollout_logps must have shape \(9, 40\) as logps"),
        ({"mask": np.full((9, 40), 2)}, "mask must hold bools or 0/1"),
        ({"prompt_id": np.arange(8)}, r"prompt_id must have shape \(9,\), one per sequence, got \(8,\)"),
        ({"prompt_id": np.arange(9.0)}, "prompt_id must hold ints or strings, got dtype float64"),
        ({"columns": {"x": [None] * 9}}, "x must hold numbers or strings, got None"),
        (
            {"columns": {"logps": np.arange(9)}},
            "columns must have other names .* got 'logps'",
        ),
        ({"columns": {"step": np.arange(9)}}, "got 'step'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(bad, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        RolloutWriter(tmp_path).write(**{"step": 0} | padded() | bad)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    writer = RolloutWriter(tmp_path)
    path = writer.write(step=0, **padded())
    before, write = path.read_bytes(), parquet.write_table

    def fails(table, where, **options):
        write(table, where, **options)
        seen.append(sorted(os.listdir(tmp_path)))
        raise OSError("disk full")

    seen = []
    monkeypatch.setattr(parquet, "write_table", fails)
    with pytest.raises(OSError, match="disk full"):
        RolloutWriter(tmp_path).write(step=0, **padded(1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert [name for name in seen[0] if not name.startswith(".")] == [path.name]


def fails_once(monkeypatch):
    """Make the next write of a file fail halfway."""
    write = parquet.write_table

    def fails(table, where, **options):
        write(table.slice(0, 1), where, **options)
        monkeypatch.setattr(parquet, "write_table", write)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", fails)


@pytest.mark.parametrize("held", [0, 2])
def test_a_call_that_failed_can_be_repeated(held, tmp_path, monkeypatch):
    parts = [padded(i) for i in range(held + 1)]
    RolloutWriter(tmp_path).write(step=3, **padded(9))  # of an earlier run, with a second part
    (tmp_path / "step-00000003-rank-00000-part-1.parquet").write_bytes(b"")
    writer = RolloutWriter(tmp_path)
    for part in parts[:-1]:
        writer.write(step=3, complete=False, **part)
    fails_once(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        writer.write(step=3, **parts[-1])
    writer.write(step=3, **parts[-1])
    assert os.listdir(tmp_path) == ["step-00000003-rank-00000.parquet"]
    assert evaluate(tmp_path, **OPTIONS) == sum(grpo_loss(**part, **OPTIONS).stats for part in parts)


def test_a_step_that_was_held_is_written_once_though_the_next_one_fails(tmp_path, monkeypatch):
    writer = RolloutWriter(tmp_path)
    writer.write(step=0, complete=False, **padded(0))
    fails_once(monkeypatch)
    with pytest.raises(OSError, match="No space left"):  # of step 0
        writer.write(step=1, **padded(1))
    writer.write(step=1, complete=False, **padded(1))
    fails_once(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer.close() == tmp_path / "step-00000001-rank-00000.parquet"
    assert writer.close() is None
    whole = grpo_loss(**padded(0), **OPTIONS).stats + grpo_loss(**padded(1), **OPTIONS).stats
    assert evaluate(tmp_path, **OPTIONS) == whole
    assert len(os.listdir(tmp_path)) == 2


def test_unlike_micro_batches_of_a_step_are_refused_by_name(tmp_path):
    writer = RolloutWriter(tmp_path)
    arrays = padded()
    writer.write(step=0, complete=False, **arrays)
    per_token = np.zeros(arrays["logps"].shape)
    for name, unlike in (
        ("advantages", {"advantages": per_token}),
        ("ref_logps", {"ref_logps": None}),
        ("reward", {"columns": {"reward": np.arange(9)}}),
        ("loss_weights", {"loss_weights": np.ones(9)}),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be of one type in all micro-batches .* got .* after "):
            writer.write(step=0, **arrays | unlike)
    writer.write(step=1, complete=False, **arrays | {"advantages": per_token})  # other steps may be unlike
    writer.write(step=1, **arrays | {"advantages": per_token + 1})
    assert evaluate(tmp_path / "step-00000000-rank-00000.parquet", **OPTIONS) == grpo_loss(**arrays, **OPTIONS).stats
    assert len(os.listdir(tmp_path)) == 2


def test_the_order_of_columns_does_not_matter(tmp_path):
    writer = RolloutWriter(tmp_path)
    writer.write(step=0, complete=False, **padded(), columns={"a": np.arange(9), "b": np.arange(9)})
    path = writer.write(step=0, **padded(), columns={"b": np.arange(9), "a": np.arange(9)})
    assert parquet.read_table(path)["a"].to_pylist() == 2 * list(range(9))


def test_what_is_held_in_the_end_is_written(tmp_path):
    with RolloutWriter(tmp_path) as writer:
        writer.write(step=0, complete=False, **padded(0))
        writer.write(step=0, complete=False, **padded(1))
        assert os.listdir(tmp_path) == []
    whole = grpo_loss(**padded(0), **OPTIONS).stats + grpo_loss(**padded(1), **OPTIONS).stats
    assert evaluate(tmp_path, **OPTIONS) == whole

    def is_interrupted():
        with RolloutWriter(tmp_path, rank=1) as writer:
            writer.write(step=0, complete=False, **padded(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        is_interrupted()
    assert evaluate(tmp_path, **OPTIONS) == whole + grpo_loss(**padded(2), **OPTIONS).stats


def test_without_pyarrow_it_says_so(tmp_path):
    script = f"""
import sys
sys.modules["pyarrow"] = None
from grpo_fast.files import RolloutWriter
try:
    RolloutWriter({str(tmp_path)!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "writing rollouts needs pyarrow: pip install 'grpo_fast[data]'\n"


def test_the_mark_is_there(tmp_path):
    path = RolloutWriter(tmp_path).write(step=0, **padded())
    assert _writer.MARK in parquet.read_schema(path).metadata

"""`FastGRPOTrainer` has the loss, gradient and metrics of TRL's own trainer, or says that it leaves them to it."""

import importlib
import inspect
import logging
import math
import os
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from numpy.testing import assert_allclose

import grpo_fast

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
trl = pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is not installed")

from grpo_fast.trl import FastGRPOTrainer  # noqa: E402 - needs TRL

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours

CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
LOSSES = [*CLIPPED, "cispo", "sapo", "vespo"]
LEVELS = ["token", "sequence"]
CLIP_RATIOS = [f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")]
LOGGED = dict.fromkeys(CLIPPED, CLIP_RATIOS) | {
    "cispo": ["cispo_clip_ratio"],
    "sapo": [],
    "vespo": ["vespo/phi_seq_mean"],
}
ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    is_main_process=True,
    reduce=lambda x, reduction: x.clone(),
    gather=lambda x: x.clone(),
    pad_across_processes=lambda x, dim, pad_index: x.clone(),
)


def like(namespace, **others):
    return SimpleNamespace(**vars(namespace) | others)


# --- a trainer without a model, and its batches -----------------------------------------------------------------------
def stub(logps, entropies, accelerator=ALONE, training=True, args=(), **options):
    """A `FastGRPOTrainer` whose model gives these log-probabilities, and of the rest only what the loss looks at."""
    trainer = FastGRPOTrainer.__new__(FastGRPOTrainer)
    arguments = {
        "delta": None,
        "use_bias_correction_kl": True,
        "steps_per_generation": 6,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    of_trainer = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.04,
        "max_completion_length": 9,
        "current_gradient_accumulation_steps": 3,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": False,
        "aux_loss_enabled": False,
        "router_aux_loss_coef": 0.001,
    }
    assert set(options) <= set(of_trainer)
    vars(trainer).update(
        of_trainer | options,
        args=SimpleNamespace(**arguments | dict(args)),
        accelerator=accelerator,
        model=SimpleNamespace(training=training),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, torch.tensor(1.5)),
    )
    return trainer


def batch(lengths=(7, 0, 3, 6, 1), width=7, seed=3, drift=0.3, tools=True):
    """Log-probabilities, entropies and what TRL hands to its loss, of completions of these lengths, padded with 0."""
    make = torch.Generator().manual_seed(seed)
    shape = len(lengths), width
    completions = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    old = -torch.rand(shape, generator=make, dtype=torch.float64) - 0.1
    steps = [torch.randn(like, generator=make, dtype=torch.float64) for like in (shape, (len(lengths), 1), shape)]
    logps, ref = old + drift * (steps[0] + steps[1]), old + drift * steps[2]
    logps, ref, old, entropies = (x * completions for x in (logps, ref, old, torch.rand(shape, generator=make)))
    tool_mask = (torch.rand(shape, generator=make) < 0.8).long() if tools else torch.ones(shape).long()
    inputs = {
        "prompt_ids": torch.ones(len(lengths), 2).long(),
        "prompt_mask": torch.ones(len(lengths), 2).long(),
        "completion_ids": torch.ones(shape).long(),
        "completion_mask": completions,
        "tool_mask": tool_mask,
        "advantages": torch.randn(len(lengths), generator=make),
        "num_items_in_batch": (completions * tool_mask).sum() * 5,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    return logps.detach().requires_grad_(), entropies, inputs


def both(trainer, logps, inputs):
    """Loss, gradient and metrics, by `FastGRPOTrainer` and by TRL."""
    found = []
    for compute in (FastGRPOTrainer._compute_loss, trl.GRPOTrainer._compute_loss):
        for metrics in trainer._metrics.values():
            metrics.clear()
        logps.grad = None
        loss = compute(trainer, None, inputs)
        if loss.requires_grad:
            loss.backward()
        found.append((loss.detach(), logps.grad, {mode: dict(lists) for mode, lists in trainer._metrics.items()}))
    return found


def assert_as_trl(trainer, logps, inputs):
    """Both agree, and it was not TRL that computed both; the metrics."""
    (loss, gradient, metrics), (expected, right, theirs) = both(trainer, logps, inputs)
    assert not trainer._warnings_given
    few = 1e-7 if trainer.loss_type == "sapo" else 1e-12  # torch.where of two numbers is float32: 1.05 is 1.04999995
    assert_allclose(loss, expected, rtol=few, atol=1e-15)
    assert (gradient is None) == (right is None)
    if right is not None:
        assert_allclose(gradient, right, rtol=10 * few, atol=1e-15 + 1e-13 * abs(right).max())
    assert_same_metrics(metrics, theirs)
    return metrics["train"] or metrics["eval"]


def assert_same_metrics(metrics, theirs):
    for mode in ("train", "eval"):
        assert list(metrics[mode]) == list(theirs[mode])
        for name, values in metrics[mode].items():
            assert [type(value) for value in values] == [float]
            # TRL counts what is clipped in float32
            assert_allclose(values, theirs[mode][name], rtol=1e-6, atol=1e-12, err_msg=name)


# --- as TRL -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kl", ["none", "weighted", "plain"])
def test_every_loss(loss_type, level, kl):
    logps, entropies, inputs = batch()
    args, beta = {"use_bias_correction_kl": kl == "weighted"}, 0.0 if kl == "none" else 0.4
    trainer = stub(logps, entropies, loss_type=loss_type, importance_sampling_level=level, beta=beta, args=args)
    metrics = assert_as_trl(trainer, logps, inputs)
    assert list(metrics) == (["kl"] if beta else []) + ["entropy", *LOGGED[loss_type]]
    if loss_type in CLIPPED:
        assert 0 < metrics["clip_ratio/low_mean"][0] < metrics["clip_ratio/region_mean"][0]  # or little was tried
    else:
        assert all(metrics[name][0] > 0 for name in LOGGED[loss_type])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy(loss_type):
    logps, entropies, inputs = batch()
    del inputs["old_per_token_logps"], inputs["tool_mask"]
    metrics = assert_as_trl(stub(logps, entropies, loss_type=loss_type), logps, inputs)
    if loss_type in CLIPPED:
        assert {metrics[name][0] for name in CLIP_RATIOS} == {0.0}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", [(0.1, 0.5, None), (0.0, 0.0, 1.1), (0.1, 0.2, 1.3), (1.5, 0.1, None)])
def test_the_clip(options, level):
    low, high, delta = options
    logps, entropies, inputs = batch(drift=0.6)
    options = {"epsilon_low": low, "epsilon_high": high, "args": {"delta": delta}}
    assert_as_trl(stub(logps, entropies, importance_sampling_level=level, **options), logps, inputs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_advantages_of_one_sign(sign, level):  # else the least fraction clipped below is 0, of a sequence with A > 0
    logps, entropies, inputs = batch((7, 0, 5, 6))
    with torch.no_grad():
        logps += sign
    inputs["advantages"] = sign * inputs["advantages"].abs()
    metrics = assert_as_trl(stub(logps, entropies, importance_sampling_level=level), logps, inputs)
    if level == "token":
        assert metrics["clip_ratio/low_min" if sign < 0 else "clip_ratio/high_max"][0] > 0.5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shift", [-1, 1])
def test_without_an_advantage_nothing_is_clipped(shift, level):
    logps, entropies, inputs = batch((7, 5, 3))
    with torch.no_grad():
        logps += shift
    inputs["advantages"] = torch.tensor([0.0, 1.0 * shift, 0.0])
    metrics = assert_as_trl(stub(logps, entropies, importance_sampling_level=level), logps, inputs)
    assert 0 < metrics["clip_ratio/region_mean"][0] <= 0.5


@pytest.mark.parametrize("loss_type", LOSSES)
def test_in_evaluation(loss_type):
    logps, entropies, inputs = batch()
    trainer = stub(logps, entropies, training=False, loss_type=loss_type)
    with torch.no_grad():
        assert_as_trl(trainer, logps, inputs)
    assert trainer._metrics["eval"]
    assert not trainer._metrics["train"]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("steps", [1, 2])
def test_accumulated(loss_type, processes, steps):
    logps, entropies, inputs = batch()
    accelerator = like(ALONE, num_processes=processes)
    trainer = stub(logps, entropies, accelerator, loss_type=loss_type, current_gradient_accumulation_steps=steps)
    assert_as_trl(trainer, logps, inputs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lengths", [(4, 2, 0, 3), (4, 4, 4, 4)])
def test_as_many_sequences_as_tokens(lengths, level):  # where (4,) could be either
    logps, entropies, inputs = batch(lengths, width=4)
    assert_as_trl(stub(logps, entropies, importance_sampling_level=level), logps, inputs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (1, 0, 1, 1)])
def test_one_token_wide(lengths, level):  # to TRL's metrics that is one value for each sequence
    logps, entropies, inputs = batch(lengths, width=1, drift=1.0, tools=False)
    assert_as_trl(stub(logps, entropies, importance_sampling_level=level), logps, inputs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(5, 7), (5, 1)])
def test_advantages_of_a_derived_trainer(shape, level):
    logps, entropies, inputs = batch()
    inputs["advantages"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert_as_trl(stub(logps, entropies, importance_sampling_level=level), logps, inputs)


@pytest.mark.parametrize("level", LEVELS)
def test_no_token_counts(level):  # all of a batch truncated
    logps, entropies, inputs = batch((0, 0, 0))
    metrics = assert_as_trl(stub(logps, entropies, importance_sampling_level=level), logps, inputs)
    assert metrics["entropy"] == [0.0]
    assert math.isnan(metrics["clip_ratio/high_max"][0]) == (level == "token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes(dtype):
    logps, entropies, inputs = batch(drift=0.6)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    logps = logps.detach().to(dtype).requires_grad_()
    trainer = stub(logps, entropies)
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    assert logps.grad.dtype == dtype
    wide = logps.detach().double().requires_grad_()
    expected = trl.GRPOTrainer._compute_loss(stub(wide, entropies), None, inputs)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_allclose(logps.grad.double(), wide.grad, rtol=2.0 ** -(8 if dtype == torch.bfloat16 else 18), atol=1e-6)


def test_the_model_is_asked_as_by_trl():
    logps, entropies, inputs = batch()
    images = ["pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"]
    images += ["image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"]
    inputs |= {name: f"the {name}" for name in images}
    trainer, asked = stub(logps, entropies), []
    signature = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies)

    def forward(*args, **kwargs):
        bound = signature.bind(trainer, *args, **kwargs)
        bound.apply_defaults()
        asked.append({name: x.tolist() if torch.is_tensor(x) else x for name, x in bound.arguments.items()})
        return logps, entropies, None

    trainer._get_per_token_logps_and_entropies = forward
    assert_as_trl(trainer, logps, inputs)
    ours, theirs = asked
    assert ours == theirs
    assert set(images) < set(ours)


def test_what_is_not_finite_is_an_error():
    logps, entropies, inputs = batch()
    inputs["old_per_token_logps"][2, 1] = math.nan
    inputs["tool_mask"][2, 1] = 1
    with pytest.raises(ValueError, match=r"old_logps must be finite where it is not masked, got old_logps\[2, 1\]"):
        stub(logps, entropies)._compute_loss(None, inputs)


def test_no_outputs():
    logps, entropies, inputs = batch()
    with pytest.raises(ValueError, match="does not support returning outputs"):
        stub(logps, entropies).compute_loss(None, inputs, return_outputs=True)


# --- the sampler, and what is kept ------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_weights_of_the_sampler(loss_type, mode, level):
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL refuses it")
    logps, entropies, inputs = batch()
    old = inputs["old_per_token_logps"]
    difference = 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=old.dtype)
    difference = difference * inputs["completion_mask"] * inputs["tool_mask"]
    ratio = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    inputs["importance_sampling_ratio"] = (
        ratio.clamp(max=1.3) if mode.endswith("truncate") else ratio.masked_fill(ratio > 1.3, 0.0)
    )
    inputs["sampling_per_token_logps"] = old - difference
    options = {"loss_type": loss_type, "importance_sampling_level": level, "use_vllm": True}
    args = {"use_bias_correction_kl": loss_type != "vespo"}
    assert_as_trl(stub(logps, entropies, args=args, **options), logps, inputs)


def test_vespo_of_the_policy_that_trains():  # of one step a batch: only the sampler is another
    logps, entropies, inputs = batch()
    del inputs["old_per_token_logps"]
    inputs["importance_sampling_ratio"] = torch.rand(logps.shape, dtype=logps.dtype).masked_fill(
        ~(inputs["completion_mask"] * inputs["tool_mask"]).bool(), 1
    )
    trainer = stub(logps, entropies, loss_type="vespo", use_vllm=True, args={"use_bias_correction_kl": False})
    assert_as_trl(trainer, logps, inputs)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sampler", [False, True])
def test_which_sequences_and_tokens_are_kept(loss_type, level, sampler):
    logps, entropies, inputs = batch()
    if sampler:
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.2
    options = {"loss_type": loss_type, "importance_sampling_level": level, "top_entropy_quantile": 0.6}
    trainer = stub(logps, entropies, off_policy_mask_threshold=0.1, **options)
    assert_as_trl(trainer, logps, inputs)
    for option in ({"off_policy_mask_threshold": 0.1}, {"top_entropy_quantile": 0.6}):
        kept = stub(logps, entropies, loss_type=loss_type, **option)
        without = stub(logps, entropies, loss_type=loss_type)
        assert both(kept, logps, inputs)[0][0] != both(without, logps, inputs)[0][0]


# --- left to TRL ------------------------------------------------------------------------------------------------------
LEFT = {
    "loss_type='reinforce' is not covered": {"loss_type": "reinforce"},
    "loss_type='vespo' with vllm_importance_sampling_correction and use_bias_correction_kl is not covered": {
        "loss_type": "vespo",
        "use_vllm": True,
    },
    "entropy_coef or use_adaptive_entropy is not covered": {"_entropy_bonus_enabled": True, "entropy_coef": 0.1},
    "router_aux_loss_coef is not covered": {"aux_loss_enabled": True},
    "delta must be a number above 1 + epsilon_high = 1.28, got 1.2": {"args": {"delta": 1.2}},
    "beta must be a number in [0, inf), got -0.1": {"beta": -0.1},
    "training is on cuda:0, not on the CPU": {"accelerator": like(ALONE, device=torch.device("cuda:0"))},
    "loss_type='reinforce' is not covered; router_aux_loss_coef is not covered": {
        "loss_type": "reinforce",
        "aux_loss_enabled": True,
    },
}


@pytest.fixture
def trls(monkeypatch):
    """TRL's own loss as a number that is no other's."""
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda *_: torch.tensor(42.0))


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_to_trl_is_said_once(reason, trls, caplog):
    logps, entropies, inputs = batch()
    for _ in range(2):  # each trainer says it
        caplog.clear()
        trainer = stub(logps, entropies, **LEFT[reason])
        assert [trainer._compute_loss(None, inputs) for _ in range(3)] == [42.0] * 3
        assert caplog.record_tuples == [
            ("grpo_fast.trl", logging.WARNING, f"FastGRPOTrainer: the loss is left to TRL: {reason}")
        ]


@pytest.mark.parametrize("loss_type", ["cispo", "grpo"])
def test_then_it_is_trls(loss_type):
    logps, entropies, inputs = batch()
    trainer = stub(logps, entropies, loss_type=loss_type, _entropy_bonus_enabled=True, entropy_coef=0.1)
    trainer.accelerator = like(ALONE, sync_gradients=True)
    ours, theirs = both(trainer, logps, inputs)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]
    assert ours[2]["train"]


def test_it_is_said_by_one_process(trls, caplog):
    logps, entropies, inputs = batch()
    another = like(ALONE, is_main_process=False)
    assert stub(logps, entropies, another, beta=-0.1)._compute_loss(None, inputs) == 42
    assert not caplog.records


def test_an_option_that_changes_is_said(trls, caplog):
    logps, entropies, inputs = batch()
    trainer = stub(logps, entropies)
    for loss_type in ("dapo", "theirs", "others", "theirs", "dapo"):
        trainer.loss_type = loss_type
        assert (trainer._compute_loss(None, inputs) == 42) == (loss_type != "dapo")
    assert ["theirs" in text or "others" in text for text in caplog.messages] == [True, True]


def test_the_sampler_of_vllm_alone_is_covered():
    logps, entropies, inputs = batch()
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 1
    options = {"use_vllm": True, "vllm_importance_sampling_correction": False}
    assert_as_trl(stub(logps, entropies, **options), logps, inputs)


def test_what_both_refuse():
    logps, entropies, inputs = batch()
    with pytest.raises(ValueError, match="Unknown importance sampling level: word"):
        stub(logps, entropies, importance_sampling_level="word")._compute_loss(None, inputs)
    with pytest.raises(ValueError, match="Unknown loss type: ppo"):
        stub(logps, entropies, loss_type="ppo")._compute_loss(None, inputs)


# --- other releases ---------------------------------------------------------------------------------------------------
def test_a_newer_trl_is_mentioned_once(monkeypatch, trls, caplog):
    monkeypatch.setattr("grpo_fast.trl._INSTALLED", (1, 17))
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    logps, entropies, inputs = batch()
    trainer = stub(logps, entropies)
    assert all(trainer._compute_loss(None, inputs) != 42 for _ in range(2))
    text = "the loss was compared with that of TRL 1.16; in the TRL installed, 1.17.0, it may be another"
    assert caplog.messages == [f"FastGRPOTrainer: {text}"]


@pytest.mark.parametrize(
    ("level", "beta", "weighted", "left"),
    [
        ("sequence", 0.4, True, True),
        ("sequence", 0.4, False, False),
        ("sequence", 0.0, True, False),
        ("token", 0.4, True, False),
    ],
)
def test_of_a_newer_trl_nobody_knows_the_kl_at_sequence_level(level, beta, weighted, left, monkeypatch, trls, caplog):
    monkeypatch.setattr("grpo_fast.trl._INSTALLED", (1, 17))
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    logps, entropies, inputs = batch()
    args = {"use_bias_correction_kl": weighted}
    trainer = stub(logps, entropies, importance_sampling_level=level, beta=beta, args=args)
    assert (trainer._compute_loss(None, inputs) == 42) == left
    reason = "use_bias_correction_kl at sequence level of TRL 1.17.0 is not covered"
    assert (f"FastGRPOTrainer: the loss is left to TRL: {reason}" in caplog.messages) == left


@pytest.mark.parametrize("version", ["1.15.2", "0.24.0", "1.16.0.dev0", "1.17.0rc1", "2.0"])
def test_which_trl_it_takes(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    monkeypatch.delitem(sys.modules, "grpo_fast.trl")  # imported again, and what was there put back
    monkeypatch.setattr(grpo_fast, "trl", None)
    if version in ("1.15.2", "0.24.0"):
        with pytest.raises(ImportError, match=f"grpo_fast.trl needs TRL 1.16 or newer, got {version}"):
            importlib.import_module("grpo_fast.trl")
    else:
        importlib.import_module("grpo_fast.trl")


# --- processes --------------------------------------------------------------------------------------------------------
PROCESS = """
import sys, torch
from accelerate import Accelerator
sys.path.insert(0, {tests!r})
from test_trl import assert_as_trl, batch, stub

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
assert accelerator.num_processes == 2
for loss_type in ("dapo", "grpo"):
    for level in ("token", "sequence"):
        for lengths in [(7, 0, 3, 6), (2, 7, 1, 0)], [(7, 0, 3, 6), (0, 0, 0, 0)], [(0, 0, 0, 0), (0, 1, 0, 0)]:
            logps, entropies, inputs = batch(lengths[rank], seed=rank, tools=False)
            inputs["num_items_in_batch"] = torch.tensor(sum(map(sum, lengths)))
            trainer = stub(logps, entropies, accelerator, loss_type=loss_type, importance_sampling_level=level)
            metrics = assert_as_trl(trainer, logps, inputs)
            print(loss_type, level, lengths, sorted(metrics.items()))
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # else its threads may still run when the interpreter is gone
"""


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = PROCESS.format(tests=os.path.dirname(__file__))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (first, errors), (second, more) = (process.communicate(timeout=300) for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors + more
    assert first == second  # the metrics are everyone's
    assert first.count("dapo") == first.count("grpo") == 6


# --- a training run ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """The trainer over a model of random weights, a handful of words, and no download."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    where = str(tmp_path_factory.mktemp("model"))  # from which TRL loads the reference, too
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), num_key_value_heads=1, **sizes)).save_pretrained(where)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        mask_truncated_completions=True,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        beta=0.04,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h"] * 4})
    return FastGRPOTrainer(
        model=where,
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
        args=config,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def steps(trainer):
    """What a run, then an evaluation, hands to the loss at each step; the policy has left the one that sampled."""
    seen, of_loss = [], FastGRPOTrainer._compute_loss

    def spy(self, model, inputs):
        seen.append({name: x.clone() if torch.is_tensor(x) else x for name, x in inputs.items()})
        return of_loss(self, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastGRPOTrainer, "_compute_loss", spy)
        trainer.train()
        trainer.evaluate()
    return seen


def test_it_trains(trainer, steps):
    logged = trainer.state.log_history
    for prefix, times in (("", 4), ("eval_", 1)):
        entries = [entry for entry in logged if f"{prefix}clip_ratio/low_mean" in entry]
        assert len(entries) == times
        for entry in entries:
            assert all(math.isfinite(entry[prefix + name]) for name in ("loss", "kl", "entropy", *CLIP_RATIOS))
    assert not trainer._warnings_given


@pytest.mark.parametrize("evaluation", [False, True])
def test_its_loss_gradient_and_metrics_are_those_of_trl(trainer, steps, evaluation):
    inputs, model = steps[-1 if evaluation else -2], trainer.model.train(not evaluation)
    found = []
    for compute in (FastGRPOTrainer._compute_loss, trl.GRPOTrainer._compute_loss):
        for lists in trainer._metrics.values():
            lists.clear()
        model.zero_grad()
        with torch.set_grad_enabled(not evaluation):
            loss = compute(trainer, model, inputs)
        if not evaluation:
            loss.backward()
        gradients = [p.grad.ravel() for p in model.parameters() if p.grad is not None]
        metrics = trainer._metrics["eval" if evaluation else "train"]
        found.append((loss.item(), torch.cat(gradients) if gradients else None, dict(metrics)))
    (loss, gradient, metrics), (expected, right, theirs) = found
    # float32: 48 tokens of some 16 roundings each, and what the k3 of TRL loses: 2⁻²⁴ a token, times β
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (gradient is None) == (right is None) == evaluation
    if not evaluation:
        assert_allclose(gradient, right, rtol=1e-4, atol=1e-5 * abs(right).max())
    assert list(metrics) == list(theirs) == ["kl", "entropy", *CLIP_RATIOS]
    for name, values in metrics.items():
        assert values == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


# --- rollouts ---------------------------------------------------------------------------------------------------------
def test_a_run_is_written_as_the_loss_saw_it(trainer, tmp_path):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from datasets import Dataset

    args = trainer.args
    args.max_steps = 3
    prompts = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h"] * 4})
    options = {"model": trainer.model.name_or_path, "reward_funcs": trainer.reward_funcs, "args": args}
    options |= {"train_dataset": prompts, "processing_class": trainer.processing_class}
    writing = FastGRPOTrainer(**options, rollouts=tmp_path / "run")
    writing.train()
    writing.evaluate(prompts.select(range(2)))
    names = sorted(os.listdir(tmp_path / "run"))
    assert names == [f"step-{step:08d}-rank-00000.parquet" for step in (1, 2, 3)]
    logged = [entry for entry in writing.state.log_history if "clip_ratio/low_mean" in entry][:3]
    from pyarrow import parquet

    for name, entry in zip(names, logged, strict=True):
        table = parquet.read_table(tmp_path / "run" / name)
        assert len(table) == 16  # two micro-batches
        of_prompts = Counter(table["prompt_id"].to_pylist()).values()
        assert {count % 4 for count in of_prompts} == {0}  # its groups, as a whole
        ratios = []
        for rows in (table.slice(0, 8), table.slice(8)):  # the log has the mean over them
            parquet.write_table(rows, tmp_path / "micro-batch.parquet")
            ratios.append(grpo_fast.evaluate(tmp_path / "micro-batch.parquet").clip_ratio_region)
        assert sum(ratios) / 2 == pytest.approx(entry["clip_ratio/region_mean"])
    assert entry["clip_ratio/region_mean"] == 0 < logged[1]["clip_ratio/region_mean"]  # of 2 the second iteration


@pytest.mark.parametrize(
    "options", [{}, {"off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.6}, {"use_vllm": True}]
)
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_what_is_written_gives_the_loss_again(loss_type, options, tmp_path):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from grpo_fast import _trl_options
    from grpo_fast.files import RolloutWriter

    logps, entropies, inputs = batch()
    inputs["importance_sampling_ratio"] = torch.rand(logps.shape, dtype=logps.dtype)
    trainer = stub(logps, entropies, loss_type=loss_type, beta=0.0, **options)
    trainer.accelerator = like(ALONE, sync_gradients=True)
    trainer.state, trainer._policy_logps = SimpleNamespace(global_step=0), logps.detach()
    trainer._writer = RolloutWriter(tmp_path)
    loss = trainer._compute_loss(None, inputs).item()
    of_loss = _trl_options.options_of(trainer)._asdict()
    mask = _trl_options.tokens_of(inputs)
    of_loss["normalizer"] = float(_trl_options.normalizer(trainer, mask, inputs))
    assert grpo_fast.evaluate(tmp_path, **of_loss).loss == pytest.approx(loss, rel=1e-12)


def test_a_loss_that_is_left_to_trl_is_written_too(trainer, tmp_path):
    pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
    from datasets import Dataset

    prompts = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h"] * 4})
    args = trainer.args
    args.max_steps, args.entropy_coef = 1, 0.1
    options = {"model": trainer.model.name_or_path, "reward_funcs": trainer.reward_funcs, "args": args}
    writing = FastGRPOTrainer(
        **options, train_dataset=prompts, processing_class=trainer.processing_class, rollouts=str(tmp_path)
    )
    args.entropy_coef = 0.0
    assert writing._entropy_bonus_enabled
    writing.train()
    assert os.listdir(tmp_path) == ["step-00000001-rank-00000.parquet"]
    assert grpo_fast.evaluate(tmp_path / "step-00000001-rank-00000.parquet").sequences == 16

"""The README's subclass of TRL's trainer has the loss, the gradient and the metrics of TRL's own, where it is used."""

import math

import numpy as np
import pytest
from test_readme import run

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """The subclass over a model of random weights, a handful of words, and no download."""
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
        num_generations=4,
        max_completion_length=6,
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
    return run("torch", "trl")["FastGRPOTrainer"](
        model=where,
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h"] * 4}),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def steps(trainer):
    """What a training run hands to the loss at each step: with the policy already apart from the one that sampled."""
    seen, of_loss = [], type(trainer)._compute_loss

    def spy(self, model, inputs):
        seen.append({name: x.clone() if torch.is_tensor(x) else x for name, x in inputs.items()})
        return of_loss(self, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "_compute_loss", spy)
        trainer.train()
    return seen


def test_it_trains(trainer, steps):
    logged = [entry for entry in trainer.state.log_history if "clip_ratio/low_mean" in entry]
    assert len(logged) == 4
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["kl"]) for entry in logged)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_loss_gradient_and_metrics_are_those_of_trl(trainer, steps, loss_type, level, monkeypatch):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", level)
    inputs, model = steps[-1], trainer.model.train()
    found = []
    for compute in (type(trainer)._compute_loss, trl.GRPOTrainer._compute_loss):
        trainer._metrics["train"].clear()
        model.zero_grad()
        loss = compute(trainer, model, inputs)
        loss.backward()
        grads = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
        found.append((loss.item(), grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}))
    (loss, grads, metrics), (expected, right, theirs) = found
    # float32: 48 tokens of some 16 roundings each, and what the k3 of TRL loses: 2⁻²⁴ a token, times β
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(grads, right, rtol=1e-4, atol=1e-5 * abs(right).max())
    at_token_level = {name for name in metrics if level == "token" or name in ("kl", "entropy")}
    for name in at_token_level & set(theirs):
        assert metrics[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} <= set(metrics)

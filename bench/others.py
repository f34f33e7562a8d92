"""What the losses of TRL, Liger-Kernel, verl, OpenRLHF and SkyRL compute: their own code, asked by `identify`.

``python bench/others.py FOLDER …`` takes two minutes: TRL and Liger-Kernel as installed; of the others, wheels unpacked
in a FOLDER (``pip download --no-deps``, unzip), whose file with the losses is imported with stubs in place of what else
it imports. The rows of "What others compute" in the guide are what this prints.
"""

import argparse
import importlib
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from grpo_fast.conformance import identify

ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    is_main_process=True,
    reduce=lambda x, reduction: x.clone(),
    gather=lambda x: x.clone(),
)


def trl_loss(loss_type: str, **options: Any) -> Any:
    """`GRPOTrainer._compute_loss` with one accumulation step, as a function of what our losses take."""
    trainer_class = importlib.import_module("trl").GRPOTrainer
    config = importlib.import_module("trl").GRPOConfig
    asked = {
        "beta": 0.04,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "importance_sampling_level": "token",
        "max_completion_length": 9,
        "off_policy_mask_threshold": None,
    } | options
    names = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
    names += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    defaults = {name: config.__dataclass_fields__[name].default for name in names}
    arguments = {name: asked.pop(name, default) for name, default in defaults.items()}

    def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
        trainer = trainer_class.__new__(trainer_class)
        vars(trainer).update(
            asked,
            loss_type=loss_type,
            args=SimpleNamespace(steps_per_generation=1, **arguments),
            model=SimpleNamespace(training=True),
            accelerator=ALONE,
            current_gradient_accumulation_steps=1,
            top_entropy_quantile=1.0,
            aux_loss_enabled=False,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
        )
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
        nothing = torch.zeros(len(logps), 0, dtype=torch.long)
        return trainer._compute_loss(
            None,
            {
                "prompt_ids": nothing,
                "prompt_mask": nothing,
                "completion_ids": torch.zeros_like(mask, dtype=torch.long),
                "completion_mask": mask,
                "advantages": advantages,
                "old_per_token_logps": old_logps,
                "ref_per_token_logps": ref_logps,
                "num_items_in_batch": mask.sum(),
            },
        )

    loss.__qualname__ = f"GRPOTrainer._compute_loss, loss_type={loss_type!r}"
    return loss


def liger_loss(loss_type: str, **options: Any) -> Any:
    """`LigerFusedLinearGRPOFunction.ppo_loss_fn` of all rows, which is what its chunks add up to."""
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    asked = {"beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 9} | options

    def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
        return module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logps, mask, advantages, mask, ref_logps, old_logps, loss_type=loss_type, **asked
        )

    loss.__qualname__ = f"LigerFusedLinearGRPOFunction.ppo_loss_fn, loss_type={loss_type!r}"
    return loss


# --- of wheels, with stubs --------------------------------------------------------------------------------------------
def stub(*names: str, **attributes: Any) -> None:
    """Make modules of these names importable, which hold the attributes, and a mock for everything else."""
    for name in names:
        module = MagicMock(__path__=[], __spec__=None)
        vars(module).update(attributes)
        sys.modules[name] = module


def package(name: str, folder: Path) -> None:
    """Make a package importable without running its ``__init__``."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


class ActorConfig(SimpleNamespace):
    """What verl's losses ask their configuration for."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def verl_losses(folder: Path) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The losses of `verl.trainer.ppo.core_algos`, with the defaults of its configuration, and its KL loss."""
    names = ["omegaconf", "tensordict", "verl.utils.import_utils", "verl.utils.device", "verl.trainer.config"]
    stub(*names, AlgoConfig=type("AlgoConfig", (), {}))
    stub("verl.workers", "verl.workers.config", ActorConfig=ActorConfig)
    for name in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo"):
        package(name, folder / name.replace(".", "/"))
    vars(sys.modules["verl.utils"]).update(as_torch_index=None, group_mean_std=None)
    if "transformers" not in sys.modules and importlib.util.find_spec("transformers") is None:
        stub("transformers")
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    tau = SimpleNamespace(tau_pos=1.0, tau_neg=1.05)
    config = ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=3.0,
        global_batch_info={},
        policy_loss=tau,
    )
    config.tau_pos, config.tau_neg = 1.0, 1.05

    def named(mode: str, aggregation: str, kl: str = "") -> Callable[..., Any]:
        def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
            if advantages.dim() == 1:
                advantages = advantages[:, None] * torch.ones_like(logps)
            result, _ = algos.get_policy_loss_fn(mode)(
                old_logps, logps, advantages, mask, loss_agg_mode=aggregation, config=config
            )
            if kl:
                result = result + 0.001 * algos.agg_loss(algos.kl_penalty(logps, ref_logps, kl), mask, aggregation)
            return result

        return loss

    for mode in ("vanilla", "gspo", "sapo", "cispo", "geo_mean", "dppo_tv", "dppo_kl", "gpg"):
        yield f"{mode}, token-mean", named(mode, "token-mean")
    for aggregation in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        yield f"vanilla, {aggregation}", named("vanilla", aggregation)
    for kl in ("kl", "abs", "mse", "low_var_kl", "k3+"):
        yield f"vanilla, token-mean, KL {kl}", named("vanilla", "token-mean", kl)


def openrlhf_losses(folder: Path) -> Iterator[tuple[str, Callable[..., Any]]]:
    """`openrlhf.models.loss.PolicyLoss`, and its KL loss."""
    stub("deepspeed", "transformers.integrations.deepspeed")
    (home,) = folder.glob("*.data/purelib/openrlhf")
    for name in ("openrlhf", "openrlhf.models"):
        package(name, home.parent / name.replace(".", "/"))
    module = importlib.import_module("openrlhf.models.loss")
    utils = importlib.import_module("openrlhf.models.utils")

    def named(kl: str = "", **options: Any) -> Callable[..., Any]:
        policy = module.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, **options)

        def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
            if advantages.dim() == 1:
                advantages = advantages[:, None] * torch.ones_like(logps)
            result = policy(logps, old_logps, advantages, action_mask=mask)[0]
            if kl:
                penalty = utils.compute_approx_kl(logps, ref_logps, kl_estimator=kl)
                result = result + 0.01 * utils.masked_mean(penalty, mask)
            return result

        return loss

    yield "PolicyLoss", named()
    yield "PolicyLoss, dual_clip", named(dual_clip=3.0)
    yield "PolicyLoss, token_level_loss=False", named(token_level_loss=False)
    yield "PolicyLoss, gspo", named(policy_loss_type="gspo")
    for kl in ("k1", "k2", "k3"):
        yield f"PolicyLoss, KL {kl}", named(kl)


def skyrl_losses(folder: Path) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The losses of `skyrl.backends.skyrl_train.utils.ppo_utils`, which leave the aggregation to the advantages."""
    stub("ray", "cloudpickle", "loguru", "jaxtyping", "skyrl.train", "skyrl.train.config")
    stub("skyrl.backends.skyrl_train.utils.off_policy_correction_utils")
    nothing = sys.modules["skyrl.backends.skyrl_train.utils.off_policy_correction_utils"]
    nothing.apply_off_policy_correction = lambda loss, old, rollout, mask, config: (loss, mask, {})
    for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"):
        package(name, folder / name.replace(".", "/"))
    module = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    config = SimpleNamespace(
        eps_clip_low=0.2,
        eps_clip_high=0.28,
        clip_ratio_c=3.0,
        loss_reduction="sequence_mean",
        sapo=SimpleNamespace(tau_pos=1.0, tau_neg=1.05),
        cispo=SimpleNamespace(cispo_eps_clip_low=0.0, cispo_eps_clip_high=5.0),
        dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.15, delta_high=0.2),
        off_policy_correction=None,
    )

    def named(function: Any, kl: str = "", **options: Any) -> Callable[..., Any]:
        own = SimpleNamespace(**vars(config) | options)

        def loss(logps: Any, old_logps: Any, advantages: Any, ref_logps: Any, mask: Any) -> Any:
            if advantages.dim() == 1:
                advantages = advantages[:, None] * torch.ones_like(logps)
            result, _ = function(logps, old_logps, advantages, own, mask)
            if kl:
                result = result + 0.001 * module.compute_approx_kl(logps, ref_logps, mask, kl).sum()
            return result

        return loss

    yield "regular", named(module.ppo_policy_loss, policy_loss_type="regular")
    yield "dual_clip", named(module.ppo_policy_loss, policy_loss_type="dual_clip")
    yield "sapo", named(module.sapo_policy_loss)
    yield "gspo", named(module.gspo_policy_loss)
    yield "cispo", named(module.compute_policy_loss_cispo)
    yield "dppo, binary_tv", named(module.dppo_policy_loss)
    kl_region = SimpleNamespace(dppo_type="binary_kl", delta_low=0.05, delta_high=0.05)
    yield "dppo, binary_kl", named(module.dppo_policy_loss, dppo=kl_region)
    for kl in ("k1", "abs", "k2", "k3"):
        yield f"regular, KL {kl}", named(module.ppo_policy_loss, kl, policy_loss_type="regular")


def trl_losses() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All loss types of TRL at both levels, with its defaults but for β."""
    for level in ("token", "sequence"):
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"):
            yield f"{name}, {level}", trl_loss(name, importance_sampling_level=level)
    yield "dapo, token, delta", trl_loss("dapo", delta=3.0)
    yield "grpo, token, use_bias_correction_kl=False", trl_loss("grpo", use_bias_correction_kl=False)


def liger_losses() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All loss types of Liger-Kernel at the levels it has them."""
    for level in ("token", "sequence"):
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"):
            if level == "token" or name not in ("cispo", "sapo", "vespo"):
                yield f"{name}, {level}", liger_loss(name, importance_sampling_level=level)
    yield "grpo, token, use_bias_correction_kl=True", liger_loss("grpo", use_bias_correction_kl=True)
    yield "dapo, token, delta", liger_loss("dapo", delta=3.0)


def main() -> None:
    """Print what each of them computes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="where wheels of the others are unpacked")
    sources: dict[str, Callable[[], Iterator[Any]]] = {"TRL": trl_losses, "Liger-Kernel": liger_losses}
    for folder in parser.parse_args().folders:
        for name, losses in (("verl", verl_losses), ("openrlhf", openrlhf_losses), ("skyrl", skyrl_losses)):
            sources[name] = lambda losses=losses, home=Path(folder) / name: losses(home)
    for source, losses in sources.items():
        for name, loss in losses():
            report = identify(loss)
            options = (
                "none of these"
                if report.options is None
                else ", ".join(f"{k}={v!r}" for k, v in report.options.items())
            )
            print(f"| {source} | {name} | `{options}` | {'; '.join(x.what for x in report.findings)} |", flush=True)


if __name__ == "__main__":
    main()

"""Tensors and options that grpo_fast.torch.grpo_loss cannot take are refused by name, with what is allowed."""

import pytest

from grpo_fast import K3

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from grpo_fast.torch import grpo_loss  # noqa: E402 - needs torch

LOGPS = torch.zeros(2, 3, dtype=torch.float64)
WRONG = {
    "no tensor": (lambda x: x.numpy(), "must be a tensor, got ndarray"),
    "elsewhere": (lambda x: x.to("meta"), "must be on the CPU, got a tensor on meta"),
    "sparse": (lambda x: x.to_sparse(), "must be a dense tensor, got one that is sparse or nested"),
    "complex": (lambda x: x.to(torch.complex128), "must hold float64, .* ints or bools, got torch.complex128"),
    "narrow": (lambda x: x.to(torch.float8_e4m3fn), "must hold float64, .* ints or bools, got torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize(
    "name", ["logps", "old_logps", "advantages", "ref_logps", "mask", "rollout_is_weights", "cu_seqlens", "normalizer"]
)
def test_a_tensor_of_another_kind(name, case):
    make, message = WRONG[case]
    if (name, case) == ("normalizer", "no tensor"):
        message = "must be a number in"
    arguments = {"logps": LOGPS, "old_logps": LOGPS, "advantages": LOGPS, "ref_logps": LOGPS, "kl": K3(0.1)}
    value = make(torch.ones(1, dtype=torch.float64) if name == "normalizer" else LOGPS)
    with pytest.raises(TypeError, match=f"^{name} {message}"):
        grpo_loss(**arguments | {name: value})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logps": LOGPS.long()}, TypeError, "logps must be float32, float64, bfloat16 or float16, got torch.int64"),
        ({"advantages": None}, TypeError, "advantages must be a tensor, got NoneType"),
        ({"old_logps": LOGPS[0]}, ValueError, r"old_logps must have shape \(2, 3\) as logps, got \(3,\)"),
        ({"logps": LOGPS[0, 0]}, ValueError, r"logps must be \(B, T\) or \(N,\), got shape \(\)"),
        ({"kl": K3(0.1)}, ValueError, "ref_logps must be given with a kl, got None"),
        ({"kl": 0.1}, TypeError, "kl must be a K1, K2, K3 or None, got 0.1"),
        (
            {"surrogate": (0.2,)},
            TypeError,
            r"surrogate must be a Clip, CISPO, SAPO, Unclipped, VESPO or GMPO, got \(0.2,\)",
        ),
        ({"importance_sampling_level": 3}, ValueError, "importance_sampling_level must be one of 'token', 'sequence'"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of 'token-mean', .*, got 'mean'"),
        ({"normalizer": 0}, ValueError, "normalizer must be above 0 where a token counts, got 0"),
        ({"normalizer": torch.tensor(0)}, ValueError, "normalizer must be above 0 where a token counts, got 0"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be one number, got shape \(2,\)"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        grpo_loss(**{"logps": LOGPS, "old_logps": None, "advantages": torch.ones(2)} | changes)


TRANSFORMS = {
    "grad": lambda loss: torch.func.grad(loss)(LOGPS),
    "vjp": lambda loss: torch.func.vjp(loss, LOGPS),
    "jacrev": lambda loss: torch.func.jacrev(loss)(LOGPS),
    "jacfwd": lambda loss: torch.func.jacfwd(loss)(LOGPS),
    "jvp": lambda loss: torch.func.jvp(loss, (LOGPS,), (LOGPS,)),
    "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss))(LOGPS[None]),
    "grad of vmap": lambda loss: torch.func.grad(lambda x: torch.func.vmap(loss)(x[None]).sum())(LOGPS),
}


of_pytorch_itself = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@of_pytorch_itself
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_derivative_that_is_not_known_is_refused_rather_than_0(transform):
    with pytest.raises(RuntimeError, match=r"^grpo_loss has a gradient for loss.backward.* take torch.autograd.grad"):
        TRANSFORMS[transform](lambda logps: grpo_loss(logps, None, torch.ones(2)))


def test_to_map_it_is_refused():
    with pytest.raises(RuntimeError, match=r"^grpo_loss is of one batch, and not known to torch.vmap: loop over"):
        torch.vmap(lambda logps: grpo_loss(logps, None, torch.ones(2)))(LOGPS[None])
    with pytest.raises(RuntimeError, match=r"^grpo_loss is of one batch, and not known to torch.vmap: loop over"):
        torch.vmap(lambda advantages: grpo_loss(LOGPS, None, advantages))(torch.ones(3, 2))


@of_pytorch_itself
def test_forward_mode_is_refused():
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        assert grpo_loss(LOGPS, None, torch.ones(2)).item() == -1  # without a tangent it is like any other
        with pytest.raises(RuntimeError, match=r"^grpo_loss has a gradient for loss.backward.* in forward mode"):
            grpo_loss(forward_ad.make_dual(LOGPS, LOGPS), None, torch.ones(2))


@pytest.mark.slow
def test_stats_in_one_graph_are_refused_with_what_to_do():
    def loss(logps):
        return grpo_loss(logps, None, torch.ones(2), return_stats=True)

    with pytest.raises(Exception, match="leave return_stats out, or compile without fullgraph=True"):
        torch.compile(loss, fullgraph=True)(LOGPS)


def test_an_unknown_keyword_says_what_was_meant():
    with pytest.raises(TypeError, match=r"^grpo_loss has no argument 'return_stat': did you mean 'return_stats'\?"):
        grpo_loss(LOGPS, None, torch.ones(2), return_stat=True)
    with pytest.raises(TypeError, match=r"it is a part of surrogate, as in surrogate=Clip\(epsilon=…\)"):
        grpo_loss(LOGPS, None, torch.ones(2), epsilon=0.2)

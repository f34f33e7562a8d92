"""`rollout_correction` and the two masks of tensors are those of arrays, constants to autograd, and feed the loss."""

import pytest
from numpy.testing import assert_array_equal

import grpo_fast
from grpo_fast import K3, Reject

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from grpo_fast.torch import (  # noqa: E402 - needs torch
    grpo_loss,
    high_entropy_mask,
    off_policy_sequence_mask,
    rollout_correction,
)

REJECT = [Reject("ratio", "geometric", 0.9, 1.1), Reject("k2", "token", upper=0.5)]


def batch(dtype=torch.float64):
    """log π_old, log π_rollout and a mask; all that can requires a gradient."""
    torch.manual_seed(0)
    old = -torch.rand(6, 30, dtype=dtype) - 0.1
    rollout = old + 0.3 * torch.randn(6, 30, dtype=dtype)
    rollout[1, 2] = torch.nan
    return old.requires_grad_(), rollout.requires_grad_(), torch.rand(6, 30) < 0.8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_is_that_of_arrays(level, dtype):
    old, rollout, mask = batch(dtype)
    options = {"level": level, "mode": "mask", "lower": 0.5, "upper": 3, "reject": REJECT, "normalize": True}
    found = rollout_correction(old, rollout, mask=mask, **options)
    half = dtype in (torch.bfloat16, torch.float16)
    arrays = [(x.float() if half else x).detach().numpy() for x in (old, rollout)]
    expected = grpo_fast.rollout_correction(*arrays, mask=mask.numpy(), **options)
    assert found.weights.dtype == (torch.float32 if half else dtype)
    assert found.mask.dtype == torch.bool
    assert_array_equal(found.weights.numpy(), expected.weights)
    assert_array_equal(found.mask.numpy(), expected.mask)
    assert found.stats == expected.stats
    assert repr(found) == repr(expected)


def test_packed():
    old, rollout, mask = (x[:4].reshape(-1) for x in batch())
    cuts = torch.tensor([0, 7, 7, 120])
    found = rollout_correction(old, rollout, mask=mask, cu_seqlens=cuts, level="geometric")
    arrays = [x.detach().numpy() for x in (old, rollout)]
    expected = grpo_fast.rollout_correction(*arrays, mask=mask.numpy(), cu_seqlens=cuts.numpy(), level="geometric")
    assert_array_equal(found.weights.numpy(), expected.weights)


def test_no_gradient_flows():
    old, rollout, mask = batch()
    correction = rollout_correction(old, rollout, mask=mask)
    assert not correction.weights.requires_grad
    assert not off_policy_sequence_mask(old, rollout, torch.ones(6).requires_grad_(), 0.1).requires_grad
    assert not high_entropy_mask(old, 0.5).requires_grad
    logps = (old.detach() + 0.1).requires_grad_()
    loss = grpo_loss(logps, old, torch.ones(6), mask=correction.mask, rollout_is_weights=correction.weights)
    loss.backward()
    assert logps.grad is not None
    assert old.grad is None
    assert rollout.grad is None


def test_the_masks_are_those_of_arrays():
    old, rollout, mask = batch(torch.float32)
    advantages = torch.tensor([1.0, -1.0, -2.0, -1.0, 0.0, -1.0])
    arrays = [x.detach().numpy() for x in (old, rollout, advantages)]
    found = off_policy_sequence_mask(old, rollout, advantages, 0.05, mask=mask)
    assert_array_equal(found.numpy(), grpo_fast.off_policy_sequence_mask(*arrays, 0.05, mask=mask.numpy()))
    assert 0 < found.sum() < mask.sum()
    entropies = -old
    assert_array_equal(
        high_entropy_mask(entropies, 0.8, mask=mask).numpy(),
        grpo_fast.high_entropy_mask(-arrays[0], 0.8, mask=mask.numpy()),
    )
    # of the package itself, too: tensors in, tensors out
    assert torch.is_tensor(grpo_fast.high_entropy_mask(entropies.detach(), 0.8))
    correction = grpo_fast.rollout_correction(old.detach(), rollout.detach(), mask=mask)
    assert torch.equal(correction.weights, rollout_correction(old, rollout, mask=mask).weights)
    assert correction.mask.dtype == torch.bool
    assert torch.is_tensor(grpo_fast.off_policy_sequence_mask(old.detach(), rollout.detach(), advantages, 0.05))
    weights = rollout_correction(old, rollout, mask=mask).weights * found
    assert torch.isfinite(grpo_loss(old, None, advantages, mask=mask, rollout_is_weights=weights))


def test_whatever_the_default_dtype():
    old, rollout, mask = batch(torch.float32)
    expected = rollout_correction(old, rollout, mask=mask).weights
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(rollout_correction(old, rollout, mask=mask).weights, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rollout_correction(x.detach().numpy(), x), TypeError, "old_logps must be a tensor, got ndarray"),
        (lambda x: rollout_correction(x, None), TypeError, "rollout_logps must be a tensor, got NoneType"),
        (lambda x: rollout_correction(x, x.to("meta")), TypeError, "rollout_logps must be on the CPU"),
        (lambda x: rollout_correction(x, x[0]), ValueError, r"rollout_logps must have shape \(6, 30\) as old_logps"),
        (lambda x: rollout_correction(x, x, mask=[1]), TypeError, "mask must be a tensor, got list"),
        (lambda x: rollout_correction(x, x, upper=-1), ValueError, "upper must be a number in"),
        (lambda x: rollout_correction(x, x, uper=1), TypeError, "no argument 'uper': did you mean 'upper'"),
        (lambda x: off_policy_sequence_mask(x, x, [1.0], 1), TypeError, "advantages must be a tensor"),
        (lambda x: high_entropy_mask(x, 2), ValueError, "quantile must be a number in"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(batch()[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_beside_a_compiled_graph():
    old, rollout, mask = batch()

    @torch.compile
    def step(logps):
        correction = rollout_correction(old, rollout, mask=mask)
        return grpo_loss(logps, old, torch.ones(6), kl=K3(0.1), ref_logps=old, rollout_is_weights=correction.weights)

    logps = (old.detach() + 0.1).requires_grad_()
    weights = rollout_correction(old, rollout, mask=mask).weights
    expected = grpo_loss(logps, old, torch.ones(6), kl=K3(0.1), ref_logps=old, rollout_is_weights=weights)
    assert step(logps).item() == expected.item()

"""Arrays of other libraries: what can be read is, bfloat16 in float32; of the rest one sentence says what helps."""

import numpy as np
import pytest

from grpo_fast import K3, Clip, group_advantages, grpo_loss, grpo_objective, grpo_stats, reference

rng = np.random.default_rng(0)
LOGPS = -rng.exponential(size=(3, 7)).astype(np.float32)
OLD, REF = (LOGPS + rng.normal(0, 0.1, LOGPS.shape).astype(np.float32) for _ in "12")
ADVANTAGES = np.array([1.0, -2.0, 0.5], np.float32)
PROBABILITIES = [np.exp(x) for x in (OLD - LOGPS, LOGPS, OLD, REF)]
REWARDS = np.array([[1.0, 0.5, 3.0, 0.25]], np.float32)


def torch_bfloat16():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    return lambda x: torch.from_numpy(x).bfloat16(), lambda x: x.float().numpy()


def jax_bfloat16():
    jnp = pytest.importorskip("jax.numpy", reason="needs JAX")
    return lambda x: jnp.asarray(x, jnp.bfloat16), lambda x: np.asarray(x).astype(np.float32)


def ml_dtypes_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    return lambda x: x.astype(ml_dtypes.bfloat16), lambda x: x.astype(np.float32)


@pytest.mark.parametrize("library", [torch_bfloat16, jax_bfloat16, ml_dtypes_bfloat16])
def test_bfloat16_computes_in_float32(library):
    to_bfloat16, to_float32 = library()
    given = [to_bfloat16(x) for x in (LOGPS, OLD, ADVANTAGES, REF)]
    result = grpo_loss(*given, kl=K3(0.1), grad=True)
    expected = grpo_loss(*map(to_float32, given), kl=K3(0.1), grad=True)
    assert result.grad.dtype == np.float32
    assert (result.loss, result.stats) == (expected.loss, expected.stats)
    assert np.array_equal(result.grad, expected.grad)
    by_reference = reference.grpo_loss(*given, kl=K3(0.1), grad=True)
    assert by_reference.grad.dtype == np.float32
    assert by_reference.loss == reference.grpo_loss(*map(to_float32, given), kl=K3(0.1)).loss
    place = np.empty_like(LOGPS)
    assert np.array_equal(grpo_loss(*given, kl=K3(0.1), grad=place).grad, expected.grad)

    given = [to_bfloat16(x) for x in PROBABILITIES]
    assert grpo_stats(*given) == grpo_stats(*map(to_float32, given))
    assert grpo_objective(*given) == grpo_objective(*map(to_float32, given))
    assert reference.grpo_objective(*given) == reference.grpo_objective(*map(to_float32, given))
    advantages = np.asarray(group_advantages(to_bfloat16(REWARDS)))  # of a tensor, a tensor
    assert advantages.dtype == np.float32
    assert np.array_equal(advantages, group_advantages(to_float32(to_bfloat16(REWARDS))))


def refused(message, *args, **kwargs):
    with pytest.raises(TypeError, match=message):
        grpo_loss(*args, **kwargs)


def test_tensors_that_numpy_cannot_read_are_pointed_to_what_can():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    logps, old = torch.from_numpy(LOGPS), torch.from_numpy(OLD)
    assert grpo_loss(logps, old, torch.from_numpy(ADVANTAGES)).loss == grpo_loss(LOGPS, OLD, ADVANTAGES).loss
    refused(
        "logps must not require a gradient here: grpo_fast.torch.grpo_loss is", logps.clone().requires_grad_(), old, 1
    )
    refused("old_logps must not require", logps, old.clone().requires_grad_(), ADVANTAGES)
    refused("logps must be on the CPU, got a tensor on meta: logps.cpu", logps.to("meta"), old, ADVANTAGES)
    with pytest.raises(TypeError, match="rewards must not require"):
        group_advantages(torch.ones(1, 2, requires_grad=True))
    nested = torch.nested.nested_tensor([logps[0], logps[1, :3]], layout=torch.jagged)
    refused(r"logps must not be nested: logps.values\(\) is packed, with cu_seqlens=logps.offsets\(\)", nested, None, 1)
    packed = grpo_loss(nested.values(), None, ADVANTAGES[:2], cu_seqlens=nested.offsets())
    assert packed.stats.sequences == 2


@pytest.mark.parametrize("normalizer", [np.array(8.0), np.float32(8), np.int64(8), 8])
def test_numbers_of_any_kind(normalizer):
    expected = grpo_loss(LOGPS, OLD, ADVANTAGES, normalizer=8.0, surrogate=Clip(0.25))
    found = grpo_loss(LOGPS, OLD, ADVANTAGES, normalizer=normalizer, surrogate=Clip(normalizer / 32))
    assert (found.loss, found.stats) == (expected.loss, expected.stats)


def test_numbers_of_other_libraries():
    expected = grpo_loss(LOGPS, OLD, ADVANTAGES, normalizer=8.0, surrogate=Clip(0.25))
    for name, make in (("torch", "tensor"), ("jax.numpy", "asarray")):
        library = pytest.importorskip(name)
        eight = getattr(library, make)(8.0)
        assert grpo_loss(LOGPS, OLD, ADVANTAGES, normalizer=eight, surrogate=Clip(eight / 32))[2] == expected.stats


def test_packed_batches_with_more_around_them():
    flat, bounds = LOGPS.reshape(-1), [0, 7, 14]
    with pytest.raises(ValueError, match=r"got 0 to 14; without padding at the end: logps\[:14\]"):
        grpo_loss(flat, None, ADVANTAGES[:2], cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"beside logps \(1, 21\): logps\[0\] is"):
        grpo_loss(flat[None], None, ADVANTAGES[:2], cu_seqlens=bounds)

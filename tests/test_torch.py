"""The loss of tensors is that of arrays and that of the textbook, wherever PyTorch may call it."""

import math
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from combinations import ARRAYS, COMBINATIONS, F8, REGIONS, SEQ_MEAN, TOKEN, Row, batch, textbook
from interpreter import python
from numpy.testing import assert_allclose, assert_array_equal

import grpo_fast
from grpo_fast import K3, Clip, Stats

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 - needs torch

from grpo_fast.torch import _operator, grpo_loss  # noqa: E402 - needs torch

HALVES = [torch.bfloat16, torch.float16]
ROW = Row(Clip(0.1, 0.3, 1.8), K3(0.3), TOKEN, F8, "padded", TOKEN, TOKEN, SEQ_MEAN, 3.7, False, True, TOKEN)
LEGAL = {"loss_weights": 1.0}


def tensors(arguments, grad=True):
    """The same arguments, arrays as tensors, of which ``logps`` requires a gradient."""
    found = {name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    found["logps"].requires_grad_(bool(grad))
    return found


def clean(lengths=(5, 0, 40, 3), seed=0):
    """The tensors of `ROW`, with numbers in the masked places: a function of NaN has no slope, of 0 neither."""
    arguments = batch(ROW, list(lengths), seed=seed)
    keep = arguments["mask"] != 0
    given = [name for name in ARRAYS if arguments[name] is not None]
    return tensors(arguments | {name: np.where(keep, arguments[name], LEGAL.get(name, -1.0)) for name in given})


def loss_and_grad(arguments, function=grpo_loss, **changes):
    arguments = arguments | changes
    loss = function(**arguments)
    return loss.item(), torch.autograd.grad(loss, arguments["logps"])[0]


# --- the same as … ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", COMBINATIONS, ids=COMBINATIONS.index)
def test_is_the_loss_of_arrays_and_of_the_textbook(row):
    arrays = batch(row, [5, 0, 40, 300, 1], seed=3)
    ours = tensors(arrays, row.grad)
    loss, stats = grpo_loss(**ours, return_stats=True)
    expected = grpo_fast.grpo_loss(**arrays, grad=bool(row.grad))
    assert loss.dtype == ours["logps"].dtype
    assert loss.item() == row.dtype(expected.loss)
    assert stats == expected.stats
    assert loss.requires_grad == bool(row.grad)
    theirs = tensors(arrays | {name: x.astype(F8) for name in ARRAYS if (x := arrays[name]) is not None})
    right = textbook(**theirs)
    # A float32 term has some 16 roundings of 2⁻²⁴ of its largest part; the parts are of the size 1 to 10 here.
    assert loss.item() == pytest.approx(right.item(), rel=1e-12 if row.dtype is F8 else 1e-4)
    if not row.grad:
        return
    loss.backward()
    right.backward()
    assert_array_equal(ours["logps"].grad.numpy(), expected.grad)
    if row.dtype is F8:
        assert_allclose(ours["logps"].grad.numpy(), theirs["logps"].grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("trust_region", "row"), REGIONS, ids=range(len(REGIONS)))
def test_trust_regions_are_those_of_arrays(trust_region, row):
    arrays = batch(row, [5, 0, 40, 300, 1], seed=3) | {"trust_region": trust_region}
    ours = tensors(arrays, row.grad)
    loss, stats = grpo_loss(**ours, return_stats=True)
    expected = grpo_fast.grpo_loss(**arrays, grad=bool(row.grad))
    assert (loss.item(), stats) == (row.dtype(expected.loss), expected.stats)
    if row.grad:
        loss.backward()
        assert_array_equal(ours["logps"].grad.numpy(), expected.grad)


def test_gradcheck():
    arguments = clean(lengths=(3, 0, 5))
    logps = arguments.pop("logps")
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, **arguments), logps)


def test_through_a_graph_of_its_own_scale():
    arguments = clean()
    leaf = arguments["logps"].detach().clone().requires_grad_()

    def total(function):
        logps = torch.nn.functional.logsigmoid(leaf)
        loss = 3 * function(**arguments | {"logps": logps}) + (leaf**2).sum()
        return loss.item(), torch.autograd.grad(loss, leaf)[0].numpy()

    (loss, grad), (expected, slope) = total(grpo_loss), total(textbook)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_allclose(grad, slope, rtol=1e-12, atol=1e-12)


def test_backward_twice_gives_the_same_twice():
    arguments = clean()
    logps = arguments["logps"]
    _, expected = loss_and_grad(arguments)
    loss = grpo_loss(**arguments)
    loss.backward(retain_graph=True)
    first = logps.grad
    first.mul_(7)  # of its owner, who may do so
    logps.grad = None
    (2 * loss).backward(retain_graph=True)
    assert_array_equal(logps.grad, 2 * expected)
    loss.backward()
    assert_array_equal(logps.grad, 3 * expected)
    assert_array_equal(first, 7 * expected)


class Sizes(TorchDispatchMode):
    """The sizes of the tensors that are made meanwhile."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if torch.is_tensor(found) and func is not torch.ops.aten.detach.default:
            self.sizes.add(found.numel())
        return found


def test_the_gradient_is_handed_on_uncopied():
    # from the forward pass to .grad: the memory that the operator returned
    arguments = clean()
    loss = grpo_loss(**arguments)
    (saved,) = loss.grad_fn.saved_tensors
    address = saved.data_ptr()
    del saved
    with Sizes() as made:
        loss.backward()
    assert arguments["logps"].grad.data_ptr() == address
    assert made.sizes == {1}  # the 1 that it begins with: nothing as large as the gradient, which is but referred to


def test_tensors_are_not_copied(monkeypatch):
    seen = {}

    def spy(*arrays, **options):
        seen.update(zip(("logps", "old_logps", "advantages", "ref_logps"), arrays, strict=True), **options)
        return grpo_fast.grpo_loss(*arrays, **options)

    monkeypatch.setattr("grpo_fast.torch.loss_of_arrays", spy)
    arguments = clean() | {"mask": torch.ones(4, 40, dtype=torch.bool)}
    arguments = {name: x[:, :40] if torch.is_tensor(x) and x.dim() == 2 else x for name, x in arguments.items()}
    arguments = {name: x.detach().contiguous() if torch.is_tensor(x) else x for name, x in arguments.items()}
    arguments["logps"].requires_grad_()
    grpo_loss(**arguments)
    given = {name: x for name, x in arguments.items() if torch.is_tensor(x)}
    assert {name: seen[name].ctypes.data for name in given} == {name: x.data_ptr() for name, x in given.items()}


# --- modes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(mode, monkeypatch):
    arguments = clean()
    expected, _ = loss_and_grad(arguments)
    asked = []

    def spy(*arrays, **options):
        asked.append(options["grad"])
        return grpo_fast.grpo_loss(*arrays, **options)

    monkeypatch.setattr("grpo_fast.torch.loss_of_arrays", spy)
    with mode():
        loss = grpo_loss(**arguments)
    assert loss.item() == expected
    assert not loss.requires_grad
    grpo_loss(**arguments | {"logps": arguments["logps"].detach()})
    grpo_loss(**arguments)
    assert asked == [False, False, True]


def test_only_logps_get_a_gradient():
    arguments = clean()
    others = [arguments[name].requires_grad_() for name in ("old_logps", "advantages", "ref_logps")]
    grpo_loss(**arguments).backward()
    assert arguments["logps"].grad is not None
    assert [x.grad for x in others] == [None] * 3
    arguments["logps"] = arguments["logps"].detach()
    assert not grpo_loss(**arguments).requires_grad


def test_differentiating_twice_is_refused():
    arguments = clean()
    with pytest.raises(RuntimeError, match="can be differentiated once: its gradient is known as numbers"):
        torch.autograd.grad(grpo_loss(**arguments), arguments["logps"], create_graph=True)


def schema(arguments, grad=False, stats=False):
    """The arguments of the operator behind ``grpo_loss``, for `ROW`."""
    found = {name: x for name, x in arguments.items() if name not in ("surrogate", "kl")}
    found["normalizer"] = torch.tensor(3.7, dtype=torch.float64)
    found |= {"surrogate": "Clip", "surrogate_numbers": [0.1, 0.3, 1.8], "kl": "K3", "kl_numbers": [0.3, 1.0]}
    found |= {"trust_region": "TV", "trust_region_numbers": [0.1, 0.05]}
    return found | {"grad": grad, "return_stats": stats}


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_keeps_its_promises(grad, stats):
    arguments = clean()
    arguments["logps"] = arguments["logps"].detach().requires_grad_(grad)
    torch.library.opcheck(_operator, (), schema(arguments, grad, stats))


# --- torch.compile ----------------------------------------------------------------------------------------------------
no_compiler = not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))
no_header = not (Path(sysconfig.get_path("include")) / "Python.h").exists()
needs_compiler = pytest.mark.skipif(no_compiler or no_header, reason="inductor needs a C++ compiler and Python.h")
backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile about torch


@pytest.mark.slow
@backends
@own_warnings
def test_compiled_in_full(backend):
    arguments = clean()
    leaf, mask = arguments.pop("logps"), arguments["mask"]

    def step(leaf, epsilon, **arguments):
        surrogate = Clip(epsilon, 0.3, 1.8)  # made where it is used
        return 2 * grpo_loss(torch.nn.functional.logsigmoid(leaf), **arguments | {"surrogate": surrogate})

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for changes in ({}, {"normalizer": torch.tensor(5)}, {"normalizer": torch.tensor(6)}):
        expected, loss = (f(leaf, 0.1, **arguments | changes) for f in (step, compiled))
        # inductor has another logsigmoid; the loss itself is the same operator, to the bit
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        slopes = [torch.autograd.grad(x, leaf)[0] for x in (loss, expected)]
        assert_allclose(*slopes, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert compiled(leaf, 0.1, **arguments).item() == pytest.approx(step(leaf, 0.1, **arguments).item(), rel=1e-12)
    bad = torch.where(mask != 0, math.nan, 0.0)
    with pytest.raises(ValueError, match=r"old_logps must be finite where it is not masked, got old_logps\[0, "):
        compiled(leaf, 0.1, **arguments | {"old_logps": bad})


@pytest.mark.slow
@own_warnings
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_stats_break_the_graph():
    arguments = clean()

    def step(**arguments):
        loss, stats = grpo_loss(**arguments, return_stats=True)
        return 2 * loss, stats

    loss, stats = torch.compile(step, backend="aot_eager")(**arguments)
    expected, right = step(**arguments)
    assert loss.item() == expected.item()
    assert stats == right
    torch.compiler.reset()  # else it would take the pieces that it has
    with pytest.raises(Exception, match=r"stats_of"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(**arguments)


# --- dtypes and layouts -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_compute_in_float32(dtype):
    row = ROW._replace(dtype=np.float32, surrogate=Clip(), layout="plain", weights=None)
    arguments = {name: x.to(dtype) if torch.is_tensor(x) else x for name, x in tensors(batch(row, [50])).items()}
    arguments["logps"] = arguments["logps"].detach().requires_grad_()
    wide = {name: x.detach().float() if torch.is_tensor(x) else x for name, x in arguments.items()}
    wide["logps"].requires_grad_()
    loss, grad = loss_and_grad(arguments)
    expected, slope = loss_and_grad(wide)
    assert grpo_loss(**arguments).dtype == torch.float32
    assert loss == expected
    assert grad.dtype == dtype
    assert_array_equal(grad.float(), slope.to(dtype).float())
    tiny = {"normalizer": 1e9}
    # Scaled in float32, as a GradScaler wants it: what float16 does not hold comes back.
    (scaled,) = torch.autograd.grad(2.0**30 * grpo_loss(**arguments | tiny), arguments["logps"])
    assert_array_equal(scaled.float(), (2.0**30 * loss_and_grad(wide | tiny)[1]).to(dtype).float())


def test_strides_do_not_matter():
    arguments = clean()
    expected, slope = loss_and_grad(arguments)
    apart = {}
    for name, x in arguments.items():
        if torch.is_tensor(x) and x.dim() == 2:
            everywhere = torch.full((x.shape[1], 3 * x.shape[0]), 9, dtype=x.dtype)
            everywhere[:, 1::3] = x.detach().t()
            x = everywhere[:, 1::3].t()
        apart[name] = x
    assert not apart["logps"].is_contiguous()
    loss, grad = loss_and_grad(apart | {"logps": apart["logps"].requires_grad_()})
    assert loss == expected
    assert_array_equal(grad, slope)


def test_ref_logps_are_not_looked_at_without_a_kl():
    row = next(row for row in COMBINATIONS if row.kl is None and row.grad)
    arguments = tensors(batch(row, [5, 40]))
    assert grpo_loss(**arguments | {"ref_logps": "anything"}) == grpo_loss(**arguments | {"ref_logps": None})


# --- elsewhere --------------------------------------------------------------------------------------------------------
WORKER = """
import torch
from test_torch import loss_and_grad, clean
from grpo_fast._kernels.threads import WORTH_SHARING

MANY = [WORTH_SHARING, 5]  # for which threads are woken, but in a forked child

class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, seed):
        return loss_and_grad(clean(lengths=MANY, seed=seed))

here = [Losses()[seed] for seed in range(2)]
there = list(torch.utils.data.DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
for (loss, grad), (expected, slope) in zip(there, here, strict=True):
    assert loss == expected and torch.equal(grad, slope)
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_workers_of_a_data_loader():
    assert python(WORKER) == "same\n"


RANKS = """
import sys
import torch
import torch.distributed as dist
from test_torch import grpo_loss, loss_and_grad, clean

def rank(number, store, results):
    dist.init_process_group("gloo", init_method="file://" + store, rank=number, world_size=2)
    mine = slice(0, 1) if number == 0 else slice(1, 4)
    whole = clean()
    part = {name: x[mine] if torch.is_tensor(x) else x for name, x in whole.items()} | {"aggregation": "token-mean"}
    part["logps"] = part["logps"].detach().requires_grad_()
    part["normalizer"] = (part["mask"] != 0).sum()
    dist.all_reduce(part["normalizer"])  # the unmasked tokens of all ranks
    loss, stats = grpo_loss(**part, return_stats=True)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    parts = [None, None]
    dist.all_gather_object(parts, (part["logps"].grad, stats))
    if number == 0:
        torch.save((total, torch.cat([grad for grad, _ in parts]), sum(stats for _, stats in parts)), results)
    dist.destroy_process_group()

if __name__ == "__main__":
    rank(int(sys.argv[1]), *sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_ranks_add_up(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    results = str(tmp_path / "results")
    launch = f"""
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, {str(script)!r}, str(number), {str(tmp_path / "store")!r}, {results!r}])
         for number in range(2)]
assert [rank.wait() for rank in ranks] == [0, 0]
"""
    python(launch, GLOO_SOCKET_IFNAME="lo") if os.path.exists("/sys/class/net/lo") else python(launch)
    total, grad, stats = torch.load(results, weights_only=False)
    whole = clean() | {"aggregation": "token-mean", "normalizer": None}
    expected, right = grpo_loss(**whole, return_stats=True)
    assert total.item() == pytest.approx(expected.item(), rel=1e-15)  # of two sums, each rounded once
    assert_array_equal(grad, loss_and_grad(whole)[1])
    assert isinstance(stats, Stats)
    assert stats.loss == right.loss
    assert stats.as_dict() == pytest.approx(right.as_dict(), rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("normalizer", [None, 8.0, 3])
def test_nothing_depends_on_a_default_device_or_dtype(normalizer):
    def found():
        logps = torch.tensor([[-1.0, -2.0]], dtype=torch.float32, device="cpu", requires_grad=True)
        advantages = torch.tensor([1.0], dtype=torch.float32, device="cpu")
        loss, stats = grpo_loss(logps, logps.detach() - 0.5, advantages, normalizer=normalizer, return_stats=True)
        loss.backward()
        return loss.item(), loss.dtype, loss.device.type, logps.grad.tolist(), stats

    expected = found()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert found() == expected
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)

"""Tensors → arrays: which may come in, and how, without a copy where there is a choice."""

import inspect
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor

HALVES = (torch.bfloat16, torch.float16)
_INTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (torch.float32, torch.float64, *HALVES, *_INTS)
#: Whether it can be said why a graph must end: since PyTorch 2.7.
CAN_BE_SAID = "reason" in inspect.signature(torch.compiler.disable).parameters


def refuse_unless_plain(name: str, tensor: Any) -> None:
    """Raise the TypeError unless it is a dense tensor on the CPU, of a dtype that can be computed with."""
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} must be on the CPU, got a tensor on {tensor.device}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        packed = f": {name}.values() is packed, with cu_seqlens={name}.offsets()" if tensor.is_nested else ""
        raise TypeError(f"{name} must be a dense tensor, got one that is sparse or nested{packed}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must hold float64, float32, bfloat16, float16, ints or bools, got {tensor.dtype}")


def constant(name: str, tensor: Any, *, optional: bool = True) -> Tensor | None:
    """The tensor, checked and detached from its graph: else the loss would seem to have a gradient for it."""
    if tensor is None and optional:
        return None
    refuse_unless_plain(name, tensor)
    return tensor.detach()


def array(tensor: Any) -> Any:
    """The tensor as an array: of the same memory, but for bfloat16 and float16, which become float32."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype in HALVES else tensor).numpy(force=True)

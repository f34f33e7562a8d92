"""torch.compile for the CPU, or in one line why it is not to be had."""

import textwrap
import warnings
from collections.abc import Callable
from typing import Any


def compiled_or_missing(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function)``, one kernel for each shape; ImportError where nothing can be compiled."""
    import torch

    torch._dynamo.config.recompile_limit = 1000  # each case has its own kernel; past the limit of 8 all would be eager
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, which pytest makes errors
            torch.compile(lambda x: x.exp().sum(), fullgraph=True)(torch.ones(8))
    except Exception as error:  # no C++ compiler, no Python.h, a Python that torch.compile does not know: many types
        raise ImportError(textwrap.shorten(str(error), 160)) from None
    return torch.compile(function, dynamic=False, fullgraph=True)

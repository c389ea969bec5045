"""Is autocast on where a tensor is, and how to switch it off there."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_fast import torch_internals


def autocasts(x: Tensor) -> bool:
    """Tell whether autocast is on where `x` is; torch can't be asked for meta, which knows none."""
    if x.is_cpu:  # first, as the name of a device's type takes longer than all the rest
        return torch_internals.autocasts_anything() and torch.is_autocast_enabled("cpu")
    kind = x.device.type
    known = kind == "cuda" or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off where `x` is, if it is on."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()

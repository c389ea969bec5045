"""Attention whose output projection has an adapter, and what it has to give."""

from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_


def attention(lib: ModuleType = lora, **kwargs: Any) -> nn.MultiheadAttention:
    """Attention of width 8 whose output projection has an adapter."""
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    module.out_proj = randomize_(lib.Linear(8, 8, r=2, lora_alpha=3, **kwargs))
    return module


def attended(module: nn.MultiheadAttention, x: Tensor, weight: Tensor) -> Tensor:
    """Self-attention by its formula, with `weight` for the output projection."""
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    heads = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    return F.linear(heads.transpose(1, 2).flatten(2), weight, module.out_proj.bias)


def effective(layer: Any) -> Tensor:
    return layer.weight.detach() + layer.scaling * layer.lora_B @ layer.lora_A

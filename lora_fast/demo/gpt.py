"""A small byte-level GPT whose attention takes its q, k, v projection from a layer library."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class Size:
    """Size of the model."""

    layers: int = 4
    width: int = 192
    heads: int = 4
    context: int = 128


@dataclass(frozen=True)
class Adapter:
    """The adapter of loralib's own GPT-2 recipe: q and v of every layer."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    enable_lora: tuple[bool, bool, bool] = (True, False, True)


class GPT(nn.Module):
    """A decoder with learned positions: byte ids (batch, time) to logits (batch, time, 256).

    Args:
        library: `loralib` or `lora_fast`.
        size: size of the model.
        adapter: the adapter; None for the plain model.
    """

    def __init__(self, library: ModuleType, size: Size, adapter: Adapter | None) -> None:
        super().__init__()
        self.context = size.context
        self.bytes = nn.Embedding(BYTES, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(library, size, adapter) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the byte that follows each of `ids`."""
        positions = self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.bytes(ids) + positions)))
        return logits


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and beside the residual stream."""

    def __init__(self, library: ModuleType, size: Size, adapter: Adapter | None) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = _qkv(library, size.width, adapter)
        self.out = nn.Linear(size.width, size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


def _qkv(library: ModuleType, width: int, adapter: Adapter | None) -> Any:
    # As in examples/NLG of loralib, weights are stored (in, out), as GPT-2 stores them.
    if adapter is None:
        return library.MergedLinear(width, 3 * width, fan_in_fan_out=True, enable_lora=[False])
    return library.MergedLinear(
        width,
        3 * width,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        enable_lora=list(adapter.enable_lora),
        fan_in_fan_out=True,
    )


def adapted(library: ModuleType, base: GPT, size: Size, adapter: Adapter, seed: int) -> GPT:
    """Return a model with the weights of `base` and a fresh adapter, the only part that trains."""
    torch.manual_seed(seed)
    model = GPT(library, size, adapter)
    model.load_state_dict(base.state_dict(), strict=False)
    library.mark_only_lora_as_trainable(model)
    return model

"""What `torch.jit.script` compiles in the place of a layer.

TorchScript knows neither properties with locks nor this package's dispatch, and takes instead the
module that a layer's `__prepare_scriptable__` returns. It has the layer's parameters, under the
same names, except where the layer is merged: then a copy of the merged weight, because the layer's
own is restored by its next `train()`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Scripted(nn.Module):
    """What the linear layers and the embedding share: their weight, A and B."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.adapted = layer._has_adapter() and not layer.merged
        self.weight = _copied(layer.weight) if layer.merged else layer.weight
        if self.adapted:
            self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling


class ScriptedLinear(_Scripted):
    """`Linear` and `MergedLinear`, with an adapter or merged, as TorchScript can compile them."""

    __constants__ = ("adapted", "transposed")

    def __init__(self, layer: Any, blocks: list[tuple[int, int]]) -> None:
        """Take the parameters of `layer`; `blocks` are its output columns that have an adapter."""
        super().__init__(layer)
        self.transposed = layer.fan_in_fan_out
        self.bias = layer.bias
        self.blocks = blocks
        self.dropout = _module(layer.lora_dropout)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features)."""
        y = F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        if self.adapted:
            s = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling
            lora_B, rank = self.lora_B.to(x.dtype), self.lora_B.size(1)
            row = 0
            for i in range(len(self.blocks)):
                lo, hi = self.blocks[i]
                update = F.linear(s[..., i * rank : (i + 1) * rank], lora_B[row : row + hi - lo])
                y = y + F.pad(update, [lo, y.size(-1) - hi])
                row += hi - lo
        return y


class ScriptedEmbedding(_Scripted):
    """`Embedding` as TorchScript can compile it."""

    __constants__ = ("adapted",)

    def __init__(self, layer: Any) -> None:
        """Take the parameters and settings of `layer`."""
        super().__init__(layer)
        self.padding_idx: int | None = layer.padding_idx
        self.max_norm: float | None = layer.max_norm
        self.norm_type: float = layer.norm_type
        self.by_freq: bool = layer.scale_grad_by_freq
        self.sparse: bool = layer.sparse

    def forward(self, x: Tensor) -> Tensor:
        """Look up `x`, integer indices of any shape."""
        y = F.embedding(
            x,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.by_freq,
            self.sparse,
        )
        if self.adapted:
            a = F.embedding(x, self.lora_A.t(), self.padding_idx, None, 2.0, self.by_freq)
            y = y + F.linear(a.to(y.dtype) * self.scaling, self.lora_B.to(y.dtype))
        return y


class ScriptedConv(nn.Module):
    """`Conv1d`, `Conv2d` and `Conv3d` as TorchScript can compile them."""

    __constants__ = ("adapted",)

    def __init__(self, layer: Any) -> None:
        """Take the convolution and the adapter of `layer`."""
        super().__init__()
        self.conv = layer.conv
        self.adapted = layer._has_adapter() and not layer.merged
        if self.adapted:
            self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling
        elif layer.merged:
            self.conv = _with_own_weight(layer.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`."""
        weight = self.conv.weight
        if self.adapted:
            flat = weight.reshape(self.lora_B.size(0), self.lora_A.size(1))
            lora_A, lora_B = self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
            weight = torch.addmm(flat, lora_B * self.scaling, lora_A).view_as(weight)
        y: Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
        return y


def _copied(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _with_own_weight(conv: nn.Module) -> nn.Module:
    """A copy of `conv` that shares all but the weight."""
    copy = conv.__new__(type(conv))
    copy.__dict__ = {**conv.__dict__, "_parameters": dict(conv._parameters)}
    copy._parameters["weight"] = _copied(conv.weight)  # type: ignore[arg-type]
    return copy


def _module(dropout: Any) -> nn.Module:
    return dropout if isinstance(dropout, nn.Module) else nn.Identity()

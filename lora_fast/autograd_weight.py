"""The autograd of the fused merged weight: two thin products of dW' with A and B."""

from typing import Any

import torch
from torch import Tensor

from lora_fast import ops
from lora_fast.autocast import no_autocast
from lora_fast.autograd import keep_undefined


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling (B A).view(W) by the fused kernel, in the weight's dtype under autocast too."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, lora_A, lora_B)):
        merged: Tensor = _MergedWeight.apply(weight, lora_A, lora_B, scaling)
    else:
        merged = ops.launcher("merged_weight", weight)(weight, lora_A, lora_B, scaling)
    return merged


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        _, need_A, need_B = ctx.needs_input_grad[:3]
        ctx.scaling, ctx.shape = scaling, (lora_B.shape[0], lora_A.shape[1])
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        ctx.save_for_backward(lora_A if need_B else None, lora_B if need_A else None)
        keep_undefined(ctx)
        launch = ops.launcher("merged_weight", weight)
        merged: Tensor = launch(weight, lora_A, lora_B, scaling)
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Ordinary torch code, so that it has gradients again.
        (dweight,) = grads
        if dweight is None:
            return (None,) * 4
        lora_A, lora_B = ctx.saved_tensors
        need_weight, need_A, need_B = ctx.needs_input_grad[:3]
        dA = dB = None
        flat = dweight.reshape(ctx.shape)
        with no_autocast(dweight):
            if need_A:
                dA = ((lora_B.to(flat.dtype) * ctx.scaling).t() @ flat).to(ctx.dtypes[0])
            if need_B:
                dB = (flat @ lora_A.to(flat.dtype).t() * ctx.scaling).to(ctx.dtypes[1])
        return dweight if need_weight else None, dA, dB, None

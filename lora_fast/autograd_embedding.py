"""The autograd of the fused embedding.

Saved for backward: the indices, beside A and B. What was looked up in A is gathered again, which
costs less memory traffic than to keep it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import eager, ops
from lora_fast.autograd import keep_undefined


def lora_embedding(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Y = W[input] + scaling A^T[input] B^T by the fused kernels.

    The result has the weight's dtype and so has the product, under autocast too.
    """
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, lora_A, lora_B)):
        if padding_idx is not None:
            padding_idx %= weight.shape[0]
        y: Tensor = _LoraEmbedding.apply(
            *(weight, lora_A, lora_B, input, scaling, padding_idx, scale_grad_by_freq, sparse)
        )
    else:
        forward = ops.launcher("lora_embedding_fwd", input)
        y = forward(input, weight, lora_A, lora_B, scaling)
    return y


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        input: Tensor,
        scaling: float,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        sparse: bool,
    ) -> Tensor:
        forward = ops.launcher("lora_embedding_fwd", input)
        y: Tensor = forward(input, weight, lora_A, lora_B, scaling)
        ctx.save_for_backward(input, lora_A, lora_B)
        ctx.num, ctx.scaling, ctx.padding_idx = weight.shape[0], scaling, padding_idx
        ctx.by_freq, ctx.sparse = scale_grad_by_freq, sparse
        keep_undefined(ctx)
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        if dy is None:
            return (None,) * 8
        # Once: what unpacks them under activation checkpointing hands them out one time only.
        saved = input, lora_A, lora_B = ctx.saved_tensors
        need_weight, need_A, need_B = ctx.needs_input_grad[:3]
        dW: Tensor | None = None
        dA: Tensor | None = None
        dB: Tensor | None = None
        if need_weight:
            padding = -1 if ctx.padding_idx is None else ctx.padding_idx
            flat = (dy.reshape(-1, dy.shape[-1]), input.reshape(-1))  # a scalar, too
            dW = torch.ops.aten.embedding_backward(*flat, ctx.num, padding, ctx.by_freq, ctx.sparse)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dA, dB = _differentiable_grads(ctx, saved, dy)
        elif need_A or need_B:
            dA, dB = ops.launcher("lora_embedding_bwd", dy)(
                *(dy, input, lora_A, lora_B, ctx.scaling, ctx.padding_idx, ctx.by_freq),
                *(not ctx.sparse, [need_A, need_B]),
            )
        if dA is not None and need_A and ctx.sparse:
            dA = eager.columns_gradient(input, dA, lora_A.shape, ctx.padding_idx, ctx.by_freq)
        return (dW, dA if need_A else None, dB if need_B else None, *([None] * 5))


def _differentiable_grads(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dA (of `sparse` its addends) and dB as ordinary torch code, for `create_graph=True`."""
    input, lora_A, lora_B = saved
    _, need_A, need_B = ctx.needs_input_grad[:3]
    rows, index = dy.reshape(-1, dy.shape[-1]), input.reshape(-1)
    options = {"padding_idx": ctx.padding_idx, "scale_grad_by_freq": ctx.by_freq}
    dA = dB = None
    if need_A:
        # As loralib scales, before the rounding: the product alone may be too small for fp16.
        ds = (rows * ctx.scaling @ lora_B.to(dy.dtype)).to(lora_A.dtype)
        padding = -1 if ctx.padding_idx is None else ctx.padding_idx
        dA = ds
        if not ctx.sparse:
            columns = torch.ops.aten.embedding_backward(
                ds, index, ctx.num, padding, ctx.by_freq, False
            )
            dA = columns.t()
    if need_B:
        s = F.embedding(index, lora_A.to(dy.dtype).t(), **options) * ctx.scaling
        dB = (rows.t() @ s).to(lora_B.dtype)
    return dA, dB

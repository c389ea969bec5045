"""`lora_linear` on torch's own kernels in the order in which they take least: the update first.

S = scaling dropout(X) A^T, then S B^T + bias, on which the large product goes on adding. Three
launches forward and five backward, which cost the host less than those of the fused kernels: on a
GPU, what counts where they have little to do. Backward keeps x, S and a byte a mask element.
"""

from typing import Any

import torch
from torch import Tensor

from lora_fast import eager


def lora_first(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Y = X W^T + scaling (dropout(X) A^T) B^T + bias.

    Args:
        x: (..., K). All tensors have one floating-point dtype and one device.
        weight: (N, K), any strides.
        lora_A: (R, K).
        lora_B: (N, R).
        scaling: lora_alpha / r.
        bias: (N,) or None.
        dropout_p: rate in [0, 1]; 0 draws nothing.

    Returns:
        (..., N), contiguous, the dtype of `x`.
    """
    return _LoraFirst.apply(  # type: ignore[no-any-return]
        x, weight, lora_A, lora_B, bias, scaling, dropout_p
    )


class _LoraFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
    ) -> Tensor:
        rows = dropped = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        keep, keep_scale = None, 1.0
        if dropout_p > 0.0:
            keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
            dropped, keep = torch.native_dropout(rows, dropout_p, True)
        s = _scaled(dropped, lora_A.t(), scaling)
        up = lora_B.t()
        y = torch.mm(s, up) if bias is None else torch.addmm(bias, s, up)
        y.addmm_(rows, weight.t())
        # Without dX the weight plays no part, and a merge between forward and backward is harmless.
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x, weight if needs[0] or needs[1] else None, lora_A, lora_B, s, keep)
        ctx.scaling, ctx.keep_scale = scaling, keep_scale
        ctx.out_features = weight.shape[0]
        return y if x.dim() == 2 else eager.as_own(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.blocks = ((0, ctx.out_features),)
            return (*eager.backward_through_reference(ctx, grads[0]), None, None)
        x, weight, lora_A, lora_B, s, keep = ctx.saved_tensors
        need_x, need_weight, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        dy = grads[0] if x.dim() == 2 else grads[0].reshape(-1, ctx.out_features)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        dx = dW = dA = dB = dbias = None
        if need_x or need_A:
            ds = _scaled(dy, lora_B, ctx.scaling)
            if need_A:
                dA = ds.t() @ _kept(rows, keep, ctx.keep_scale)
            if need_x:
                dx = _kept(ds @ lora_A, keep, ctx.keep_scale).addmm_(dy, weight)
                dx = dx if x.dim() == 2 else dx.view(x.shape)
        if need_B:
            dB = dy.t() @ s
        if need_weight:
            dW = dy.t() @ rows
        if need_bias:
            dbias = dy.sum(0)
        return dx, dW, dA, dB, dbias, None, None


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`scaling * (a @ b)`, with the factor before the rounding and in no launch of its own."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _kept(x: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    return x if keep is None else torch.ops.aten.native_dropout_backward(x, keep, scale)

"""`lora_linear` on torch's own kernels in the order in which they take least: the update first.

S = dropout(X) A^T, then scaling S B^T + bias, on which the large product goes on adding. Three
launches forward and five backward, which cost the host less than those of the fused kernels: on a
GPU, what counts where they have little to do. Backward keeps x, S and a byte a mask element, and of
these what the gradients that are asked for need.
"""

from typing import Any

import torch
from torch import Tensor

from lora_fast import checks, eager, torch_internals
from lora_fast.autocast import no_autocast
from lora_fast.dropout import keep_scale
from lora_fast.products import add_mm_


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
        rows = dropped = eager.as_matrix(x)
        keep = None
        if dropout_p > 0.0:
            # Of x as it lies in memory, in whose order torch draws.
            dropped, keep = torch.native_dropout(x, dropout_p, True)
            dropped, keep = dropped.reshape(rows.shape), keep.reshape(rows.shape)
        s, up = torch.mm(dropped, lora_A.t()), lora_B.t()
        y = _scaled(s, up, scaling) if bias is None else torch.addmm(bias, s, up, alpha=scaling)
        add_mm_(y, rows, weight.t())
        need_x, need_weight, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_weight or need_A else None,
            # Without dX the weight plays no part, and a merge between forward and backward is
            # harmless.
            weight if need_x or need_weight else None,
            lora_A,
            lora_B,
            s if need_B else None,
            keep if need_x or need_weight or need_A else None,
        )
        ctx.scaling, ctx.keep_scale = scaling, keep_scale(dropout_p)
        ctx.in_shape, ctx.out_features = x.shape, weight.shape[0]
        ctx.set_materialize_grads(False)
        return y if x.dim() == 2 else eager.as_own(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 7
        with no_autocast(grads[0]):  # the operands have the dtypes of the forward
            # Once: what unpacks them under activation checkpointing hands them out one time only.
            saved = ctx.saved_tensors
            if torch.is_grad_enabled() and saved[0] is not None:
                ctx.spans = ((0, ctx.out_features),)
                return (*eager.backward_through_reference(ctx, saved, grads[0]), None, None)
            return (*_LoraFirst._gradients(ctx, saved, grads[0]), None, None)

    @staticmethod
    def _gradients(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable where x was not needed."""
        x, weight, lora_A, lora_B, s, keep = saved
        need_x, need_weight, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and need_x and need_B:
            raise checks.no_input_kept()
        dy = eager.as_matrix(dy)
        rows: Any = None if x is None else eager.as_matrix(x)
        dx = dW = dA = dB = dbias = None
        if need_x or need_A:
            ds = _scaled(dy, lora_B, ctx.scaling)
            if need_A:
                dA = ds.t() @ _kept(rows, keep, ctx.keep_scale)
            if need_x:
                delta = _kept(ds @ lora_A, keep, ctx.keep_scale)
                dx = delta + dy @ weight if _transformed() else add_mm_(delta, dy, weight)
                dx = dx if len(ctx.in_shape) == 2 else dx.view(ctx.in_shape)
        if need_B:
            dB = _scaled(dy.t(), s, ctx.scaling)
        if need_weight:
            dW = dy.t() @ rows
        if need_bias:
            dbias = dy.sum(0)
        return dx, dW, dA, dB, dbias


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`scaling * (a @ b)`, with the factor before the rounding and in no launch of its own."""
    if _transformed():  # whose rule for the other reads what it is to multiply by beta
        return a * scaling @ b  # as loralib scales dY: before the rounding here, too
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _transformed() -> bool:
    return torch_internals.functorch_level() is not None


def _kept(x: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    return x if keep is None else torch.ops.aten.native_dropout_backward(x, keep, scale)

"""Two orders in which plain torch can add a LoRA without a fused kernel, from their formulas.

Both run without dropout only; libraries that use them go back to their plain path for it.
"""

from typing import Any

import torch
from torch import Tensor

_Grads = tuple[Tensor | None, ...]


def addmm_order(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Y = X W^T + bias, then Y += scaling (X A^T) B^T in place: the order of Unsloth and Axolotl.

    Args:
        x: (M, K).
        weight: (N, K), frozen.
        bias: (N,) or None, frozen.
        a: (R, K).
        b: (N, R).
        scaling: factor of the update.
    """
    y: Tensor = _AddmmOrder.apply(x, weight, bias, a, b, scaling)
    return y


def lora_first(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Y = scaling (X A^T) B^T + bias, then Y += X W^T by the GEMM's own accumulation.

    Arguments as for `addmm_order`.
    """
    y: Tensor = _LoraFirst.apply(x, weight, bias, a, b, scaling)
    return y


class _AddmmOrder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = s
        y = torch.nn.functional.linear(x, weight, bias)
        return y.addmm_(x @ a.t(), b.t(), alpha=s)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> _Grads:
        (dy,), (x, weight, a, b) = dys, ctx.saved_tensors
        down = dy @ b
        da = torch.mm(down.t(), x).mul_(ctx.scaling)
        db = torch.mm(dy.t(), x @ a.t()).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(down, a, alpha=ctx.scaling) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None


class _LoraFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        ctx.scaling = s
        down = (x @ a.t()).mul_(s)
        ctx.save_for_backward(x, weight, a, b, down)
        y = down @ b.t() if bias is None else torch.addmm(bias, down, b.t())
        return y.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> _Grads:
        (dy,), (x, weight, a, b, down) = dys, ctx.saved_tensors
        ds = (dy @ b).mul_(ctx.scaling)
        dx = (ds @ a).addmm_(dy, weight) if ctx.needs_input_grad[0] else None
        return dx, None, None, ds.t() @ x, dy.t() @ down, None

"""The autograd of the fused operators.

Saved for backward: x itself, S = factor * (x * D) A^T and the packed dropout mask, beside the
parameters; each only where a gradient reads it.
"""

from typing import Any

import torch
from torch import Tensor

from lora_fast import blocks, checks, ops
from lora_fast.autocast import no_autocast
from lora_fast.blocks import Spans

_SEED_END = 2**63 - 1


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator, on the device.

    An ordinary torch op and no host read: `torch.manual_seed` and activation checkpointing replay
    it, each replay of a CUDA graph draws a fresh one, and torch.compile traces it.
    """
    return torch.randint(0, _SEED_END, (1,), device=device, dtype=torch.int64)


def keep_undefined(ctx: Any) -> None:
    """Have the backward told by None that nothing depends on an output, as torch's own are."""
    if not torch.compiler.is_compiling():  # torch.compile traces no such call
        ctx.set_materialize_grads(False)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    spans: Spans | None = None,
) -> Tensor:
    """Y = X W^T + scaling (dropout(X) A^T) B^T + bias by the fused kernels.

    With spans, the output columns of each adapter, it is `lora_merged_linear`. Under
    autocast x and weight are cast as torch's linear casts them; A, B and bias keep their dtype,
    and the kernels convert what they read.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    inputs = (x, weight, bias, lora_A, lora_B)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y: Tensor = _LoraLinear.apply(
            x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, spans
        )
    else:
        forward = ops.launcher("lora_linear_fwd", x)
        edges = None if spans is None else blocks.edges(spans)
        lora_B, scaling = _folded(x, lora_B, scaling)
        y = forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, edges)[0]
    return y


def _is_folded(x: Tensor, scaling: float) -> bool:
    """Tell whether the forward multiplies B by `scaling`: in fp16 S may be too large for that."""
    return x.dtype is torch.float16 and abs(scaling) > 1.0


def _folded(x: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, float]:
    """B and the factor that the forward's kernels round S with."""
    if not _is_folded(x, scaling):
        return lora_B, scaling
    # A bf16 product would be rounded twice, the first time to 8 bits.
    wide = lora_B.float() if lora_B.dtype is torch.bfloat16 else lora_B
    return wide * scaling, 1.0


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        spans: Spans | None,
    ) -> Tensor:
        y: Tensor
        edges = None if spans is None else blocks.edges(spans)
        b, factor = _folded(x, lora_B, scaling)
        y, s, mask = ops.launcher("lora_linear_fwd", x)(
            x, weight, bias, lora_A, b, factor, dropout_p, seed, edges
        )
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:5]
        ctx.scaling, ctx.dropout_p, ctx.spans, ctx.edges = scaling, dropout_p, spans, edges
        keep_undefined(ctx)
        ctx.bias_dtype = bias.dtype if bias is not None else y.dtype
        ctx.save_for_backward(
            x if need_weight or need_A else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            s if need_B else None,
            mask if seed is not None and (need_x or need_A) else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        if dy is None:
            return (None,) * 9
        # Once: what unpacks them under activation checkpointing hands them out one time only.
        saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        with no_autocast(dy):  # the operands have the dtypes of the forward
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = _differentiable_grads(ctx, saved, dy)
            else:
                s_scaling = ctx.scaling if _is_folded(dy, ctx.scaling) else 1.0
                grads = ops.launcher("lora_linear_bwd", dy)(
                    *(dy, *saved, ctx.scaling, ctx.dropout_p, needs, ctx.bias_dtype, ctx.edges),
                    s_scaling,
                )
        kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*kept, None, None, None, None)


def _differentiable_grads(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients as ordinary torch code, for `create_graph=True`: they have gradients again."""
    x, weight, lora_A, lora_B, s, mask = saved
    need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
    flat = dy.reshape(-1, dy.shape[-1])
    b, factor = _folded(dy, lora_B, ctx.scaling)
    a, b = lora_A.to(dy.dtype), b.to(dy.dtype)
    rows = x.reshape(-1, a.shape[1]) if x is not None else None
    if need_B and rows is None and need_x:
        raise checks.no_input_kept()
    drop = None
    if mask is not None:
        from lora_fast.kernels.dropout import keep_scale, unpack_mask

        drop = unpack_mask(mask, a.shape[1]).to(dy.dtype) * keep_scale(ctx.dropout_p)
    dropped = rows if rows is None or drop is None else rows * drop
    spans = ((0, flat.shape[1]),) if ctx.spans is None else ctx.spans
    columns = [flat[:, lo:hi] for lo, hi in spans]
    factors = blocks.rows(b, spans)
    ds = torch.cat([dy @ b for dy, b in zip(columns, factors, strict=True)], 1) * factor
    dx = dW = dbias = dA = dB = None
    if need_x:
        delta = ds @ a
        dx = flat @ weight + (delta if drop is None else delta * drop)
        dx = dx.view(*dy.shape[:-1], a.shape[1])
    if need_weight:
        assert rows is not None
        dW = flat.t() @ rows
    if need_bias:
        dbias = flat.sum(0).to(ctx.bias_dtype)
    if need_A:
        dA = (ds.t() @ dropped).to(lora_A.dtype)
    if need_B:
        # Where neither x nor A needs a gradient none flows through S, and the saved one serves;
        # the mask, which only their gradients read, was not kept.
        u = s if dropped is None or not (need_x or need_A) else dropped @ a.t() * factor
        ranks = blocks.columns(u, b.shape[1], spans)
        if _is_folded(dy, ctx.scaling):  # before the rounding: the product alone may be too small
            columns = [dy * ctx.scaling for dy in columns]
        dB = torch.cat([dy.t() @ u for dy, u in zip(columns, ranks, strict=True)]).to(lora_B.dtype)
    return dx, dW, dbias, dA, dB

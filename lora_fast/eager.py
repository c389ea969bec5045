"""The linear ops on torch's own kernels, with a backward written by hand.

Autograd over the reference formulas copies the output once for every block that an adapter adds
to, and keeps the dropped input beside the mask. Here the blocks are added in place, and backward
keeps the input itself, S = dropout(X) A^T unless it is larger than the weight, and a byte a mask
element. Serves plain tensors in eager mode; `lora_fast.backend` sends everything else to
`lora_fast.reference`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import blocks, delta, products, torch_internals
from lora_fast.autocast import autocasts, no_autocast
from lora_fast.blocks import Spans
from lora_fast.dropout import dropout, keep_scale
from lora_fast.reference import like, scaled_s


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    spans: Spans,
) -> Tensor:
    """Y = X W^T + bias; Y[:, lo:hi] += scaling (dropout(X) A_g^T) B_g^T for span g = (lo, hi).

    Args:
        x: (..., K). All tensors have one floating-point dtype and one device.
        weight: (N, K), any strides.
        lora_A: (R * len(spans), K).
        lora_B: (sum of their widths, R).
        scaling: lora_alpha / r.
        bias: (N,) or None.
        dropout_p: rate in [0, 1]; 0 draws nothing.
        spans: the output columns of each adapter.

    Returns:
        (..., N), contiguous, the dtype of `x`.
    """
    if not torch.is_grad_enabled():  # spares the host the making of a node
        return _forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, spans)[0]
    return _LowRankLinear.apply(  # type: ignore[no-any-return]
        x, weight, lora_A, lora_B, bias, scaling, dropout_p, spans
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    spans: Spans,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y, S and the dropout mask, None without dropout."""
    keep, dropped = None, as_matrix(x)
    y = products.linear(dropped, weight, bias)  # first, as it may take room beside its result
    if dropout_p > 0.0:
        dropped, keep = dropout(x, dropout_p)
        dropped = as_matrix(dropped)
    s = delta.add_(y, dropped, lora_A, lora_B, scaling, spans)
    return y if x.dim() == 2 else as_own(y, (*x.shape[:-1], y.shape[1])), s, keep


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, s, keep = _forward(*arguments)
        x, weight, lora_A, lora_B, _, scaling, dropout_p, spans = arguments
        need_x, need_weight, need_A, need_B, *_ = ctx.needs_input_grad
        # Of more rows than the weight has room for, S would take more than loralib's dense delta.
        keeps_s = need_B and s.numel() <= weight.numel()
        ctx.save_for_backward(
            # Where S is kept, only a second derivative may still read x for the gradient of B.
            x if need_weight or need_A or (need_B and (need_x or not keeps_s)) else None,
            # Without dX the weight plays no part, and a merge between forward and backward is
            # harmless.
            weight if need_x or need_weight else None,
            lora_A,
            lora_B,
            s if keeps_s else None,
            keep if need_x or need_A or (need_B and not keeps_s) else None,
        )
        ctx.scaling, ctx.spans = scaling, spans
        ctx.keep_scale = keep_scale(dropout_p)
        ctx.in_shape, ctx.out_features = x.shape, weight.shape[0]
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:  # nothing depends on what nothing was asked of
            return (None,) * 8
        if autocasts(dy):
            with no_autocast(dy):  # the operands have the dtypes of the forward
                return _LowRankLinear.backward(ctx, *grads)
        if torch.is_grad_enabled():
            saved = ctx.saved_tensors
            return (*backward_through_reference(ctx, saved, dy), None, None, None)
        return _LowRankLinear._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, s, keep = ctx.saved_tensors
        need_x, need_weight, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        dy = as_matrix(dy)
        rows: Any = None if x is None else as_matrix(x)
        dx = products.mm(dy, weight) if need_x else None
        saved = (dy, rows, lora_A, lora_B, s, keep)
        dA, dB = delta.gradients_(
            dx, (need_A, need_B), saved, ctx.scaling, ctx.keep_scale, ctx.spans
        )
        dW = products.mm_over_rows(dy, rows) if need_weight else None
        dbias = dy.sum(0) if need_bias else None
        if dx is not None and len(ctx.in_shape) != 2:
            dx = dx.view(ctx.in_shape)
        return dx, dW, dA, dB, dbias, None, None, None


def backward_through_reference(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x, W, A, B and bias from differentiable formulas, for double backward.

    Args:
        ctx: with `scaling`, `keep_scale`, `spans`, `in_shape` and `out_features` set.
        saved: x, W, A, B, S and the mask; None for x where no gradient depends on it. That of B is
            made of S, where S is kept and nothing else depends on it.
        dy: (..., N).
    """
    *inputs, kept_s, keep = saved
    # One input may depend on another: through an alias of its own each is differentiated alone.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    x, weight, lora_A, lora_B = inputs
    # Where neither x nor A learns the mask was not kept, but S, which is of what was dropped.
    is_of_s = kept_s is not None and not (ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
    if x is None:
        inputs[0] = x = dy.new_zeros(ctx.in_shape, requires_grad=True)
    dropped = x if keep is None else x * keep.view(x.shape) * ctx.keep_scale
    shape = (*x.shape[:-1], lora_A.shape[0])
    s = kept_s.view(shape) if is_of_s else F.linear(dropped, lora_A)
    s, rest = scaled_s(s, ctx.scaling)
    n = ctx.out_features
    y = x.new_zeros((*x.shape[:-1], n)) if weight is None else F.linear(x, weight)
    for (lo, hi), s_block, b_block in zip(
        ctx.spans,
        blocks.columns(s, lora_B.shape[1], ctx.spans),
        blocks.rows(lora_B, ctx.spans),
        strict=True,
    ):
        update = F.linear(s_block, b_block)
        y = y + F.pad(update if rest == 1.0 else update * rest, (lo, n - hi))
    needed = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, needed, dy, create_graph=True) if needed else ())
    grads = [next(found) if need else None for need in ctx.needs_input_grad[:4]]
    dbias = as_matrix(dy).sum(0) if ctx.needs_input_grad[4] else None
    return (*grads, dbias)


_unsafe_view = torch.ops.aten._unsafe_view.default


def as_own(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a new tensor another shape, as no view: autograd restricts who may write to a view."""
    return _unsafe_view(y, shape)  # type: ignore[no-any-return]


def as_matrix(x: Tensor) -> Tensor:
    """Return x, (..., K), as its rows, (M, K), also where K is 0."""
    # Not flatten(), which vmap over the gradients has no rule for.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def expand(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Y + scaling S B^T, out of place, as `lora_fast.reference.lora_expand`."""
    update = products.differentiable_mm(as_matrix(s), like(lora_B, y).t(), scaling)
    return y + update.view(y.shape)


def sparse_columns(
    input: Tensor, lora_A: Tensor, padding_idx: int | None, scale_grad_by_freq: bool
) -> Tensor:
    """A^T[input], with a sparse gradient for A.

    Args:
        input: integer indices of any shape.
        lora_A: (R, num_embeddings).
        padding_idx: this column gets no gradient; may count from the end.
        scale_grad_by_freq: divide the gradient by the frequency of the index in `input`.

    Returns:
        (*input.shape, R).
    """
    return _SparseColumns.apply(  # type: ignore[no-any-return]
        input, lora_A, padding_idx, scale_grad_by_freq
    )


def makes_sparse(lora_A: Tensor) -> bool:
    """Tell whether `sparse_columns` serves: not for transforms, tangents and traces, nor without A.

    They know torch's own functions alone.
    """
    if not lora_A.requires_grad or not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or (
        torch_internals.functorch_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch_internals.is_tracing()
    )


class _SparseColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        lora_A: Tensor,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.padding_idx, ctx.by_freq = lora_A.shape, padding_idx, scale_grad_by_freq
        return F.embedding(input, lora_A.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 4
        (input,) = ctx.saved_tensors
        grad = columns_gradient(input, grads[0], ctx.shape, ctx.padding_idx, ctx.by_freq)
        return None, grad, None, None


def columns_gradient(
    input: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """The sparse gradient of A (R, num) from the gradients of A^T[input], (*input.shape, R).

    COO with two sparse dimensions, not coalesced: A is (R, num), its columns are touched.
    """
    rank, num = shape
    columns, values = input.reshape(-1), values.reshape(input.numel(), rank)
    if padding_idx is not None:
        kept = columns != padding_idx % num
        columns, values = columns[kept], values[kept]
    if scale_grad_by_freq:
        values = values / torch.bincount(columns, minlength=num)[columns].unsqueeze(1)
    rows = torch.arange(rank, device=columns.device).repeat(columns.numel())
    indices = torch.stack([rows, columns.repeat_interleave(rank)])
    return torch.sparse_coo_tensor(indices, values.reshape(-1), shape, check_invariants=False)

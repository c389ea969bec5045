"""The operators as functions: checked arguments, then the implementation that `backend` chooses.

M rows, K in_features, N out_features, R rank, `scaling = lora_alpha / r`. A and B may have another
floating-point dtype than x: they are used in x's, and their gradients come back in their own.
Under autocast torch's rules choose the dtypes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fast import (
    autograd,
    autograd_embedding,
    autograd_weight,
    checks,
    eager,
    reference,
    shapes,
)
from lora_fast.backend import Backend, choose, decided
from lora_fast.lora_first import lora_first
from lora_fast.merging import merge_, unmerge_

__all__ = [
    "lora_conv",
    "lora_embedding",
    "lora_linear",
    "lora_merged_linear",
    "merge_",
    "merged_delta",
    "merged_weight",
    "unmerge_",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Y = X W^T + scaling (dropout(X) A^T) B^T + bias.

    Args:
        x: (..., K), any strides, any number of dimensions from 1 on, also empty.
        weight: (N, K), any strides (a weight stored (K, N) goes in as `weight.t()`), dtype of `x`.
        lora_A: (R, K).
        lora_B: (N, R).
        scaling: lora_alpha / r, a number; or a tensor of one element or N, which may be trained.
        bias: (N,) or None, dtype of `weight`.
        dropout_p: rate of the dropout on the adapter's input, in [0, 1].
        training: whether dropout is applied.

    Returns:
        (..., N), the dtype of `x`, contiguous where `x` is.

    Raises:
        ValueError: a shape or the dropout rate does not fit; the message names both sides.
        TypeError: an argument is no tensor or no number, or its dtype does not fit.
        RuntimeError: a forced backend cannot serve the call.

    Note:
        Accumulates as torch's matrix products do (fp32 for 16-bit dtypes). Dropout draws what that
        of torch does, but for the fused kernels: they draw a seed a call, and drop with the
        multiple of 2^-16 nearest to `dropout_p`. Source: loralib/layers.py:143-151.
    """
    if not isinstance(x, Tensor):  # an fx proxy, which has no shape to check
        checks.tensors("lora_linear", x=x)
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, training)
    shapes.linear(x, weight, lora_A, lora_B, bias)
    if type(dropout_p) is not float or dropout_p or type(scaling) is not float:  # seldom
        checks.rate_and_scaling("lora_linear", dropout_p, scaling, weight.shape[0], x)
    p = dropout_p if training else 0.0
    backend = choose("lora_linear", x, weight, lora_A, lora_B, bias, drops=p > 0, scaling=scaling)
    number: Any = scaling  # but for the reference, which is chosen for a tensor
    try:
        if backend is Backend.TRITON:
            return autograd.lora_linear(x, weight, lora_A, lora_B, number, bias, p)
        if backend is not Backend.REFERENCE:
            operands = (x, weight, reference.like(lora_A, x), reference.like(lora_B, x))
            if backend is Backend.EAGER_LORA_FIRST:
                return lora_first(*operands, number, bias, p)
            return eager.low_rank_linear(*operands, number, bias, p, ((0, weight.shape[0]),))
        rest = (weight, lora_A, lora_B, scaling, bias, dropout_p, training)
        if x.dim() > 2 and _flattens(x, scaling):
            y = reference.lora_linear(x.flatten(0, -2), *rest)
            return eager.as_own(y, (*x.shape[:-1], y.shape[-1]))
        return reference.lora_linear(x, *rest)
    except (RuntimeError, TypeError):
        checks.dtypes("lora_linear", weight, lora_A, lora_B, x=x, bias=bias)
        raise


def _flattens(x: Tensor, scaling: float | Tensor) -> bool:
    """Tell whether `x` may serve as a matrix of rows: one product for a view at either end."""
    if type(scaling) is not float and isinstance(scaling, Tensor) and scaling.dim() > 1:
        return False  # each row has its own
    if type(x) is not Tensor or x.is_nested or x.layout is not torch.strided:
        return False
    # A trace would keep this batch's shape, and dropout draws in the order of memory.
    return not torch.compiler.is_compiling() and x.is_contiguous() and not torch.jit.is_tracing()


def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    enable_lora: Iterable[object],
    out_splits: Sequence[int] | None = None,
) -> Tensor:
    """Y = X W^T + bias, and block g of Y += scaling (dropout(X) A_g^T) B_g^T where g is enabled.

    Args:
        x: (..., K).
        weight: (N, K), any strides.
        lora_A: (R * enabled blocks, K), the blocks' factors one under the other.
        lora_B: (sum of the enabled blocks' widths, R).
        scaling: lora_alpha / r, a number; or a tensor of one element or N, which may be trained.
        bias: (N,) or None, dtype of `weight`.
        dropout_p: rate of the dropout on the adapter's input, in [0, 1].
        training: whether dropout is applied.
        enable_lora: for each block of the output, whether it has an adapter.
        out_splits: width of each block; None for equal blocks.

    Returns:
        (..., N), the dtype of `x`.

    Raises:
        ValueError: shapes, blocks or the dropout rate do not fit; the message names both sides.
        TypeError: an argument is no tensor, number or list, or its dtype does not fit.
        RuntimeError: a forced backend cannot serve the call.

    Note:
        The dense delta is formed for nested tensors alone. Source: loralib/layers.py:234-243.
    """
    enable = checks.enabled("lora_merged_linear", enable_lora)
    widths = None if out_splits is None else checks.widths("lora_merged_linear", out_splits)
    rest = (weight, lora_A, lora_B, scaling, bias, dropout_p, training)
    if not isinstance(x, Tensor):  # an fx proxy
        checks.tensors("lora_merged_linear", x=x)
        return reference.lora_merged_linear(x, *rest, enable_lora=enable, out_splits=widths)
    spans = shapes.merged_linear(x, weight, lora_A, lora_B, bias, enable, widths)
    if type(dropout_p) is not float or dropout_p or type(scaling) is not float:
        checks.rate_and_scaling("lora_merged_linear", dropout_p, scaling, weight.shape[0], x)
    backend = choose("lora_merged_linear", x, weight, lora_A, lora_B, bias, scaling=scaling)
    number: Any = scaling  # but for the reference
    p = dropout_p if training else 0.0
    try:
        if backend is Backend.TRITON:
            return autograd.lora_linear(x, weight, lora_A, lora_B, number, bias, p, spans)
        if backend is Backend.EAGER and spans:
            operands = (x, weight, reference.like(lora_A, x), reference.like(lora_B, x))
            return eager.low_rank_linear(*operands, number, bias, p, spans)
        return reference.lora_merged_linear(x, *rest, enable_lora=enable, out_splits=widths)
    except (RuntimeError, TypeError):
        checks.dtypes("lora_merged_linear", weight, lora_A, lora_B, x=x, bias=bias)
        raise


def lora_embedding(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Y = W[input] + scaling A^T[input] B^T.

    Args:
        input: indices of any shape, int64 or int32, also a scalar or empty.
        weight: (num_embeddings, D).
        lora_A: (R, num_embeddings).
        lora_B: (D, R).
        scaling: lora_alpha / r, a number; or a tensor of one element or D, which may be trained.
        padding_idx: as in `torch.nn.functional.embedding`; its row and column get no gradient.
        max_norm: limits the rows of `weight` that are looked up, in place; never those of A.
        norm_type: p of that norm.
        scale_grad_by_freq: divides gradients by the frequency of the index in the batch.
        sparse: gradients of `weight` and `lora_A` are sparse tensors.

    Returns:
        (*input.shape, D), the dtype of `weight`.

    Raises:
        ValueError: the factors or `padding_idx` do not fit the weight.
        TypeError: a dtype does not fit, an argument is no tensor, or `padding_idx` no integer.
        IndexError: an index is out of range; on a GPU the kernel's assertion fails instead.
        RuntimeError: a forced backend cannot serve the call.

    Note:
        Source: loralib/layers.py:77-87.
    """
    factors = (lora_A, lora_B, scaling)
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    arguments: tuple[Any, ...] = (input, weight, *factors, *options)
    if isinstance(input, Tensor):
        shapes.embedding(input, weight, lora_A, lora_B)
        if type(scaling) is not float:
            checks.scaling("lora_embedding", scaling, weight.shape[1], input.unsqueeze(-1))
        shapes.padding_idx("lora_embedding", padding_idx, weight)
        backend = choose("lora_embedding", input, weight, lora_A, lora_B, scaling=scaling)
        try:
            if backend is Backend.TRITON:
                return autograd_embedding.lora_embedding(*arguments)
            if input.dim() != 1 and _flattens(input, scaling):
                y = _embedding_in_torch(backend, input.flatten(), *arguments[1:])
                return eager.as_own(y, (*input.shape, y.shape[-1]))
            return _embedding_in_torch(backend, *arguments)
        except (RuntimeError, TypeError):
            checks.dtypes("lora_embedding", weight, lora_A, lora_B)
            raise
    checks.tensors("lora_embedding", input=input)
    return reference.lora_embedding(*arguments)


def _embedding_in_torch(
    backend: Backend,
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Any,
    *options: Any,
) -> Tensor:
    padding_idx, _, _, scale_grad_by_freq, sparse = options
    makes_sparse = sparse and eager.makes_sparse(lora_A)
    if not makes_sparse and backend is Backend.REFERENCE:
        return reference.lora_embedding(input, weight, lora_A, lora_B, scaling, *options)
    y = torch.nn.functional.embedding(input, weight, *options)
    # Converted afterwards: a sparse gradient does not pass through a change of dtype.
    if makes_sparse:
        a = eager.sparse_columns(input, lora_A, padding_idx, scale_grad_by_freq)
    else:
        by_freq = {"scale_grad_by_freq": scale_grad_by_freq}
        a = torch.nn.functional.embedding(input, lora_A.t(), padding_idx, **by_freq)
    expand = eager.expand if backend is Backend.EAGER else reference.lora_expand
    return expand(y, reference.like(a, y), lora_B, scaling)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Y = conv(X, W + scaling (B A).view(W), bias), in one to three spatial dimensions.

    Args:
        x: (batch, C_in, *space) or (C_in, *space).
        weight: (C_out, C_in / groups, *kernel), one to three kernel dimensions.
        lora_A: (R k, C_in k).
        lora_B: (C_out / groups * k^(d-1), R k), d the number of spatial dimensions.
        scaling: lora_alpha / r, a number; or a tensor of one element, which may be trained.
        bias: (C_out,) or None.
        stride: as in `torch.nn.functional.conv2d`.
        padding: likewise.
        dilation: likewise.
        groups: likewise.

    Returns:
        The convolution's output, the dtype of `x`.

    Raises:
        ValueError: the factors, `groups` or `x` do not fit the weight.
        TypeError: an argument is no tensor or no number, or its dtype does not fit.
        RuntimeError: a forced backend cannot serve the call.

    Note:
        Source: loralib/layers.py:287-294.
    """
    options = (stride, padding, dilation, groups)
    if isinstance(x, Tensor):
        if type(scaling) is not float:
            checks.scaling("lora_conv", scaling, 1)
        shapes.conv(weight, lora_A, lora_B, bias)
        try:
            w = _merged_in_one_block(weight, lora_A, lora_B, scaling)
            return reference.convolution(x, w, bias, *options)
        except (RuntimeError, TypeError):
            checks.dtypes("lora_conv", weight, lora_A, lora_B, x=x, bias=bias)
            shapes.conv_input(x, weight, groups)
            raise
    checks.tensors("lora_conv", x=x)
    return reference.lora_conv(x, weight, lora_A, lora_B, scaling, bias, *options)


def merged_delta(
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    enable_lora: Iterable[object] | None = None,
    out_splits: Sequence[int] | None = None,
) -> Tensor:
    """Delta = scaling B A, the dense (N, K) matrix that a merge adds to the weight.

    Args:
        lora_A: (R, K), or (R * enabled blocks, K) with `enable_lora`.
        lora_B: (N, R), or (sum of the enabled blocks' widths, R).
        scaling: lora_alpha / r, a number; or a tensor of one element or N, which may be trained.
        enable_lora: for each block of rows, whether it has an adapter; None for a single block.
        out_splits: width of each block; None for equal blocks.

    Returns:
        (N, K), differentiable; the rows of disabled blocks are zero.
        Source: loralib/layers.py:207-215.

    Raises:
        ValueError: the factors do not fit each other or the blocks.
        TypeError: an argument is no tensor, number or list, or the factors differ in dtype.
    """
    enable, widths = checks.blocks("merged_delta", enable_lora, out_splits)
    checks.scaling("merged_delta", scaling, shapes.factors(lora_A, lora_B, enable, widths))
    checks.one_dtype("merged_delta", "lora_B", lora_B, lora_A=lora_A)
    decided("merged_delta", Backend.REFERENCE, "there is no kernel for it")
    return reference.merged_delta(lora_A, lora_B, scaling, enable_lora=enable, out_splits=widths)


def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    enable_lora: Iterable[object] | None = None,
    out_splits: Sequence[int] | None = None,
) -> Tensor:
    """W + Delta.view(W), out of place and differentiable.

    Args:
        weight: (N, K), or more dimensions with the same number of elements (a convolution's).
        lora_A: as for `merged_delta`.
        lora_B: as for `merged_delta`.
        scaling: lora_alpha / r, a number; or a tensor of one element or N, which may be trained.
        enable_lora: as for `merged_delta`.
        out_splits: as for `merged_delta`.

    Returns:
        The shape and dtype of `weight`.

    Raises:
        ValueError: the factors do not fit the weight.
        TypeError: an argument is no tensor or no number, or its dtype does not fit.
        RuntimeError: a forced backend cannot serve the call.

    Note:
        Torch serves blocks, whatever backend is chosen. Source: loralib/layers.py:287-294.
    """
    enable = widths = None
    if enable_lora is not None or out_splits is not None:
        enable, widths = checks.blocks("merged_weight", enable_lora, out_splits)
    if isinstance(lora_A, Tensor):
        shapes.delta("merged_weight", weight, lora_A, lora_B, enable, widths)
        if type(scaling) is not float:
            n = lora_B.shape[0] if enable is None else weight.shape[0]
            checks.scaling("merged_weight", scaling, n)
    else:
        checks.tensors("merged_weight", lora_A=lora_A)
    factors = (lora_A, lora_B, scaling)
    try:
        if enable is None and isinstance(lora_A, Tensor) and isinstance(weight, Tensor):
            return _merged_in_one_block(weight, *factors)
        decided("merged_weight", Backend.REFERENCE, "blocks, for which there is no kernel")
        return reference.merged_weight(weight, *factors, enable_lora=enable, out_splits=widths)
    except (RuntimeError, TypeError):
        checks.dtypes("merged_weight", weight, lora_A, lora_B)
        checks.mergeable("merged_weight", weight, lora_A, lora_B)
        raise


def _merged_in_one_block(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Any) -> Tensor:
    backend = choose("merged_weight", weight, lora_A, lora_B, scaling=scaling)
    if backend is Backend.TRITON:
        return autograd_weight.merged_weight(weight, lora_A, lora_B, scaling)
    return reference.merged_weight(weight, lora_A, lora_B, scaling)

"""The operators in plain, differentiable PyTorch: the oracle, and the path that runs anywhere.

Each function of `lora_fast.functional` has its name and its arguments here. Nothing but torch
computes, so functorch transforms, double backward, export, DTensor and any device work as they are.
Arguments are documented in `lora_fast.functional`, which checks them first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.autocast import autocasts, no_autocast
from lora_fast.blocks import Block, block_widths, output_blocks


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
    """Y = X W^T + scaling (dropout(X) A^T) B^T + bias. Source: loralib/layers.py:143-151."""
    y = F.linear(x, weight, bias)
    if training and dropout_p > 0.0:  # `dropout` below, without its call
        x = F.dropout(x, dropout_p)
    return lora_expand(y, F.linear(x, like(lora_A, x)), lora_B, scaling)


# In 16 bits oneDNN takes longer to add a few rows to a product than another operation does, and
# to scale one, whatever its rows.
_TOO_FEW_FOR_ADDMM = 32


def lora_expand(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """Y + scaling S B^T, out of place: what an adapter adds to the frozen layer's output."""
    if isinstance(scaling, Tensor):  # of one's own, perhaps trained; one for each feature, too
        return y + (F.linear(s, like(lora_B, y)) * scaling).to(y.dtype)
    in_one_product = (
        type(y) is Tensor
        and y.dim() == 2
        and s.dtype is y.dtype is lora_B.dtype
        and (y.dtype.itemsize > 2 or y.shape[0] >= _TOO_FEW_FOR_ADDMM)
        and not torch.compiler.is_dynamo_compiling()  # it fuses them, and takes alpha as constant
        and not autocasts(y)  # the product would round to its dtype, which y need not have
        and not torch.jit.is_tracing()  # a trace serves any number of dimensions
    )
    if in_one_product and y.dtype.itemsize > 2:
        return torch.addmm(y, s, lora_B.t(), alpha=scaling)
    s, rest = scaled_s(s, scaling)
    if in_one_product and rest == 1.0:
        return torch.addmm(y, s, lora_B.t())
    update = F.linear(s, like(lora_B, y))
    update = update if rest == 1.0 else update * rest
    return y + (update if update.dtype is y.dtype else update.to(y.dtype))  # autocast's, say


def scaled_s(s: Tensor, scaling: float) -> tuple[Tensor, float]:
    """S, and the factor of S B^T: 1 where S, which has fewer elements, is times `scaling`.

    In fp16 S may be too large to be multiplied by more than 1. There the product is, as loralib's,
    so that backward multiplies dY before its products round what may be small. A factor below 1
    does belong to S: dB = dY^T (scaling S), a sum over all rows, might overflow without it.
    """
    if _multiplies_in_fp16(s) and abs(scaling) > 1.0:
        return s, scaling
    return s * scaling, 1.0


def _multiplies_in_fp16(x: Tensor) -> bool:
    if not isinstance(x, Tensor):  # an fx proxy, which has no dtype to ask for
        return False
    if x.dtype is torch.float16:
        return True
    return autocasts(x) and torch.get_autocast_dtype(x.device.type) is torch.float16


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
    enable_lora: list[bool],
    out_splits: list[int] | None = None,
) -> Tensor:
    """Y = X W^T + bias, and block g of Y += scaling (dropout(X) A_g^T) B_g^T where g is enabled.

    Source: loralib/layers.py:234-243, which forms the dense delta; this is the factored form.
    """
    if not any(enable_lora):  # nor is anything drawn
        return F.linear(x, weight, bias)
    if isinstance(x, Tensor) and x.is_nested:  # cannot be split and joined along the features
        a, b = like(lora_A, x), like(lora_B, x)
        widths = block_widths(weight.shape[0], enable_lora, out_splits)
        delta = merged_delta(a, b, scaling, enable_lora=enable_lora, out_splits=widths)
        return F.linear(x, weight, bias) + F.linear(dropout(x, dropout_p, training), delta)
    y, s = F.linear(x, weight, bias), F.linear(dropout(x, dropout_p, training), like(lora_A, x))
    # Which dimension of y has the features, torch.jit would fix; fx folds no size of a weight.
    out_features = weight.shape[0] if isinstance(weight, Tensor) else y.shape[-1]
    blocks = output_blocks(out_features, enable_lora, out_splits)
    return grouped_expand(y, s, lora_B, scaling, blocks)


def grouped_expand(
    y: Tensor, s: Tensor, lora_B: Tensor, scaling: float | Tensor, blocks: list[Block]
) -> Tensor:
    """Y, and block g of it + scaling S_g B_g^T where g is enabled, out of place."""
    rest: float | Tensor = scaling
    if not isinstance(scaling, Tensor):  # of one's own, perhaps trained
        s, rest = scaled_s(s, scaling)
    lora_B = like(lora_B, s)
    rank = lora_B.shape[1]
    updated = []
    for block in blocks:
        part = y.narrow(-1, block.begin, block.width)
        if block.enabled:
            s_block = s.narrow(-1, block.adapter * rank, rank)
            update = F.linear(s_block, lora_B.narrow(0, block.row, block.width))
            if isinstance(rest, Tensor) or rest != 1.0:
                update = (update * _of_block(rest, block, y.shape[-1])).to(y.dtype)
            part = part + update
        updated.append(part)
    return torch.cat(updated, dim=-1)


def _of_block(scaling: float | Tensor, block: Block, out_features: int) -> float | Tensor:
    """What scales a block, of a factor that may be one for each output feature."""
    if not isinstance(scaling, Tensor) or scaling.dim() == 0:
        return scaling
    each = scaling.expand(*scaling.shape[:-1], out_features)
    return each.narrow(-1, block.begin, block.width)


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
    """Y = W[input] + scaling A^T[input] B^T. Source: loralib/layers.py:77-87.

    `max_norm` limits the rows of W alone; A is never renormalised. A's gradient is dense here,
    also for `sparse`: torch has no sparse gradient for a transposed view.
    """
    y = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    table = like(lora_A, y).t()
    if isinstance(input, Tensor) and input.is_nested:  # no proxy of a tracer
        table = table.contiguous()  # as torch asks there
    a = F.embedding(input, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return lora_expand(y, a, lora_B, scaling)


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
    """Y = conv(X, W + scaling (B A).view(W), bias). Source: loralib/layers.py:287-294."""
    w = merged_weight(weight, lora_A, lora_B, scaling)
    return convolution(x, w, bias, stride, padding, dilation, groups)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
) -> Tensor:
    """torch's convolution in as many dimensions as the kernel has."""
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return conv(x, weight, bias, stride, padding, dilation, groups)


def merged_delta(
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    enable_lora: list[bool] | None = None,
    out_splits: list[int] | None = None,
) -> Tensor:
    """Delta = scaling B A, (N, K), block by block where `enable_lora` is given."""
    if enable_lora is None:
        return _scaled_rows(lora_B, scaling) @ lora_A
    if out_splits is None:
        out_splits = [lora_B.shape[0] // sum(enable_lora)] * len(enable_lora)
    rows, out_features = [], sum(out_splits)
    for block in output_blocks(out_features, enable_lora, out_splits):
        if block.enabled:
            block_A, block_B = block.factors(lora_A, lora_B)
            rows.append(_scaled_rows(block_B, _of_block(scaling, block, out_features)) @ block_A)
        else:
            rows.append(lora_A.new_zeros((block.width, lora_A.shape[1])))
    return torch.cat(rows)


def _scaled_rows(lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    if isinstance(scaling, Tensor) and scaling.dim() > 0:  # one for each output feature, or for all
        return (lora_B * scaling.reshape(-1, 1)).to(lora_B.dtype)  # as beside a number
    return lora_B * scaling


def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    enable_lora: list[bool] | None = None,
    out_splits: list[int] | None = None,
) -> Tensor:
    """W + Delta.view(W), out of place and differentiable; W may have any number of dimensions."""
    # The sum has the weight's dtype all the same.
    if isinstance(weight, Tensor) and autocasts(weight):
        with no_autocast(weight):
            return merged_weight(
                weight, lora_A, lora_B, scaling, enable_lora=enable_lora, out_splits=out_splits
            )
    lora_A, lora_B = like(lora_A, weight), like(lora_B, weight)
    # An fx proxy cannot say how it lies. The sum keeps the layout of a channels_last kernel.
    if enable_lora is None and (not isinstance(weight, Tensor) or weight.is_contiguous()):
        # One product that adds while it multiplies: no dense delta, one rounding. Sizes are calls:
        # what computes a kernel, FX quantization copies, but for what an attribute is read of.
        flat = weight.reshape(lora_B.size(0), lora_A.size(1))
        # Scaled as it is made, so that nothing but A and B is kept for backward. Not in 16 bits:
        # oneDNN scales slower than another operation, and gradients of fp16 overflow before it.
        is_wide = isinstance(lora_A, Tensor) and lora_A.dtype.itemsize > 2
        if is_wide and not isinstance(scaling, Tensor) and not torch.compiler.is_dynamo_compiling():
            return torch.addmm(flat, lora_B, lora_A, alpha=scaling).view(weight.shape)
        return torch.addmm(flat, _scaled_rows(lora_B, scaling), lora_A).view_as(weight)
    widths = None
    if enable_lora is not None:
        widths = block_widths(weight.shape[0], enable_lora, out_splits)
    delta = merged_delta(lora_A, lora_B, scaling, enable_lora=enable_lora, out_splits=widths)
    return weight + delta.view(weight.shape)


DeltaBlock = tuple[Tensor, Tensor, Tensor]
"""Rows of a weight, and the A (R, K) and B (rows, R) whose product is added to them."""


def delta_blocks(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> list[DeltaBlock]:
    """The parts of a weight that a merge changes, as views, each with its own A and B."""
    if enable_lora is None:
        return [(weight, lora_A, lora_B)]
    return [
        (weight.narrow(0, block.begin, block.width), *block.factors(lora_A, lora_B))
        for block in output_blocks(weight.shape[0], enable_lora, out_splits)
        if block.enabled
    ]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout as `torch.nn.Dropout`; draws nothing from the generator where it changes nothing."""
    return F.dropout(x, p, True) if training and p > 0.0 else x  # a traced rate is a symbol


def like(adapter: Tensor, x: Tensor) -> Tensor:
    """`adapter` in the dtype of `x`; under autocast torch's own rules choose the dtype."""
    if not isinstance(x, Tensor):
        return adapter.to(x)  # an fx proxy, which has no dtype to ask for
    if adapter.dtype is x.dtype or autocasts(x):
        return adapter
    fits = adapter.is_floating_point() or (adapter.is_complex() and x.is_complex())
    if not fits or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"lora_A and lora_B must be floating-point, got {adapter.dtype}")
    return adapter.to(x.dtype)


@torch.no_grad()
def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    enable_lora: list[bool] | None = None,
    out_splits: list[int] | None = None,
) -> Tensor:
    """W <- round(W + Delta) in place, accumulated in fp32 (fp64 for fp64). Returns a copy of W.

    Raises:
        OverflowError: a finite element of W would become infinite or NaN; W is as it was.
    """
    original = weight.clone()
    merge_beside_(original, weight, lora_A, lora_B, scaling, enable_lora, out_splits)
    return original


@torch.no_grad()
def merge_beside_(
    original: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> None:
    """`merge_` of a weight of which the caller has made a copy."""
    try:
        with no_autocast(weight):
            _add_delta_(weight, lora_A, lora_B, scaling, enable_lora, out_splits)
        if not finite_where(weight, original):
            raise OverflowError(why_not_finite(weight, lora_A, lora_B))
    except BaseException:
        weight.copy_(original)
        raise


@torch.no_grad()
def unmerge_(weight: Tensor, original: Tensor) -> None:
    """W <- the copy that `merge_` returned, bit for bit."""
    weight.copy_(original)


def why_not_finite(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str:
    """Say why a merge was refused."""
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not bool(factor.isfinite().all()):
            return f"{name} holds infinities or NaN; load or reset the adapter"
    return (
        f"the merged weight does not fit {weight.dtype}: some of its elements overflow; use a "
        "wider dtype or a smaller, finite scaling"
    )


def finite_where(weight: Tensor, original: Tensor) -> bool:
    """Tell whether `weight` is finite wherever `original` was."""
    if weight.is_meta:
        return True
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    if bool(weight.sum(dtype=accumulate).isfinite()):  # one pass, and nearly always enough
        return True
    return bool((weight.isfinite() | ~original.isfinite()).all())


def _add_delta_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> None:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    factors = (lora_A.to(dtype), lora_B.to(dtype))
    for block, block_A, block_B in delta_blocks(weight, *factors, enable_lora, out_splits):
        if block.dim() == 2:
            _add_product_(block, block_B, block_A, scaling)
        elif block.is_contiguous():
            flat = block.view(block_B.shape[0], block_A.shape[1])
            _add_product_(flat, block_B, block_A, scaling)
        else:
            delta = merged_delta(block_A, block_B, scaling).view(block.shape)
            block.copy_(block.to(dtype) + delta)


def _add_product_(weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float) -> None:
    if weight.dtype == lora_A.dtype:
        weight.addmm_(lora_B, lora_A, alpha=scaling)
        return
    rows = max(1, 2**20 // max(1, weight.shape[1]))  # 4 MiB of fp32 at a time
    for w, b in zip(weight.split(rows), lora_B.split(rows), strict=True):
        w.copy_(torch.addmm(w.to(b.dtype), b, lora_A, alpha=scaling))

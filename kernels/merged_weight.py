"""The weight of a convolution with its adapter: W + scaling * (B A).view(W), in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.configs import WeightConfig, architecture
from lora_fast.kernels.launch import prepared
from lora_fast.kernels.plans import weight_plan
from lora_fast.kernels.primitives import block_offsets, mma, tile_ptrs
from lora_fast.kernels.sizes import cdiv, rank_blocks
from lora_fast.kernels.torch_rules import dot_precision, on_device_of


@triton.jit
def view_offsets(flat, sizes, strides):
    """Offsets of the elements number `flat`, row-major; sizes and strides innermost axis first."""
    offsets = flat * 0
    for axis in tl.static_range(len(sizes) - 1):
        offsets += flat % sizes[axis] * strides[axis]
        flat = flat // sizes[axis]
    return offsets + flat * strides[len(sizes) - 1]


@prepared
@triton.jit
def merged_weight_kernel(
    w_ptr,
    sizes,
    w_strides,
    out_ptr,
    out_strides,
    a_ptr,
    a_strides,
    b_ptr,
    b_strides,
    N,
    K,
    R,
    scaling,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program writes out = w + scaling * b a for [BLOCK_N, BLOCK_K] of the product.

    Grid: (cdiv(K, BLOCK_K) * cdiv(N, BLOCK_N),), along K first: a second axis ends at 65,535.
    a: [R, K], b: [N, R], any strides. w and out: N * K elements of the given sizes and strides,
    the innermost axis first; row-major they are the elements of the product. WIDE where an offset
    may pass 2**31.
    Accumulates in fp32 and rounds once.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_k = block_offsets(tl.program_id(0) % tiles_k, BLOCK_K)
    offs_n = block_offsets(tl.program_id(0) // tiles_k, BLOCK_N)
    mask_k, mask_n = (offs_k < K)[None, :], (offs_n < N)[:, None]
    flat = offs_n[:, None] * K + offs_k[None, :]
    if not WIDE:
        flat = flat.to(tl.int32)  # half the work of a division
    w = tl.load(w_ptr + view_offsets(flat, sizes, w_strides), mask=mask_n & mask_k, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R).to(tl.int64)
        b_mask = mask_n & (offs_r < R)[None, :]
        b = tl.load(tile_ptrs(b_ptr, b_strides, offs_n, offs_r), mask=b_mask, other=0.0)
        a_mask = (offs_r < R)[:, None] & mask_k
        a = tl.load(tile_ptrs(a_ptr, a_strides, offs_r, offs_k), mask=a_mask, other=0.0)
        acc = mma(b.to(w.dtype), a.to(w.dtype), acc, PRECISION)
    out = (w.to(tl.float32) + acc * scaling).to(w.dtype)
    tl.store(out_ptr + view_offsets(flat, sizes, out_strides), out, mask=mask_n & mask_k)


def joined_axes(weight: Tensor, out: Tensor) -> tuple[tuple[int, ...], ...]:
    """Sizes and both tensors' strides, innermost first, in as few axes as describe both."""
    axes: list[tuple[int, int, int]] = []
    for size, *strides in zip(weight.shape, weight.stride(), out.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * strides[0], size * strides[1]):
            axes[-1] = (axes[-1][0] * size, *strides)
        else:
            axes.append((size, *strides))
    return tuple(zip(*reversed(axes), strict=True)) or ((1,), (1,), (1,))


def merged_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    config: WeightConfig | None = None,
) -> Tensor:
    """W + scaling * (B A).view(W), out of place.

    weight: N * K elements, any number of dimensions, any strides; lora_a (R, K) and lora_b (N, R),
    any strides, of any floating dtype, used in the weight's.

    Returns shape and dtype of the weight, laid out as `torch.empty_like` lays out.
    Note: fp32 accumulation and one rounding; W is read once, the result written once.
    """
    out = torch.empty_like(weight)
    (R, K), N = lora_a.shape, lora_b.shape[0]
    if out.numel() == 0:
        return out
    if config is None:
        config = weight_plan(architecture(weight.device), N, K, R, weight.dtype).config
    sizes, w_strides, out_strides = joined_axes(weight, out)
    furthest = max(
        sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        for strides in (w_strides, out_strides)
    )
    block_r, _ = rank_blocks(R)
    with on_device_of(weight):
        merged_weight_kernel[(cdiv(K, config.block_k) * cdiv(N, config.block_n),)](
            *(weight, sizes, w_strides, out, out_strides),
            *(lora_a, lora_a.stride(), lora_b, lora_b.stride(), N, K, R, float(scaling)),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=block_r,
            WIDE=furthest + config.block_n * K >= 2**31,
            PRECISION=dot_precision(weight.dtype),
            num_warps=config.num_warps,
        )
    return out

"""Forward of the LoRA embedding: y = W[index] + (scaling * A^T[index]) B^T in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.configs import EmbeddingConfig, architecture
from lora_fast.kernels.launch import prepared
from lora_fast.kernels.plans import embedding_plan
from lora_fast.kernels.primitives import block_offsets, mma, tile_ptrs
from lora_fast.kernels.sizes import cdiv, rank_blocks
from lora_fast.kernels.torch_rules import as_own, dot_precision, on_device_of


@triton.jit
def gather_scaled(a_ptr, a_strides, index, mask, offs_r, R, scaling, DTYPE: tl.constexpr):
    """S[i, r] = scaling * A[r, index[i]], rounded as torch rounds it: A to DTYPE, then S."""
    a_ptrs = tile_ptrs(a_ptr, (a_strides[1], a_strides[0]), index, offs_r)
    a = tl.load(a_ptrs, mask=mask[:, None] & (offs_r < R)[None, :], other=0.0)
    return (a.to(DTYPE).to(tl.float32) * scaling).to(DTYPE)


@prepared
@triton.jit
def gather_columns_kernel(
    index_ptr,
    a_ptr,
    a_strides,
    s_ptr,
    M,
    R,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Each program writes [BLOCK_M, BLOCK_R] of s = scaling * a[:, index]^T.

    Grid: (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)).
    index: [M], contiguous, in range.  a: [R, num], any strides.  s: [M, R], contiguous.
    """
    offs_m = block_offsets(tl.program_id(0), BLOCK_M)
    offs_r = block_offsets(tl.program_id(1), BLOCK_R)
    mask_m = offs_m < M
    index = tl.load(index_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    s = gather_scaled(a_ptr, a_strides, index, mask_m, offs_r, R, scaling, dtype)
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    tl.store(tile_ptrs(s_ptr, (R, 1), offs_m, offs_r), s, mask=mask)


@triton.jit
def add_ranks(
    acc,
    s_ptr,
    b_ptr,
    b_strides,
    offs_m,
    offs_d,
    sizes,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + s b^T over all blocks of the rank, s as it was gathered before."""
    M, D, R = sizes
    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = (offs_r < R)[None, :]
        s_ptrs = tile_ptrs(s_ptr, (R, 1), offs_m, offs_r)
        s = tl.load(s_ptrs, mask=(offs_m < M)[:, None] & mask_r, other=0.0)
        b_ptrs = tile_ptrs(b_ptr, b_strides, offs_d, offs_r)
        b = tl.load(b_ptrs, mask=(offs_d < D)[:, None] & mask_r, other=0.0)
        acc = mma(s, tl.trans(b.to(s.dtype)), acc, PRECISION)
    return acc


# Outside debug mode Triton drops device_assert, and a wrong index would read foreign memory.
@prepared
@triton.jit(debug=True)
def lora_embedding_fwd_kernel(
    index_ptr,
    w_ptr,
    w_strides,
    a_ptr,
    a_strides,
    s_ptr,
    b_ptr,
    b_strides,
    y_ptr,
    M,
    D,
    R,
    num,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program writes [BLOCK_M, CHUNK_D] of y = w[index] + s b^T, s = scaling * a[:, index]^T.

    Grid: (cdiv(M, BLOCK_M), cdiv(D, CHUNK_D)).
    index: [M], contiguous.  w: [num, D], a: [R, num], b: [D, R], any strides.  y: [M, D] and
    s: [M, R], contiguous. Without s_ptr the program gathers s itself, which takes a rank of one
    block; with it s is read. An index outside [0, num) stops the kernel as torch's does.
    Accumulates s b^T in fp32 and rounds once, with w added.
    """
    offs_m = block_offsets(tl.program_id(0), BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    index = tl.load(index_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    in_range = (index >= 0) & (index < num)
    tl.device_assert(in_range | ~mask_m, "lora_embedding: index out of range")
    found = mask_m & in_range
    if s_ptr is None:
        s = gather_scaled(a_ptr, a_strides, index, found, offs_r, R, scaling, dtype)

    first = tl.program_id(1) * CHUNK_D
    for start_d in range(first, min(D, first + CHUNK_D), BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < D
        w_ptrs = tile_ptrs(w_ptr, w_strides, index, offs_d)
        w = tl.load(w_ptrs, mask=found[:, None] & mask_d[None, :], other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if s_ptr is None:
            b_ptrs = tile_ptrs(b_ptr, b_strides, offs_d, offs_r)
            b = tl.load(b_ptrs, mask=mask_d[:, None] & (offs_r < R)[None, :], other=0.0)
            acc = mma(s, tl.trans(b.to(dtype)), acc, PRECISION)
        else:
            acc = add_ranks(
                *(acc, s_ptr, b_ptr, b_strides, offs_m, offs_d, (M, D, R)),
                *(BLOCK_R, PRECISION),
            )
        y = (w.to(tl.float32) + acc).to(dtype)
        y_ptrs = tile_ptrs(y_ptr, (D, 1), offs_m, offs_d)
        tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_d[None, :])


def gather_columns(index: Tensor, lora_a: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """S (M, R) = scaling * A[:, index]^T in `dtype`, contiguous, for index (M,) in range."""
    M, R = index.shape[0], lora_a.shape[0]
    block_r, r_blocks = rank_blocks(R)
    s = torch.empty((M, R), device=index.device, dtype=dtype)
    gather_columns_kernel[(cdiv(M, 64), r_blocks)](
        *(index, lora_a, lora_a.stride(), s, M, R, scaling),
        BLOCK_M=64,
        BLOCK_R=block_r,
        num_warps=4,
    )
    return s


def refuse_out_of_range(index: Tensor, num: int) -> None:
    """Raise on a CPU, where torch raises too; a GPU asserts in the kernel, without a host read."""
    if index.device.type == "cpu" and index.numel():
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= num:
            raise IndexError(
                f"lora_embedding: input must hold indices from 0 to {num - 1}, the rows of weight, "
                f"got {low if low < 0 else high}"
            )


def lora_embedding_fwd(
    input: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    config: EmbeddingConfig | None = None,
) -> Tensor:
    """y = W[input] + (scaling * A^T[input]) B^T.

    input (...) int32 or int64, weight (num, D), lora_a (R, num) and lora_b (D, R), any strides;
    A and B of any floating dtype, used in the weight's.

    Returns y (..., D) in the dtype of the weight, contiguous.
    Raises IndexError on a CPU for an index outside [0, num); on a GPU the kernel asserts.
    Note: fp32 accumulation and one rounding; the same bits every run.
    """
    scaling = float(scaling)  # a kernel for an integer is another one
    index = input.reshape(-1).contiguous()
    M, (num, D), R = index.shape[0], weight.shape, lora_a.shape[0]
    refuse_out_of_range(index, num)
    y = torch.empty((M, D), device=weight.device, dtype=weight.dtype)
    if y.numel():
        if config is None:
            config = embedding_plan(architecture(weight.device), M, D, num, R, weight.dtype)
        block_r, r_blocks = rank_blocks(R)
        with on_device_of(weight):
            s = gather_columns(index, lora_a, scaling, weight.dtype) if r_blocks > 1 else None
            lora_embedding_fwd_kernel[(cdiv(M, config.block_m), cdiv(D, config.chunk_d))](
                *(index, weight, weight.stride(), lora_a, lora_a.stride(), s),
                *(lora_b, lora_b.stride(), y, M, D, R, num, scaling),
                BLOCK_M=config.block_m,
                BLOCK_D=config.block_d,
                CHUNK_D=config.chunk_d,
                BLOCK_R=block_r,
                PRECISION=dot_precision(weight.dtype),
                num_warps=config.num_warps,
                sanitize_overflow=False,  # debug mode would check every sum of int32 too
            )
    return as_own(y, (*input.shape, D))

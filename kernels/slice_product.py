"""x w^T over one slice of K, for so few rows that reading w is all that takes time.

Compiled by Triton 3.7.1 for sm_90, both products fetch w 16 bytes at a time (LDGSTS.128), stored as
(N, K) or as (K, N), where N and K are multiples of 16; NUM_STAGES - 1 tiles are under way.
"""

import triton
import triton.language as tl

from lora_fast.kernels.primitives import mma, tile_ptrs


@triton.jit
def row_product(
    x_ptr,
    x_strides,
    w_ptr,
    w_strides,
    offs_n,
    start_k,
    end_k,
    sizes,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """[1, columns `offs_n`] of x w^T over start_k <= k < end_k, in fp32, for a single row x.

    Each thread adds up products of what it loads itself; threads meet once, at the end.
    """
    _, N, K = sizes
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_n = offs_n[:, None] < N
    x_ptrs = x_ptr + (start_k + offs_k) * x_strides[1]
    w_ptrs = tile_ptrs(w_ptr, w_strides, offs_n, start_k + offs_k)
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((offs_n.shape[0], BLOCK_K), tl.float32)
    for k in tl.range(start_k, end_k, BLOCK_K, num_stages=NUM_STAGES):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_k, other=0.0)
        w = tl.load(w_ptrs, mask=mask_n & mask_k[None, :], other=0.0).to(x.dtype)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        x_ptrs += step * x_strides[1]
        w_ptrs += step * w_strides[1]
    return tl.sum(acc, axis=1)[None, :]


@triton.jit
def rows_product(
    x_ptr,
    x_strides,
    w_ptr,
    w_strides,
    offs_n,
    start_k,
    end_k,
    sizes,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, columns `offs_n`] of x w^T over start_k <= k < end_k, in fp32.

    On the tensor cores, which wait for the memory anyway: rows padded to 16 cost nothing.
    """
    M, N, K = sizes
    offs_m, offs_k = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N
    x_ptrs = tile_ptrs(x_ptr, x_strides, offs_m, start_k + offs_k)
    w_ptrs = tile_ptrs(w_ptr, (w_strides[1], w_strides[0]), start_k + offs_k, offs_n)
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, offs_n.shape[0]), tl.float32)
    for k in tl.range(start_k, end_k, BLOCK_K, num_stages=NUM_STAGES):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_n & mask_k[:, None], other=0.0)
        acc = mma(x, w.to(x.dtype), acc, PRECISION)
        x_ptrs += step * x_strides[1]
        w_ptrs += step * w_strides[1]
    return acc


@triton.jit
def leave_partial(
    x_ptr,
    x_strides,
    w_ptr,
    w_strides,
    partial_ptr,
    offs_n,
    split,
    slice_k,
    sizes,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the columns `offs_n` of x w^T over one slice of K to partial [splits, M, N]."""
    M, N, K = sizes
    start_k, end_k = split * slice_k, min(K, (split + 1) * slice_k)
    operands = (x_ptr, x_strides, w_ptr, w_strides, offs_n, start_k, end_k, sizes)
    if BLOCK_M == 1:
        acc = row_product(*operands, BLOCK_K, NUM_STAGES)
    else:
        acc = rows_product(*operands, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(tile_ptrs(partial_ptr, (N, 1), split * M + offs_m, offs_n), acc, mask=mask)

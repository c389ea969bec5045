"""What the adapter adds to one tile of the output: t U^T, whole or block by block."""

import triton
import triton.language as tl

from lora_fast.kernels.column_blocks import overlapping_blocks, pick_block
from lora_fast.kernels.primitives import mma, tile_ptrs


@triton.jit
def add_update(
    acc,
    t,
    t_ptr,
    up_ptr,
    up_strides,
    offs_m,
    offs_n,
    start_n,
    sizes,
    blocks,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + t U^T` for one tile: t is at hand in one pass, else it is read from [M, R].

    With blocks each adds its own columns of t to its own columns of the tile, and no NaN passes
    from one to another.
    """
    M, N, R = sizes
    if blocks is None:
        return add_block(
            *(acc, t, t_ptr, up_ptr, up_strides, offs_m, offs_n, offs_n < N, (M, R), None),
            *(BLOCK_R, R_BLOCKS, ONE_PASS, PRECISION),
        )
    else:
        first, last = overlapping_blocks(blocks, start_n, start_n + acc.shape[1])
        # Nearly always one round: nothing to pipeline, and no shared memory to do it in.
        for index in tl.range(first, last, num_stages=1):
            begin, end, row = pick_block(blocks, index)
            mask_n = (offs_n >= begin) & (offs_n < end)
            added = add_block(
                *(acc, t, t_ptr, up_ptr, up_strides, offs_m, offs_n - begin + row, mask_n),
                *((M, R), (index, R // len(blocks))),
                *(BLOCK_R, R_BLOCKS, ONE_PASS, PRECISION),
            )
            acc = tl.where(mask_n[None, :], added, acc)
        return acc


@triton.jit
def add_block(
    acc,
    t,
    t_ptr,
    up_ptr,
    up_strides,
    offs_m,
    offs_up,
    mask_up,
    sizes,
    block_rank,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + t U^T` for the rows `offs_up` of U; `block_rank`: which columns of t, if not all."""
    M, R = sizes
    # A loop that is not unrolled: each product would take tensor memory of its own on sm_100.
    for part in tl.range(0, R_BLOCKS, num_stages=1):
        offs_r = part * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        offs_t = offs_r
        mask_r = offs_r[None, :] < R
        if block_rank is not None:
            index, rank = block_rank
            if ONE_PASS:
                offs_r = offs_t - index * rank
            else:
                offs_t = offs_r + index * rank
            mask_r = (offs_r >= 0)[None, :] & (offs_r < rank)[None, :]
        if not ONE_PASS:
            t_ptrs = tile_ptrs(t_ptr, (R, 1), offs_m, offs_t)
            t_part = tl.load(t_ptrs, mask=(offs_m[:, None] < M) & mask_r, other=0.0)
        elif block_rank is not None:
            t_part = tl.where(mask_r, t, tl.zeros_like(t))
        else:
            t_part = t
        up_ptrs = tile_ptrs(up_ptr, up_strides, offs_up, offs_r)
        up = tl.load(up_ptrs, mask=mask_up[:, None] & mask_r, other=0.0)
        acc = mma(t_part, tl.trans(up.to(t_ptr.dtype.element_ty)), acc, PRECISION)
    return acc

"""The end of a forward for a few rows: who comes last adds up partial sums, update and bias.

Programs count themselves in at what they have left a partial sum for. None waits for another.
"""

import triton
import triton.language as tl

from lora_fast.kernels.primitives import block_offsets, mma, tile_ptrs


@triton.jit
def sum_partials(partial_ptr, offs_m, offs_n, M, N, SPLITS: tl.constexpr):
    """The tile summed over partial [SPLITS, M, N], in order; from L2, where others have put it."""
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    total = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        ptrs = tile_ptrs(partial_ptr, (N, 1), split * M + offs_m, offs_n)
        total += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def count_in(counter_ptrs, mask=None):
    """How many were counted in before. What this program stored is seen by all who come later."""
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(counter_ptrs, 1, mask=mask, sem="acq_rel", scope="gpu")


@triton.jit
def store_s(
    partial_ptr,
    s_ptr,
    multiplier,
    M,
    R,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the partials of x a^T, scale, round once, store."""
    offs_m, offs_r = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_R).to(tl.int64)
    s = sum_partials(partial_ptr, offs_m, offs_r, M, R, SPLITS) * multiplier
    mask = (offs_m[:, None] < M) & (offs_r[None, :] < R)
    tl.store(tile_ptrs(s_ptr, (R, 1), offs_m, offs_r), s.to(s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_decode_update(
    y,
    s_ptr,
    first_rank,
    b_ptr,
    b_strides,
    block,
    offs_n,
    sizes,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y + s b^T` in the columns of a block, whose ranks in s [M, ranks] begin at `first_rank`."""
    M, ranks, R = sizes
    first, end, row = block
    offs_m, offs_r = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_R).to(tl.int64)
    mask_n, mask_r = (offs_n >= first) & (offs_n < end), offs_r[None, :] < R
    s_ptrs = tile_ptrs(s_ptr, (ranks, 1), offs_m, first_rank + offs_r)
    s = tl.load(s_ptrs, mask=(offs_m[:, None] < M) & mask_r, other=0.0, cache_modifier=".cg")
    b_ptrs = tile_ptrs(b_ptr, b_strides, offs_n - first + row, offs_r)
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r, other=0.0).to(s.dtype)
    if BLOCK_M == 1:
        added = y + tl.sum(b.to(tl.float32) * s.to(tl.float32), axis=1)[None, :]
    else:
        added = mma(s, tl.trans(b), y, PRECISION)
    return tl.where(mask_n[None, :], added, y)  # not 0 * Inf in the columns of others


@triton.jit
def finish_decode_tile(
    tile,
    partial_ptr,
    s_ptr,
    b_ptr,
    b_strides,
    bias_ptr,
    y_ptr,
    blocks,
    sizes,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum a tile's partials, add the update and the bias, round once, store."""
    M, N, ranks = sizes
    offs_m, offs_n = tl.arange(0, BLOCK_M).to(tl.int64), block_offsets(tile, BLOCK_N)
    mask_m, mask_n = offs_m[:, None] < M, offs_n < N
    y = sum_partials(partial_ptr, offs_m, offs_n, M, N, SPLITS)
    for index in tl.static_range(len(blocks)):
        R = ranks // len(blocks)
        if (tile * BLOCK_N < blocks[index][1]) & ((tile + 1) * BLOCK_N > blocks[index][0]):
            y = add_decode_update(
                *(y, s_ptr, index * R, b_ptr, b_strides, blocks[index], offs_n, (M, ranks, R)),
                *(BLOCK_M, BLOCK_R, PRECISION),
            )
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = tile_ptrs(y_ptr, (N, 1), offs_m, offs_n)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n[None, :])


@triton.jit
def finish_tiles(
    tile,
    has_s,
    first_group,
    end_group,
    operands,
    counter_ptr,
    blocks,
    sizes,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Finish a tile; or, for the program that has completed s, the tiles that wait for s alone.

    It looks at groups of TILES_AT_ONCE tiles, first_group up to end_group. Who has s counts itself
    in at each tile: one that has all its partials by then is its to finish, and any other that of
    the program with the last partial.
    """
    _, N, _ = sizes
    partial_ptr, s_ptr, b_ptr, b_strides, bias_ptr, y_ptr = operands
    tiles = tl.cdiv(N, BLOCK_N)
    for group in tl.range(first_group, end_group, num_stages=1):
        offs_t = group * TILES_AT_ONCE + tl.arange(0, TILES_AT_ONCE)
        ready = offs_t == tile
        if has_s:
            counted = count_in(counter_ptr + 1 + offs_t, offs_t < tiles)
            ready = (counted == SPLITS) & (offs_t < tiles)
        current = tl.min(tl.where(ready, offs_t, tiles))
        while current < tiles:
            finish_decode_tile(
                *(current, partial_ptr, s_ptr, b_ptr, b_strides, bias_ptr, y_ptr, blocks, sizes),
                *(SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION),
            )
            tl.store(counter_ptr + 1 + current, 0)
            current = tl.min(tl.where(ready & (offs_t > current), offs_t, tiles))

"""The backward pass over dY: dS = factor * dY B, dB = s_scaling * dY^T S and dbias."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.column_blocks import Blocks, gaps, pick_block, whole_or
from lora_fast.kernels.configs import GradSBConfig
from lora_fast.kernels.launch import Launch, launch, prepared
from lora_fast.kernels.primitives import block_offsets, mma, tile_ptrs
from lora_fast.kernels.reduce_partials import reduce_partials
from lora_fast.kernels.sizes import cdiv, chunk_length, rank_blocks
from lora_fast.kernels.torch_rules import dot_precision


@triton.jit
def chunk_columns(blocks_and_gaps, chunk, N, CHUNK_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """First, last + 1 and limiting column of a chunk, its first row in lora_B, block and number."""
    if blocks_and_gaps is None:
        start = chunk * CHUNK_N
        return start, min(N, start + CHUNK_N), N, start, 0, chunk
    else:
        chunks = tl.num_programs(1) // len(blocks_and_gaps)
        index, chunk = chunk // chunks, chunk % chunks
        first, end, row = pick_block(blocks_and_gaps, index)
        width = tl.cdiv(tl.cdiv(end - first, chunks), BLOCK_N) * BLOCK_N
        start = first + chunk * width
        return start, min(end, start + width), end, row + chunk * width, index, chunk


@prepared
@triton.jit
def lora_grad_sb_kernel(
    dy_ptr, dy_strides, b_ptr, b_strides, s_ptr, ds_ptr, db_ptr, dbias_ptr,
    blocks_and_gaps, M, N, R, rows_b, factor, s_scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program reads [BLOCK_M, columns of a chunk] of dy once and writes fp32 partial sums.

    Grid: (cdiv(M, BLOCK_M), chunks, cdiv(R, BLOCK_R)), where a chunk is CHUNK_N columns or, with
    blocks_and_gaps, an equal part of one of them: first the BLOCKS blocks, each with a rank of R,
    then the gaps between them, which have a bias alone.
    dy: [M, N], b: [rows_b, R], any strides.  s: [M, BLOCKS * R].
    Partials: ds [chunks of a block, M, BLOCKS * R], db [row blocks, rows_b, R], dbias [row blocks,
    N]; those whose pointer is None are not computed. A fixed order of sums: no atomics.
    """
    pid_m, chunk = tl.program_id(0), tl.program_id(1)
    offs_m = block_offsets(pid_m, BLOCK_M)
    offs_r = block_offsets(tl.program_id(2), BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r[None, :] < R
    start, stop, end, row_b, index, chunk = chunk_columns(
        blocks_and_gaps, chunk, N, CHUNK_N, BLOCK_N
    )
    offs_s = offs_r + index * R
    if blocks_and_gaps is not None:  # no rank is read or written for a gap, which has none
        mask_r = mask_r & (index < BLOCKS)
    acc_ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if db_ptr is not None:
        s_ptrs = tile_ptrs(s_ptr, (BLOCKS * R, 1), offs_m, offs_s)
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r, other=0.0)

    for start_n in range(start, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
        offs_b = offs_n + (row_b - start)
        mask_n = offs_n < end
        dy_ptrs = tile_ptrs(dy_ptr, dy_strides, offs_m, offs_n)
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if ds_ptr is not None:
            b_ptrs = tile_ptrs(b_ptr, b_strides, offs_b, offs_r)
            b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r, other=0.0).to(dy.dtype)
            acc_ds = mma(dy, b, acc_ds, PRECISION)
        if db_ptr is not None:
            # The transposed product: dy stays in the layout that the other product reads.
            db = mma(tl.trans(s), dy, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), PRECISION)
            db_ptrs = tile_ptrs(db_ptr, (1, R), offs_r, pid_m.to(tl.int64) * rows_b + offs_b)
            tl.store(db_ptrs, db * s_scaling, mask=mask_n[None, :] & tl.trans(mask_r))
        if dbias_ptr is not None:
            dbias = tl.sum(dy.to(tl.float32), axis=0)
            dbias_ptrs = dbias_ptr + pid_m.to(tl.int64) * N + offs_n
            tl.store(dbias_ptrs, dbias, mask=mask_n & (tl.program_id(2) == 0))

    if ds_ptr is not None:
        row = chunk.to(tl.int64) * M + offs_m
        ds_ptrs = tile_ptrs(ds_ptr, (BLOCKS * R, 1), row, offs_s)
        tl.store(ds_ptrs, acc_ds * factor, mask=mask_m[:, None] & mask_r)


def lora_grad_sb(
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    factor: float,
    blocks: Blocks | None,
    *,
    config: GradSBConfig,
    need_ds: bool,
    need_db: bool,
    dbias_dtype: torch.dtype | None,
    s_scaling: float = 1.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS (M, R) = factor * dY B, dB (N, R) = s_scaling * dY^T S and dbias (N,), or None.

    What is not asked for is None. Both factors multiply sums in fp32, before the rounding.
    With blocks B and dB have a row for each of their columns, and dS the ranks of all blocks.
    """
    (M, N), (rows_b, R) = dy.shape, lora_b.shape
    dy_strides, b_strides = dy.stride(), lora_b.stride()
    chunks, row_blocks, rank, blocks_and_gaps, planned = grad_sb_launch(
        *(M, N, R, dy.dtype, dy_strides, blocks, dbias_dtype is not None, config),
        *(dot_precision(dy.dtype), need_ds, need_db, rows_b, b_strides, lora_b.dtype),
    )

    def pair(dtype: torch.dtype | None, splits: int, *shape: int):
        partial = dy.new_empty((splits, *shape), dtype=torch.float32)
        return partial, dy.new_empty(shape, dtype=dtype)

    none = None, None
    ds = pair(dy.dtype, chunks, M, rank) if need_ds else none
    db = pair(lora_b.dtype, row_blocks, rows_b, R) if need_db else none
    dbias = pair(dbias_dtype, row_blocks, N) if dbias_dtype is not None else none
    launch(
        lora_grad_sb_kernel,
        planned,
        *(dy, dy_strides, lora_b, b_strides, s if need_db else None, ds[0], db[0], dbias[0]),
        *(blocks_and_gaps, M, N, R, rows_b, factor, s_scaling),
    )
    reduce_partials(*(both for both in (ds, db, dbias) if both[0] is not None))
    return ds[1], db[1], dbias[1]


@lru_cache(maxsize=4096)
def grad_sb_launch(
    M: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    dy_strides: tuple[int, int],
    blocks: Blocks | None,
    has_dbias: bool,
    config: GradSBConfig,
    precision: str,
    *details: object,
) -> tuple[int, int, int, Blocks | None, Launch]:
    """Partial sums of dS and of dB, all ranks, blocks and gaps, and the launch.

    `details` are what else decides how it is compiled.
    """
    block_r, r_blocks = rank_blocks(R)
    blocks_and_gaps, rank = blocks, R
    if blocks is not None:
        rank = R * len(blocks)
        blocks_and_gaps = blocks + gaps(blocks, N) if has_dbias else blocks
    widest = max(end - first for first, end, _ in whole_or(blocks, N))
    count = len(blocks_and_gaps or (0,))
    chunk_n = chunk_length(widest * count, config.chunk_n)
    chunks = cdiv(widest, chunk_n)
    # Off a grid of 16 elements each is loaded alone, which takes registers: half the rows then; and
    # for blocks in fp32, which has no tensor core to keep operands out of registers.
    fits = blocks is None or dtype is not torch.float32
    edges = (edge for first, end, _ in blocks_and_gaps or () for edge in (first, end))
    offsets = (dy_strides[0], *edges)
    block_m = (
        config.block_m
        if fits and all(offset % 16 == 0 for offset in offsets)
        else max(16, config.block_m // 2)
    )
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "CHUNK_N": chunk_n,
        "BLOCK_R": block_r,
        "BLOCKS": 1 if blocks is None else len(blocks),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    row_blocks = cdiv(M, block_m)
    return (
        chunks,
        row_blocks,
        rank,
        blocks_and_gaps,
        Launch((row_blocks, chunks * count, r_blocks), constants),
    )


def library_grad_sb(
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    factor: float,
    blocks: Blocks | None,
    *,
    need_ds: bool,
    need_db: bool,
    dbias_dtype: torch.dtype | None,
    s_scaling: float = 1.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The results of `lora_grad_sb` from vendor GEMMs, which are better at large ranks."""
    blocks, R = whole_or(blocks, dy.shape[1]), lora_b.shape[1]
    empty = {"device": dy.device, "dtype": dy.dtype}
    ds = torch.empty((dy.shape[0], R * len(blocks)), **empty) if need_ds else None
    db = torch.empty(lora_b.shape, **empty) if need_db else None
    nothing = torch.empty((), **empty)
    for index, (first, end, row) in enumerate(blocks):
        dy_block, rows = dy[:, first:end], slice(row, row + end - first)
        ranks = slice(index * R, (index + 1) * R)
        # The factors before the rounding: a product alone may be too large or too small for fp16.
        if ds is not None:
            b, out = lora_b[rows].to(dy.dtype), ds[:, ranks]
            torch.addmm(nothing, dy_block, b, beta=0, alpha=factor, out=out)
        if db is not None:
            s_block, out = s[:, ranks], db[rows]
            torch.addmm(nothing, dy_block.t(), s_block, beta=0, alpha=s_scaling, out=out)
    db = None if db is None else db.to(lora_b.dtype)
    dbias = None if dbias_dtype is None else dy.sum(0, dtype=torch.float32).to(dbias_dtype)
    return ds, db, dbias

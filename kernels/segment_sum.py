"""Deterministic scatter: the sum of the rows that share a key, keys sorted, in a fixed order.

A run of equal keys may cross blocks. The first kernel sums what each block adds to a run that
began before it; the second gives every run to the block where it begins, which adds those sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.launch import prepared
from lora_fast.kernels.primitives import block_offsets, tile_ptrs
from lora_fast.kernels.sizes import cdiv, rank_blocks

CARRIES = tl.constexpr(32)  # how many blocks' sums one step adds to a long run


@triton.jit
def add_run(sum_after, closed, row, ends):
    """One step of a scan from the last row up: a run's sum starts anew where the run ends."""
    return tl.where(ends != 0, row, sum_after + row), closed | ends


@triton.jit
def load_rows(rows_ptr, order_ptr, offs, mask, offs_r, R):
    """The rows [order[offs], offs_r] in fp32; zero where masked."""
    order = tl.load(order_ptr + offs, mask=mask, other=0)
    row_ptrs = tile_ptrs(rows_ptr, (R, 1), order, offs_r)
    return tl.load(row_ptrs, mask=mask[:, None] & (offs_r < R)[None, :], other=0.0).to(tl.float32)


@prepared
@triton.jit
def segment_carry_kernel(
    keys_ptr, order_ptr, rows_ptr, carry_ptr, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Each program writes carry[block], the sum of its rows that continue the previous block's run.

    Grid: (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)).
    keys: [M], sorted; order: [M] int64; rows: [M, R]; carry: [blocks, R] fp32. A block that
    begins a run writes nothing.
    """
    block = tl.program_id(0)
    offs = block_offsets(block, BLOCK_M)
    offs_r = block_offsets(tl.program_id(1), BLOCK_R)
    if block > 0:
        before = keys_ptr + block.to(tl.int64) * BLOCK_M - 1
        key = tl.load(before)
        if tl.load(before + 1) == key:
            same = (offs < M) & (tl.load(keys_ptr + offs, mask=offs < M, other=-1) == key)
            rows = load_rows(rows_ptr, order_ptr, offs, same, offs_r, R)
            out_ptrs = carry_ptr + block.to(tl.int64) * R + offs_r
            tl.store(out_ptrs, tl.sum(rows, axis=0), mask=offs_r < R)


@prepared
@triton.jit
def segment_sum_kernel(
    keys_ptr,
    order_ptr,
    rows_ptr,
    carry_ptr,
    counts_ptr,
    out_ptr,
    M,
    R,
    num,
    skipped,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Each program writes out[:, key] for the keys whose run begins in its BLOCK_M positions.

    Grid: (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)).
    keys: [M], sorted; order: [M] int64; rows: [M, R]; carry: as `segment_carry_kernel` left it;
    counts: [M] or None, divides the sum; out: [R, num]. The key `skipped` is left out.
    Sums in fp32: a tree within the block, then the later blocks in order; rounds once.
    """
    block = tl.program_id(0)
    offs = block_offsets(block, BLOCK_M)
    offs_r = block_offsets(tl.program_id(1), BLOCK_R)
    mask, mask_r = offs < M, offs_r < R
    keys = tl.load(keys_ptr + offs, mask=mask, other=-1)
    before = tl.load(keys_ptr + offs - 1, mask=mask & (offs > 0), other=-1)
    after = tl.load(keys_ptr + offs + 1, mask=offs + 1 < M, other=-1)
    begins = mask & ((offs == 0) | (keys != before))
    ends = ((offs + 1 >= M) | (keys != after)).to(tl.int32)

    rows = load_rows(rows_ptr, order_ptr, offs, mask, offs_r, R)
    ends = tl.broadcast_to(ends[:, None], rows.shape)
    sums, _ = tl.associative_scan((rows, ends), 0, add_run, reverse=True)

    start = (block.to(tl.int64) + 1) * BLOCK_M  # of the next block
    last = tl.load(keys_ptr + tl.minimum(start, M) - 1)
    begins_here = tl.sum((begins & (keys == last)).to(tl.int32), axis=0) > 0
    later = tl.zeros((BLOCK_R,), tl.float32)
    goes_on = begins_here & (tl.load(keys_ptr + start, mask=start < M, other=-1) == last)
    while goes_on & (start < M):
        starts = start + tl.arange(0, CARRIES).to(tl.int64) * BLOCK_M
        same = (starts < M) & (tl.load(keys_ptr + starts, mask=starts < M, other=-1) == last)
        carry_ptrs = tile_ptrs(carry_ptr, (R, 1), starts // BLOCK_M, offs_r)
        carries = tl.load(carry_ptrs, mask=same[:, None] & mask_r[None, :], other=0.0)
        later += tl.sum(carries, axis=0)
        start += CARRIES * BLOCK_M
        goes_on = tl.load(keys_ptr + start, mask=start < M, other=-1) == last
    sums += tl.where((keys == last)[:, None], later[None, :], 0.0)

    if counts_ptr is not None:
        counts = tl.load(counts_ptr + offs, mask=mask, other=1)
        sums = tl.div_rn(sums, tl.broadcast_to(counts.to(tl.float32)[:, None], sums.shape))
    column = keys.to(tl.int64)
    kept = begins & (column >= 0) & (column < num) & (column != skipped)
    out_ptrs = tile_ptrs(out_ptr, (1, num), column, offs_r)
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=kept[:, None] & mask_r[None, :])


def segment_sum(
    rows: Tensor,
    index: Tensor,
    num: int,
    dtype: torch.dtype,
    *,
    skipped: int | None,
    mean: bool,
    block_m: int,
) -> Tensor:
    """out[:, v] = sum of the rows whose index is v; divided by how many they are, with `mean`.

    rows (M, R) contiguous, index (M,) in [0, num). Returns (R, num) in `dtype`, contiguous, zero
    where no row went; the column `skipped` stays zero too. fp32 accumulation in a fixed order.
    """
    M, R = rows.shape
    out = torch.zeros((R, num), device=rows.device, dtype=dtype)
    # The sort takes a pass for each byte of a key.
    widths = (torch.int16, torch.int32, torch.int64)
    narrowest = next(width for width in widths if num <= torch.iinfo(width).max)
    keys, order = torch.sort(index.to(narrowest), stable=True)
    counts = None
    if mean:
        counts = torch.searchsorted(keys, keys, right=True) - torch.searchsorted(keys, keys)
    block_r, r_blocks = rank_blocks(R)
    blocks = cdiv(M, block_m)
    carry = torch.empty((blocks, R), device=rows.device, dtype=torch.float32)
    sizes = {"BLOCK_M": block_m, "BLOCK_R": block_r, "num_warps": 4}
    if blocks > 1:
        segment_carry_kernel[(blocks, r_blocks)](keys, order, rows, carry, M, R, **sizes)
    segment_sum_kernel[(blocks, r_blocks)](
        *(keys, order, rows, carry, counts, out, M, R, num, -1 if skipped is None else skipped),
        **sizes,
    )
    return out

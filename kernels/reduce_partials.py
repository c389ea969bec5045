"""Second level of a deterministic sum: fp32 partial results into one, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.launch import prepared
from lora_fast.kernels.primitives import block_offsets, cdiv

REDUCE_BLOCK = 1024


@triton.jit
def reduce_segment(partial_ptr, out_ptr, splits, length, block, BLOCK: tl.constexpr):
    """One block of out[i] = sum over splits of partial[split, i], in order."""
    offs = block_offsets(block, BLOCK)
    mask = offs < length
    total = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partial_ptr + offs
    for _ in range(splits):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += length
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@prepared
@triton.jit
def reduce_partials_kernel(segments, BLOCK: tl.constexpr):
    """Each program reduces one block of one segment (partial [splits, length], out [length], ...).

    Grid: (sum over the segments of cdiv(length, BLOCK),). Sums fp32 in a fixed order and rounds
    once, to the dtype of `out`.
    """
    block = tl.program_id(0)
    for index in tl.static_range(len(segments)):
        partial_ptr, out_ptr, splits, length = segments[index]
        if (block >= 0) & (block < tl.cdiv(length, BLOCK)):
            reduce_segment(partial_ptr, out_ptr, splits, length, block, BLOCK)
        block -= tl.cdiv(length, BLOCK)


def reduce_partials(*pairs: tuple[Tensor, Tensor]) -> None:
    """Sum each partial (splits, ...) over its first axis into its contiguous output; one launch."""
    segments = tuple((part, out, part.shape[0], out.numel()) for part, out in pairs)
    blocks = sum(cdiv(out.numel(), REDUCE_BLOCK) for _, out in pairs)
    reduce_partials_kernel[(blocks,)](segments, BLOCK=REDUCE_BLOCK, num_warps=4)

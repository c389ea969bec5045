"""Second level of a deterministic sum: fp32 partial results into one, in a fixed order."""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.launch import Launch, launch, prepared
from lora_fast.kernels.primitives import block_offsets, tile_ptrs
from lora_fast.kernels.sizes import cdiv

REDUCE_BLOCK = 256
AT_ONCE = 8  # partial results whose loads are under way together


@triton.jit
def reduce_segment(
    partial_ptr, out_ptr, splits, length, block, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """One block of out[i] = sum over splits of partial[split, i], AT_ONCE at a time."""
    offs = block_offsets(block, BLOCK)
    offs_s = tl.arange(0, AT_ONCE).to(tl.int64)
    mask = offs < length
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, AT_ONCE):
        ptrs = tile_ptrs(partial_ptr, (length, 1), first + offs_s, offs)
        mask_s = first + offs_s < splits
        parts = tl.load(ptrs, mask=mask_s[:, None] & mask[None, :], other=0.0)
        total += tl.sum(parts, axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@prepared
@triton.jit
def reduce_partials_kernel(segments, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Each program reduces one block of one segment (partial [splits, length], out [length], ...).

    Grid: (sum over the segments of cdiv(length, BLOCK),). Sums fp32 in a fixed order and rounds
    once, to the dtype of `out`.
    """
    block = tl.program_id(0)
    for index in tl.static_range(len(segments)):
        partial_ptr, out_ptr, splits, length = segments[index]
        if (block >= 0) & (block < tl.cdiv(length, BLOCK)):
            reduce_segment(partial_ptr, out_ptr, splits, length, block, BLOCK, AT_ONCE)
        block -= tl.cdiv(length, BLOCK)


@lru_cache(maxsize=4096)
def reduce_launch(*segments: tuple[object, ...]) -> Launch:
    """The launch for segments of so many splits and elements, and the dtypes of their outputs."""
    blocks = sum(cdiv(length, REDUCE_BLOCK) for _, length, _ in segments)
    constants = {"BLOCK": REDUCE_BLOCK, "AT_ONCE": AT_ONCE, "num_warps": 4}
    return Launch((blocks,), constants)


def reduce_partials(*pairs: tuple[Tensor, Tensor]) -> None:
    """Sum each partial (splits, ...) over its first axis into its contiguous output; one launch."""
    segments = tuple((part, out, part.shape[0], out.numel()) for part, out in pairs)
    planned = reduce_launch(*((splits, length, out.dtype) for _, out, splits, length in segments))
    launch(reduce_partials_kernel, planned, segments)

"""Which columns of the output an adapter adds to: the blocks of a merged linear layer.

A block is (first column, last column + 1, its first row in lora_B); S and dS hold the blocks' ranks
side by side. Kernels take a tuple of blocks, or None where one block is the whole output.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

Blocks = tuple[tuple[int, int, int], ...]


def column_blocks(edges: Sequence[int] | None, features: int) -> Blocks | None:
    """The blocks between pairs of ascending edges; None for a block of all the features."""
    if edges is None or tuple(edges) == (0, features):
        return None
    blocks, row = [], 0
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        blocks.append((first, end, row))
        row += end - first
    return tuple(blocks)


def whole_or(blocks: Blocks | None, features: int) -> Blocks:
    """The blocks, spelled out where None stands for the whole output."""
    return ((0, features, 0),) if blocks is None else blocks


def gaps(blocks: Blocks, features: int) -> Blocks:
    """The columns between the blocks, which have no adapter and no row in lora_B: row -1."""
    firsts = [0, *(end for _, end, _ in blocks)]
    ends = [*(first for first, _, _ in blocks), features]
    return tuple((lo, hi, -1) for lo, hi in zip(firsts, ends, strict=True) if lo < hi)


@triton.jit
def pick_block(blocks, index):
    """The block of an index that is known only when the kernel runs."""
    first, end, row = blocks[0]
    for i in tl.static_range(1, len(blocks)):
        first = tl.where(index == i, blocks[i][0], first)
        end = tl.where(index == i, blocks[i][1], end)
        row = tl.where(index == i, blocks[i][2], row)
    return first, end, row


@triton.jit
def overlapping_blocks(blocks, start, stop):
    """The indices, first and last + 1, of the blocks that have one of the columns [start, stop)."""
    first = tl.full((), 0, tl.int32)
    last = tl.full((), 0, tl.int32)
    for i in tl.static_range(len(blocks)):
        first += tl.where(blocks[i][1] <= start, 1, 0)
        last += tl.where(blocks[i][0] < stop, 1, 0)
    return first, last

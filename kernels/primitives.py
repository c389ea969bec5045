"""Device code that at least two kernels share."""

import triton
import triton.language as tl

# The interpreter computes with NumPy, which has no bf16: it needs fp32 operands.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_ptrs(ptr, strides, rows, cols):
    """Addresses of the elements [rows, cols] of a strided matrix; `rows` and `cols` are int64."""
    return ptr + rows[:, None] * strides[0] + cols[None, :] * strides[1]


@triton.jit
def block_offsets(block, BLOCK: tl.constexpr):
    """Indices of one block, int64: 64k tokens x 32k features pass 2**31."""
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` with an fp32 `acc`; PRECISION concerns fp32 operands only."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, walking GROUP_M rows of tiles at a time so that L2 keeps both."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    group_m = min(num_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % group_m, (tile % per_group) // group_m

"""Building blocks that at least two kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes with NumPy, which has no bf16: it needs fp32 operands.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

MAX_BLOCK_R = 64  # wider ranks are cut into blocks of this many columns
MAX_GRID_Y = 65535  # CUDA's limit for the second and third axis of a grid
MAX_SIZE = 2**31 - 2**16  # of one dimension: the end of a tile beyond it fits 32 bits


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


def cdiv(length: int, block: int) -> int:
    """How many blocks cover a length. `triton.cdiv` serves kernels as well and takes 3 us."""
    return -(-length // block)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller; as with `cdiv`, Triton's own takes its time."""
    return 1 << max(number - 1, 0).bit_length()


def rank_blocks(rank: int) -> tuple[int, int]:
    """Width of a block of the rank (16 is the least that `tl.dot` takes) and how many there are."""
    block_r = min(MAX_BLOCK_R, max(16, next_power_of_2(rank)))
    return block_r, cdiv(rank, block_r)


def chunk_length(length: int, chunk: int) -> int:
    """`chunk`, or the power of two from which `length` fits a grid's second axis in chunks."""
    return max(chunk, next_power_of_2(cdiv(length, MAX_GRID_Y)))


def descriptor_fits(tensor: Tensor) -> bool:
    """Can the accelerator read this matrix: rows contiguous, base and pitch on 16 bytes?

    Rows that overlap, as those of an expanded gradient do, are outside of its contract.
    """
    pitch, step = tensor.stride()
    return (
        step == 1
        and pitch >= tensor.shape[1]
        and pitch * tensor.itemsize % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 for fp32 operands only where torch's own matmul is allowed to use it."""
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def as_own(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a new tensor another shape, as no view: autograd refuses writes to an op's views."""
    if y.dim() == len(shape):
        return y
    return torch.ops.aten._unsafe_view.default(y, shape)  # type: ignore[no-any-return]


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current one, wherever the data is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()

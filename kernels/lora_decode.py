"""Forward for a few rows in one launch: y = x W^T + scaling * (x A^T) B^T + bias, M <= 64.

W is read once, at the speed of the memory, and so is A: its rows are a few more columns of the
product, whose result S all the others need. Nobody waits for anybody. Each program leaves a
partial sum and counts itself in at its tile; whoever comes last finishes the tile.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.column_blocks import Blocks, whole_or
from lora_fast.kernels.configs import architecture, processor_count
from lora_fast.kernels.counters import zeroed_counters
from lora_fast.kernels.decode_configs import (
    MAX_M,
    TILES,
    DecodeConfig,
    DecodeSplits,
    decode_splits,
)
from lora_fast.kernels.finish_decode import count_in, finish_tiles, store_s
from lora_fast.kernels.launch import Launch, launch, prepared
from lora_fast.kernels.primitives import block_offsets
from lora_fast.kernels.sizes import MAX_BLOCK_R, cdiv, next_power_of_2, rank_blocks
from lora_fast.kernels.slice_product import leave_partial
from lora_fast.kernels.torch_rules import dot_precision


@prepared
@triton.jit
def lora_decode_kernel(
    x_ptr, x_strides, w_ptr, w_strides, a_ptr, a_strides, b_ptr, b_strides, bias_ptr,
    y_ptr, s_ptr, partial_ptr, counter_ptr,
    blocks, sizes, slices, multiplier,
    SPLITS_W: tl.constexpr, SPLITS_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr, NUM_STAGES: tl.constexpr, STAGES_A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program multiplies x by BLOCK_A rows of a or BLOCK_N rows of w over one slice of K.

    Grid: (cdiv(R, BLOCK_A) * SPLITS_A + cdiv(N, BLOCK_N) * SPLITS_W,), those of a first.
    x: [M, K], w: [N, K], a: [R, K], b, any strides.  y: [M, N], s: [M, R], bias: [N], contiguous.
    sizes: M, N, K, R.  slices: how many columns one of w's has, and of a's.
    blocks: each (first column, last column + 1, its first row in b) of y gets its own R /
    len(blocks) columns of s times its rows of b.
    partial: fp32, [SPLITS_W, M, N] and [SPLITS_A, M, R] one after the other.
    counters: one for a and one for each tile of y, zero before and after.
    Accumulates in fp32 in a fixed order; s and y are rounded once, y is built from the rounded s.
    A tile of y waits for SPLITS_W partials and for s, and whoever comes last finishes it: no
    program ever waits, whichever of them run at once or in what order.
    """
    M, N, K, R = sizes
    pid = tl.program_id(0)
    programs_a, tiles = tl.cdiv(R, BLOCK_A) * SPLITS_A, tl.cdiv(N, BLOCK_N)
    partial_a_ptr = partial_ptr + tl.cast(SPLITS_W * M, tl.int64) * N
    tile = tiles
    first_group, end_group = 0, 0
    if pid < programs_a:
        leave_partial(
            *(x_ptr, x_strides, a_ptr, a_strides, partial_a_ptr),
            *(block_offsets(pid // SPLITS_A, BLOCK_A), pid % SPLITS_A, slices[1], (M, R, K)),
            *(BLOCK_M, BLOCK_K, STAGES_A, PRECISION),
        )
        if count_in(counter_ptr) == programs_a - 1:
            tl.store(counter_ptr, 0)
            store_s(partial_a_ptr, s_ptr, multiplier, M, R, SPLITS_A, BLOCK_M, BLOCK_S)
            end_group = tl.cdiv(tiles, TILES_AT_ONCE)
    else:
        tile = (pid - programs_a) // SPLITS_W
        leave_partial(
            *(x_ptr, x_strides, w_ptr, w_strides, partial_ptr),
            *(block_offsets(tile, BLOCK_N), (pid - programs_a) % SPLITS_W, slices[0], (M, N, K)),
            *(BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION),
        )
        if count_in(counter_ptr + 1 + tile) == SPLITS_W:
            first_group = tile // TILES_AT_ONCE
            end_group = first_group + 1
    finish_tiles(
        *(tile, pid < programs_a, first_group, end_group),
        *((partial_ptr, s_ptr, b_ptr, b_strides, bias_ptr, y_ptr), counter_ptr, blocks),
        *((M, N, R), SPLITS_W, BLOCK_M, BLOCK_N, BLOCK_R, TILES_AT_ONCE, PRECISION),
    )


class DecodeLaunch(NamedTuple):
    """The launch for the sizes of a call, with its workspace in numbers; made once for each."""

    launch: Launch
    partials: int
    counters: int
    sizes: tuple[tuple[int, ...], tuple[int, int]]


@lru_cache(maxsize=4096)
def decode_launch(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype,
    w_is_nk: bool, device: torch.device, blocks: int, config: DecodeConfig,
    splits: DecodeSplits | None, precision: str, *details: object,
) -> DecodeLaunch:  # fmt: skip
    """Launch and workspace of a call; without `splits`, those of the model.

    `details` are what else decides how it is compiled.
    """
    if not (1 <= M <= MAX_M and R <= MAX_BLOCK_R):
        raise ValueError(
            f"lora_decode: expected 1 to {MAX_M} rows and a rank up to {MAX_BLOCK_R}, got {M} "
            f"and {R}; another implementation serves those"
        )
    if M == 1 and not w_is_nk:
        config = config.across()
    block_k = config.row_bytes // dtype.itemsize
    block_s = rank_blocks(R)[0]
    block_a = min(config.block_n, block_s)
    tiles = cdiv(N, config.block_n)
    if splits is None:
        in_flight = TILES[architecture(device).name].bytes_in_flight * processor_count(device)
        splits = decode_splits(config, block_k, tiles, K, in_flight)
    constants = {
        "SPLITS_W": splits.w,
        "SPLITS_A": splits.a,
        "BLOCK_M": 1 if M == 1 else max(16, next_power_of_2(M)),
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "BLOCK_A": block_a,
        "BLOCK_R": rank_blocks(R // blocks)[0],
        "BLOCK_S": block_s,
        # One for each thread, of warps of 32 or 64: an atomic that threads share is not portable.
        "TILES_AT_ONCE": 64 * config.num_warps,
        "NUM_STAGES": config.num_stages,
        # A pipeline of fp32 factors beside a 16-bit weight would not fit every chip.
        "STAGES_A": config.num_stages if adapter_dtype.itemsize <= dtype.itemsize else 2,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return DecodeLaunch(
        launch=Launch((cdiv(R, block_a) * splits.a + tiles * splits.w,), constants),
        partials=M * (splits.a * R + splits.w * N),
        counters=1 + tiles,
        sizes=((M, N, K, R), (splits.slice_w, splits.slice_a)),
    )


def lora_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    config: DecodeConfig,
    blocks: Blocks | None = None,
    splits: DecodeSplits | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `lora_decode_kernel` for x (M, K), weight (N, K), lora_a (R, K) and lora_b.

    lora_b is (N, R) for one block of all columns (None), (columns of all blocks, R / blocks) else.
    Returns y (M, N) and s (M, R) = scaling * x A^T, contiguous, in x's dtype.
    Raises: ValueError beyond 64 rows or a rank of 64.
    """
    (M, K), N, R, device = x.shape, weight.shape[0], lora_a.shape[0], x.device
    blocks = whole_or(blocks, N)
    strides = x.stride(), weight.stride(), lora_a.stride(), lora_b.stride()
    planned = decode_launch(
        *(M, N, K, R, x.dtype, lora_a.dtype, strides[1][1] == 1, device, len(blocks)),
        *(config, splits, dot_precision(x.dtype)),
        *(strides, lora_b.dtype, None if bias is None else bias.dtype, blocks),
    )
    y, s = x.new_empty((M, N)), x.new_empty((M, R))
    partial = x.new_empty(planned.partials, dtype=torch.float32)
    counters = zeroed_counters(planned.counters, device)
    launch(
        lora_decode_kernel,
        planned.launch,
        *(x, strides[0], weight, strides[1], lora_a, strides[2], lora_b, strides[3]),
        *(bias, y, s, partial, counters, blocks, *planned.sizes, scaling),
    )
    return y, s

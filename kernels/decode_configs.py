"""Tiles of the kernel for a few rows, and how it cuts the work: models, not measurements.

The tiles come from the compile report (registers, shared memory, no spills), the cuts from how
many bytes must be under way to keep the memory busy.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lora_fast.kernels.sizes import MAX_BLOCK_R, cdiv

# Rows of one tile. In 16 bits these are far below the ratio of arithmetic to bandwidth of every
# chip. fp32 without TF32 has no tensor core on NVIDIA's: by the datasheets a product is bound by
# its arithmetic from 20 rows (A100, B200), 40 (H100) or 165 on (RTX 4090), whichever kernel runs
# it. This one spares the launch of a shrink, whose few rows fill few processors.
MAX_M = 64


@dataclass(frozen=True)
class DecodeConfig:
    """Tile of the kernel for a few rows; it streams `block_n` rows of the weight.

    Attributes:
        row_bytes: bytes of each of these rows that a step of the loop reads.
        max_splits: bound of the slices of K. Each costs a partial sum of 4 MN bytes, written and
            read, and the one who adds them up has them all in registers.
    """

    block_n: int
    row_bytes: int
    num_warps: int
    num_stages: int
    max_splits: int = 8

    def bytes_in_flight(self) -> int:
        """What one program has asked of the memory and not got yet, once its loop runs."""
        return self.block_n * self.row_bytes * max(1, self.num_stages - 1)

    def across(self) -> "DecodeConfig":
        """For one row and a weight stored (K, N): more neighbours along N, fewer tiles at once."""
        return replace(self, block_n=2 * self.block_n, num_stages=max(2, self.num_stages - 1))


@dataclass(frozen=True)
class DecodeTiles:
    """The tiles of one chip.

    Attributes:
        bytes_in_flight: what a multiprocessor must have asked of the memory to keep it busy:
            datasheet bandwidth x 800 ns of assumed latency / multiprocessors.
        one: for one row.
        few: for up to 32.
        many: for up to 64, wider because more of x is read for each tile.
        wide: for more than one row in fp32, whose operands are in registers: with 4 warps, 64 rows
            of the weight at once or 8 partial sums it spills where K is odd. 57 % (16 rows) to
            72 % (64) of its loop's instructions are multiply-adds on sm_80 and sm_90.
    """

    bytes_in_flight: int
    one: DecodeConfig = DecodeConfig(16, 512, num_warps=4, num_stages=4)
    few: DecodeConfig = DecodeConfig(64, 256, num_warps=4, num_stages=4)
    many: DecodeConfig = DecodeConfig(128, 128, num_warps=8, num_stages=4, max_splits=4)
    wide: DecodeConfig = DecodeConfig(32, 256, num_warps=8, num_stages=4, max_splits=4)


@dataclass(frozen=True)
class DecodeSplits:
    """How programs share the columns of x: slices of W (`w` of them) and of A, in elements."""

    w: int
    a: int
    slice_w: int
    slice_a: int


TILES = {
    "sm_80": DecodeTiles(16 * 1024),
    "sm_89": DecodeTiles(8 * 1024),
    "sm_90": DecodeTiles(32 * 1024),
    "sm_100": DecodeTiles(48 * 1024),
    "gfx942": DecodeTiles(
        16 * 1024,
        one=DecodeConfig(16, 512, num_warps=4, num_stages=2),
        few=DecodeConfig(64, 256, num_warps=4, num_stages=2),
        many=DecodeConfig(64, 128, num_warps=4, num_stages=2, max_splits=4),
        wide=DecodeConfig(32, 256, num_warps=8, num_stages=2, max_splits=4),
    ),
}


def decode_serves(M: int, R: int) -> bool:
    """Can the decode kernel run it?"""
    return M <= MAX_M and R <= MAX_BLOCK_R


def decode_config(arch: str, M: int, dtype: torch.dtype) -> DecodeConfig:
    """Tile for M rows on an architecture."""
    tiles = TILES[arch]
    if M <= 1:
        return tiles.one
    if dtype is torch.float32:
        return tiles.wide
    return tiles.few if M <= 32 else tiles.many


@lru_cache(maxsize=4096)
def decode_splits(
    config: DecodeConfig, block_k: int, tiles: int, K: int, bytes_in_flight: int
) -> DecodeSplits:
    """Cut K so that the programs together have `bytes_in_flight` under way.

    Slices are whole blocks of K, at least as many as the pipeline has stages. Those of A are a
    quarter to a half as long, so that S is there before it is needed.
    """
    blocks = cdiv(K, block_k)
    wanted = cdiv(bytes_in_flight, config.bytes_in_flight() * tiles)
    splits = max(1, min(wanted, blocks // config.num_stages, config.max_splits))
    blocks_w = cdiv(blocks, splits)
    blocks_a = cdiv(blocks, min(4 * splits, 2 * config.max_splits, blocks))
    return DecodeSplits(
        w=cdiv(blocks, blocks_w),
        a=cdiv(blocks, blocks_a),
        slice_w=blocks_w * block_k,
        slice_a=blocks_a * block_k,
    )

"""Dropout masks: drawn once per element by a counter-based generator, kept as bits.

One Philox call of four 32-bit words serves eight elements with 16 bits each, so the drop
probability is a multiple of 2**-16, and the kept values are scaled by its exact inverse.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.primitives import INTERPRETED, tile_ptrs
from lora_fast.kernels.sizes import cdiv

LEVELS = 1 << 16


@triton.jit
def draw_keep_bits(seed, rows, octets, threshold):
    """One byte per row and group of eight columns; bit j is set where column 8 * octet + j stays.

    The counter is (octet, row), so the bits depend on the element alone, not on the tiling.
    """
    row_words = rows.to(tl.uint32)[:, None]
    octet_words = octets.to(tl.uint32)[None, :]
    zeros = (row_words + octet_words) * 0
    words = tl.philox(seed, octet_words + zeros, row_words + zeros, zeros, zeros)
    packed = zeros
    for word in tl.static_range(4):
        low = (words[word] & 0xFFFF) >= threshold
        high = (words[word] >> 16) >= threshold
        packed += low.to(tl.uint32) << (2 * word)
        packed += high.to(tl.uint32) << (2 * word + 1)
    return packed.to(tl.uint8)


@triton.jit
def unpack_keep_bits(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS // 8] bytes as a [ROWS, COLS] tile of 0 and 1."""
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
    return tl.reshape(bits, (ROWS, COLS))


@triton.jit
def load_keep(keep_ptr, offs_m, start_col, M, COLS_TOTAL, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The [ROWS, COLS] tile of the packed mask whose columns begin at `start_col`, as 0 and 1."""
    width = tl.cdiv(COLS_TOTAL, 8)
    octets = start_col.to(tl.int64) // 8 + tl.arange(0, COLS // 8)
    mask = (offs_m[:, None] < M) & (octets[None, :] < width)
    packed = tl.load(tile_ptrs(keep_ptr, (width, 1), offs_m, octets), mask=mask, other=0)
    return unpack_keep_bits(packed, ROWS, COLS)


@triton.jit
def apply_keep(values, keep):
    """`values * keep`: a product, so that a dropped NaN or Inf gives NaN as in torch."""
    if INTERPRETED:
        return (values.to(tl.float32) * keep.to(tl.float32)).to(values.dtype)
    else:
        return values * keep.to(values.dtype)


def keep_threshold(dropout_p: float) -> int:
    """The number of the 2**16 levels that drop an element."""
    return round(dropout_p * LEVELS)


def keep_scale(dropout_p: float) -> float:
    """1 / (probability to keep), for the probability that is drawn; 0 where all is dropped."""
    kept = LEVELS - keep_threshold(dropout_p)
    return LEVELS / kept if kept else 0.0


def packed_width(features: int) -> int:
    """Bytes that one row of the mask takes."""
    return cdiv(features, 8)


def unpack_mask(mask: Tensor, features: int) -> Tensor:
    """The packed (M, ceil(features / 8)) mask as a bool tensor (M, features)."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :features].bool()

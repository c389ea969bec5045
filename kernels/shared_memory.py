"""Bytes of shared memory that a tile takes where A and B are in fp32 and the rest in 16 bits.

A measured row serves such calls as well, those under autocast, and was measured with A and B in 16
bits. What is counted here is at least what Triton 3.7 compiles for sm_80, sm_89 and gfx942
(bench/compile_report.py), whose tiles are close to their limits.
"""

from lora_fast.kernels.configs import (
    Architecture,
    EmbeddingConfig,
    GradSBConfig,
    ShrinkConfig,
    WeightConfig,
    for_wide_adapters,
)
from lora_fast.kernels.sizes import rank_blocks

AnyTile = ShrinkConfig | GradSBConfig | EmbeddingConfig | WeightConfig
FACTOR, BASE = 4, 2  # bytes of an element of A and B, and of all else
DEFAULT_STAGES = {"sm": 3, "gfx": 2}  # Triton's, where a tile has none of its own


def memory_misfit(arch: Architecture, tile: AnyTile, R: int) -> str | None:
    """Why a chip cannot hold a tile, None where it can."""
    taken = bytes_taken(arch, tile, R)
    if taken <= arch.shared_memory:
        return None
    return (
        f"with lora_A and lora_B in fp32 it takes {taken} bytes of shared memory, {arch.name} has "
        f"{arch.shared_memory}: {tile}"
    )


def bytes_taken(arch: Architecture, tile: AnyTile, R: int) -> int:
    """Shared memory for a rank: what is under way, in stages but one, and what is at hand."""
    block_r, r_blocks = rank_blocks(R)
    is_amd = arch.name.startswith("gfx")
    under_way = DEFAULT_STAGES["gfx" if is_amd else "sm"] - 1
    match tile:
        case ShrinkConfig():
            under_way = for_wide_adapters(arch, tile).num_stages - 1
            return under_way * tile.block_k * (tile.block_m * BASE + block_r * FACTOR)
        case GradSBConfig():
            under_way = for_wide_adapters(arch, tile).num_stages - 1
            step = tile.block_n * (tile.block_m * BASE + block_r * FACTOR)
            # S stays, and a tile of B is turned into 16 bits; not on AMD's, there by registers.
            at_hand = block_r * (tile.block_m * BASE + tile.block_n * FACTOR)
            return under_way * step + (0 if is_amd else at_hand)
        case EmbeddingConfig():
            s, b = tile.block_m * block_r * BASE, tile.block_d * block_r * FACTOR
            w = tile.block_m * tile.block_d * BASE
            return under_way * (s + b) if r_blocks > 1 else under_way * b + s + w
        case WeightConfig():
            return under_way * block_r * (tile.block_n + tile.block_k) * FACTOR

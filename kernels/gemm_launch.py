"""How a call of the large product is launched: its tile, grid and constants, once for its sizes."""

import logging
from dataclasses import replace
from functools import lru_cache

import torch

from lora_fast.kernels.column_blocks import Blocks
from lora_fast.kernels.configs import GemmConfig, processor_count
from lora_fast.kernels.launch import Launch
from lora_fast.kernels.sizes import MAX_BLOCK_R, cdiv, rank_blocks

_log = logging.getLogger("lora_fast.dispatch.plan")


@lru_cache(maxsize=4096)
def gemm_launch(
    config: GemmConfig,
    tma_fits: bool,
    one_pass: bool,
    sizes: tuple[int, int, int, int],
    rank_of_up: int,
    dtype: torch.dtype,
    device: torch.device,
    blocks: Blocks | None,
    has_keep: bool,
    w_is_kn: bool,
    precision: str,
    *details: object,
) -> tuple[GemmConfig, Launch]:
    """The tile that serves M, N, K and R, and its launch.

    `details` are what else decides how it is compiled.
    """
    M, N, K, R = sizes
    block_r, r_blocks = rank_blocks(R if one_pass else rank_of_up)
    crowded = blocks is not None or (has_keep and R > MAX_BLOCK_R)
    chosen, config = config, fitting(config, dtype, tma_fits, crowded)
    if config != chosen:
        _log.debug("lora_gemm of %s -> %s in the place of %s", sizes, config, chosen)
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    constants: dict[str, object] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r,
        "R_BLOCKS": r_blocks,
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
        "ONE_PASS": one_pass,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.tma:
        grid = min(tiles, processor_count(device))
        return config, Launch((grid,), {**constants, "W_IS_KN": w_is_kn})
    return config, Launch((tiles,), {**constants, "EVEN_K": K % config.block_k == 0})


def fitting(config: GemmConfig, dtype: torch.dtype, tma_fits: bool, crowded: bool) -> GemmConfig:
    """The tile for operands that the accelerator takes or not, and for few or many of them.

    Warps with a work of their own are of another kernel, which does not serve here.
    """
    config = replace(config, specialised=False)
    if config.tma and not tma_fits:
        config = config.without_tma()
    if not crowded:
        return config
    # So that registers hold a part of the tile twice, with pointers their addresses as well, and in
    # fp32, which has no tensor core, the operands.
    columns = 16 if dtype is torch.float32 else 64 if config.tma else 32
    return replace(config, parts=max(config.parts, config.block_n // columns))

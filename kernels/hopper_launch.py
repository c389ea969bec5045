"""How a call of the Hopper product is launched, and on what: once for its sizes."""

from functools import lru_cache

import torch

from lora_fast.kernels.configs import (
    GemmConfig,
    architecture,
    processor_count,
    specialised_misfit,
)
from lora_fast.kernels.launch import Launch
from lora_fast.kernels.sizes import cdiv, rank_blocks


@lru_cache(maxsize=4096)
def hopper_launch(
    config: GemmConfig,
    groups: int,
    M: int,
    N: int,
    R: int,
    w_is_kn: bool,
    up_is_rn: bool,
    device: torch.device,
    dtype: torch.dtype,
    *details: object,
) -> tuple[int, Launch]:
    """The width of a step along the rank, and the launch.

    `details` are what else decides how it is compiled.
    """
    check_hopper(device, dtype, config)
    block_r = min(rank_blocks(R)[0], config.block_k)
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r,
        "GROUP_M": config.group_m,
        "STAGES": config.num_stages,
        "UP_IS_RN": up_is_rn,
        "W_IS_KN": w_is_kn,
        "num_warps": config.num_warps // groups,
    }
    return block_r, Launch((min(tiles, processor_count(device)),), constants)


def check_hopper(device: torch.device, dtype: torch.dtype, config: GemmConfig) -> None:
    """Refuse what the kernel is not made for."""
    if device.type in ("cuda", "meta"):  # meta: compiled for a GPU that is not here
        misfit = specialised_misfit(architecture(device), dtype, config)
    else:
        misfit = f"specialised warps need a Hopper GPU (sm_90), got a tensor on {device}"
    if misfit is not None:
        raise ValueError(f"config: {misfit}; take a GemmConfig with specialised=False")

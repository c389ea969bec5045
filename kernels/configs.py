"""The tiles of a linear layer's kernels for many rows, per GPU architecture.

They come from the compile report (registers, shared memory, no spills); those for Hopper were the
best of what `lora-fast tune` tries on an H200, or within a few percent of it. The tiles for a few
rows are in `decode_configs`. Those of embeddings and merged weights, the same on every chip, are in
`plans`, which also chooses the kernels that serve a call.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch


@dataclass(frozen=True)
class GemmConfig:
    """Tile of the large product.

    Attributes:
        tma: descriptors and a persistent grid instead of pointers, for operands that allow it.
        parts: 2 where the epilogue works on half the columns at a time, to need fewer registers;
            4 where it needs less shared memory.
        specialised: some warps only fetch and the others only multiply, where t is at hand and
            descriptors serve; Hopper alone has such a kernel.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    parts: int = 1
    group_m: int = 8
    specialised: bool = False

    def without_tma(self) -> "GemmConfig":
        """For operands off the 16-byte grid: pointers take registers, so the tile is narrower."""
        narrow = replace(self, block_n=128, block_k=32, num_stages=4, parts=2)
        return replace(narrow, tma=False, specialised=False)


@dataclass(frozen=True)
class ShrinkConfig:
    """Tile of the pass over x; `block_n` is the width of the columns of y0 written at its end."""

    block_m: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradSBConfig:
    """Tile of the pass over dY; one program covers `block_m` rows and `chunk_n` columns."""

    block_m: int
    block_n: int
    chunk_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradAConfig:
    """Tile of the backward pass over x; one program covers `chunk_m` rows and `block_k` columns."""

    block_m: int
    block_k: int
    chunk_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class EmbeddingConfig:
    """Tile of the look-up; one program covers `block_m` tokens and `chunk_d` columns."""

    block_m: int
    block_d: int
    chunk_d: int
    num_warps: int


@dataclass(frozen=True)
class WeightConfig:
    """Tile of the product that is added to a convolution's weight."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, eq=False)  # told apart by identity: plans are cached, and hashing is slow
class Architecture:
    """What a chip allows, and the tiles chosen for it.

    Attributes:
        name: the architecture as compilers call it.
        shared_memory: bytes one program may use.
        flops_per_byte: dense 16-bit rate over memory bandwidth, from datasheets.
        triton_ratio: assumed speed of the Triton GEMM relative to the vendor's.
        gemm: tile for 16-bit operands; `gemm_one_pass` where the loop computes S as well,
            `gemm_wide` for fp32, `gemm_small` for few rows.
        gemm_specialised: the same for warps with a work of their own.
        gpu: name of the GPU, by which its measured tables are found; "" where there is none.
        processors: its multiprocessors, which work on as many tiles at once; where there is no GPU
            those of an H100 or H200.
    """

    name: str
    shared_memory: int
    flops_per_byte: float
    triton_ratio: float
    gemm: GemmConfig
    gemm_one_pass: GemmConfig
    gemm_wide: GemmConfig
    gemm_small: GemmConfig
    shrink: ShrinkConfig
    grad_sb: GradSBConfig
    grad_a: GradAConfig
    gemm_specialised: GemmConfig | None = None
    gpu: str = ""
    processors: int = 132


_SMALL = GemmConfig(16, 32, 128, num_warps=4, num_stages=4)
_AMPERE = GemmConfig(128, 128, 32, num_warps=8, num_stages=4, parts=2)
_WIDE = GemmConfig(64, 32, 32, num_warps=8, num_stages=3)
_SHRINK = ShrinkConfig(32, 128, 128, num_warps=4, num_stages=4)
_GRAD_SB = GradSBConfig(256, 64, 512, num_warps=8, num_stages=3)
_GRAD_A = GradAConfig(64, 64, 1024, num_warps=4, num_stages=3)

ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture(
            *("sm_80", 163 * 1024, 153.0, 0.90),
            gemm=_AMPERE,
            gemm_one_pass=_AMPERE,
            gemm_wide=_WIDE,
            gemm_small=_SMALL,
            shrink=_SHRINK,
            grad_sb=_GRAD_SB,
            grad_a=_GRAD_A,
        ),
        Architecture(
            *("sm_89", 99 * 1024, 165.0, 0.90),
            gemm=_AMPERE,
            gemm_one_pass=_AMPERE,
            gemm_wide=_WIDE,
            gemm_small=_SMALL,
            shrink=_SHRINK,
            grad_sb=_GRAD_SB,
            # Four warps spill where there is a dropout mask and a rank of 32.
            grad_a=replace(_GRAD_A, num_warps=8),
        ),
        Architecture(
            *("sm_90", 227 * 1024, 184.0, 0.95),
            gemm=GemmConfig(128, 256, 64, num_warps=8, num_stages=4, tma=True, parts=2),
            gemm_one_pass=GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, parts=2),
            gemm_wide=_WIDE,
            gemm_small=_SMALL,
            shrink=_SHRINK,
            grad_sb=_GRAD_SB,
            grad_a=_GRAD_A,
            gemm_specialised=GemmConfig(
                *(128, 256, 64), num_warps=8, num_stages=4, tma=True, parts=4, specialised=True
            ),
        ),
        Architecture(
            *("sm_100", 227 * 1024, 281.0, 0.90),
            # In two parts the epilogue with a dropout mask spills.
            gemm=GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, parts=4),
            # S beside 256 columns of y is more than the tensor memory holds.
            gemm_one_pass=GemmConfig(128, 128, 64, num_warps=8, num_stages=3, tma=True, parts=2),
            gemm_wide=_WIDE,
            gemm_small=_SMALL,
            shrink=_SHRINK,
            grad_sb=_GRAD_SB,
            grad_a=_GRAD_A,
        ),
        Architecture(
            *("gfx942", 64 * 1024, 247.0, 0.90),
            gemm=GemmConfig(128, 128, 32, num_warps=8, num_stages=2),
            gemm_one_pass=GemmConfig(128, 128, 32, num_warps=8, num_stages=2),
            gemm_wide=GemmConfig(64, 64, 32, num_warps=4, num_stages=2),
            gemm_small=GemmConfig(16, 32, 64, num_warps=4, num_stages=2),
            shrink=ShrinkConfig(32, 64, 64, num_warps=4, num_stages=2),
            grad_sb=GradSBConfig(64, 64, 512, num_warps=4, num_stages=2),
            grad_a=GradAConfig(64, 64, 1024, num_warps=4, num_stages=2),
        ),
    )
}

SMALL_M = 16  # rows up to which a product is bound by the read of the weight
WIDE_RANK = 32  # ranks beyond it take blocks of 64, which need other tiles


@cache
def architecture(device: torch.device) -> Architecture:
    """The entry that serves a device: its own, or the nearest with less memory."""
    if device.type != "cuda":
        offline = ARCHITECTURES["sm_90"]
        # On a CPU kernels are interpreted, which the one in Gluon is not.
        return replace(offline, gemm_specialised=None) if device.type == "cpu" else offline
    if torch.version.hip is not None:
        name = "gfx942"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        older = "sm_80" if (major, minor) == (8, 0) else "sm_89"
        name = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, older)
    gpu = torch.cuda.get_device_name(device)
    return replace(ARCHITECTURES[name], gpu=gpu, processors=processor_count(device))


@cache
def processor_count(device: torch.device) -> int:
    """How many programs run at once: the size of a persistent grid."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def gemm_config(
    arch: Architecture, M: int, dtype: torch.dtype, *, one_pass: bool = False
) -> GemmConfig:
    """Tile of the large product for M rows."""
    if M <= SMALL_M:
        small = arch.gemm_small
        return replace(small, block_k=small.block_k // 2) if dtype is torch.float32 else small
    if dtype is torch.float32:
        return arch.gemm_wide
    return arch.gemm_one_pass if one_pass else arch.gemm


def specialised_misfit(arch: Architecture, dtype: torch.dtype, config: GemmConfig) -> str | None:
    """Why no kernel with specialised warps can serve with a tile, None where one can."""
    if arch.gemm_specialised is None:
        return f"specialised warps need a Hopper GPU (sm_90) and no interpreter, got {arch.name}"
    if dtype.itemsize != 2:
        return f"specialised warps need fp16 or bf16, got {dtype}"
    if config.num_warps != 8 or config.block_m not in (128, 256):
        return (
            "specialised warps are two groups of four, each for 64 or 128 rows of a tile: expected "
            f"num_warps=8 and block_m=128 or 256, got {config}"
        )
    return None


# The chips' tiles are for 16 bits and ranks up to 32. fp32 takes twice the shared memory and, with
# no tensor core, registers for whole rows of the operands; a rank beyond 32 takes twice the
# accumulators. What follows lets every chip compile them without spills.


def shrink_config(arch: Architecture, M: int, K: int, R: int, dtype: torch.dtype) -> ShrinkConfig:
    """Tile of the pass over x: fewer rows per program where M is too small to fill the chip."""
    base = arch.shrink
    if dtype is torch.float32:
        rows = base.block_m if R <= 16 else 16
        base = replace(base, block_m=rows, block_k=base.block_k // 2, block_n=32)
    elif K % 8:  # rows off the 16-byte grid take registers for their addresses
        base = replace(base, block_m=16, block_k=64)
    return base if M > 2048 else replace(base, block_m=16)


def grad_sb_config(arch: Architecture, R: int, dtype: torch.dtype) -> GradSBConfig:
    """Tile of the pass over dY."""
    base = arch.grad_sb
    if dtype is torch.float32:
        if R > WIDE_RANK:
            return replace(base, block_m=base.block_m // 4, block_n=base.block_n // 4)
        return replace(base, block_m=base.block_m // 2, block_n=base.block_n // 2, num_stages=2)
    if R > WIDE_RANK:
        return replace(base, block_m=base.block_m // 2, block_n=base.block_n // 2)
    return base


Tile = TypeVar("Tile", ShrinkConfig, GradSBConfig)


def for_wide_adapters(arch: Architecture, tile: Tile) -> Tile:
    """The tile for a call with A and B in fp32 and x in 16 bits, as under autocast.

    A stage takes more memory then: chips with less than 100 KiB hold one fewer.
    """
    if arch.shared_memory > 100 * 1024:
        return tile
    return replace(tile, num_stages=max(2, tile.num_stages - 1))


def grad_a_config(arch: Architecture, dtype: torch.dtype) -> GradAConfig:
    """Tile of the backward pass over x."""
    if dtype is torch.float32:
        return replace(arch.grad_a, block_m=16, block_k=32, num_warps=8)
    return arch.grad_a

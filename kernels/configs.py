"""Every tile size and every choice of implementation, per GPU architecture.

Nothing in this file is measured: the tiles come from the compile report (registers, shared
memory, no spills) and the choices from a model of the memory traffic. What a GPU has measured is
in the tables of `lora_fast.kernels.tables` and wins over the rules here.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, TypeVar

import torch

from lora_fast.kernels import tables
from lora_fast.kernels.decode_configs import (
    DecodeConfig,
    DecodeTiles,
    decode_config,
    decode_serves,
)
from lora_fast.kernels.primitives import MAX_BLOCK_R
from lora_fast.kernels.tables import Call

_log = logging.getLogger("lora_fast.dispatch.plan")

ForwardImpl = Literal["decode", "one_pass", "split", "lora_first"]
# The others have S in registers: one block of the rank, and no mask to be kept.
SERVE_EVERY_CALL: tuple[ForwardImpl, ...] = ("split", "lora_first")
InputGradImpl = Literal["fused", "lora_first"]


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
        return replace(self, tma=False, parts=1, block_n=128, num_stages=3, specialised=False)


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
        gemm_specialised: the same for warps with a work of their own; only a measured table may
            choose it.
        gpu: name of the GPU, by which its measured tables are found; "" where there is none.
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
            gemm_one_pass=GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, parts=2),
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
ONE_PASS_MAX_N = 3072  # beyond it, x A^T per column tile costs more than a second read of x
WIDE_RANK = 32  # ranks beyond it take blocks of 64, which need other tiles
LIBRARY_RANK = 64  # from this rank on two vendor GEMMs over dY beat one pass (kernels are thin)


@dataclass(frozen=True)
class ForwardPlan:
    """How one forward call runs."""

    impl: ForwardImpl
    gemm: GemmConfig
    shrink: ShrinkConfig
    decode: DecodeConfig = DecodeTiles.few


@dataclass(frozen=True)
class BackwardPlan:
    """How one backward call runs. `library_sb`: dS and dB by two vendor GEMMs."""

    input_grad: InputGradImpl
    library_sb: bool
    gemm: GemmConfig
    grad_sb: GradSBConfig
    grad_a: GradAConfig


Plan = TypeVar("Plan", ForwardPlan, BackwardPlan)


@dataclass(frozen=True)
class EmbeddingPlan:
    """How a look-up and its backward run. `segment_m`: tokens of one program of the scatter."""

    forward: EmbeddingConfig
    library_sb: bool
    grad_sb: GradSBConfig
    segment_m: int


MERGED_WEIGHT = WeightConfig(32, 64, num_warps=4)

# Below this many elements a convolution's weight is formed by torch's addmm. The kernel saves the
# copy that addmm makes of W first, 4 bytes of traffic an element in 16 bits: 0.3 us of an H100's
# 3.35 TB/s at 2**18 elements (170 channels of 3 x 3), which no longer pays for a Python launch.
MERGED_WEIGHT_MIN_NUMEL = 2**18


@cache
def architecture(device: torch.device) -> Architecture:
    """The row of the table that serves a device: its own, or the nearest with less memory."""
    if device.type != "cuda":
        return ARCHITECTURES["sm_90"]  # interpreted or compiled offline
    if torch.version.hip is not None:
        name = "gfx942"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        older = "sm_80" if (major, minor) == (8, 0) else "sm_89"
        name = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, older)
    return replace(ARCHITECTURES[name], gpu=torch.cuda.get_device_name(device))


@cache
def processor_count(device: torch.device) -> int:
    """How many programs run at once: the size of a persistent grid."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_gemm_pays(arch: Architecture, depth: int, dtype: torch.dtype) -> bool:
    """Does the Triton GEMM beat the vendor's plus one read of C, for a product of this depth?

    Break-even (kernels.md's byte model): ratio > 1 / (1 + flops_per_byte / depth). The fp32
    tensor-core path is left to the vendor.
    """
    if dtype is torch.float32:
        return False
    return arch.triton_ratio > 1.0 / (1.0 + arch.flops_per_byte / depth)


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


@lru_cache(maxsize=4096)
def forward_plan(
    arch: Architecture, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool
) -> ForwardPlan:
    """How a forward call runs: the measured row, else the rule."""
    rule = forward_rule(arch, M, N, K, R, dtype, dropout)
    return measured(arch, Call.of("lora_linear_fwd", M, N, K, R, dtype, dropout), rule)


@lru_cache(maxsize=4096)
def backward_plan(
    arch: Architecture, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool = False
) -> BackwardPlan:
    """How a backward call runs: the measured row, else the rule."""
    rule = backward_rule(arch, M, N, K, R, dtype)
    return measured(arch, Call.of("lora_linear_bwd", M, N, K, R, dtype, dropout), rule)


def measured(arch: Architecture, call: Call, rule: Plan) -> Plan:
    """The rule's plan with what the tables in force have for the call; a bad row is ignored."""
    plan, source = rule, "the rule"
    found = tables.find(arch.gpu, arch.name, call)
    if found is not None:
        row, path = found
        try:
            changed = tables.changed(rule, row.plan)
            reason = why_not(arch, changed, call)
            if reason is not None:
                raise ValueError(reason)
            plan, source = changed, str(path)
        except ValueError as error:
            tables.warn_once(path, f"{path}: the row for {call} is ignored: {error}")
    _log.debug("%s -> %s: %s", call, plan, source)
    return plan


def why_not(arch: Architecture, plan: ForwardPlan | BackwardPlan, call: Call) -> str | None:
    """Say why a plan cannot serve a call, if so."""
    if plan.gemm.specialised and (arch.gemm_specialised is None or call.dtype == "float32"):
        return f"specialised warps need 16-bit products on Hopper, got {call.dtype} on {arch.name}"
    if plan.gemm.specialised and (plan.gemm.num_warps != 8 or plan.gemm.block_m not in (128, 256)):
        return f"specialised warps need num_warps 8 and block_m 128 or 256, got {plan.gemm}"
    if isinstance(plan, ForwardPlan) and plan.impl not in SERVE_EVERY_CALL:
        if call.dropout:
            return f"{plan.impl} draws no dropout"
        if call.R > MAX_BLOCK_R:
            return f"{plan.impl} takes a rank of at most {MAX_BLOCK_R}, got {call.R}"
        if plan.impl == "decode" and not decode_serves(call.M, call.R, getattr(torch, call.dtype)):
            return f"decode takes fewer rows, got {call.M} of {call.dtype}"
    return None


def reload_tables() -> None:
    """Read the tables again: the plans of calls that ran before may change."""
    tables.forget()
    forward_plan.cache_clear()
    backward_plan.cache_clear()


def forward_rule(
    arch: Architecture, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool
) -> ForwardPlan:
    """Choose the forward implementation by the model."""
    fused = fused_gemm_pays(arch, K, dtype)
    narrow = N <= ONE_PASS_MAX_N and fused and R <= 16
    impl: ForwardImpl
    if not dropout and decode_serves(M, R, dtype):
        impl = "decode"
    elif not dropout and narrow:
        impl = "one_pass"
    else:
        impl = "split" if fused else "lora_first"
    gemm = gemm_config(arch, M, dtype, one_pass=impl == "one_pass")
    decode = decode_config(arch.name, M, dtype)
    return ForwardPlan(impl, gemm, shrink_config(arch, M, dtype), decode)


def backward_rule(
    arch: Architecture, M: int, N: int, K: int, R: int, dtype: torch.dtype
) -> BackwardPlan:
    """Choose by the model the implementation of dx (a product of depth N) and of dS and dB."""
    return BackwardPlan(
        input_grad="fused" if fused_gemm_pays(arch, N, dtype) else "lora_first",
        library_sb=R >= LIBRARY_RANK or (R > WIDE_RANK and dtype is torch.float32),
        gemm=gemm_config(arch, M, dtype),
        grad_sb=grad_sb_config(arch, R, dtype),
        grad_a=grad_a_config(arch, R, dtype),
    )


# The chips' tiles are for 16 bits and ranks up to 32. fp32 takes twice the shared memory and, with
# no tensor core, registers for whole rows of the operands; a rank beyond 32 takes twice the
# accumulators. What follows lets every chip compile them without spills.


def shrink_config(arch: Architecture, M: int, dtype: torch.dtype) -> ShrinkConfig:
    """Tile of the pass over x: fewer rows per program where M is too small to fill the chip."""
    base = arch.shrink
    if dtype is torch.float32:
        base = replace(base, block_k=base.block_k // 2, block_n=32)
    return base if M > 2048 else replace(base, block_m=16)


def grad_sb_config(arch: Architecture, R: int, dtype: torch.dtype) -> GradSBConfig:
    """Tile of the pass over dY."""
    base = arch.grad_sb
    if dtype is torch.float32:
        part = 4 if R > WIDE_RANK else 2
        return replace(base, block_m=base.block_m // part, block_n=base.block_n // part)
    return replace(base, block_m=base.block_m // 2) if R > WIDE_RANK else base


def grad_a_config(arch: Architecture, R: int, dtype: torch.dtype) -> GradAConfig:
    """Tile of the backward pass over x."""
    if dtype is torch.float32:
        return replace(arch.grad_a, block_m=16 if R > WIDE_RANK else 32, block_k=32, num_warps=8)
    return arch.grad_a


@lru_cache(maxsize=4096)
def embedding_plan(arch: Architecture, M: int, D: int, R: int, dtype: torch.dtype) -> EmbeddingPlan:
    """The plan for M tokens: with few of them, narrow chunks, so that all processors have work."""
    few, thin = M <= 2048, R <= 16
    # A product of fp32 keeps its operands in registers, rows off the 16-byte grid their addresses.
    odd, fp32 = D % 16 != 0, dtype is torch.float32
    forward = EmbeddingConfig(
        block_m=16 if few or odd or (fp32 and not thin) else 32,
        block_d=64 if fp32 else 128,
        chunk_d=128 if few else 512,
        num_warps=4,
    )
    grad_sb = grad_sb_config(arch, R, dtype)
    if odd:
        grad_sb = replace(grad_sb, block_n=grad_sb.block_n // 2)
    return EmbeddingPlan(
        forward,
        library_sb=R >= LIBRARY_RANK or fp32,  # without dbias the tile of fp32 spills on sm_80
        grad_sb=grad_sb,
        segment_m=64 if thin else 32,
    )


def merged_weight_pays(weight: torch.Tensor, *adapters: torch.Tensor) -> bool:
    """Does the kernel beat torch's way to a merged weight?

    That is one addmm where W is contiguous and all have its dtype; else casts, a dense delta and
    a sum, which the kernel's one launch beats at any size.
    """
    one_gemm = weight.is_contiguous() and all(t.dtype is weight.dtype for t in adapters)
    return not one_gemm or weight.numel() >= MERGED_WEIGHT_MIN_NUMEL

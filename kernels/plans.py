"""Which kernels serve a call, and with which tiles: what a GPU has measured, else a rule.

The rules come from a model of the memory traffic and are not measured. What a GPU has measured is
in the tables of `lora_fast.kernels.tables` and wins over them.
"""

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import torch

from lora_fast.kernels import tables
from lora_fast.kernels.configs import (
    WIDE_RANK,
    Architecture,
    EmbeddingConfig,
    GemmConfig,
    GradAConfig,
    GradSBConfig,
    ShrinkConfig,
    WeightConfig,
    gemm_config,
    grad_a_config,
    grad_sb_config,
    shrink_config,
)
from lora_fast.kernels.decode_configs import (
    DecodeConfig,
    MAX_M,
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

ONE_PASS_MAX_N = 3072  # beyond it, x A^T per column tile costs more than a second read of x
LIBRARY_RANK = 64  # from this rank on two vendor GEMMs over dY beat one pass (kernels are thin)
MERGED_WEIGHT = WeightConfig(32, 64, num_warps=4)

# Below this many elements a convolution's weight is formed by torch's addmm. The kernel saves the
# copy that addmm makes of W first, 4 bytes of traffic an element in 16 bits: 0.3 us of an H100's
# 3.35 TB/s at 2**18 elements (170 channels of 3 x 3), which no longer pays for a Python launch.
MERGED_WEIGHT_MIN_NUMEL = 2**18


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


@dataclass(frozen=True)
class EmbeddingPlan:
    """How a look-up and its backward run. `segment_m`: tokens of one program of the scatter."""

    forward: EmbeddingConfig
    library_sb: bool
    grad_sb: GradSBConfig
    segment_m: int


Plan = TypeVar("Plan", ForwardPlan, BackwardPlan)


def fused_gemm_pays(arch: Architecture, depth: int, dtype: torch.dtype) -> bool:
    """Does the Triton GEMM beat the vendor's plus one read of C, for a product of this depth?

    Break-even (kernels.md's byte model): ratio > 1 / (1 + flops_per_byte / depth). The fp32
    tensor-core path is left to the vendor.
    """
    if dtype is torch.float32:
        return False
    return arch.triton_ratio > 1.0 / (1.0 + arch.flops_per_byte / depth)


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
        if plan.impl == "decode" and not decode_serves(call.M, call.R):
            return f"decode takes at most {MAX_M} rows, got {call.M}"
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
    if not dropout and decode_serves(M, R):
        impl = "decode"
    elif not dropout and narrow:
        impl = "one_pass"
    else:
        impl = "split" if fused else "lora_first"
    gemm = gemm_config(arch, M, dtype, one_pass=impl == "one_pass")
    decode = decode_config(arch.name, M, dtype)
    return ForwardPlan(impl, gemm, shrink_config(arch, M, K, R, dtype), decode)


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
        # Without dbias the tile spills there: for wide ranks on sm_100, for fp32 on sm_80.
        library_sb=R > WIDE_RANK or fp32,
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

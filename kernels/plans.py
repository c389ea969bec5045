"""Which kernels serve a call, and with which tiles: what a GPU has measured, else a rule.

The rules for Hopper come from measurements on an H200, those for other chips from a model of the
memory traffic. What a GPU has measured for a call of its own is in the tables of
`lora_fast.kernels.tables` and wins over them.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

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
    architecture,
    for_wide_adapters,
    gemm_config,
    grad_a_config,
    grad_sb_config,
    shrink_config,
    specialised_misfit,
)
from lora_fast.kernels.decode_configs import (
    MAX_M,
    DecodeConfig,
    DecodeTiles,
    decode_config,
    decode_serves,
)
from lora_fast.kernels.shared_memory import AnyTile, memory_misfit
from lora_fast.kernels.sizes import MAX_BLOCK_R, cdiv
from lora_fast.kernels.tables import Call

_log = logging.getLogger("lora_fast.dispatch.plan")

ForwardImpl = Literal["decode", "one_pass", "split", "lora_first", "library_expand", "library"]
InputGradImpl = Literal["fused", "lora_first", "library"]
NO_DROPOUT = ("decode", "one_pass", "library")
ONE_BLOCK = ("decode", "one_pass", "lora_first")  # a program holds the whole rank

ONE_PASS_MAX_N = 3072  # beyond it, x A^T per column tile costs more than a second read of x
BUSY = 0.75  # the part of the chip that must have a tile, on average, for the largest tiles to pay
LIBRARY_RANK = 64  # from this rank on two vendor GEMMs over dY beat one pass (kernels are thin)
MERGED_WEIGHT = WeightConfig(32, 64, num_warps=4)

# Below this many elements eager mode leaves a convolution's weight to torch's addmm. The kernel
# saves the copy that addmm makes of W first: on an H200 7 us of 15 at 2.4 M elements, less than the
# host takes longer to launch it.
MERGED_WEIGHT_MIN_NUMEL = 2**23


@dataclass(frozen=True)
class ForwardPlan:
    """How one forward call runs.

    `decode`: one launch for a few rows. `one_pass`: one product, whose loop makes S as well. The
    others make S first: `split` adds S B^T in the product's epilogue, `lora_first` writes it where
    it makes S, and the vendor's product adds to it. In `library_expand` that is the vendor's, too;
    in `library` everything is.
    """

    impl: ForwardImpl
    gemm: GemmConfig
    shrink: ShrinkConfig
    decode: DecodeConfig = DecodeTiles.few


@dataclass(frozen=True)
class BackwardPlan:
    """How one backward call runs.

    `input_grad`: dx by one product with dS A in its epilogue; or dS A first, by the pass over x or
    by the vendor, who then makes dA too, and the vendor's product adds to it.
    `library_sb`: dS and dB by two vendor GEMMs.
    """

    input_grad: InputGradImpl
    library_sb: bool
    gemm: GemmConfig
    grad_sb: GradSBConfig
    grad_a: GradAConfig


@dataclass(frozen=True)
class EmbeddingBackwardPlan:
    """How the backward of a look-up runs. `segment_m`: tokens of one program of the scatter."""

    library_sb: bool
    grad_sb: GradSBConfig
    segment_m: int


@dataclass(frozen=True)
class WeightPlan:
    """How a merged weight is formed that torch forms in one addmm: by that, or `fused`."""

    fused: bool
    config: WeightConfig


Plan = TypeVar("Plan")  # ForwardPlan, BackwardPlan, EmbeddingConfig, EmbeddingBackwardPlan, ...


def fused_gemm_pays(arch: Architecture, depth: int, dtype: torch.dtype) -> bool:
    """Does the Triton GEMM beat the vendor's plus one read of C, for a product of this depth?

    Break-even by the byte model of bench's floor.py: ratio > 1 / (1 + flops_per_byte / depth). The
    fp32 tensor-core path is left to the vendor.
    """
    if dtype is torch.float32:
        return False
    return arch.triton_ratio > 1.0 / (1.0 + arch.flops_per_byte / depth)


def specialised_pays(arch: Architecture, M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Is Hopper's kernel of specialised warps the best for a product of M x N and depth K?

    Measured on an H200 (bench/results/nvidia-h200): with the update in it, it takes as long as the
    vendor's GEMM without, where its tiles fill the chip and the copy engine takes the operands.
    """
    gemm = arch.gemm_specialised
    if gemm is None or dtype is torch.float32 or N % 8 or K % 8:
        return False
    tiles = cdiv(M, gemm.block_m) * cdiv(N, gemm.block_n)
    return tiles >= BUSY * arch.processors * cdiv(tiles, arch.processors)


@lru_cache(maxsize=4096)
def forward_plan(
    arch: Architecture, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool,
    wide_adapters: bool = False,
) -> ForwardPlan:  # fmt: skip
    """How a forward call runs. `wide_adapters`: A and B have more bytes an element than x."""
    call = Call.of("lora_linear_fwd", M, N, K, R, dtype, dropout)
    plan, source = measured(arch, call, rule_for(arch, call))
    if wide_adapters:
        plan = replace(plan, shrink=for_wide_adapters(arch, plan.shrink))
    return logged(call, plan, source)


@lru_cache(maxsize=4096)
def backward_plan(
    arch: Architecture, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool = False,
    wide_adapters: bool = False, all_ranks: int = 0,
) -> BackwardPlan:  # fmt: skip
    """How a backward call runs.

    `wide_adapters`: A and B have more bytes an element than x. `all_ranks`: the ranks of all blocks
    of columns together, where there are some.
    """
    call = Call.of("lora_linear_bwd", M, N, K, R, dtype, dropout)
    plan, source = measured(arch, call, rule_for(arch, call))
    if plan.input_grad == "lora_first":
        plan = replace(plan, input_grad=adding_input_grad(max(R, all_ranks), dropout))
    if wide_adapters:
        plan = replace(plan, grad_sb=for_wide_adapters(arch, plan.grad_sb))
    return logged(call, plan, source)


@lru_cache(maxsize=4096)
def embedding_plan(
    arch: Architecture, M: int, D: int, num: int, R: int, dtype: torch.dtype
) -> EmbeddingConfig:
    """How a look-up of M tokens in (num, D) runs."""
    call = Call.of("lora_embedding_fwd", M, D, num, R, dtype, False)
    return logged(call, *measured(arch, call, rule_for(arch, call)))


@lru_cache(maxsize=4096)
def embedding_backward_plan(
    arch: Architecture, M: int, D: int, num: int, R: int, dtype: torch.dtype,
    wide_adapters: bool = False,
) -> EmbeddingBackwardPlan:  # fmt: skip
    """How the backward of a look-up runs. `wide_adapters`: they have more bytes than the table."""
    call = Call.of("lora_embedding_bwd", M, D, num, R, dtype, False)
    plan, source = measured(arch, call, rule_for(arch, call))
    if wide_adapters:
        plan = replace(plan, grad_sb=for_wide_adapters(arch, plan.grad_sb))
    return logged(call, plan, source)


@lru_cache(maxsize=4096)
def weight_plan(arch: Architecture, N: int, K: int, R: int, dtype: torch.dtype) -> WeightPlan:
    """How the merged weight W + B A of N K elements is formed."""
    call = Call.of("merged_weight", 1, N, K, R, dtype, False)
    return logged(call, *measured(arch, call, rule_for(arch, call)))


def logged(call: Call, plan: Plan, source: str) -> Plan:
    """Log a plan as it will run, and return it."""
    _log.debug("%s -> %s: %s", call, plan, source)
    return plan


def measured(arch: Architecture, call: Call, rule: Plan) -> tuple[Plan, str]:
    """The rule's plan with what the tables have for the call, and whose it is.

    A bad row is ignored.
    """
    found = tables.find(arch.gpu, arch.name, call)
    if found is not None:
        row, path = found
        try:
            changed = tables.changed(rule, row.plan)
            reason = why_not(arch, changed, call)
            if reason is not None:
                raise ValueError(reason)
            return changed, str(path)
        except ValueError as error:
            tables.warn_once(path, f"{path}: the row for {call} is ignored: {error}")
    return rule, "the rule"


def why_not(arch: Architecture, plan: object, call: Call) -> str | None:
    """Say why a plan cannot serve a call as it is named, if so."""
    if isinstance(plan, (ForwardPlan, BackwardPlan)):
        reason = why_not_named(plan, call.M, call.R, call.dropout)
        if reason is None and plan.gemm.specialised:
            reason = specialised_misfit(arch, call.torch_dtype, plan.gemm)
        if reason is not None:
            return reason
    if call.torch_dtype.itemsize > 2:
        return None  # A and B have no more bytes than the rest, as when the row was measured
    return memory_misfit(arch, tile_with_factors(plan), call.R)


def why_not_named(plan: ForwardPlan | BackwardPlan, M: int, R: int, dropout: bool) -> str | None:
    """Say why the implementation that a plan names cannot run, if so: another one would."""
    name = plan.impl if isinstance(plan, ForwardPlan) else plan.input_grad
    if dropout and name in NO_DROPOUT:
        return f"{name} draws no dropout and applies no mask"
    if R > MAX_BLOCK_R and name in ONE_BLOCK:
        return f"{name} takes a rank of at most {MAX_BLOCK_R}, got {R}"
    if name == "decode" and not decode_serves(M, R):
        return f"decode takes at most {MAX_M} rows, got {M}"
    return None


def check_named(plan: ForwardPlan | BackwardPlan, M: int, R: int, dropout: bool) -> None:
    """Refuse a plan, of the caller's own, that cannot run as it is named."""
    reason = why_not_named(plan, M, R, dropout)
    if reason is not None:
        raise ValueError(f"plan: {reason}; take another implementation")


def tile_with_factors(plan: Any) -> AnyTile:
    """The tile of a plan that holds A or B in shared memory."""
    match plan:
        case ForwardPlan():
            return plan.shrink
        case WeightPlan():
            return plan.config
        case EmbeddingConfig():
            return plan
    return plan.grad_sb


def adding_input_grad(ranks: int, dropout: bool) -> InputGradImpl:
    """Who makes dx where the vendor's product should add to dS A.

    Beyond one block of the rank no pass over x makes dS A, and only an epilogue masks it.
    """
    if ranks <= MAX_BLOCK_R:
        return "lora_first"
    return "fused" if dropout else "library"


def reload_tables() -> None:
    """Read the tables again: the plans of calls that ran before may change."""
    tables.forget()
    linear, embedding = (forward_plan, backward_plan), (embedding_plan, embedding_backward_plan)
    for plan_of in (*linear, *embedding, weight_plan):
        plan_of.cache_clear()


def forward_rule(arch: Architecture, call: Call) -> ForwardPlan:
    """Choose the forward implementation by the model."""
    _, M, N, K, R, _, dropout = call
    dtype = call.torch_dtype
    fused = fused_gemm_pays(arch, K, dtype)
    narrow = N <= ONE_PASS_MAX_N and fused and R <= 16
    specialised = specialised_pays(arch, M, N, K, dtype)
    impl: ForwardImpl
    if not dropout and decode_serves(M, R):
        impl = "decode"
    elif specialised:
        impl = "split"
    elif arch.gemm_specialised is not None:
        # Measured there, too: too little work for tiles of that size is the vendor's.
        impl = "lora_first" if dropout else "library"
    elif not dropout and narrow:
        impl = "one_pass"
    else:
        impl = "split" if fused else "lora_first"
    if impl == "lora_first" and R > MAX_BLOCK_R:
        impl = "library_expand"
    gemm = gemm_config(arch, M, dtype, one_pass=impl == "one_pass")
    if specialised and arch.gemm_specialised is not None:
        gemm = arch.gemm_specialised
    decode = decode_config(arch.name, M, dtype)
    return ForwardPlan(impl, gemm, shrink_config(arch, M, K, R, dtype), decode)


def backward_rule(arch: Architecture, call: Call) -> BackwardPlan:
    """Choose by the model the implementation of dx (a product of depth N) and of dS and dB."""
    _, M, N, K, R, _, dropout = call
    dtype = call.torch_dtype
    gemm, fused = gemm_config(arch, M, dtype), fused_gemm_pays(arch, N, dtype)
    if arch.gemm_specialised is not None:
        fused = specialised_pays(arch, M, K, N, dtype)
        gemm = arch.gemm_specialised if fused else gemm
    return BackwardPlan(
        input_grad="fused" if fused else adding_input_grad(R, dropout),
        library_sb=R >= LIBRARY_RANK or (R > WIDE_RANK and dtype is torch.float32),
        gemm=gemm,
        grad_sb=grad_sb_config(arch, R, dtype),
        grad_a=grad_a_config(arch, dtype),
    )


def embedding_rule(arch: Architecture, call: Call) -> EmbeddingConfig:
    """The tile for M tokens, N wide: with few, narrow chunks, so that all processors have work."""
    # A product of fp32 keeps its operands in registers, rows off the 16-byte grid their addresses.
    few, odd, fp32 = call.M <= 2048, call.N % 16 != 0, call.torch_dtype is torch.float32
    return EmbeddingConfig(
        block_m=16 if few or odd or (fp32 and call.R > 16) else 32,
        block_d=64 if fp32 else 128,
        chunk_d=128 if few else 512,
        num_warps=4,
    )


def embedding_backward_rule(arch: Architecture, call: Call) -> EmbeddingBackwardPlan:
    """Choose the implementation of dS and dB, and the tile of the scatter."""
    R, dtype = call.R, call.torch_dtype
    grad_sb = grad_sb_config(arch, R, dtype)
    if call.N % 16 != 0:
        grad_sb = replace(grad_sb, block_n=grad_sb.block_n // 2)
    return EmbeddingBackwardPlan(
        # Without dbias the tile spills there: for wide ranks on sm_100, for fp32 on sm_80.
        library_sb=R > WIDE_RANK or dtype is torch.float32,
        grad_sb=grad_sb,
        segment_m=64 if R <= 16 else 32,
    )


def weight_rule(arch: Architecture, call: Call) -> WeightPlan:
    """Choose by the size between the kernel and torch's addmm."""
    return WeightPlan(fused=call.N * call.K >= MERGED_WEIGHT_MIN_NUMEL, config=MERGED_WEIGHT)


_RULES: dict[str, Callable[[Architecture, Call], Any]] = {
    "lora_linear_fwd": forward_rule,
    "lora_linear_bwd": backward_rule,
    "lora_embedding_fwd": embedding_rule,
    "lora_embedding_bwd": embedding_backward_rule,
    "merged_weight": weight_rule,
}
OPS = tuple(_RULES)  # whose plans a table may hold


def rule_for(arch: Architecture, call: Call) -> Any:
    """The plan that serves a call where nothing was measured.

    It changes with M only from one power of two to the next: a call's M is one.

    Raises:
        ValueError: no plan is made for such an op.
    """
    if call.op not in _RULES:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {call.op!r}")
    return _RULES[call.op](arch, call)


def merged_weight_pays(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> bool:
    """Does the kernel beat torch's way to a merged weight?

    That is one addmm where W is contiguous and A (R, K) and B (N, R) have its dtype; else casts, a
    dense delta and a sum, which the kernel's one launch beats at any size.
    """
    if not weight.is_contiguous() or {lora_a.dtype, lora_b.dtype} != {weight.dtype}:
        return True
    (R, K), N = lora_a.shape, lora_b.shape[0]
    return weight_plan(architecture(weight.device), N, K, R, weight.dtype).fused

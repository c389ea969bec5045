"""What `lora-fast tune` measures: the plans that may serve a call, as changes to the rule's plan.

Changes come in steps. Those of a step are alternatives, and steps are about launches whose times
add up: so the best of each step, one after the other, is the best of all combinations.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, get_args

from lora_fast.kernels.configs import (
    Architecture,
    EmbeddingConfig,
    GemmConfig,
    GradAConfig,
    GradSBConfig,
    ShrinkConfig,
    WeightConfig,
    gemm_config,
)
from lora_fast.kernels.decode_configs import DecodeConfig
from lora_fast.kernels.plans import (
    BackwardPlan,
    EmbeddingBackwardPlan,
    ForwardImpl,
    ForwardPlan,
    WeightPlan,
    why_not,
)
from lora_fast.kernels.sizes import rank_blocks
from lora_fast.kernels.tables import Call

Change = dict[str, Any]
Steps = list[list[Change]]

# block_m, block_n, block_k, num_warps, num_stages; the likely ones first, as time may be short
_GEMMS = (
    (256, 128, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 64, 32, 8, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 32, 64, 8, 3),
    (32, 64, 128, 4, 3),
    (16, 128, 64, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 32, 256, 4, 3),
    (16, 32, 128, 4, 4),
)
# block_n, row_bytes, num_warps, num_stages
_DECODES = (
    (16, 512, 4, 4),
    (16, 1024, 4, 3),
    (32, 256, 4, 4),
    (32, 256, 8, 4),
    (64, 128, 4, 4),
    (64, 256, 4, 3),
    (128, 128, 8, 4),
)
# A larger tile takes more registers than pointers leave.
_LARGEST_WITH_POINTERS = 128 * 128
# block_m, block_k, num_warps, num_stages
_SHRINKS = ((16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 8, 3))
# block_m, block_n, chunk_n, num_warps, num_stages
_GRAD_SBS = (
    (64, 64, 512, 4, 3),
    (128, 64, 512, 4, 3),
    (128, 64, 1024, 4, 3),
    (128, 128, 512, 8, 3),
    (256, 64, 512, 8, 3),
    (256, 64, 1024, 8, 3),
)
# block_m, block_k, chunk_m, num_warps, num_stages
_GRAD_AS = (
    (64, 64, 512, 4, 3),
    (64, 64, 1024, 4, 3),
    (64, 64, 2048, 4, 3),
    (64, 128, 1024, 4, 3),
    (128, 64, 1024, 8, 3),
)
# block_m, block_d, chunk_d, num_warps
_LOOK_UPS = (
    (16, 128, 128, 4),
    (16, 128, 256, 4),
    (16, 128, 512, 4),
    (16, 256, 256, 4),
    (16, 256, 1024, 8),
    (32, 64, 256, 4),
    (32, 128, 256, 4),
    (32, 128, 512, 4),
    (32, 128, 1024, 4),
    (64, 64, 512, 4),
    (64, 128, 512, 8),
)
_SEGMENTS = (16, 32, 64, 128, 256)
# block_n, block_k, num_warps
_WEIGHTS = (
    (16, 64, 4),
    (16, 128, 4),
    (16, 256, 4),
    (32, 64, 4),
    (32, 128, 4),
    (32, 256, 8),
    (64, 64, 4),
    (64, 128, 8),
)


def candidates(arch: Architecture, call: Call, rule: Any) -> Steps:
    """The steps for a call; every change, on its own, gives another plan than the rule's.

    Raises:
        ValueError: nothing is known about the op.
    """
    if call.op not in _STEPS:
        raise ValueError(f"op must be one of {', '.join(_STEPS)}, got {call.op!r}")
    seen, found = {rule}, []
    for step in _STEPS[call.op](arch, call, rule):
        found.append([])
        for change in step:
            plan = replace(rule, **change)
            if plan not in seen and why_not(arch, plan, call) is None:
                seen.add(plan)
                found[-1].append(change)
    return found


def _forward_steps(arch: Architecture, call: Call, rule: ForwardPlan) -> Steps:
    ways: list[Change] = [{"impl": impl} for impl in get_args(ForwardImpl)]
    for way in ways:
        if way["impl"] == "one_pass":  # which takes more shared memory than the others
            way["gemm"] = gemm_config(arch, call.M, call.torch_dtype, one_pass=True)
    ways += [{"impl": "split", "gemm": gemm} for gemm in _gemms(arch, call)]
    ways += [{"impl": "one_pass", "gemm": gemm} for gemm in _gemms(arch, call, one_pass=True)]
    ways += [
        {"impl": "decode", "decode": DecodeConfig(*sizes, max_splits=splits)}
        for sizes in _staged(arch, _DECODES)
        for splits in (4, 8)
    ]
    block_n = rule.shrink.block_n
    shrinks = [ShrinkConfig(m, k, block_n, *pace) for m, k, *pace in _staged(arch, _SHRINKS)]
    return [ways, [{"shrink": shrink} for shrink in shrinks]]


def _backward_steps(arch: Architecture, call: Call, rule: BackwardPlan) -> Steps:
    dx: list[Change] = [{"input_grad": impl} for impl in ("lora_first", "library")]
    dx += [{"input_grad": "fused", "gemm": gemm} for gemm in _gemms(arch, call)]
    return [
        _rank_grads(arch),
        dx,
        [{"grad_a": GradAConfig(*sizes)} for sizes in _staged(arch, _GRAD_AS)],
    ]


def _embedding_steps(arch: Architecture, call: Call, rule: EmbeddingConfig) -> Steps:
    tiles = [EmbeddingConfig(*sizes) for sizes in _LOOK_UPS if sizes[0] <= max(16, call.M)]
    return [[asdict(tile) for tile in tiles]]


def _embedding_backward_steps(arch: Architecture, call: Call, rule: EmbeddingBackwardPlan) -> Steps:
    return [_rank_grads(arch), [{"segment_m": tokens} for tokens in _SEGMENTS]]


def _weight_steps(arch: Architecture, call: Call, rule: WeightPlan) -> Steps:
    fused = [{"fused": True, "config": WeightConfig(*sizes)} for sizes in _WEIGHTS]
    return [[{"fused": False}, {"fused": True}, *fused]]


_STEPS = {
    "lora_linear_fwd": _forward_steps,
    "lora_linear_bwd": _backward_steps,
    "lora_embedding_fwd": _embedding_steps,
    "lora_embedding_bwd": _embedding_backward_steps,
    "merged_weight": _weight_steps,
}


def _rank_grads(arch: Architecture) -> list[Change]:
    """Ways to dS and dB: two vendor GEMMs, or one pass over dY."""
    sbs = [GradSBConfig(*sizes) for sizes in _staged(arch, _GRAD_SBS)]
    return [{"library_sb": True}, *({"library_sb": False, "grad_sb": config} for config in sbs)]


def _gemms(arch: Architecture, call: Call, *, one_pass: bool = False) -> Iterator[GemmConfig]:
    """Tiles of the large product that fit the chip and the number of rows."""
    element_size = call.torch_dtype.itemsize
    rank = rank_blocks(call.R)[0] if one_pass else 0
    for block_m, block_n, block_k, *pace in _staged(arch, _GEMMS):
        # Neither mostly empty tiles nor ones that are read over and over.
        if block_m > max(16, call.M) or (block_m < 64 and 8 * block_m < call.M):
            continue
        sizes = (block_m, block_n, block_k // (2 if element_size == 4 else 1))
        loop = pace[1] * (block_m + block_n + rank) * sizes[2] * element_size
        parts = 2 if block_n > 128 else 1
        # The accelerator also stores out of shared memory, and needs a few barriers.
        stored = block_m * block_n // parts * element_size + 128
        # A row serves factors in fp32 as well, of which one pass holds A.
        wide = pace[1] * rank * sizes[2] * (4 - element_size)
        serves = arch.gemm.tma and block_m >= 64 and element_size == 2
        if serves and loop + stored + wide <= arch.shared_memory:
            yield GemmConfig(*sizes, *pace, tma=True, parts=parts)
        if block_m * block_n <= _LARGEST_WITH_POINTERS and loop <= arch.shared_memory:
            yield GemmConfig(*sizes, *pace)
    # The kernel in Gluon is not interpreted, and takes t as it is: it is no one-pass kernel.
    hopper = arch.gemm_specialised if arch.gpu and element_size == 2 else None
    if hopper is not None and call.M >= 64 and not one_pass:
        yield hopper
        yield replace(hopper, block_m=256, block_n=128, parts=2, num_stages=3)


def _staged(arch: Architecture, tiles: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, ...]]:
    """The tiles with stages, their last number, cut to what the chip has the memory for."""
    most = 2 if arch.name.startswith("gfx") else 8
    yield from dict.fromkeys((*sizes, min(stages, most)) for *sizes, stages in tiles)

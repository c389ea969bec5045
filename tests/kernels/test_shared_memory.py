"""What a tile takes with A and B in fp32: no row is used that a chip could not hold then."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from made_tables import put, table

from lora_fast.kernels import plans
from lora_fast.kernels.candidates import candidates
from lora_fast.kernels.configs import (
    ARCHITECTURES,
    EmbeddingConfig,
    GradSBConfig,
    ShrinkConfig,
    WeightConfig,
)
from lora_fast.kernels.shared_memory import bytes_taken, memory_misfit
from lora_fast.kernels.tables import Call

# Chip, tile, rank, and the bytes for which Triton 3.7.1 compiled it with A and B in fp32.
COMPILED: list[tuple[str, Any, int, int]] = [
    ("sm_89", EmbeddingConfig(16, 256, 1024, 8), 64, 141312),
    ("sm_89", EmbeddingConfig(16, 256, 256, 4), 128, 135168),
    ("sm_89", EmbeddingConfig(64, 128, 512, 8), 64, 90112),
    ("sm_89", WeightConfig(32, 256, 8), 192, 147456),
    ("sm_89", WeightConfig(16, 256, 4), 192, 139264),
    ("sm_89", WeightConfig(64, 128, 8), 192, 98304),
    ("sm_89", GradSBConfig(128, 128, 512, 8, 3), 64, 114688),
    ("sm_89", GradSBConfig(256, 64, 512, 8, 3), 64, 98304),
    ("sm_89", ShrinkConfig(16, 256, 128, 4, 3), 64, 73728),
    ("sm_80", GradSBConfig(128, 128, 512, 8, 3), 64, 180224),
    ("sm_80", ShrinkConfig(16, 256, 128, 4, 3), 64, 147456),
    ("gfx942", EmbeddingConfig(16, 256, 1024, 8), 64, 73728),
    ("gfx942", WeightConfig(16, 256, 4), 192, 69632),
    ("gfx942", WeightConfig(64, 128, 8), 192, 49152),
    ("gfx942", GradSBConfig(128, 128, 512, 8, 2), 64, 65536),
    ("gfx942", ShrinkConfig(16, 256, 64, 4, 2), 64, 73728),
    ("sm_90", EmbeddingConfig(16, 256, 1024, 8), 64, 137216),
]
WIDE = {
    "lora_linear_fwd": {"shrink": {"block_m": 16, "block_k": 256, "num_stages": 4}},
    "lora_linear_bwd": {"library_sb": False, "grad_sb": {"block_m": 128, "block_n": 128}},
    "lora_embedding_fwd": {"block_m": 16, "block_d": 256, "chunk_d": 1024, "num_warps": 8},
    "lora_embedding_bwd": {"library_sb": False, "grad_sb": {"block_m": 128, "block_n": 128}},
    "merged_weight": {"fused": True, "config": {"block_n": 32, "block_k": 256, "num_warps": 8}},
}


@pytest.mark.parametrize(("arch", "tile", "rank", "compiled"), COMPILED, ids=str)
def test_the_count_is_that_of_the_compiler(arch: str, tile: Any, rank: int, compiled: int) -> None:
    chip = ARCHITECTURES[arch]
    assert compiled <= bytes_taken(chip, tile, rank) <= 1.1 * compiled
    assert (memory_misfit(chip, tile, rank) is not None) is (compiled > chip.shared_memory)


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("op", plans.OPS)
def test_a_row_whose_tile_overflows_with_factors_in_fp32_is_ignored(
    op: str, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = "NVIDIA Imaginary 4090"
    chip = replace(ARCHITECTURES["sm_89"], gpu=gpu)
    wide = Call.of(op, 1 if op == "merged_weight" else 8192, 4096, 4096, 64, torch.bfloat16, False)
    for call, serves in (
        (wide, False),
        (wide._replace(R=8), True),
        (wide._replace(dtype="float32"), True),
    ):
        put(table(WIDE[op], call, gpu=gpu, arch="sm_89"), shipped="sm_89.json")
        caplog.clear()
        rule = plans.rule_for(chip, call)
        with caplog.at_level(logging.WARNING):
            plan, source = plans.measured(chip, call, rule)
        assert (source != "the rule") is serves
        assert ("lora_B in fp32 it takes" in caplog.text) is not serves
        assert (plan == rule) is not serves
    big = replace(ARCHITECTURES["sm_90"], gpu=gpu)
    assert plans.why_not(big, plan, wide) is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rank", [16, 64, 200])
def test_every_rule_and_candidate_holds_factors_in_fp32(arch: str, rank: int) -> None:
    chip = ARCHITECTURES[arch]
    for op in plans.OPS:
        for rows in (1, 64, 8192):
            for dropout in {False, op.startswith("lora_linear")}:
                call = Call.of(op, rows, 4096, 4096, rank, torch.bfloat16, dropout)
                rule = plans.rule_for(chip, call)
                assert plans.why_not(chip, rule, call) is None
                tried = [
                    replace(rule, **way) for step in candidates(chip, call, rule) for way in step
                ]
                for plan in tried:
                    tile = plans.tile_with_factors(plan)
                    assert bytes_taken(chip, tile, rank) <= chip.shared_memory


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_one_pass_leaves_room_for_a_in_fp32(arch: str) -> None:
    """256 x 128 x 64 in three stages takes 233,520 bytes of 232,448 then, at a rank of 32."""
    chip = ARCHITECTURES[arch]

    def tiles(rank: int) -> set[tuple[int, int]]:
        call = Call.of("lora_linear_fwd", 8192, 4096, 4096, rank, torch.bfloat16, False)
        ways = candidates(chip, call, plans.rule_for(chip, call))[0]
        found = (way["gemm"] for way in ways if way["impl"] == "one_pass")
        return {(gemm.block_m, gemm.block_n) for gemm in found if gemm.tma}

    assert (256, 128) in tiles(16)
    assert (256, 128) not in tiles(32)
    assert (128, 128) in tiles(32)

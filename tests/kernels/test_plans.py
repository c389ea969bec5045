"""Which implementation serves a call by the rule: every branch of it, on every architecture."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_fast import backend
from lora_fast.kernels.configs import ARCHITECTURES
from lora_fast.kernels.decode_configs import MAX_M
from lora_fast.kernels.plans import (
    EmbeddingBackwardPlan,
    backward_plan,
    embedding_backward_plan,
    embedding_plan,
    forward_plan,
    rule_for,
    weight_plan,
    why_not,
    why_not_named,
)
from lora_fast.kernels.sizes import MAX_BLOCK_R
from lora_fast.kernels.tables import Call

HALF = (torch.float16, torch.bfloat16)
# Where nothing is measured, a model chooses: on Hopper without its own kernel, too.
ARCHITECTURES = {**ARCHITECTURES, "model": replace(ARCHITECTURES["sm_90"], gemm_specialised=None)}


def forward(
    m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16, *,
    dropout: bool = False, arch: str = "sm_90",
) -> str:  # fmt: skip
    return forward_plan(ARCHITECTURES[arch], m, n, k, r, dtype, dropout).impl


def input_grad(m: int, n: int, k: int, r: int, dtype: torch.dtype, arch: str = "sm_90") -> str:
    return backward_plan(ARCHITECTURES[arch], m, n, k, r, dtype).input_grad


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_few_rows_take_one_launch(dtype: torch.dtype, arch: str) -> None:
    for m in (1, 16, 17, 64):
        assert forward(m, 8192, 8192, 64, dtype, arch=arch) == "decode"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_narrow_outputs_take_one_pass_at_small_ranks(dtype: torch.dtype) -> None:
    assert forward(8192, 1024, 1024, 16, dtype, arch="model") == "one_pass"
    assert forward(8192, 3072, 1024, 16, dtype, arch="model") == "one_pass"
    assert forward(8192, 3073, 1024, 16, dtype, arch="model") == "split"
    assert forward(8192, 1024, 1024, 17, dtype, arch="model") == "split"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_pass_serves_no_dropout_and_no_rank_beyond_a_block(arch: str) -> None:
    for m in (1, 16, 17, 8192):
        for n in (1, 1024, 8192):
            assert forward(m, n, 1024, 8, arch=arch, dropout=True) != "one_pass"
            assert forward(m, n, 1024, MAX_BLOCK_R + 1, arch=arch) != "one_pass"


@pytest.mark.parametrize("dropout", [True, False])
def test_the_depth_decides_between_triton_and_the_vendor(dropout: bool) -> None:
    """At sm_90's assumed .95 the break-even depth is 184 / (1 / .95 - 1), about 3500."""
    chip = {"arch": "model"}
    for dtype in HALF:
        assert forward(8192, 4096, 1024, 16, dtype, dropout=dropout, **chip) == "split"
        assert forward(8192, 4096, 3400, 16, dtype, dropout=dropout, **chip) == "split"
        assert forward(8192, 4096, 3600, 16, dtype, dropout=dropout, **chip) == "lora_first"
        assert input_grad(8192, 3400, 8192, 16, dtype, **chip) == "fused"
        assert input_grad(8192, 3600, 1024, 16, dtype, **chip) == "lora_first"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dropout", [True, False])
def test_hopper_has_a_kernel_of_its_own_where_it_has_work_for_all(
    dropout: bool, dtype: torch.dtype
) -> None:
    chip = ARCHITECTURES["sm_90"]
    for m, n, k in ((8192, 4096, 14336), (8192, 1024, 1024), (1024, 4096, 4096)):
        plan = forward_plan(chip, m, n, k, 16, dtype, dropout)
        assert (plan.impl, plan.gemm) == ("split", chip.gemm_specialised)
        back = backward_plan(chip, m, n, k, 16, dtype, dropout)
        assert (back.input_grad, back.gemm) == ("fused", chip.gemm_specialised)
    # Half of the processors would have no tile in the first or in the second turn, or the copy
    # engine does not take the rows.
    alone = "lora_first" if dropout else "library"
    for m, n, k in ((512, 4096, 4096), (128, 34304, 34304), (8192, 4095, 4096), (8192, 4096, 4090)):
        assert forward(m, n, k, 16, dtype, dropout=dropout) == alone
        assert input_grad(m, n, k, 16, dtype) == "lora_first"
    # 88 tiles keep two thirds of 132 multiprocessors busy, which is too few; 104 keep four fifths.
    for n, serves in ((11 * 256, False), (13 * 256, True)):
        plan = forward_plan(chip, 1024, n, 4096, 16, dtype, dropout)
        assert plan.gemm.specialised is serves
        assert backward_plan(chip, 1024, 4096, n, 16, dtype, dropout).gemm.specialised is serves
    # 64 tiles: too few for 132 multiprocessors, enough for the 78 of an H20.
    small = replace(chip, processors=78)
    assert forward_plan(small, 512, 4096, 4096, 16, dtype, dropout).gemm == chip.gemm_specialised


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_large_products_of_fp32_are_left_to_the_vendor(arch: str) -> None:
    alone = "library" if arch == "sm_90" else "lora_first"
    assert forward(8192, 1024, 256, 16, torch.float32, arch=arch) == alone
    assert input_grad(8192, 256, 1024, 16, torch.float32, arch) == "lora_first"


@pytest.mark.parametrize(("rank", "library"), [(1, False), (63, False), (64, True), (512, True)])
def test_large_ranks_read_dy_twice_by_the_vendor(rank: int, library: bool) -> None:
    plan = backward_plan(ARCHITECTURES["sm_90"], 8192, 4096, 4096, rank, torch.bfloat16)
    assert plan.library_sb == library
    wide = backward_plan(ARCHITECTURES["sm_90"], 8192, 4096, 4096, rank, torch.float32)
    assert wide.library_sb == (rank > 32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rule_names_what_runs(arch: str, dtype: torch.dtype, dropout: bool) -> None:
    chip = ARCHITECTURES[arch]
    for rank in (1, MAX_BLOCK_R, MAX_BLOCK_R + 1, 200):
        for m in (1, MAX_M, MAX_M + 1, 8192):
            for n in (64, 1024, 4096, 14336):
                call = Call.of("lora_linear_fwd", m, n, 4096, rank, dtype, dropout)
                assert why_not(chip, rule_for(chip, call), call) is None
                back = Call.of("lora_linear_bwd", m, n, 4096, rank, dtype, dropout)
                assert why_not(chip, rule_for(chip, back), back) is None
                # Two blocks of columns, each of this rank.
                plan = backward_plan(chip, m, n, 4096, rank, dtype, dropout, False, 2 * rank)
                assert why_not_named(plan, m, 2 * rank, dropout) is None


def test_beyond_a_block_of_the_rank_the_vendor_expands() -> None:
    chip = {"arch": "sm_89"}
    assert forward(8192, 4096, 14336, 64, dropout=True, **chip) == "lora_first"
    for dropout in (True, False):
        assert forward(8192, 4096, 14336, 65, dropout=dropout, **chip) == "library_expand"
    assert input_grad(8192, 14336, 1024, 64, torch.bfloat16, "sm_89") == "lora_first"
    assert input_grad(8192, 14336, 1024, 65, torch.bfloat16, "sm_89") == "library"
    sizes = (ARCHITECTURES["sm_89"], 8192, 14336, 1024)
    assert backward_plan(*sizes, 65, torch.bfloat16, True).input_grad == "fused"
    assert backward_plan(*sizes, 33, torch.bfloat16, True, False, 66).input_grad == "fused"


def test_wide_adapters_take_a_stage_fewer_where_memory_is_scarce() -> None:
    """Under autocast A and B are fp32 and x is not: 4 stages of a rank of 64 take 120 KiB."""
    forward_of = {"sm_80": (4, 4), "sm_89": (4, 3), "sm_90": (4, 4), "gfx942": (2, 2)}
    backward_of = {"sm_80": (3, 3), "sm_89": (3, 2), "sm_90": (3, 3), "gfx942": (2, 2)}
    sizes = (8192, 4096, 4096, 32, torch.bfloat16, False)
    for arch, stages in forward_of.items():
        chip = ARCHITECTURES[arch]
        found = [forward_plan(chip, *sizes, wide).shrink.num_stages for wide in (False, True)]
        assert tuple(found) == stages
        found = [backward_plan(chip, *sizes, wide).grad_sb.num_stages for wide in (False, True)]
        assert tuple(found) == backward_of[arch]
        plans = [embedding_backward_plan(chip, *sizes[:5], wide) for wide in (False, True)]
        assert tuple(plan.grad_sb.num_stages for plan in plans) == backward_of[arch]


def test_a_few_rows_of_the_kernel_are_those_of_the_dispatch() -> None:
    assert backend._MOST_DECODE_ROWS == MAX_M


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_are_what_the_kernels_assume(arch: str) -> None:
    """Powers of two, whole octets of the mask in a tile, whole tiles in a chunk."""
    for m in (1, 16, 17, 2048, 2049, 10**6):
        for dtype in (torch.float32, torch.bfloat16):
            plan = forward_plan(ARCHITECTURES[arch], m, 4096, 4096, 16, dtype, True)
            back = backward_plan(ARCHITECTURES[arch], m, 4096, 4096, 16, dtype)
            for gemm in (plan.gemm, back.gemm, plan.gemm.without_tma()):
                sizes = (gemm.block_m, gemm.block_n, gemm.block_k)
                assert all(size & (size - 1) == 0 and size >= 16 for size in sizes)
                assert gemm.block_n // gemm.parts % 8 == 0
                assert not gemm.tma or gemm.block_n // gemm.parts <= 256
            assert plan.shrink.block_k % 8 == 0
            assert back.grad_sb.chunk_n % back.grad_sb.block_n == 0
            assert back.grad_a.chunk_m % back.grad_a.block_m == 0
            assert back.grad_a.block_k % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_rule_of_a_call_is_that_of_its_rows(arch: str, dtype: torch.dtype) -> None:
    """A call stands for the rows up to a power of two, where alone the rules may change."""
    chip, (n, k, r) = ARCHITECTURES[arch], (768, 50257, 16)
    served = {
        "lora_linear_fwd": lambda *a: forward_plan(*a, False),
        "lora_linear_bwd": backward_plan,
        "lora_embedding_fwd": embedding_plan,
        "lora_embedding_bwd": embedding_backward_plan,
    }
    for power in range(15):
        for m in {1 << power, max(1, (1 << power) - 1), (1 << power) + 1}:
            for op, plan_of in served.items():
                call = Call.of(op, m, n, k, r, dtype, False)
                assert plan_of(chip, m, n, k, r, dtype) == rule_for(chip, call)
    call = Call.of("merged_weight", 1, n, k, r, dtype, False)
    assert weight_plan(chip, n, k, r, dtype) == rule_for(chip, call)


def test_the_tile_of_a_look_up() -> None:
    """Fewer tokens at once off the 16-byte grid and, in fp32, at ranks beyond 16."""
    chip, half, single = ARCHITECTURES["sm_90"], torch.bfloat16, torch.float32

    def tile(m: int, d: int, r: int, dtype: torch.dtype) -> tuple[int, int, int]:
        plan = embedding_plan(chip, m, d, 50257, r, dtype)
        return plan.block_m, plan.block_d, plan.chunk_d

    assert tile(2048, 1024, 16, half) == (16, 128, 128)
    assert tile(2049, 1024, 64, half) == (32, 128, 512)
    assert tile(4096, 1016, 16, half) == (16, 128, 512)
    assert tile(4096, 1024, 16, single) == (32, 64, 512)
    assert tile(4096, 1024, 17, single) == (16, 64, 512)


def test_the_backward_of_a_look_up() -> None:
    chip = ARCHITECTURES["sm_90"]

    def plan(d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> EmbeddingBackwardPlan:
        return embedding_backward_plan(chip, 4096, d, 50257, r, dtype)

    assert not plan(1024, 32).library_sb and plan(1024, 33).library_sb
    assert plan(1024, 8, torch.float32).library_sb
    assert plan(1016, 16).grad_sb.block_n == plan(1024, 16).grad_sb.block_n // 2
    assert (plan(1024, 16).segment_m, plan(1024, 17).segment_m) == (64, 32)

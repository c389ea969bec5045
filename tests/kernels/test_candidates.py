"""What `lora-fast tune` measures: plans that serve their calls, each another than the rule's."""

import json
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("triton")

from made_tables import ARCH, CALL, RULE, SIZES

from lora_fast.kernels import configs, plans, tables
from lora_fast.kernels.candidates import candidates
from lora_fast.kernels.tables import Call

pytestmark = pytest.mark.usefixtures("no_tables")


@pytest.mark.parametrize("op", plans.OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 100, 8192])
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_candidate_is_a_valid_row_for_the_call(
    arch: str, rows: int, dtype: torch.dtype, op: str
) -> None:
    chip = configs.ARCHITECTURES[arch]
    call = Call.of(op, rows, 4096, 4096, 128, dtype, op.startswith("lora_linear"))
    rule = plans.rule_for(chip, call)
    steps = candidates(chip, call, rule)
    assert all(steps)
    seen: set[Any] = set()
    for change in (change for step in steps for change in step):
        found = replace(rule, **change)
        data = json.loads(json.dumps(asdict(found)))
        assert found not in seen
        seen.add(found)
        assert tables.changed(rule, data) == found != rule
        assert plans.why_not(chip, found, call) is None
        assert not hasattr(found, "gemm") or found.gemm.tma is False or chip.gemm.tma


def test_no_tile_of_a_look_up_has_more_rows_than_there_are_tokens() -> None:
    def rows(tokens: int) -> set[int]:
        call = Call.of("lora_embedding_fwd", tokens, 768, 50257, 16, torch.bfloat16, False)
        rule = plans.rule_for(ARCH, call)
        return {replace(rule, **change).block_m for change in candidates(ARCH, call, rule)[0]}

    assert rows(1) == rows(16) == {16}
    assert rows(8192) == {16, 32, 64}


def test_torchs_way_to_a_weight_is_measured_beside_the_kernel() -> None:
    for n, fused in ((64, False), (4096, True)):
        call = Call.of("merged_weight", 1, n, n, 16, torch.bfloat16, False)
        rule = plans.rule_for(ARCH, call)
        assert rule.fused is fused
        (ways,) = candidates(ARCH, call, rule)
        assert {way["fused"] for way in ways} == {True, not fused}
        assert {"fused": not fused} in ways


def test_one_pass_is_a_candidate_where_it_can_serve() -> None:
    def impls(R: int, dropout: bool) -> set[str]:
        call = Call.of("lora_linear_fwd", 64, 4096, 4096, R, torch.bfloat16, dropout)
        rule = plans.rule_for(ARCH, call)
        found = candidates(ARCH, call, rule)[0]
        return {rule.impl, *(change["impl"] for change in found)}

    assert impls(16, False) == set(get_args(plans.ForwardImpl))
    assert impls(16, True) == {"split", "lora_first", "library_expand"}
    assert impls(65, False) == {"split", "library_expand", "library"}


def test_specialised_warps_are_a_candidate_on_hopper_alone() -> None:
    def offered(arch: configs.Architecture, dtype: torch.dtype) -> bool:
        call = Call.of("lora_linear_fwd", *SIZES[:4], dtype, False)
        rule = plans.rule_for(arch, call)
        ways = candidates(arch, call, rule)[0]
        return any("gemm" in way and way["gemm"].specialised for way in ways)

    assert offered(ARCH, torch.bfloat16)
    assert not offered(ARCH, torch.float32)
    assert not offered(configs.ARCHITECTURES["sm_90"], torch.bfloat16)  # interpreted
    assert not offered(replace(configs.ARCHITECTURES["sm_100"], gpu="B200"), torch.bfloat16)


def test_an_op_without_candidates_is_named() -> None:
    with pytest.raises(ValueError, match=r"op must be one of lora_linear_fwd, .*got 'lora_conv'"):
        candidates(ARCH, CALL._replace(op="lora_conv"), RULE)
    with pytest.raises(ValueError, match=r"op must be one of lora_linear_fwd, .*got 'lora_conv'"):
        plans.rule_for(ARCH, CALL._replace(op="lora_conv"))


def test_one_pass_has_the_tile_that_leaves_room_for_s() -> None:
    chip = configs.ARCHITECTURES["sm_90"]
    call = Call.of("lora_linear_fwd", 8192, 4096, 4096, 16, torch.bfloat16, False)
    ways, _ = candidates(chip, call, plans.rule_for(chip, call))
    (way,) = (way for way in ways if way["impl"] == "one_pass" and way["gemm"].tma and
              way["gemm"].block_n == 256)  # fmt: skip
    assert way["gemm"] == chip.gemm_one_pass

"""Tables of measured choices: what wins, and what a launcher then runs."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from made_tables import ARCH, CALL, OTHER, RULE, SIZES, TILE, plan, put, table, write

from lora_fast.kernels import configs, plans, tables
from lora_fast.kernels.gemm_launch import gemm_launch
from lora_fast.kernels.lora_gemm import lora_gemm
from lora_fast.kernels.tables import Call

pytestmark = pytest.mark.usefixtures("no_tables")


def test_the_rule_does_not_choose_what_these_tables_say() -> None:
    assert plan() == RULE
    assert RULE.impl != OTHER


def test_the_users_table_wins_over_the_shipped_ones_and_those_over_the_rule() -> None:
    put(table({"shrink": {"block_m": 64}}), shipped="sm_90.json")
    assert plan() == replace(RULE, shrink=replace(RULE.shrink, block_m=64))
    path = put(table({"impl": OTHER}))
    assert plan() == replace(RULE, impl=OTHER)
    path.unlink()
    plans.reload_tables()
    assert plan().impl == RULE.impl


def test_a_shipped_table_of_the_same_gpu_wins_over_another_of_the_architecture() -> None:
    put(table({"impl": OTHER}), shipped="z.json")
    put(table({"impl": "one_pass"}, gpu="NVIDIA Imaginary 1"), shipped="a.json")
    put(table({"impl": "one_pass"}, gpu="NVIDIA Imaginary 1"), shipped="zz.json")
    assert plan().impl == OTHER
    assert plan(arch=replace(ARCH, gpu="NVIDIA Imaginary 2")).impl == "one_pass"
    assert plan(arch=replace(configs.ARCHITECTURES["sm_80"], gpu="A")).impl != OTHER


def test_a_shipped_table_serves_other_versions_the_users_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    put(table({"impl": OTHER}, torch="1.0", triton="1.0"), shipped="sm_90.json")
    assert plan().impl == OTHER
    other = table({"impl": "one_pass"}, triton="1.0")
    write(other, tables.user_path(other.machine))
    plans.reload_tables()
    assert plan().impl == OTHER
    assert not caplog.records  # a table of another version is in a file of its own, and stays


def test_rows_of_another_call_change_nothing() -> None:
    put(table({"impl": OTHER}))
    assert plan(R=8).impl == RULE.impl
    assert plan(dropout=True).impl == RULE.impl
    assert plan(M=4097).impl == RULE.impl
    backward = Call.of("lora_linear_bwd", *SIZES, False)
    assert plans.backward_plan(ARCH, *SIZES) == plans.rule_for(ARCH, backward)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4095, 4096), (4097, 8192)])
def test_rows_up_to_a_power_of_two_share_a_choice(rows: int, bucket: int) -> None:
    call = Call.of("lora_linear_fwd", bucket, 4096, 4096, 16, torch.bfloat16, False)
    assert call == Call.of("lora_linear_fwd", rows, 4096, 4096, 16, torch.bfloat16, False)
    put(table({"impl": OTHER}, call))
    assert plan(M=rows).impl == OTHER


def test_the_backward_has_rows_with_and_without_dropout() -> None:
    call = Call.of("lora_linear_bwd", *SIZES, True)
    rule = plans.rule_for(ARCH, call)
    put(table({"library_sb": True, "gemm": TILE}, call))
    assert plans.backward_plan(ARCH, *SIZES) == rule
    measured = plans.backward_plan(ARCH, *SIZES, True)
    assert (measured.library_sb, rule.library_sb) == (True, False)
    assert measured.gemm == replace(rule.gemm, **TILE)


def test_the_log_says_which_plan_serves_a_call_and_where_it_is_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put(table({"impl": OTHER}))
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        plan()
        plan()
        plan(R=8)
    measured, ruled = (record.getMessage() for record in caplog.records)
    assert measured.startswith(f"{CALL} -> ForwardPlan(impl={OTHER!r}")
    assert measured.endswith(f": {path}")
    assert ruled.startswith(f"{CALL._replace(R=8)} -> ForwardPlan(impl={RULE.impl!r}")
    assert ruled.endswith(": the rule")


def test_the_log_tells_of_the_tile_for_factors_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    chip = configs.ARCHITECTURES["sm_89"]
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        found = plans.forward_plan(chip, *SIZES, False, True)
        back = plans.backward_plan(chip, 4096, 14336, 1024, 40, torch.bfloat16, True, True, 80)
    assert [record.args[1] for record in caplog.records] == [found, back]
    assert (found.shrink.num_stages, back.input_grad) == (chip.shrink.num_stages - 1, "fused")


def test_the_log_says_which_tile_takes_the_place_of_another(
    caplog: pytest.LogCaptureFixture, kernel_device: torch.device
) -> None:
    """What the accelerator does not take, only the launch knows."""
    gemm_launch.cache_clear()
    tma = replace(configs.GemmConfig(32, 32, 32, 4, 2, tma=True), block_n=64)
    x, w, up, t = on(kernel_device, *(torch.randn(s) for s in ((5, 7), (6, 7), (6, 4), (5, 4))))
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch.plan"):
        for _ in range(2):
            lora_gemm(x, w, up, t=t, config=tma)
    (record,) = caplog.records
    assert record.args == ((5, 6, 7, 4), tma.without_tma(), tma)


def test_interpreted_and_offline_plans_know_no_table() -> None:
    put(table({"impl": OTHER}))
    interpreted = configs.architecture(torch.device("cpu"))
    assert plan(arch=interpreted) == plans.rule_for(interpreted, CALL)
    assert plan(arch=configs.ARCHITECTURES["sm_90"]).impl == RULE.impl


def test_the_launcher_runs_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fast.kernels import lora_linear_fwd as module

    m, n, k, r = 5, 6, 7, 2
    monkeypatch.setattr(module, "architecture", lambda device: ARCH)
    called = []
    original = module.lora_shrink
    monkeypatch.setattr(
        module, "lora_shrink", lambda *a, **k: called.append(1) or original(*a, **k)
    )
    x, weight, a, b = (torch.randn(s) for s in ((m, k), (n, k), (r, k), (n, r)))
    if torch.cuda.is_available():
        x, weight, a, b = (t.cuda() for t in (x, weight, a, b))
    for impl, calls in (("one_pass", 0), ("lora_first", 1)):
        put(table({"impl": impl}, Call.of("lora_linear_fwd", m, n, k, r, torch.float32, False)))
        y, _, _ = module.lora_linear_fwd(x, weight, None, a, b, 1.0)
        torch.testing.assert_close(y, x @ weight.t() + x @ a.t() @ b.t())
        assert len(called) == calls


class Launches:
    """Stands for a kernel, launches it, and keeps the constants of every launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.constants = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> None:
            self.constants.append(constants)
            self.kernel[grid](*args, **constants)

        return launch


def on(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def test_a_look_up_runs_with_the_tile_that_the_table_says(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    from lora_fast.kernels import lora_embedding_fwd as module

    m, num, d, r = 40, 9, 33, 4
    kernel = Launches(module.lora_embedding_fwd_kernel)
    monkeypatch.setattr(module, "architecture", lambda device: ARCH)
    monkeypatch.setattr(module, "lora_embedding_fwd_kernel", kernel)
    index = torch.randint(0, num, (m,), device=kernel_device)
    weight, a, b = on(kernel_device, torch.randn(num, d), torch.randn(r, num), torch.randn(d, r))
    call = Call.of("lora_embedding_fwd", m, d, num, r, torch.float32, False)
    for tile, of_call in (
        ({}, call),
        ({"block_m": 32}, call),
        ({"block_m": 64}, call._replace(K=8)),
    ):
        put(table(tile, of_call))
        y = module.lora_embedding_fwd(index, weight, a, b, 1.0)
        torch.testing.assert_close(y, weight[index] + a.t()[index] @ b.t())
    rule = plans.rule_for(ARCH, call).block_m
    assert [constants["BLOCK_M"] for constants in kernel.constants] == [rule, 32, rule]
    assert rule != 32


def test_the_backward_of_a_look_up_runs_as_the_table_says(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    from lora_fast.kernels import lora_embedding_bwd as module

    m, num, d, r = 40, 9, 33, 4
    ran: list[Any] = []
    passes, scatter = module.lora_grad_sb, module.segment_sum

    def segment_sum(*args: Any, block_m: int, **options: Any) -> torch.Tensor:
        ran.append(block_m)
        return scatter(*args, block_m=block_m, **options)

    monkeypatch.setattr(module, "architecture", lambda device: ARCH)
    monkeypatch.setattr(
        module, "lora_grad_sb", lambda *a, **k: ran.append("pass") or passes(*a, **k)
    )
    monkeypatch.setattr(module, "segment_sum", segment_sum)
    index = torch.randint(0, num, (m,), device=kernel_device)
    dy, a, b = on(kernel_device, torch.randn(m, d), torch.randn(r, num), torch.randn(d, r))
    call = Call.of("lora_embedding_bwd", m, d, num, r, torch.float32, False)
    grad_sb = {"block_m": 32, "block_n": 32, "chunk_n": 64}
    for changes, expected in (
        ({}, [64]),
        ({"segment_m": 16}, [16]),
        ({"library_sb": False, "grad_sb": grad_sb, "segment_m": 32}, ["pass", 32]),
    ):
        put(table(changes, call))
        ran.clear()
        da, db = module.lora_embedding_bwd(dy, index, a, b, 1.0, None, False, True, [True, True])
        assert ran == expected
        torch.testing.assert_close(da, torch.zeros_like(a).index_add_(1, index, (dy @ b).t()))
        torch.testing.assert_close(db, dy.t() @ a.t()[index])


def test_a_merged_weight_is_formed_as_the_table_says(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    from lora_fast import backend
    from lora_fast.kernels import merged_weight as module

    kernel = Launches(module.merged_weight_kernel)
    for where in (module, plans):
        monkeypatch.setattr(where, "architecture", lambda device: ARCH)
    monkeypatch.setattr(module, "merged_weight_kernel", kernel)
    weight, a, b = on(
        kernel_device, torch.randn(6, 5, 3, 3), torch.randn(6, 15), torch.randn(18, 6)
    )
    call = Call.of("merged_weight", 1, 18, 15, 6, torch.float32, False)
    for changes, is_fused, block_n in (
        ({}, False, plans.MERGED_WEIGHT.block_n),
        ({"fused": True, "config": {"block_n": 64}}, True, 64),
    ):
        put(table(changes, call))
        assert plans.merged_weight_pays(weight, a, b) is is_fused
        reason = backend._why_torch_is_as_fast("merged_weight", (weight, a, b))
        assert (reason is None) is is_fused
        torch.testing.assert_close(
            module.merged_weight(weight, a, b, 1.0), weight + (b @ a).view(weight.shape)
        )
        assert kernel.constants[-1]["BLOCK_N"] == block_n
    # Of what torch does not form in one addmm nothing was measured.
    put(table({"fused": False}, call))
    assert plans.merged_weight_pays(weight.to(memory_format=torch.channels_last), a, b)
    assert plans.merged_weight_pays(weight, a.double(), b)

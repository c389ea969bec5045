"""The deterministic scatter: runs of every length across blocks, against torch's index_add."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from lora_fast.kernels import segment_sum as module
from lora_fast.kernels.segment_sum import segment_sum

BLOCK = 2
Options = dict[str, Any]


def expected(rows: Tensor, index: Tensor, num: int, skipped: int | None, mean: bool) -> Tensor:
    out = rows.new_zeros(num, rows.shape[1]).index_add_(0, index.long(), rows)
    if mean:
        out /= torch.bincount(index, minlength=num).clamp(min=1).unsqueeze(1).to(rows.dtype)
    if skipped is not None:
        out[skipped] = 0
    return out.t()


def summed(rows: Tensor, index: Tensor, num: int, skipped: Any = None, mean: Any = False) -> Tensor:
    return segment_sum(rows, index, num, rows.dtype, skipped=skipped, mean=mean, block_m=BLOCK)


def check(rows: Tensor, index: Tensor, num: int) -> Tensor:
    found = summed(rows, index, num)
    eager, oracle = (expected(r, index, num, None, False) for r in (rows, rows.double()))
    assert_within_budget(found, eager, oracle)
    assert found.is_contiguous()
    return found


# 70 rows pass 32 blocks of two, the most whose sums one step adds.
RUNS = {
    "one row": [1],
    "one run": [21],
    "a run longer than a step": [70],
    "a run of many blocks between others": [2, 69, 5],
    "runs that end with a block": [2, 4, 2, 1],
    "runs that begin in the middle": [3, 3, 9, 2, 6],
    "each its own": [1] * 11,
}


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_runs(runs: list[int], mean: bool, kernel_device: torch.device) -> None:
    keys = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs)) * 2 + 1
    index = keys[torch.randperm(len(keys))].to(kernel_device)
    # Small integers, whose sums are exact in any order.
    rows = torch.randint(-8, 8, (len(keys), 3), device=kernel_device).float()
    num = 2 * len(runs) + 1
    for skipped in (None, 1):
        wanted = expected(rows, index, num, skipped, mean)
        assert torch.equal(summed(rows, index, num, skipped, mean), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_dtypes(dtype: torch.dtype, index_dtype: torch.dtype, kernel_device: torch.device) -> None:
    index = torch.randint(0, 5, (50,), device=kernel_device, dtype=index_dtype)
    check(torch.randn(50, 2, device=kernel_device).to(dtype), index, 5)


def test_more_keys_than_16_bits_hold(kernel_device: torch.device) -> None:
    index = torch.tensor([0, 40_000, 32_767, 40_000, 32_768, 1], device=kernel_device)
    check(torch.randn(6, 2, device=kernel_device), index, 40_001)


@pytest.mark.parametrize("rank", [1, 16, 70])
def test_ranks(rank: int, kernel_device: torch.device) -> None:
    index = torch.randint(0, 3, (20,), device=kernel_device)
    check(torch.randn(20, rank, device=kernel_device), index, 3)


def test_a_nan_stays_in_its_column(kernel_device: torch.device) -> None:
    index = torch.tensor([1, 0, 1, 2, 0, 2, 2, 3, 1], device=kernel_device)
    rows = torch.randn(9, 3, device=kernel_device)
    rows[3, 1], rows[2, 0] = float("nan"), float("inf")
    found = check(rows, index, 5)
    assert found.isfinite().logical_not().nonzero().tolist() == [[0, 1], [1, 2]]


def test_the_order_of_the_rows_does_not_depend_on_chance(kernel_device: torch.device) -> None:
    index = torch.randint(0, 3, (30,), device=kernel_device)
    rows = torch.randn(30, 2, device=kernel_device)
    rows *= torch.logspace(-4, 4, 30, device=kernel_device).unsqueeze(1)
    assert torch.equal(check(rows, index, 3), check(rows, index, 3))


def test_a_block_that_is_left_out_is_seen(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests can fail: the sums of the blocks that a run goes on in are lost."""
    index = torch.zeros(20, dtype=torch.int64, device=kernel_device)
    rows = torch.randn(20, 2, device=kernel_device) + 1.0

    class Lost:
        def __getitem__(self, grid: Any) -> Any:
            return lambda keys, order, rows, carry, *sizes, **options: carry.zero_()

    check(rows, index, 1)
    monkeypatch.setattr(module, "segment_carry_kernel", Lost())
    with pytest.raises(AssertionError, match="budget"):
        check(rows, index, 1)

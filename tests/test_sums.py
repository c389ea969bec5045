"""`lora_fast.sums` on both sides of every bound: what it adds up is compared as a whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast import sums

EPS = torch.finfo(torch.float32).eps


def summed(r: int = 2, n: int = 6, k: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, base, A and B, of whole numbers, so that no rounding has a part in them."""
    base, lora_A, lora_B = (torch.randint(1, 8, size).float() for size in ((n, k), (r, k), (n, r)))
    return base + lora_B @ lora_A, base, lora_A, lora_B


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_CHUNK", {"cpu": 8})


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("blocks", [{}, {"enable_lora": [True, True]}], ids=["", "blocks"])
def test_every_row_is_looked_at(blocks: dict[str, Any], row: int, small_chunks: None) -> None:
    if blocks:
        base, lora_A, lora_B = torch.randn(6, 5), torch.randn(4, 5), torch.randn(6, 2)
        delta = torch.cat([lora_B[:3] @ lora_A[:2], lora_B[3:] @ lora_A[2:]])
        weight = base + delta
    else:
        weight, base, lora_A, lora_B = summed()
    assert sums.is_sum(weight, base, lora_A, lora_B, 1.0, **blocks)
    assert sums.is_nearer_to_sum(weight, base, lora_A, lora_B, 1.0, **blocks)
    weight[row, 4] += 1.0
    assert not sums.is_sum(weight, base, lora_A, lora_B, 1.0, **blocks)
    weight[row, 4] += 1000.0
    assert not sums.is_nearer_to_sum(weight, base, lora_A, lora_B, 1.0, **blocks)


def test_the_room_grows_with_the_rank() -> None:
    """A sum of r products may miss by as many roundings of what is added up."""
    r = 64
    base, lora_A, lora_B = torch.zeros(1, 1), torch.ones(r, 1), torch.ones(1, r)
    lora_B[:, ::2] = -1.0  # the products cancel
    for roundings, expected in ((r // 2, True), (2 * r + 8, False)):
        weight = torch.full((1, 1), roundings * EPS * r)
        assert sums.is_sum(weight, base, lora_A, lora_B, 1.0) is expected


def test_the_room_for_a_delta_that_was_rounded_before() -> None:
    """loralib rounds B A, then scales and rounds again, before it adds: here all of W is delta."""
    eps = torch.finfo(torch.bfloat16).eps
    base, lora_A = torch.full((1, 1), -256.0), torch.ones(1, 1)
    lora_B = torch.full((1, 1), 256.0)
    for off, expected in ((2.0 * eps * 256.0, True), (8.0 * eps * 256.0, False)):
        weight = torch.full((1, 1), off)
        found = sums.is_sum(*(t.bfloat16() for t in (weight, base, lora_A, lora_B)), 1.0)
        assert found is expected


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_delta_that_is_not_finite_explains_nothing(bad: float) -> None:
    weight, base, lora_A, lora_B = summed()
    lora_B[2, 0] = bad
    assert not sums.is_sum(weight, base, lora_A, lora_B, 1.0)


def test_infinities_and_nan_equal_themselves() -> None:
    weight, base, lora_A, lora_B = summed()
    for i, value in enumerate((float("inf"), -float("inf"), float("nan"))):
        weight[i, i] = base[i, i] = value
    assert sums.is_sum(weight, base, lora_A, lora_B, 1.0)
    weight[0, 0] = -weight[0, 0]
    assert not sums.is_sum(weight, base, lora_A, lora_B, 1.0)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.82, True), (0.78, False), (1.2, True), (1.3, False)]
)
def test_nearer_to_the_sum_than_by_a_quarter(share: float, expected: bool) -> None:
    _, base, lora_A, lora_B = summed()
    weight = base + share * (lora_B @ lora_A)
    assert sums.is_nearer_to_sum(weight, base, lora_A, lora_B, 1.0) is expected


@pytest.mark.parametrize("compare", [sums.is_sum, sums.is_nearer_to_sum])
@pytest.mark.parametrize("which", range(4), ids=["weight", "base", "lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_copy_in_fp8_is_compared(dtype: torch.dtype, which: int, compare: Any) -> None:
    tensors = list(summed())
    weight = tensors[0].clone()
    tensors[which] = tensors[which].to(dtype)
    assert compare(*tensors, 1.0)
    other = [weight + 1000.0, *tensors[1:]]
    assert not compare(*other, 1.0)


@pytest.mark.parametrize("compare", [sums.is_sum, sums.is_nearer_to_sum])
@pytest.mark.parametrize("which", range(4), ids=["weight", "base", "lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_integers_are_parts_of_no_sum(dtype: torch.dtype, which: int, compare: Any) -> None:
    tensors = list(summed())
    tensors[which] = tensors[which].to(dtype)
    assert not compare(*tensors, 1.0)


def test_factors_of_a_complex_weight() -> None:
    weight, base, lora_A, lora_B = summed()
    for a in (lora_A, lora_A.long(), lora_A.to(torch.complex64)):
        parts = (weight.to(torch.complex64), base.to(torch.complex64), a, lora_B)
        assert sums.is_sum(*parts, 1.0)
        assert sums.is_nearer_to_sum(*parts, 1.0)
    assert not sums.is_sum(weight, base, lora_A.to(torch.complex64), lora_B, 1.0)

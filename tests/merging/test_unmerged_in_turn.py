"""`unmerge_` takes a merge out of the weight that it left, and of no other."""

import pytest
import torch
from torch import Tensor

from lora_fast.functional import merge_, unmerge_


def factors() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 8), torch.randn(12, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_two_merges_come_out_in_the_opposite_order(dtype: torch.dtype, backend: str) -> None:
    weight = torch.randn(12, 8, dtype=dtype)
    base = weight.clone()
    first, second = (merge_(weight, *factors(), 0.5) for _ in range(2))
    both = weight.clone()
    with pytest.raises(ValueError, match="take out the last merge first"):
        unmerge_(weight, first)
    assert torch.equal(weight, both)
    unmerge_(weight, second)
    unmerge_(weight, first)
    assert torch.equal(weight, base)


def test_another_weight_and_one_that_was_written_to(backend: str) -> None:
    weight, other = torch.randn(12, 8), torch.randn(12, 8)
    base, record = weight.clone(), merge_(weight, *factors(), 0.5)
    untouched = other.clone()
    with pytest.raises(ValueError, match="or is another one"):
        unmerge_(other, record)
    assert torch.equal(other, untouched)
    merged = weight.clone()
    weight += 1
    with pytest.raises(ValueError, match="was written to"):
        unmerge_(weight, record)
    weight.copy_(merged)
    unmerge_(weight, record)
    assert torch.equal(weight, base)


def test_a_weight_that_is_not_finite(backend: str) -> None:
    weight = torch.randn(12, 8)
    weight[0, 0], weight[3, 5] = torch.nan, torch.inf
    bits = weight.clone().view(torch.int32)
    unmerge_(weight, merge_(weight, *factors(), 0.5))
    assert torch.equal(weight.view(torch.int32), bits)


def test_a_weight_that_became_sparse(backend: str) -> None:
    weight = torch.randn(12, 8)
    base, record = weight.clone(), merge_(weight, *factors(), 0.5)
    with pytest.raises(TypeError, match="unmerge_: weight must be dense"):
        unmerge_(weight.to_sparse(), record)
    unmerge_(weight, record)
    assert torch.equal(weight, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_different_blocks(dtype: torch.dtype, backend: str) -> None:
    weight = torch.randn(12, 8, dtype=dtype)
    base = weight.clone()
    one = (torch.randn(3, 8), torch.randn(6, 3), 0.01)
    first = merge_(weight, *one, enable_lora=[True, False])
    second = merge_(weight, *one, enable_lora=[False, True])
    if (
        first.original is None and second.original is None
    ):  # whose way back leaves the other block alone
        unmerge_(weight, first)
        assert torch.equal(weight[:6], base[:6]) and not torch.equal(weight[6:], base[6:])
        unmerge_(weight, second)
    else:  # of which the copy would throw the other away
        with pytest.raises(ValueError, match="take out the last merge first"):
            unmerge_(weight, first)
        unmerge_(weight, second)
        unmerge_(weight, first)
    assert torch.equal(weight, base)

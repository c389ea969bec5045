"""merge_ of kernels in three to five dimensions, in any order and with gaps."""

import random

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import assert_within_budget, randomize_


def drawn(generator: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """A strided weight, and an A and a B of rank 2 whose product has as many elements."""
    dims = generator.choice([3, 4, 5])
    shape = [generator.choice([1, 2, 3, 4]) for _ in range(dims)]
    order = generator.sample(range(dims), dims)
    padded = [shape[d] + generator.choice([0, 0, 1]) for d in order]
    weight = torch.randn(padded).permute([order.index(d) for d in range(dims)])
    weight = weight[tuple(slice(size) for size in shape)]
    rows = generator.choice([n for n in range(1, weight.numel() + 1) if weight.numel() % n == 0])
    return weight, torch.randn(2, weight.numel() // rows), torch.randn(rows, 2)


@pytest.mark.parametrize("seed", range(20))
def test_any_strides_of_a_kernel(seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(50):
        weight, lora_A, lora_B = drawn(generator)
        before = weight.clone()
        exact = before.double() + 0.7 * (lora_B.double() @ lora_A.double()).view(before.shape)
        plain = before + 0.7 * (lora_B @ lora_A).view(before.shape)
        record = functional.merge_(weight, lora_A, lora_B, 0.7)
        assert_within_budget(weight, plain, exact)
        functional.unmerge_(weight, record)
        assert torch.equal(weight, before)


def test_a_channels_last_kernel_of_one_output() -> None:
    layer = randomize_(lora.Conv2d(3, 1, 3, r=2)).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 6, 6)
    expected = layer(x)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_rows_that_touch_in_one_element() -> None:
    """Whose first element is the last of the row before: it cannot hold two sums."""
    weight = torch.randn(64).as_strided((8, 5), (4, 1))
    base = weight.clone()
    with pytest.raises(ValueError, match="memory of its own"):
        functional.merge_(weight, torch.randn(2, 5), torch.randn(8, 2), 1.0)
    assert torch.equal(weight, base)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_rank_whose_columns_are_packed_in_parts(layout: str) -> None:
    """A thread works through tasks of several columns: what it packed serves its own alone."""
    weight = torch.randn(9, 1100)
    if layout == "transposed":
        weight = weight.t()
    n, k = weight.shape
    lora_A, lora_B = torch.randn(1024, k) * 0.05, torch.randn(n, 1024) * 0.05
    before = weight.clone()
    exact = weight.double() + lora_B.double() @ lora_A.double()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = functional.merge_(weight, lora_A, lora_B, 1.0)
        torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-5)
        functional.unmerge_(weight, record)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weight, before)

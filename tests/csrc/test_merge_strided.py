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

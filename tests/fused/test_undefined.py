"""Where nothing depends on an output: by zeros AdamW would decay a parameter, and move it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast.autograd_weight import merged_weight
from lora_fast.testing import randomize_

Output = Callable[[torch.device], Tensor]


def embedded(device: torch.device) -> Tensor:
    layer = randomize_(lora.Embedding(9, 8, r=2, device=device))
    return layer(torch.tensor([1, 4], device=device))


def linear(device: torch.device) -> Tensor:
    layer = randomize_(lora.Linear(16, 8, r=2, device=device))
    return layer(torch.randn(3, 16, device=device))


def merged_linear(device: torch.device) -> Tensor:
    layer = randomize_(lora.MergedLinear(16, 8, r=2, enable_lora=[True, False], device=device))
    return layer(torch.randn(3, 16, device=device))


def weight(device: torch.device) -> Tensor:
    layer = randomize_(lora.Conv2d(4, 6, 3, r=2, device=device))
    return merged_weight(layer.conv.weight, layer.lora_A, layer.lora_B, layer.scaling)


@pytest.mark.parametrize("output", [embedded, linear, merged_linear, weight])
def test_no_gradient_gives_none(
    output: Output,
    kernel_device: torch.device,
    without_gradient: Callable[[Tensor], Tensor],
    launched: list[str],
) -> None:
    y = output(kernel_device)
    del launched[:]
    nodes = [node for node, _ in y.grad_fn.next_functions if node is not None]
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    without_gradient(y).sum().backward()
    assert leaves and all(leaf.grad is None for leaf in leaves)
    assert not launched

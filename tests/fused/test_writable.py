"""Outputs are tensors of their own: what comes next may write to them, as to any layer's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

LAYERS = {
    "linear": lambda: lora.Linear(40, 48, r=4),
    "dropping": lambda: lora.Linear(40, 48, r=4, lora_dropout=0.5),
    "merged": lambda: lora.MergedLinear(40, 48, r=4, enable_lora=[True, False, True]),
    "merged_dropping": lambda: lora.MergedLinear(
        40, 48, r=4, lora_dropout=0.5, enable_lora=[True, False, True]
    ),
    "embedding": lambda: lora.Embedding(40, 48, r=4),
}
SHAPES = [(), (7,), (3, 5), (2, 3, 5)]


@pytest.fixture
def make(kernel_device: torch.device) -> Any:
    """Make a layer and an input of some shape for it."""

    def made(name: str, shape: tuple[int, ...]) -> tuple[Any, Tensor]:
        layer = randomize_(LAYERS[name]()).to(kernel_device)
        x = torch.randint(40, shape) if name == "embedding" else torch.randn(*shape, 40)
        return layer, x.to(kernel_device)

    return made


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_next_layer_may_work_in_place(name: str, shape: Any, backend: str, make: Any) -> None:
    layer, x = make(name, shape)
    gradients = []
    for in_place in (False, True):
        torch.manual_seed(0)
        with lora.use_backend(backend):
            y = layer(x)
        if in_place:
            y[..., :16].mul_(0.5)  # of q, say
        else:
            y = torch.cat([y[..., :16] * 0.5, y[..., 16:]], -1)
        y = nn.functional.relu(y, inplace=in_place)
        gradients.append(torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", ["linear", "merged", "embedding"])
def test_what_was_computed_without_gradients_may_be_scaled_by_a_trained_one(
    name: str, backend: str, make: Any
) -> None:
    layer, x = make(name, (3, 5))
    scale = torch.ones((), device=layer.weight.device, requires_grad=True)
    with torch.no_grad(), lora.use_backend(backend):
        y = layer(x)
    y.mul_(scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("name", ["linear", "dropping", "merged", "merged_dropping"])
def test_many_elements_that_drop_in_three_dimensions(name: str, make: Any) -> None:
    layer, x = make(name, (2, 1000))
    with lora.use_backend("auto"):
        y = layer(x)
    y += 1
    y.sum().backward()
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize("name", ["linear", "dropping", "merged", "merged_dropping"])
@pytest.mark.parametrize(("rows", "backend"), [(3, "triton"), (2000, "auto")])
def test_gradients_may_come_in_batches(name: str, rows: int, backend: str, make: Any) -> None:
    layer, x = make(name, (rows,))
    x.requires_grad_()
    torch.manual_seed(0)
    with lora.use_backend(backend):
        y, inputs = layer(x), [x, layer.lora_A, layer.lora_B]
    seeds = torch.randn(3, *y.shape).to(y)
    batched = torch.autograd.grad(y, inputs, seeds, retain_graph=True, is_grads_batched=True)
    for i, seed in enumerate(seeds):
        alone = torch.autograd.grad(y, inputs, seed, retain_graph=True)
        torch.testing.assert_close(tuple(g[i] for g in batched), alone, rtol=1e-4, atol=1e-4)

"""`lora.Linear` on the fused path; `tests/fused` goes into the parts."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast.testing import assert_within_budget, randomize_

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="the kernels need a GPU or Triton's interpreter",
    ),
]


def make(device: torch.device, dropout: float = 0.0, **options: Any) -> lora.Linear:
    layer = lora.Linear(40, 24, r=4, lora_alpha=6, lora_dropout=dropout, device=device, **options)
    randomize_(layer)
    return layer


def gradients(layer: lora.Linear, y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    dy = torch.linspace(-1.0, 2.0, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [layer.lora_A, layer.lora_B, layer.bias, *inputs], dy)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 3, 40), (0, 40)], ids=str)
def test_the_layer_within_the_budget(
    kernel_device: torch.device, shape: tuple[int, ...], fan_in_fan_out: bool
) -> None:
    layer = make(kernel_device, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(shape, device=kernel_device, requires_grad=True)
    y = layer(x)
    found = gradients(layer, y, x)
    with lora.use_backend("reference"):
        eager = layer(x)
        expected = gradients(layer, eager, x)
        wide = layer.double()
        wide_x = x.detach().double().requires_grad_()
        oracle = wide(wide_x)
        exact = gradients(wide, oracle, wide_x)
    assert_within_budget(y, eager, oracle)
    for got, plain, true in zip(found, expected, exact, strict=True):
        assert_within_budget(got, plain, true)


def test_what_the_kernels_cannot_serve_raises(kernel_device: torch.device) -> None:
    layer = make(kernel_device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"forced but cannot run.*float64"):
        layer(torch.randn(3, 40, device=kernel_device, dtype=torch.float64))


def test_training_follows_the_reference(kernel_device: torch.device) -> None:
    def train(backend: str) -> list[float]:
        torch.manual_seed(0)
        with lora.use_backend(backend):
            layer = make(kernel_device)
            lora.mark_only_lora_as_trainable(layer)
            parameters = [p for p in layer.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-2)
            x = torch.randn(32, 40, device=kernel_device)
            losses = []
            for _ in range(5):
                loss = layer(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    assert train("triton") == pytest.approx(train("reference"), rel=1e-4)

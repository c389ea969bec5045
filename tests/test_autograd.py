"""`lora.Linear` on the fused path: what autograd, checkpointing and torch.compile make of it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora_fast as lora
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    """Force the kernels: what they can't serve raises."""
    with lora.use_backend("triton"):
        yield


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


def test_what_is_saved_for_backward(kernel_device: torch.device) -> None:
    """S and a bit an element of x, beside x and the parameters."""
    layer = make(kernel_device, dropout=0.5)
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(64, 40, device=kernel_device, requires_grad=True)
    saved = saved_bytes(lambda: layer(x), [x, *layer.parameters()])
    assert saved == 64 * 40 // 8 + 64 * 4 * 4


def test_dropout_draws_anew_and_follows_the_seed(kernel_device: torch.device) -> None:
    layer = make(kernel_device, dropout=0.5)
    x = torch.randn(16, 40, device=kernel_device)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(
    kernel_device: torch.device, use_reentrant: bool
) -> None:
    layer = make(kernel_device, dropout=0.5)
    x = torch.randn(16, 40, device=kernel_device, requires_grad=True)
    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B])
    torch.manual_seed(3)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, plain[0])
    assert torch.equal(layer.lora_B.grad, plain[1])


def test_double_backward_has_the_reference_values(kernel_device: torch.device) -> None:
    layer = make(kernel_device)
    x = torch.randn(6, 40, device=kernel_device, requires_grad=True)

    def penalty(layer: lora.Linear, x: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(layer(x).sin().sum(), [x, layer.lora_A], create_graph=True)
        total = sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, [x, layer.lora_A, layer.lora_B])

    found = penalty(layer, x)
    with lora.use_backend("reference"):
        eager = penalty(layer, x)
        oracle = penalty(layer.double(), x.detach().double().requires_grad_())
    for got, plain, true in zip(found, eager, oracle, strict=True):
        assert_within_budget(got, plain, true)


def test_fp32_adapters_on_a_half_base(kernel_device: torch.device) -> None:
    layer = make(kernel_device, dtype=torch.float16)
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().float()))
    x = torch.randn(8, 40, device=kernel_device, dtype=torch.float16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_what_the_kernels_cannot_serve_raises(kernel_device: torch.device) -> None:
    layer = make(kernel_device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"forced but cannot run.*float64"):
        layer(torch.randn(3, 40, device=kernel_device, dtype=torch.float64))
    merged = lora.MergedLinear(8, 6, r=2, enable_lora=[True, False], device=kernel_device)
    with pytest.raises(RuntimeError, match="no fused kernel"):
        merged(torch.randn(3, 8, device=kernel_device))


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

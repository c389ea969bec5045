"""Dropout over calls and layers: what is drawn when, and who sees the same mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lora_fast as lora
from lora_fast.autograd import draw_seed

M, K = 32, 40


def rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()


def mask_bits(y: Tensor) -> Tensor:
    """The mask of the call that gave y, which its autograd node keeps."""
    from lora_fast.kernels.dropout import unpack_mask

    return unpack_mask(y.grad_fn.saved_tensors[-1], K)


def example(layer: nn.Module) -> Tensor:
    return torch.randn(M, K, device=next(layer.parameters()).device, requires_grad=True)


def correlation(one: Tensor, other: Tensor) -> float:
    """Of two masks at rate 1/2, in standard deviations of what independent ones have."""
    product = (2.0 * one.double() - 1.0) * (2.0 * other.double() - 1.0)
    return product.mean().item() * product.numel() ** 0.5


def test_a_call_draws_one_seed(make_layer: Any) -> None:
    """The generator moves as it does for one number, whatever the size and the rate."""
    layer = make_layer(0.5)
    x = example(layer)
    torch.manual_seed(5)
    draw_seed(x.device)
    expected = rng_state(x.device)
    for rate, rows in ((0.5, M), (0.5, 3), (0.01, M), (1.0, 1)):
        torch.manual_seed(5)
        make_rate(layer, rate)(x[:rows])
        assert torch.equal(rng_state(x.device), expected)


def make_rate(layer: lora.Linear, p: float) -> lora.Linear:
    layer.lora_dropout.p = p
    return layer


def no_rate(layer: lora.Linear) -> lora.Linear:
    return make_rate(layer, 0.0)


def dropout_in_eval(layer: lora.Linear) -> lora.Linear:
    layer.lora_dropout.eval()
    return layer


def merged(layer: lora.Linear) -> lora.Linear:
    return layer.eval()


@pytest.mark.parametrize("how", [no_rate, dropout_in_eval, merged])
def test_nothing_is_drawn_where_nothing_is_dropped(
    how: Callable[[lora.Linear], lora.Linear], make_layer: Any
) -> None:
    layer = how(make_layer(0.5))
    x = example(layer)
    before = rng_state(x.device)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(rng_state(x.device), before)


def test_eval_without_a_merge_drops_nothing(make_layer: Any) -> None:
    layer = make_layer(0.5, merge_weights=False).eval()
    x = example(layer)
    before = rng_state(x.device)
    torch.testing.assert_close(layer(x), make_rate(layer, 0.0).train()(x))
    assert torch.equal(rng_state(x.device), before)


def test_calls_and_layers_have_masks_of_their_own(make_layer: Any) -> None:
    one, other = make_layer(0.5), make_layer(0.5)
    x = example(one)
    torch.manual_seed(1)
    masks = [mask_bits(layer(x)) for layer in (one, one, other, other)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs(correlation(first, second)) < 5.0
    torch.manual_seed(2)
    assert abs(correlation(mask_bits(one(x)), masks[0])) < 5.0
    torch.manual_seed(1)
    assert torch.equal(mask_bits(one(x)), masks[0])


def test_manual_seed_replays_a_training_step(make_layer: Any) -> None:
    layer = make_layer(0.3)
    x = example(layer)
    found = []
    for _ in range(2):
        torch.manual_seed(9)
        y = layer(x) + layer(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_everything_dropped_is_the_frozen_layer(make_layer: Any) -> None:
    layer = make_layer(1.0)
    x = example(layer)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    dx, da, db = torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B])
    torch.testing.assert_close(dx, layer.weight.sum(0).expand_as(dx))
    assert not da.any()
    assert not db.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_when_dropped(value: float, p: float, make_layer: Any) -> None:
    """As `F.dropout`, which multiplies by zero."""
    layer = make_layer(p)
    x = example(layer).detach()
    x[3, 5] = value
    dropped = F.dropout(torch.tensor([value]), 1.0)
    assert dropped.isnan().all()
    for _ in range(4):
        y = layer(x)
        assert not y[3].isfinite().any()
        assert y[:3].isfinite().all()
        assert y[4:].isfinite().all()


def model(make_layer: Any) -> nn.Sequential:
    layers = [make_layer(0.5), nn.GELU(), nn.Linear(24, K), make_layer(0.3), nn.Dropout(0.2)]
    return nn.Sequential(*layers).to(layers[0].weight.device)


def gradients(layers: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    layers.zero_grad()
    x.grad = None
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in layers.parameters() if p.requires_grad)]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved_hooks"])
def test_checkpointing_replays_the_masks(reentrant: bool, make_layer: Any) -> None:
    layers = model(make_layer)
    x = example(layers)
    torch.manual_seed(3)
    expected = gradients(layers, layers(x), x)
    after = rng_state(x.device)
    for run in (
        lambda: checkpoint(layers, x, use_reentrant=reentrant),
        lambda: checkpoint_sequential(layers, 3, x, use_reentrant=reentrant),
    ):
        torch.manual_seed(3)
        y = run()
        torch.rand(1, device=x.device)  # the second forward must not draw where the first left off
        found = gradients(layers, y, x)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        torch.manual_seed(3)
        layers(x)
        assert torch.equal(rng_state(x.device), after)


def test_checkpointing_without_the_state_draws_another_mask(make_layer: Any) -> None:
    """The test above can fail: here nothing replays the seed."""
    layer = make_layer(0.5)
    x = example(layer)
    torch.manual_seed(3)
    expected = gradients(layer, layer(x), x)
    torch.manual_seed(3)
    y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    torch.rand(1, device=x.device)
    assert not torch.equal(gradients(layer, y, x)[0], expected[0])

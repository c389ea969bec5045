"""A layer's state while it is merged: dicts of it that are views, and writes through `.data`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: lora.Linear(4, 6, r=2),
    "transposed": lambda: lora.Linear(4, 6, r=2, fan_in_fan_out=True),
    "merged": lambda: lora.MergedLinear(4, 6, r=2, enable_lora=[True, False]),
    "embedding": lambda: lora.Embedding(5, 4, r=2),
    "conv": lambda: lora.Conv2d(3, 4, 3, r=2),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return LAYERS[request.param]


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = getattr(layer, "conv", layer).weight
    return weight.detach().clone()


@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_layer_loads_its_own_state(make: Any, assign: bool) -> None:
    layer = randomize_(make())
    base = weight_of(layer)
    layer.eval().load_state_dict(layer.state_dict(), assign=assign)
    assert layer.merged
    assert torch.equal(weight_of(layer.train()), base)
    layer.eval()
    best = {k: v.clone() for k, v in layer.state_dict().items()}  # which loses the mark
    layer.load_state_dict(best, assign=assign)
    assert torch.equal(weight_of(layer.train()), base)


@pytest.mark.parametrize("assign", [False, True])
def test_a_view_of_a_merged_weight_is_what_its_layer_is_by_now(make: Any, assign: bool) -> None:
    layer, other = randomize_(make()), make()
    base = weight_of(layer)
    state = layer.eval().state_dict()
    layer.train().load_state_dict(state, assign=assign)
    assert torch.equal(weight_of(layer), base)
    other.load_state_dict(state)
    assert torch.equal(weight_of(other), base)
    third, state = make(), layer.eval().state_dict()
    third.load_state_dict(state)
    torch.testing.assert_close(weight_of(third), base)
    third.load_state_dict(copy.deepcopy(state))
    torch.testing.assert_close(weight_of(third), base)


def test_another_base_loads_into_a_merged_layer(make: Any) -> None:
    layer, other = randomize_(make()).eval(), make()
    layer.load_state_dict({k: v.clone() for k, v in other.state_dict().items()})
    assert torch.equal(weight_of(layer.train()), weight_of(other))


def test_other_memory_under_a_merged_weight() -> None:
    layer = randomize_(lora.Linear(64, 64, r=2)).eval()
    delta = (layer.lora_B @ layer.lora_A * layer.scaling).detach()
    new = torch.randn(64, 64)
    layer.weight.data = new.clone()
    torch.testing.assert_close(layer.train().weight.detach(), new - delta)


def test_another_dtype_through_data() -> None:
    model = nn.Sequential(randomize_(lora.Linear(4, 4, r=2)), randomize_(lora.Linear(4, 4, r=2)))
    bases = [weight_of(layer) for layer in model]
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    for each in (copy.deepcopy(model), model):
        each.train()
        for layer, base in zip(each, bases, strict=True):
            assert not layer.merged
            torch.testing.assert_close(layer.weight.detach().float(), base, rtol=0, atol=5e-3)


def test_a_mark_taken_off_by_hand_leaves_nothing_behind() -> None:
    layer = randomize_(lora.Linear(4, 4, r=2)).eval()
    layer.merged = False
    twin = copy.deepcopy(layer.half())
    assert not twin.merged
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin.train().weight, layer.weight)


def test_a_rank_set_to_zero_switches_the_adapter_off(make: Any) -> None:
    layer = randomize_(make())
    x = torch.tensor([1, 2]) if isinstance(layer, nn.Embedding) else torch.randn(3, 4)
    x = torch.randn(1, 3, 5, 5) if isinstance(layer, lora.Conv2d) else x
    base = weight_of(layer)
    layer.eval()
    layer.r = 0
    assert torch.equal(weight_of(layer.train()), base)
    y = layer(x)
    torch.testing.assert_close(layer.eval()(x), y, rtol=0, atol=0)
    assert torch.equal(weight_of(layer), base)


def test_a_layer_that_was_merged_can_be_scripted(make: Any) -> None:
    for flipped in (make().eval(), make().eval().train()):
        x = torch.tensor([1, 2]) if isinstance(flipped, nn.Embedding) else torch.randn(3, 4)
        x = torch.randn(1, 3, 5, 5) if isinstance(flipped, lora.Conv2d) else x
        torch.testing.assert_close(torch.jit.script(flipped)(x), flipped(x))


def negated(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A.mul_(-1.5)


def scaled(layer: Any) -> None:
    layer.scaling = 4.0


def merged_anew(layer: Any) -> None:
    scaled(layer)
    layer.eval()


def put_back(layer: Any) -> None:
    base = copy.deepcopy(layer).train()
    with torch.no_grad():
        getattr(layer, "conv", layer).weight.copy_(weight_of(base))


@pytest.mark.parametrize("change", [negated, scaled, merged_anew, put_back])
def test_a_view_of_a_merged_weight_brings_the_base_of_its_layer(make: Any, change: Any) -> None:
    """Whatever has become, since the merge, of the factors that come with it."""
    layer, other = randomize_(make()), make()
    base = weight_of(layer)
    state = layer.eval().state_dict()
    change(layer)
    other.load_state_dict(state)
    assert torch.equal(weight_of(other), base)
    assert torch.equal(other.lora_A, layer.lora_A)
    assert layer.merged and torch.equal(weight_of(layer.train()), base)

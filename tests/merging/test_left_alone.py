"""What leaves a merged layer's memory as it is, and memory that others have taken away."""

from typing import Any

import pytest
import torch
from each_layer import LAYERS, base_of, weight_of
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_


def flattened(layer: Any) -> Tensor:
    """Put all parameters into one memory, as sharding engines do."""
    parameters = list(layer.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return flat


@pytest.mark.parametrize("name", ["linear", "merged_linear", "embedding"])
def test_moved_to_where_it_is_already(name: str, backend: str) -> None:
    layer = randomize_(LAYERS[name]())
    flat = flattened(layer)
    before = flat.clone()
    layer.eval().to("cpu").float()
    assert layer.merged
    layer.train()
    assert torch.equal(flat, before)
    flat.zero_()
    assert not weight_of(layer).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer._apply(lambda t: t.mul_(2)),
        lambda layer: layer._apply(lambda t: t * 2),
        lambda layer: layer.double()._apply(lambda t: t * 2).float(),
        lambda layer: layer._apply(lambda t: t.data.mul_(2) if t.numel() > 0 else t),
        lambda layer: layer._apply(lambda t: t * 2 if isinstance(t, nn.Parameter) else t),
        lambda layer: layer._apply(lambda t: t * (2 if t.abs().max() > 0 else 0)),
    ],
    ids=["in place", "anew", "and converted", "past torch", "parameters", "by values"],
)
def test_changed_by_what_is_applied(layer: Any, change: Any, backend: str) -> None:
    base = base_of(layer)
    change(layer.eval())
    assert torch.equal(base_of(layer.train()), 2 * base)


def test_converted_to_another_memory_format() -> None:
    layer = randomize_(lora.Conv2d(4, 6, 3, r=2))
    base = base_of(layer)
    layer.eval().to(memory_format=torch.channels_last)
    assert layer.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(base_of(layer.train()), base)


@pytest.mark.parametrize("is_in_the_middle", [False, True])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_whose_memory_was_freed(
    layer: Any, factor: str, is_in_the_middle: bool, backend: str
) -> None:
    base = base_of(layer)
    value = getattr(layer, factor)
    flat = nn.functional.pad(value.detach().flatten(), (8, 0))
    if is_in_the_middle:
        value.data = flat[8:].view(value.shape)
    value.untyped_storage().resize_(0)
    with pytest.warns(RuntimeWarning, match=f"{factor} must hold its values"):
        layer.eval()
    assert not layer.merged
    assert torch.equal(base_of(layer), base)


def test_a_merged_weight_whose_memory_was_freed(layer: Any, backend: str) -> None:
    weight = weight_of(layer.eval())
    storage, merged = weight.untyped_storage(), weight.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError):
        layer.train()
    assert layer.merged
    storage.resize_(size)
    weight.data.copy_(merged)
    base = base_of(layer.train())
    torch.testing.assert_close(base_of(layer.eval()), merged)
    assert torch.equal(base_of(layer.train()), base)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_was_given_the_class_of_a_plain_one(layer: Any, training: bool) -> None:
    model = nn.Sequential(layer.train(training))
    model.state_dict()
    layer.__class__ = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
    state = {key: t.clone() for key, t in model.state_dict().items()}
    assert not model.load_state_dict(state).missing_keys

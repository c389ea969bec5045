"""Adapters that change, are off or come back between `eval()` and `train()`."""

import copy
from typing import Any

import pytest
import torch
from each_layer import base_of, weight_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lora_fast as lora
from lora_fast.testing import randomize_


def test_an_adapter_that_is_off_in_eval_mode_is_not_taken_out(layer: Any) -> None:
    base = base_of(layer)
    layer.r = 0
    layer.eval()
    assert layer.merged  # as in loralib
    layer.r = 2
    assert not layer.merged
    expected = layer.effective_weight().detach()
    layer.eval()
    torch.testing.assert_close(weight_of(layer), expected)
    layer.train()
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("again", [False, True])
def test_an_adapter_that_is_given_in_eval_mode_is_not_taken_out(again: bool) -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    lora_A, base, expected = layer.lora_A, base_of(layer), layer.effective_weight().detach()
    del layer.lora_A
    layer.eval()
    layer.lora_A = lora_A
    if again:
        torch.testing.assert_close(layer.eval().weight, expected)
    layer.train()
    assert torch.equal(layer.weight, base)


def test_a_state_of_a_layer_without_its_adapter_is_not_marked(layer: Any) -> None:
    base = base_of(layer)
    layer.r = 0
    state = copy.deepcopy(layer.eval().state_dict())
    layer.r = 2
    layer.train().load_state_dict(state)
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("change", ["B", "A", "data", "new", "scaling", "off"])
def test_eval_again_merges_what_the_adapter_is_now(layer: Any, change: str) -> None:
    base = base_of(layer)
    fresh = copy.deepcopy(layer)
    layer.eval()
    for changed in (layer, fresh):
        with torch.no_grad():
            if change in "AB":
                getattr(changed, f"lora_{change}").mul_(-3.0)
            elif change == "data":
                changed.lora_A.data = -3.0 * changed.lora_A
            elif change == "new":  # twice, as the second may be where the first one was
                for factor in (1.0, -3.0):
                    changed.lora_A = nn.Parameter(factor * changed.lora_A)
            elif change == "scaling":
                changed.scaling = 7.0
            else:
                changed.r = 0
    expected = fresh.eval()
    layer.eval()
    assert torch.equal(weight_of(layer), weight_of(expected))
    layer.train()
    assert torch.equal(weight_of(layer), base)


def test_eval_again_of_what_has_not_changed_does_nothing(layer: Any) -> None:
    layer.eval()
    record, version = layer._merge_state.record, weight_of(layer)._version
    layer.eval()
    assert layer._merge_state.record is record
    assert weight_of(layer)._version == version
    copied = copy.deepcopy(layer)  # whose tensors are others
    record = copied._merge_state.record
    assert copied.eval()._merge_state.record is record


def test_a_state_of_changed_factors_has_their_scaling() -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    layer.eval()
    layer.scaling = 5.0
    layer.lora_A.data.mul_(2.0)
    assert layer.state_dict()._metadata[""]["lora_scaling"] == 5.0


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * x


def test_a_state_of_a_computed_factor_that_changed_has_the_base() -> None:
    layers = [randomize_(lora.Linear(8, 12, r=2)) for _ in range(2)]
    for layer in layers:
        parametrize.register_parametrization(layer, "lora_A", Tripled())
    base = base_of(layers[0])
    layers[0].eval()
    with torch.no_grad():
        layers[0].parametrizations.lora_A.original.mul_(3.0)  # type: ignore[operator]
    layers[1].load_state_dict(copy.deepcopy(layers[0].state_dict()))
    assert torch.equal(layers[1].weight, base)


def test_merging_a_model_merges_anew_what_has_changed() -> None:
    model = nn.Sequential(randomize_(lora.Linear(8, 8, r=2)), randomize_(lora.Linear(8, 8, r=2)))
    bases = [layer.weight.detach().clone() for layer in model]
    model[0].eval()
    with torch.no_grad():
        model[0].lora_B.mul_(2.0)
    expected = model[0].scaling * model[0].lora_B @ model[0].lora_A + bases[0]
    assert lora.merge(model) == 2
    torch.testing.assert_close(model[0].weight.detach(), expected.detach())
    with pytest.raises(ValueError, match="all 2 LoRA layers of the model are merged already"):
        lora.merge(model)
    lora.unmerge(model)
    assert all(torch.equal(layer.weight, base) for layer, base in zip(model, bases, strict=True))


def test_the_base_in_another_dtype_is_no_merged_weight() -> None:
    """Also where the delta is so small that it is near both."""
    layer = lora.Linear(64, 64, r=4)
    nn.init.normal_(layer.lora_B, std=0.01)
    base = base_of(layer)
    state = layer.eval().state_dict()
    del state._metadata[""]["lora_sample"]
    layer.train()
    state["weight"] = base.half()
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.weight.detach(), base.half().float(), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_adapter_that_hooks_compute_stays_unmerged(name: str) -> None:
    """The value that they left is that of the last forward, one step old."""
    layer = randomize_(lora.Linear(8, 12, r=4))
    prune.l1_unstructured(layer, name, amount=0.5)
    optimizer = torch.optim.SGD((p for p in layer.parameters() if p.requires_grad), lr=0.1)
    x = torch.randn(4, 8)
    layer(x).square().mean().backward()
    optimizer.step()
    trained = layer(x)
    assert not layer.eval().merged
    assert torch.equal(layer(x), trained)
    other = randomize_(lora.Linear(8, 12, r=4))
    prune.identity(other, name)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other.train()(x), trained)


def test_an_adapter_that_changes_when_it_is_computed(layer: Any) -> None:
    """As spectral norm does in train mode: what only describes or saves the layer computes none."""
    torch.nn.utils.parametrizations.spectral_norm(layer, "lora_A")
    before = copy.deepcopy(layer.parametrizations.lora_A.state_dict())
    assert "r=2" in repr(layer)
    layer.state_dict()
    lora.lora_state_dict(layer)
    now = layer.parametrizations.lora_A.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items())

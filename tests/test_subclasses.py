"""Subclasses of the layers as users of loralib write them."""

import copy
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_


def set_up(layer: Any, base: nn.Linear) -> None:
    """Do what the constructor of `lora.Linear` does, but by hand."""
    lora.LoRALayer.__init__(layer, 2, 4, 0.0, True)
    layer.fan_in_fan_out = False
    layer.lora_A = nn.Parameter(torch.randn(2, base.in_features))
    layer.lora_B = nn.Parameter(torch.randn(base.out_features, 2))
    layer.scaling = 2.0
    layer.weight.requires_grad = False


def built_by_itself(base: nn.Linear, parent: type[lora.Linear] = lora.Linear) -> Any:
    """A layer whose class calls the constructors of its bases, and not that of `lora.Linear`."""

    class Wrapped(parent):  # type: ignore[misc, valid-type]
        def __init__(self, base: nn.Linear) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = base.in_features, base.out_features
            self.weight, self.bias = base.weight, base.bias
            set_up(self, base)

    return Wrapped(base)


def of_a_changed_class(base: nn.Linear) -> Any:
    """A plain layer that was made one of ours where it stands."""
    base.__class__ = lora.Linear
    set_up(base, base)
    return base


BUILT = [built_by_itself, of_a_changed_class]


@pytest.mark.parametrize("build", BUILT)
def test_a_state_of_other_factors_holds_the_base(build: Any) -> None:
    layer, other = build(nn.Linear(6, 4)), build(nn.Linear(6, 4))
    base = layer.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        layer.lora_B.mul_(3)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    torch.testing.assert_close(other.weight, base)


@pytest.mark.parametrize("build", BUILT)
def test_an_adapter_loaded_in_eval_mode_is_merged(build: Any) -> None:
    layer, other = build(nn.Linear(6, 4)), build(nn.Linear(6, 4))
    base = layer.weight.detach().clone()
    layer.eval().load_state_dict(lora.lora_state_dict(other), strict=False)
    assert layer.merged
    torch.testing.assert_close(layer.weight, base + 2 * other.lora_B @ other.lora_A)


@pytest.mark.parametrize("build", BUILT)
def test_a_live_state_follows_the_layer(build: Any) -> None:
    layer, other = build(nn.Linear(6, 4)), build(nn.Linear(6, 4))
    base, state = layer.weight.detach().clone(), layer.state_dict()
    layer.eval()
    other.load_state_dict(state)
    torch.testing.assert_close(other.weight, base)


def test_hooks_are_registered_once() -> None:
    layer = lora.Linear(6, 4, r=2)
    for _ in range(3):
        layer.load_state_dict(layer.state_dict())
    assert len(layer._load_state_dict_post_hooks) == len(layer._state_dict_hooks) == 1


def merging_by_hand(library: Any) -> Any:
    """A layer with merges of its own, which `train()` alone guards."""

    class ByHand(library.Linear):
        def _merge(self) -> None:
            self.weight.data += self.lora_B @ self.lora_A * self.scaling
            self.merged = True

        def _unmerge(self) -> None:
            self.weight.data -= self.lora_B @ self.lora_A * self.scaling
            self.merged = False

        def train(self, mode: bool = True) -> Any:
            nn.Linear.train(self, mode)
            if self.merge_weights and mode == self.merged:
                self._unmerge() if mode else self._merge()
            return self

    return ByHand


@pytest.mark.parametrize("library", [loralib, lora])
def test_merges_of_its_own_are_called_by_itself_alone(library: Any) -> None:
    cls = merging_by_hand(library)
    assert cls(6, 4, r=2, merge_weights=False).merge_weights is False
    layer = randomize_(cls(6, 4, r=2))
    base = layer.weight.detach().clone()
    layer.eval()
    assert layer.merged
    layer.train()
    torch.testing.assert_close(layer.weight, base)
    before = layer.weight.detach().clone()
    layer.merge_weights = False
    assert torch.equal(layer.weight, before)


def with_its_own_train(library: Any) -> Any:
    """A layer that merges as loralib does, in a `train()` of its own."""

    class Own(library.Linear):
        def train(self, mode: bool = True) -> Any:
            nn.Linear.train(self, mode)
            if self.merge_weights and mode == self.merged:
                sign = -1 if mode else 1
                self.weight.data += sign * self.lora_B @ self.lora_A * self.scaling
                self.merged = not mode
            return self

    return Own


def test_merge_refuses_a_delta_that_it_may_not_know() -> None:
    class Scaled(with_its_own_train(lora)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight + 2.0 * self.lora_B @ self.lora_A)

    model = nn.Sequential(Scaled(6, 4, r=2))
    with pytest.raises(RuntimeError, match=r"0: its class has a train\(\) and a forward\(\)"):
        lora.merge(model)
    assert not model[0].merged
    assert lora.merge(nn.Sequential(with_its_own_train(lora)(6, 4, r=2))) == 1


def test_loading_keeps_the_mode() -> None:
    model = nn.Sequential(built_by_itself(nn.Linear(6, 4), with_its_own_train(lora)))
    adapter = {name: value.clone() for name, value in lora.lora_state_dict(model).items()}
    model.eval()
    model.load_state_dict(adapter, strict=False)
    assert not model[0].training


def transposed(library: Any) -> Any:
    """A convolution with the kernels of a transposed one, as compression models use it."""

    class Transposed(library.ConvLoRA):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(nn.ConvTranspose2d, *args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight
            if not self.merged:
                delta = (self.lora_B @ self.lora_A).view(weight.shape)
                weight = weight + delta * self.scaling
            return F.conv_transpose2d(x, weight, self.conv.bias, self.conv.stride)

    return Transposed


def test_a_transposed_convolution_with_a_forward_of_its_own() -> None:
    ours, theirs = transposed(lora)(4, 6, 3, r=2), transposed(loralib)(4, 6, 3, r=2)
    theirs.load_state_dict(randomize_(ours).state_dict())
    x, base = torch.randn(2, 4, 5, 5), ours.conv.weight.detach().clone()
    torch.testing.assert_close(ours(x), theirs(x))
    ours.eval()
    theirs.train(False)
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(ours.train().conv.weight, base)
    with pytest.raises(TypeError, match="conv_module must be"):
        lora.ConvLoRA(nn.ConvTranspose2d, 4, 6, 3, r=2)


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), None)


class Same(nn.Conv2d):
    """A convolution that pads by what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


@pytest.mark.parametrize("conv", [Standardized, Same])
def test_a_convolution_with_a_forward_of_its_own(conv: type[nn.Conv2d]) -> None:
    layer = randomize_(lora.ConvLoRA(conv, 3, 4, 3, r=2))
    x, plain = torch.randn(2, 3, 6, 6), conv(3, 4, 3)
    plain.load_state_dict({"weight": layer.effective_weight().detach(), "bias": layer.bias})
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.lora_A.grad.norm() > 0 and layer.lora_B.grad.norm() > 0
    torch.testing.assert_close(layer.eval()(x), plain(x))

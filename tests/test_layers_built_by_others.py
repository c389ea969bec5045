"""Layers that another constructor than ours has built: loralib's pickles, and subclasses."""

import copy
import io
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

ENABLED = [True, False, True]


class Computed(lora.Linear):
    """A layer whose B is the product of two parameters."""

    def __init__(self) -> None:
        super().__init__(6, 4, r=2)
        del self.lora_B
        self.left, self.right = (nn.Parameter(torch.randn(4, 2)) for _ in range(2))

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        return self.left * self.right


def shared() -> lora.Linear:
    """A layer whose A is frozen, and kept by no state, as it is that of all layers."""
    layer = randomize_(lora.Linear(6, 4, r=2))
    del layer.lora_A
    common = torch.randn(2, 6, generator=torch.Generator().manual_seed(9))
    layer.register_buffer("lora_A", common, persistent=False)
    return layer


@pytest.mark.parametrize("make", [Computed, shared])
@pytest.mark.parametrize("training", [True, False])
def test_a_merged_state_without_a_factor(make: Any, training: bool, backend: str) -> None:
    layer, x = make(), torch.randn(3, 6)
    base, expected = layer.weight.detach().clone(), layer(x)
    state = copy.deepcopy(layer.eval().state_dict())
    other = make().train(training)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(other.train().weight.detach(), base)
    torch.testing.assert_close(other(x), expected)


def test_a_merged_state_whose_factors_somebody_left_out() -> None:
    layer, other = (randomize_(lora.Linear(6, 4, r=2)) for _ in range(2))
    state = copy.deepcopy(layer.eval().state_dict())
    del state["lora_A"], state["lora_B"]
    with pytest.warns(UserWarning, match="without the lora_A and lora_B"):
        other.load_state_dict(state, strict=False)
    assert torch.equal(other.weight, layer.weight)


def pickled_by_loralib() -> Any:
    layer: Any = loralib.MergedLinear(6, 9, r=2, enable_lora=ENABLED)
    layer.lora_dropout = nn.Identity()  # as pickle takes no lambda
    file = io.BytesIO()
    torch.save(layer, file)
    read = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    read.__class__ = lora.MergedLinear  # what importing this package in loralib's place does
    read.__setstate__(read.__dict__)
    return read


def built_as_in_loralib() -> Any:
    class Built(lora.MergedLinear):
        def __init__(self) -> None:
            nn.Linear.__init__(self, 6, 9)
            lora.LoRALayer.__init__(self, 2, 4, 0.0, True)
            self.enable_lora, self.fan_in_fan_out, self.scaling = ENABLED, False, 2.0
            self.lora_A = nn.Parameter(torch.zeros(4, 6))
            self.lora_B = nn.Parameter(torch.zeros(6, 2))
            self.weight.requires_grad = False
            self.lora_ind = torch.zeros(9, dtype=torch.bool).view(3, -1)
            self.lora_ind[self.enable_lora, :] = True
            self.lora_ind = self.lora_ind.view(-1)

    return Built()


@pytest.mark.parametrize("make", [pickled_by_loralib, built_as_in_loralib])
def test_a_merged_linear_of_another_constructor(make: Any, backend: str) -> None:
    layer, x = randomize_(make()), torch.randn(3, 6)
    theirs = loralib.MergedLinear(6, 9, r=2, enable_lora=ENABLED)
    theirs.load_state_dict(layer.state_dict())
    theirs.scaling = layer.scaling
    base = layer.weight.detach().clone()
    assert torch.equal(layer.lora_ind, theirs.lora_ind)
    torch.testing.assert_close(layer(x), theirs(x))
    torch.testing.assert_close(copy.deepcopy(layer).eval()(x), theirs(x))
    assert torch.equal(layer.eval().train().weight, base)
    with pytest.raises(ValueError, match="lora_ind follows from"):
        layer.lora_ind = ~theirs.lora_ind


def test_a_forward_put_into_conv_lora_serves_its_subclasses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora.ConvLoRA, "forward", lambda self, x: x + 1)
    for layer in (lora.Conv1d(2, 3, 1, r=1), lora.Conv2d(2, 3, 1, r=1)):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))


def test_a_flag_of_a_subclass_named_as_a_parameter_of_the_convolution() -> None:
    layer = lora.Conv2d(2, 3, 1, r=1, bias=False)
    layer.bias = False  # type: ignore[assignment]
    assert layer.bias is False and layer.conv.bias is None
    layer.weight = nn.Parameter(torch.ones(3, 2, 1, 1))
    assert layer.conv.weight is layer.weight

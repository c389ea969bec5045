"""What a user may set on a layer by hand, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lora_fast as lora
from lora_fast.testing import randomize_

LAYERS = {
    "Linear": ((4, 6), {"r": 2}),
    "MergedLinear": ((4, 6), {"r": 2, "enable_lora": [True, False]}),
    "Embedding": ((5, 4), {"r": 2}),
    "Conv2d": ((3, 4, 3), {"r": 2}),
}
INPUTS = {
    "Linear": torch.randn(3, 4),
    "MergedLinear": torch.randn(3, 4),
    "Embedding": torch.tensor([1, 2]),
    "Conv2d": torch.randn(1, 3, 5, 5),
}


def pair(cls: str, **more: Any) -> tuple[Any, Any]:
    args, kwargs = LAYERS[cls]
    ours, theirs = (getattr(lib, cls)(*args, **kwargs, **more) for lib in (lora, loralib))
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(ours, name).copy_(torch.randn_like(getattr(ours, name)))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear", "Embedding"])
def test_a_scaling_that_is_trained(cls: str) -> None:
    ours, theirs = pair(cls)
    gradients = []
    for layer in (ours, theirs):
        layer.scaling = nn.Parameter(torch.tensor(2.0))
        y = layer(INPUTS[cls])
        gradients.append(torch.autograd.grad(y.square().sum(), layer.scaling))
    torch.testing.assert_close(*gradients)
    y = ours(INPUTS[cls])
    torch.testing.assert_close(ours.eval()(INPUTS[cls]), y)
    with lora.use_backend("triton"), pytest.raises(RuntimeError, match="scaling is a tensor"):
        ours.train()(INPUTS[cls])


def test_a_trained_scaling_is_saved_and_loaded(tmp_path: Path) -> None:
    """The state brings it along, so that it is no other layer's."""
    one, two = pair("Linear")[0], pair("Linear")[0]
    one.scaling, two.scaling = (nn.Parameter(torch.tensor(value)) for value in (1.3, 0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.load_state_dict(one.eval().state_dict())
        assert two.scaling == one.scaling
        torch.testing.assert_close(two(INPUTS["Linear"]), one(INPUTS["Linear"]))
        two.scaling.data.fill_(0.1)
        lora.save(one, tmp_path / "a.safetensors")
        lora.load(two, tmp_path / "a.safetensors")


def test_a_scaling_for_each_feature() -> None:
    ours, theirs = pair("Linear")
    ours.scaling = theirs.scaling = torch.rand(6)
    torch.testing.assert_close(ours(INPUTS["Linear"]), theirs(INPUTS["Linear"]))


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear", "Conv2d"])
def test_complex_numbers(cls: str) -> None:
    ours, theirs = pair(cls, dtype=torch.complex128)
    x = INPUTS[cls].to(torch.complex128) * (1 + 2j)
    x.requires_grad_()
    gradients = [
        torch.autograd.grad(m(x).abs().sum(), [m.lora_A, m.lora_B, x]) for m in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)
    y = ours(x)
    torch.testing.assert_close(ours.eval()(x), y)


def test_the_mask_may_be_moved_but_not_changed() -> None:
    layer = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True])
    layer.lora_ind = layer.lora_ind.cpu()
    with pytest.raises(ValueError, match="lora_ind"):
        layer.lora_ind = ~layer.lora_ind
    with pytest.raises(ValueError, match="zero_pad: x must have 4 rows"):
        layer.zero_pad(torch.ones(5, 2))


@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_forward_hook"], ids=str
)
def test_hooks_on_the_dropout_are_called(register: str) -> None:
    layer = lora.Linear(4, 6, r=2, lora_dropout=0.5)
    calls: list[int] = []
    getattr(layer.lora_dropout, register)(lambda *args: calls.append(1))
    layer(torch.randn(2, 4))
    assert calls == [1]


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
def test_another_dropout_module(cls: str) -> None:
    """It is called, and what it gives goes to the adapter alone."""
    ours, theirs = pair(cls)
    x = INPUTS[cls].clone()
    x[0, 0] = torch.inf
    expected = ours(x)
    for layer in (ours, theirs):
        layer.lora_dropout = nn.Identity()
    assert torch.equal(ours(x).isnan(), expected.isnan())
    torch.testing.assert_close(ours(INPUTS[cls]), theirs(INPUTS[cls]))
    ours.lora_dropout = nn.Threshold(torch.inf, 0.0)
    torch.testing.assert_close(ours(INPUTS[cls]), ours._frozen_output(INPUTS[cls]))


@pytest.mark.parametrize("alpha", [None, "16"])
def test_lora_alpha_is_a_number(alpha: Any) -> None:
    with pytest.raises(TypeError, match="lora_alpha must be a number"):
        lora.Linear(4, 6, r=2, lora_alpha=alpha)
    assert lora.Linear(4, 6, lora_alpha=alpha).r == 0  # nothing reads it


@pytest.mark.parametrize("splits", [5, [2.0, 4.0]])
def test_out_splits_are_integers(splits: Any) -> None:
    with pytest.raises(TypeError, match="out_splits must be None or a list of integers"):
        lora.MergedLinear(4, 6, r=1, enable_lora=[True, False], out_splits=splits)


def test_helpers_see_adapters_of_other_names_and_parametrized_ones() -> None:
    class Own(nn.Linear, lora.LoRALayer):
        def __init__(self) -> None:
            nn.Linear.__init__(self, 2, 2)
            lora.LoRALayer.__init__(self, 1, 1, 0.0, True)
            self.lora_down = nn.Parameter(torch.zeros(1, 2))

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = nn.Sequential(Own(), randomize_(lora.Linear(2, 2, r=1)), nn.Linear(2, 2))
    parametrize.register_parametrization(model[1], "lora_A", Doubled())
    lora.mark_only_lora_as_trainable(model, "lora_only")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *("0.lora_down", "0.bias", "1.lora_B", "1.bias"),
        "1.parametrizations.lora_A.original",
    }
    assert set(lora.lora_state_dict(model, "lora_only")) == trained


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_an_embedding_has_its_tables_dtype_under_autocast(
    dtype: torch.dtype, autocast: torch.dtype
) -> None:
    layer = randomize_(lora.Embedding(5, 4, r=2, dtype=dtype))
    with torch.autocast("cpu", autocast):
        assert layer(torch.tensor([1])).dtype is dtype


@pytest.mark.parametrize("name", ["Dict", "F", "List", "Optional", "math", "nn", "torch"])
def test_names_that_come_along_with_loralibs(name: str) -> None:
    assert getattr(lora, name) is getattr(loralib, name)
    assert name in lora.__all__

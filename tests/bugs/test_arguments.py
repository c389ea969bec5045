"""Arguments and attributes that mean what they mean in loralib, and messages where they are bad."""

import importlib.resources
import inspect
from decimal import Decimal
from fractions import Fraction
from typing import Any

import loralib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora

CLASSES = ["Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ConvLoRA"]


def own_arguments(cls: type) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_b35_positional_arguments_come_in_loralibs_order(name: str) -> None:
    theirs = own_arguments(getattr(loralib, name))
    assert own_arguments(getattr(lora, name))[: len(theirs)] == theirs


@pytest.mark.parametrize("lib", [lora, loralib], ids=["lora_fast", "loralib"])
def test_b35_positional_arguments_of_torch_mean_something_else(lib: Any) -> None:
    conv = lib.Conv2d(3, 8, 3, 1, 1)
    assert (conv.r, conv.lora_alpha, conv.conv.stride, conv.conv.padding) == (1, 1, (1, 1), (0, 0))
    linear = lib.Linear(4, 8, False)
    assert (linear.r, linear.bias is None) == (False, False)
    embedding = lib.Embedding(10, 4, 0)
    assert (embedding.r, embedding.padding_idx) == (0, None)
    merged = lib.MergedLinear(4, 6, 2, 8, 0.0, [True, False], False, False)
    assert (merged.scaling, merged.fan_in_fan_out, merged.merge_weights) == (4.0, False, False)


def layer_of(name: str, lib: Any = lora, **kwargs: Any) -> Any:
    """A layer of the named class; convolutions of kernel size 1, which loralib can do."""
    if name == "ConvLoRA":
        return lib.ConvLoRA(nn.Conv2d, 4, 6, 1, **kwargs)
    if name == "MergedLinear" and "enable_lora" not in kwargs:
        kwargs["enable_lora"] = [True, False]
    return getattr(lib, name)(4, 6, *([1] if name.startswith("Conv") else []), **kwargs)


def input_of(name: str) -> Tensor:
    if name == "Embedding":
        return torch.tensor([[0, 1], [3, 2]])
    if name == "ConvLoRA":
        return torch.randn(2, 4, 3, 3)
    spatial = [3] * int(name[4]) if name.startswith("Conv") else []
    return torch.randn(2, 4, *spatial)


@pytest.mark.parametrize("lib", [lora, loralib], ids=["lora_fast", "loralib"])
@pytest.mark.parametrize("r", [0, -1, -100, False])
@pytest.mark.parametrize("name", CLASSES)
def test_b42_no_rank_or_a_negative_one_means_no_adapter(name: str, r: int, lib: Any) -> None:
    layer = layer_of(name, lib, r=r)
    assert layer.r == r
    assert not hasattr(layer, "lora_A")
    assert not any("lora_" in key for key in layer.state_dict())
    assert all(p.requires_grad for p in layer.parameters())
    weight = getattr(layer, "conv", layer).weight
    before, x = weight.detach().clone(), input_of(name)
    expected = layer(x)
    layer.eval()
    assert layer.merged  # the flag follows the mode, as in loralib
    assert torch.equal(layer(x), expected)
    assert torch.equal(weight, before)
    layer.train()
    assert not layer.merged


@pytest.mark.parametrize("r", [True, 2.0, "2", None], ids=repr)
@pytest.mark.parametrize("name", CLASSES)
def test_b42_a_rank_that_is_no_integer_is_refused_by_name(name: str, r: Any) -> None:
    with pytest.raises(TypeError, match=f"r must be an integer, got {r!r}"):
        layer_of(name, r=r)


@pytest.mark.parametrize("r", [np.int64(2), torch.tensor(2)], ids=["numpy", "tensor"])
def test_b42_other_integers_are_ranks(r: Any) -> None:
    layer = lora.Linear(4, 6, r=r, lora_alpha=3)
    assert type(layer.r) is int
    assert layer.lora_A.shape == (2, 4)
    assert layer.scaling == 1.5


@pytest.mark.parametrize(
    "r", [torch.tensor(2.0), np.array([2]), np.float64(2), torch.ones(2).int()], ids=repr
)
@pytest.mark.parametrize("name", CLASSES)
def test_b42_arrays_and_fractions_are_no_ranks(name: str, r: Any) -> None:
    with pytest.raises(TypeError, match="r must be an integer, got"):
        layer_of(name, r=r)


WRONG: dict[str, dict[str, Any]] = {
    "r": {"r": 2.0},
    "lora_alpha": {"r": 2, "lora_alpha": "16"},
    "lora_dropout": {"r": 2, "lora_dropout": 1.5},
}


@pytest.mark.parametrize("argument", WRONG)
@pytest.mark.parametrize("name", CLASSES)
def test_b42_nothing_is_drawn_before_a_refusal(name: str, argument: str) -> None:
    if name == "Embedding" and argument == "lora_dropout":
        pytest.skip("it has no dropout")
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=argument):
        layer_of(name, **WRONG[argument])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-1.0, -1e-9, 1.5, float("nan")])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "Embedding"])
def test_b42_a_dropout_rate_outside_its_range_is_refused(name: str, p: float) -> None:
    with pytest.raises(ValueError, match=f"lora_dropout must be between 0 and 1, got {p}"):
        layer_of(name, r=2, lora_dropout=p)


def test_b42_loralib_takes_a_negative_dropout_for_none() -> None:
    layer = loralib.Linear(4, 8, r=2, lora_dropout=-1.0)
    assert not isinstance(layer.lora_dropout, nn.Dropout)


@pytest.mark.parametrize("lib", [lora, loralib], ids=["lora_fast", "loralib"])
@pytest.mark.parametrize("name", CLASSES)
def test_b43_scaling_is_there_with_an_adapter_only_and_is_set_once(name: str, lib: Any) -> None:
    with pytest.raises(AttributeError, match="scaling"):
        layer_of(name, lib).scaling  # noqa: B018
    layer = layer_of(name, lib, r=2, lora_alpha=3)
    assert layer.scaling == 1.5
    layer.r, layer.lora_alpha = 4, 100
    assert layer.scaling == 1.5


NUMBERS = [np.float64(3), np.float32(3.1), np.float16(3.1), np.int64(3), np.array(3.0), True]


@pytest.mark.parametrize("alpha", [3, 3.3, -0.1, *NUMBERS], ids=repr)
@pytest.mark.parametrize("name", CLASSES)
def test_b43_scaling_is_a_plain_float_with_loralibs_value(name: str, alpha: Any) -> None:
    layer = layer_of(name, r=3, lora_alpha=alpha)
    assert type(layer.scaling) is float
    assert layer.lora_alpha is alpha
    assert layer.scaling == layer_of(name, loralib, r=3, lora_alpha=alpha).scaling


@pytest.mark.parametrize("alpha", [Fraction(3), Decimal(3)], ids=repr)
@pytest.mark.parametrize("name", CLASSES)
def test_b43_fractions_scale_too(name: str, alpha: Any) -> None:
    layer, x = layer_of(name, r=2, lora_alpha=alpha), input_of(name)
    assert type(layer.scaling) is float
    assert layer.scaling == 1.5
    layer(x).sum().backward()


@pytest.mark.parametrize("name", CLASSES)
def test_b43_an_alpha_that_is_trained_stays_so(name: str) -> None:
    alpha = nn.Parameter(torch.tensor(3.0))
    scaling = layer_of(name, r=2, lora_alpha=alpha).scaling
    assert scaling.requires_grad
    assert scaling.item() == 1.5


@pytest.mark.parametrize("alpha", [np.float64(16), np.float32(16), np.int64(16)], ids=repr)
@pytest.mark.parametrize("name", CLASSES)
def test_b43_a_number_of_numpy_is_as_good_for_compilers(name: str, alpha: Any) -> None:
    layer, x = layer_of(name, r=2, lora_alpha=alpha), input_of(name)
    torch._dynamo.reset()
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    torch.jit.script(layer)(x)


def test_b43_no_enabled_block_no_scaling() -> None:
    for lib in (lora, loralib):
        assert not hasattr(lib.MergedLinear(4, 6, r=2, enable_lora=[False]), "scaling")


def test_b50_repr_tells_rank_alpha_and_whether_merged(case: Any) -> None:
    layer = case.build()
    text = repr(layer)
    assert f"r={layer.r}, lora_alpha={layer.lora_alpha}, merged=False" in text
    assert "merged=True" in repr(layer.eval())
    assert (f"enable_lora={[True, False, True]}" in text) is case.name.startswith("merged")
    assert ("out_splits=[6, 2, 4]" in text) is (case.name == "merged_ragged")


@pytest.mark.parametrize("name", ["Linear", "Embedding"])
def test_b50_repr_without_an_adapter_is_torchs(name: str) -> None:
    plain = {"Linear": nn.Linear, "Embedding": nn.Embedding}[name](4, 6)
    assert repr(layer_of(name)) == repr(plain)


def test_b50_repr_of_loralib_tells_nothing() -> None:
    assert repr(loralib.Linear(4, 6, r=2)) == repr(nn.Linear(4, 6))
    assert not hasattr(loralib, "__version__")


def test_b50_version_and_type_marker() -> None:
    assert lora.__version__.count(".") == 2
    files = importlib.resources.files("lora_fast")
    assert files.joinpath("py.typed").is_file()
    assert not files.joinpath("test.py").is_file()


@pytest.mark.parametrize("lib", [lora, loralib], ids=["lora_fast", "loralib"])
@pytest.mark.parametrize("name", CLASSES)
def test_b53_the_input_is_called_x(name: str, lib: Any) -> None:
    layer, x = layer_of(name, lib, r=2), input_of(name)
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(layer(x=x), layer(x))
    with pytest.raises(TypeError, match="input"):
        layer(input=x)

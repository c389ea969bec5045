"""When `eval()` merges, when `train()` takes the adapter out again, and what stays in place."""

import copy
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import lora_fast
from lora_fast.testing import randomize_

LIBRARIES = [lora_fast, loralib]
QKV = {"enable_lora": [True, False, True]}
LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Linear": ((4, 6), {}),
    "MergedLinear": ((4, 6), QKV),
    "Embedding": ((4, 6), {}),
    "Conv2d": ((4, 6, 3), {}),
    "Conv1d": ((4, 6, 1), {}),
    "Conv3d": ((4, 6, 1), {}),
}
INPUTS = {"Conv2d": (2, 4, 5, 5), "Conv1d": (2, 4, 5), "Conv3d": (2, 4, 3, 3, 3)}

both_libraries = pytest.mark.parametrize("library", LIBRARIES, ids=["lora_fast", "loralib"])
every_layer = pytest.mark.parametrize("cls", LAYERS)


def build(library: ModuleType, cls: str, **kwargs: Any) -> Any:
    """The layer in float64 with random A and B."""
    torch.manual_seed(0)
    args, own = LAYERS[cls]
    options = {"r": 2, "lora_alpha": 3, "dtype": torch.float64, **own, **kwargs}
    return randomize_(getattr(library, cls)(*args, **options))


def make_input(cls: str) -> Tensor:
    torch.manual_seed(1)
    if cls == "Embedding":
        return torch.tensor([[0, 3], [2, 2]])
    return torch.randn(INPUTS.get(cls, (3, 4)), dtype=torch.float64)


def weight_of(layer: Any) -> nn.Parameter:
    return layer.conv.weight if hasattr(layer, "conv") else layer.weight


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@both_libraries
@every_layer
def test_eval_merges_and_train_takes_out(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls), make_input(cls)
    base, y = weight_of(layer).clone(), layer(x)
    assert not layer.merged
    layer.eval()
    assert layer.merged
    assert not torch.allclose(weight_of(layer), base)
    assert_close(layer(x), y)
    layer.train()
    assert not layer.merged
    assert_close(weight_of(layer), base)
    assert_close(layer(x), y)


@both_libraries
@every_layer
def test_repeated_calls_change_nothing_more(library: ModuleType, cls: str) -> None:
    layer = build(library, cls)
    layer.eval()
    merged = weight_of(layer).clone()
    layer.eval()
    assert torch.equal(weight_of(layer), merged)
    layer.train()
    base = weight_of(layer).clone()
    layer.train()
    assert torch.equal(weight_of(layer), base)


@both_libraries
@every_layer
@pytest.mark.parametrize("r", [0, -1])
def test_without_an_adapter_only_the_flag_flips(library: ModuleType, cls: str, r: int) -> None:
    layer = build(library, cls, r=r)
    base = weight_of(layer).clone()
    flags = []
    for mode in (False, True, False):
        layer.train(mode)
        flags.append(layer.merged)
    assert flags == [True, False, True]
    assert torch.equal(weight_of(layer), base)


@both_libraries
@every_layer
def test_merge_weights_false_never_merges(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls, merge_weights=False), make_input(cls)
    base, y = weight_of(layer).clone(), layer(x)
    layer.eval()
    assert not layer.training
    assert not layer.merged
    assert torch.equal(weight_of(layer), base)
    assert_close(layer(x), y)
    assert layer.lora_A.requires_grad
    assert layer(x).requires_grad


@both_libraries
@every_layer
def test_a_layer_registered_twice_is_merged_once(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls), make_input(cls)
    y = layer(x)
    model = nn.ModuleList([layer, nn.Sequential(layer)])
    model.eval()
    assert_close(layer(x), y)
    model.train()
    assert_close(layer(x), y)


@both_libraries
@every_layer
def test_a_copy_keeps_the_merge(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls), make_input(cls)
    y, base = layer(x), weight_of(layer).clone()
    layer.eval()
    twin = copy.deepcopy(layer)
    assert twin.merged
    assert torch.equal(weight_of(twin), weight_of(layer))
    twin.train()
    assert not twin.merged
    assert layer.merged
    assert_close(weight_of(twin), base)
    assert_close(twin(x), y)


@both_libraries
@every_layer
def test_eval_in_inference_mode_then_train(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls), make_input(cls)
    y = layer(x)
    with torch.inference_mode():
        layer.eval()
        assert_close(layer(x), y)
    layer.train()
    again = layer(x)
    assert_close(again, y)
    again.sum().backward()
    assert layer.lora_A.grad is not None


@both_libraries
@every_layer
def test_the_weight_stays_where_it_is(library: ModuleType, cls: str) -> None:
    layer = build(library, cls)
    parameter = weight_of(layer)
    address, strides = parameter.data_ptr(), parameter.stride()
    for mode in (False, True, False):
        layer.train(mode)
        assert weight_of(layer) is parameter
        assert (parameter.data_ptr(), parameter.stride()) == (address, strides)


@both_libraries
@every_layer
def test_a_merged_forward_reads_the_weight_only(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls), make_input(cls)
    layer.eval()
    y = layer(x)
    with torch.no_grad():
        layer.lora_A.fill_(float("nan"))
        layer.lora_B.fill_(float("nan"))
    assert torch.equal(layer(x), y)


@every_layer
def test_merged_layers_pass_the_same_gradients_to_the_input(cls: str) -> None:
    gradients = []
    for library in LIBRARIES:
        layer, x = build(library, cls), make_input(cls)
        layer.eval()
        if cls == "Embedding":
            weight_of(layer).requires_grad = True
            layer(x).sum().backward()
            gradients.append(weight_of(layer).grad)
        else:
            layer(x.requires_grad_()).square().sum().backward()
            gradients.append(x.grad)
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad is None
    assert_close(*gradients)


@both_libraries
@every_layer
@pytest.mark.parametrize("mode", [None, 1, "eval"], ids=str)
def test_the_mode_must_be_a_bool(library: ModuleType, cls: str, mode: object) -> None:
    layer = build(library, cls)
    with pytest.raises(ValueError, match="expected to be boolean"):
        layer.train(mode)
    assert not layer.merged


@both_libraries
def test_a_models_mode_reaches_every_layer(library: ModuleType) -> None:
    model = nn.ModuleDict({cls: nn.Sequential(build(library, cls)) for cls in LAYERS})
    assert model.eval() is model
    assert all(m.merged for m in model.modules() if isinstance(m, library.LoRALayer))
    assert model.train() is model
    assert not any(m.merged for m in model.modules() if isinstance(m, library.LoRALayer))


@both_libraries
@every_layer
def test_adapters_changed_between_cycles_are_merged_anew(library: ModuleType, cls: str) -> None:
    layer, x = build(library, cls), make_input(cls)
    for _ in range(3):
        layer.train()
        randomize_(layer)
        y = layer(x)
        layer.eval()
        assert_close(layer(x), y)


@pytest.mark.parametrize("training", [True, False])
def test_drawn_states_load_strictly_both_ways(drawn: Any, training: bool) -> None:
    ours, theirs = drawn.pair()
    x = drawn.input()
    x = x.double() if x.is_floating_point() else x
    for giver, taker in ((ours, drawn.build(loralib)), (theirs, drawn.build(lora_fast))):
        state = giver.state_dict()
        taker.load_state_dict(state, strict=True)
        for name, value in state.items():
            assert torch.equal(taker.state_dict()[name], value), name
        outputs = []
        for layer in (copy.deepcopy(giver).double(), taker.double()):
            layer.train(training)
            torch.manual_seed(0)
            outputs.append(layer(x))
        assert_close(*outputs)


def test_drawn_layers_convert_as_in_loralib(drawn: Any) -> None:
    ours, theirs = drawn.pair()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        ours.to(dtype)
        theirs.to(dtype)
        for (name, mine), (_, its) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert mine.stride() == its.stride(), name
            assert torch.equal(mine, its), name

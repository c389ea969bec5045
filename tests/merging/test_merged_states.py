"""States and weights of a merged layer that change, are refused, or are of another kind."""

import copy
import io
from typing import Any

import pytest
import torch
from each_layer import LAYERS, base_of, weight_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_fast as lora
from lora_fast.testing import randomize_


@pytest.mark.parametrize("std", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dict_taken_when_the_delta_showed_nowhere(dtype: torch.dtype, std: float) -> None:
    layer = lora.Linear(64, 64, r=2).to(dtype)
    nn.init.normal_(layer.lora_B, std=std if dtype is torch.bfloat16 else 0.0)
    state = layer.eval().state_dict()  # of views
    layer.train()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64).to(dtype)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = lora.Linear(64, 64, r=2).to(dtype)
    fresh.load_state_dict(torch.load(file))
    torch.testing.assert_close(fresh(x), layer(x))


def test_a_dict_taken_in_train_mode_and_used_in_eval_mode(layer: Any) -> None:
    base, fresh = base_of(layer), copy.deepcopy(layer)
    state = layer.state_dict()
    layer.eval()
    fresh.reset_parameters()
    fresh.load_state_dict(state)
    torch.testing.assert_close(weight_of(fresh).detach(), base)


@pytest.mark.parametrize("std", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_base_put_back_while_merged(layer: Any, std: float, zeros: bool) -> None:
    """As averages of weights do around a validation."""
    nn.init.normal_(layer.lora_B, std=std)
    if zeros:
        nn.init.zeros_(weight_of(layer))
    base = base_of(layer)
    layer.eval()
    with torch.no_grad():
        weight_of(layer).copy_(base)
    assert torch.equal(weight_of(layer.train()), base)


def test_a_marked_state_whose_weight_is_here(layer: Any) -> None:
    """Saved merged, folded for good, and taken back."""
    base = base_of(layer)
    state = copy.deepcopy(layer.eval().state_dict())
    layer.merged = False
    layer.train().load_state_dict(state)
    torch.testing.assert_close(weight_of(layer).detach(), base)


def test_a_scaling_that_changed_while_merged_is_what_is_saved(layer: Any) -> None:
    base = base_of(layer)
    layer.eval()
    layer.scaling = 7.0
    state = layer.state_dict()
    assert state._metadata[""]["lora_scaling"] == 7.0
    assert torch.equal(state[layer._weight_key()], base)


def test_a_refused_load_leaves_a_merged_layer_as_it_is(layer: Any) -> None:
    base = base_of(layer)
    layer.eval()
    for changed in (False, True):
        if changed:
            layer.lora_A.data.mul_(2.0)
        merged, state = base_of(layer), dict(layer.state_dict())
        state["lora_B"] = torch.zeros(99, 2)
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict(state)
        assert torch.equal(weight_of(layer), merged)
        layer.load_state_dict(layer.state_dict())
        torch.testing.assert_close(weight_of(layer.train()).detach(), base)
        layer.eval()


@pytest.mark.parametrize("merge", [lambda layer: layer.eval(), lora.merge], ids=["eval", "merge"])
def test_blocks_that_change_while_merged(merge: Any, backend: str) -> None:
    layer = randomize_(LAYERS["merged_linear"]())
    base = base_of(layer)
    merge(layer)
    layer.enable_lora[:] = [True, True, False]
    layer.eval()
    expected = base + layer.merge_AB().detach() * layer.scaling
    torch.testing.assert_close(weight_of(layer).detach(), expected)
    assert torch.equal(weight_of(layer.train()), base)


def test_hooks_before_loading_see_the_state_first(backend: str) -> None:
    saved = randomize_(lora.Linear(8, 12, r=2))
    base = base_of(saved)
    state = copy.deepcopy(saved.eval().state_dict())
    state["stored"] = state.pop("weight").t()
    called = []

    def rename(state_dict: Any, prefix: str, *rest: Any) -> None:
        called.append(prefix)
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "stored").t()

    layer = lora.Linear(8, 12, r=2)
    handle = layer.register_load_state_dict_pre_hook(lambda module, *arguments: rename(*arguments))
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.weight.detach(), base)
    assert called == [""]
    handle.remove()
    with pytest.raises(RuntimeError, match="stored"):
        layer.load_state_dict(state)


def test_a_dict_of_parameters_is_not_written_to(backend: str) -> None:
    source = randomize_(lora.Linear(8, 12, r=2))
    state = dict(source.named_parameters())
    base = base_of(source)
    layer = lora.Linear(8, 12, r=2)
    layer.load_state_dict(state, assign=True)
    layer.eval()
    assert torch.equal(state["weight"], base)


def test_a_merge_that_fails_leaves_merged_what_had_changed(backend: str) -> None:
    model = nn.Sequential(*(randomize_(lora.Linear(4, 4, r=2)) for _ in range(2)))
    base = base_of(model[0])
    lora.merge(model[0])
    merged = base_of(model[0])
    with torch.no_grad():
        model[0].lora_A.mul_(2.0)
    model[1].weight.data.fill_(torch.finfo(torch.float32).max)
    model[1].lora_A.data.fill_(1e30)
    model[1].lora_B.data.fill_(1e30)
    with pytest.raises(RuntimeError, match="nothing was merged"):
        lora.merge(model)
    assert torch.equal(model[0].weight, merged)
    lora.unmerge(model[0])
    assert torch.equal(model[0].weight, base)


def test_a_diverged_checkpoint_is_loaded(backend: str) -> None:
    layer = randomize_(lora.Linear(4, 4, r=2))
    layer.lora_B.data.fill_(torch.inf)
    state = {"weight": torch.randn(4, 4), "bias": torch.zeros(4)}
    state |= {"lora_A": layer.lora_A.detach().clone(), "lora_B": layer.lora_B.detach().clone()}
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])


def test_a_state_that_was_saved_merged_loads_under_fake_tensors(layer: Any) -> None:
    """As what plans a model's memory loads it."""
    fresh = copy.deepcopy(layer)
    state = layer.eval().state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = type(state)((key, mode.from_tensor(value)) for key, value in state.items())
        faked._metadata = state._metadata
        fresh.load_state_dict(faked)
    assert not fresh.merged


def _first(y: Any) -> Tensor:
    found: Tensor = getattr(y, "a", y)
    return found


def test_a_layer_that_is_quantized_after_its_merge_stays_merged(backend: str) -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    layer, x = randomize_(lora.Linear(8, 12, r=2)), torch.randn(3, 8)
    expected = layer(x)
    layer.eval()
    halves = (layer.weight.detach().clone(), torch.zeros(12, 8))
    layer.weight = nn.Parameter(two_tensor(*halves), requires_grad=False)
    for found in (layer, copy.deepcopy(layer), layer.float(), layer.eval()):
        torch.testing.assert_close(_first(found(x)), expected)
    state = layer.state_dict()
    layer.load_state_dict(state)
    torch.testing.assert_close(_first(layer(x)), expected)
    with pytest.raises(RuntimeError, match="became a TwoTensor while"):
        layer.train()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_a_weight_made_sparse_while_merged(convert: Any, backend: str) -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    base = layer.weight.detach().clone()
    merged = layer.eval().weight.detach().clone()
    layer.weight = nn.Parameter(convert(merged))
    for found in (layer.float(), layer.eval()):
        assert found.merged and torch.equal(found.weight.detach().to_dense(), merged)
    with pytest.raises(RuntimeError, match="a tensor of layout") as refused:
        layer.train()
    assert "restored" in str(refused.value)
    assert layer.merged
    layer.weight = nn.Parameter(layer.weight.detach().to_dense())
    assert torch.equal(layer.train().weight, base)


def test_the_state_of_a_layer_whose_adapter_was_folded(layer: Any, backend: str) -> None:
    """Its base is what the layer, merged, has given out before."""
    layer.eval().state_dict()
    layer.merged = False
    folded = base_of(layer)
    for training in (False, True):
        layer.train(training)
        layer.load_state_dict({key: t.clone() for key, t in layer.train().state_dict().items()})
        assert torch.equal(base_of(layer.train()), folded)

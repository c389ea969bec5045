"""What users of loralib do by hand: flags, own merges, deleted factors, a train() of their own."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from each_layer import LAYERS, base_of, weight_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap

import lora_fast as lora
from lora_fast.testing import randomize_


def fold(layer: Any) -> Tensor:
    """Fold the adapter into the weight for good, and begin another."""
    layer.eval()
    folded = base_of(layer)
    layer.merged = False
    layer.train()
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return folded


def test_a_fold_is_in_every_state(layer: Any) -> None:
    key = layer._weight_key()
    folded = fold(layer)
    state = layer.state_dict()
    assert torch.equal(state[key], folded)
    assert state._metadata[""]["lora_merged"] is False
    fresh = copy.deepcopy(layer)
    fresh.reset_parameters()
    fresh.load_state_dict(copy.deepcopy(state))
    assert torch.equal(weight_of(fresh), folded)
    layer.load_state_dict(state)
    for twin in (layer, copy.deepcopy(layer), layer.double().float()):
        assert torch.equal(weight_of(twin), folded)
        twin.eval()
        assert torch.equal(weight_of(twin.train()), folded)


def test_a_fold_is_in_what_is_saved_and_loaded(backend: str, tmp_path: Any) -> None:
    model = nn.Sequential(randomize_(lora.Linear(8, 12, r=2)))
    folded = fold(model[0])
    lora.save(model, tmp_path / "whole.safetensors", lora_only=False)
    fresh = nn.Sequential(lora.Linear(8, 12, r=2))
    lora.load(fresh, tmp_path / "whole.safetensors")
    assert torch.equal(fresh[0].weight, folded)


def test_an_own_merge_after_that_of_eval(layer: Any) -> None:
    """By hand out, trained, by hand in: what `train()` subtracts is what is in."""
    base = base_of(layer)
    layer.eval()
    layer.merged = False
    for sign, factor in ((-1.0, 3.0), (1.0, 1.0)):
        delta = layer.effective_weight().detach() - weight_of(layer).detach()
        weight_of(layer).data += sign * delta
        layer.lora_B.data *= factor
    layer.merged = True
    torch.testing.assert_close(weight_of(layer.train()).detach(), base)


def test_flags_reset_after_loading_into_a_model_in_eval_mode(layer: Any) -> None:
    """The remedy for loralib's ignoring what is loaded in eval mode."""
    source = randomize_(copy.deepcopy(layer))
    expected = source.effective_weight().detach().clone()
    layer.eval()
    layer.load_state_dict(lora.lora_state_dict(source), strict=False)
    torch.testing.assert_close(weight_of(layer).detach(), expected)
    layer.merged = False
    torch.testing.assert_close(layer.effective_weight().detach(), expected)
    layer.eval()
    torch.testing.assert_close(weight_of(layer).detach(), expected)
    layer.merged = False  # now it was eval() that merged, and this folds
    assert torch.equal(weight_of(layer.train()).detach(), weight_of(layer))
    torch.testing.assert_close(weight_of(layer).detach(), expected)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: layer,
    "eval": lambda layer: layer.eval(),
    "float": lambda layer: layer.float(),
    "half": lambda layer: layer.double(),
    "shared": lambda layer: layer.share_memory(),
    "copied": copy.deepcopy,
    "loaded": lambda layer: (layer.load_state_dict(copy.deepcopy(layer.state_dict())), layer)[1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["del", "None"])
def test_factors_that_were_dropped_stay_merged(layer: Any, how: str, change: str) -> None:
    base, merged = base_of(layer), base_of(layer.eval())
    for name in ("lora_A", "lora_B"):
        if how == "del":
            delattr(layer, name)
        else:
            setattr(layer, name, None)
    found = CHANGES[change](layer)
    torch.testing.assert_close(weight_of(found).detach().to(merged), merged)
    if change != "loaded":
        assert torch.equal(weight_of(found.train()).detach().to(base), base)


def test_an_ensemble_of_models_in_eval_mode() -> None:
    """torch's recipe: stacked parameters, and a frame of one model on meta to call them with."""
    models = [randomize_(nn.Sequential(lora.Linear(6, 5, r=2), nn.ReLU())) for _ in range(3)]
    x = torch.randn(4, 6)
    for training in (True, False):
        for model in models:
            model.train(training)
        expected = torch.stack([model(x) for model in models])
        state = stack_module_state(models)
        frame = copy.deepcopy(models[0]).to("meta")

        def call(params: Any, buffers: Any, frame: Any = frame) -> Any:
            return functional_call(frame, (params, buffers), (x,))

        torch.testing.assert_close(vmap(call)(*state), expected)
        frame.train()
        assert not frame[0].merged


class Gated(lora.Linear):
    """Merges a delta of its own in `train()`, as loralib's layers do."""

    def delta(self) -> Tensor:
        return 2.0 * (self.lora_B @ self.lora_A) * self.scaling

    def train(self, mode: bool = True) -> Any:
        nn.Linear.train(self, mode)
        if self.merged == mode:
            self.weight.data += (-1.0 if mode else 1.0) * self.delta()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.delta().T


class NeverMerged(lora.Linear):
    """Adds its adapter in every forward, also in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return nn.Linear.train(self, mode)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + x @ self.lora_A.T @ self.lora_B.T * self.scaling


@pytest.mark.parametrize("kind", [Gated, NeverMerged])
def test_a_train_of_ones_own(kind: Any) -> None:
    layer, x = randomize_(kind(6, 5, r=2)), torch.randn(3, 6)
    base, expected = base_of(layer), layer(x)
    torch.testing.assert_close(layer.eval()(x), expected)
    torch.testing.assert_close(layer.train().weight.detach(), base)
    state = copy.deepcopy(layer.state_dict())
    layer.eval().load_state_dict(state)
    torch.testing.assert_close(layer(x), expected)


def test_a_layer_that_was_pruned_by_rows_while_merged(backend: str) -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    base, kept = base_of(layer), torch.tensor([0, 3, 4, 11])
    layer.eval()
    for name in ("weight", "bias", "lora_B"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[kept]))
    torch.testing.assert_close(layer.train().weight.detach(), base[kept])


def test_subclasses_inherit_forward_as_python_has_it() -> None:
    class Shown(lora.Linear):
        pass

    class Doubled(lora.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Both(Shown, Doubled):
        pass

    class Helped(lora.Linear):
        def _forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def forward(self, x: Tensor) -> Tensor:
            return self._forward(x)

    x, layer = torch.randn(2, 3), Both(3, 2, r=1)
    torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.weight, layer.bias))
    assert Helped(3, 2, r=1)(x).shape == (2, 2)
    assert Shown.forward is lora.Linear.forward


def test_settings_in_any_order() -> None:
    class Early(lora.Linear):
        def __init__(self) -> None:
            nn.Linear.__init__(self, 3, 2)
            self.r, self.merge_weights, self.merged = 0, False, False

    assert not Early().merge_weights


# --- states


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

"""What users of loralib do by hand: flags, own merges, deleted factors, a train() of their own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from each_layer import base_of, weight_of
from torch import Tensor, nn
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


def test_a_flag_that_is_set_and_taken_back_after_a_load(layer: Any) -> None:
    """Switches the adapter off for a reference, and on again, with loralib and here."""
    base, expected = base_of(layer), layer.effective_weight().detach()
    state = copy.deepcopy(layer.eval().state_dict())
    fresh = randomize_(copy.deepcopy(layer).train())
    fresh.load_state_dict(state)
    fresh.merged = True
    fresh.merged = False
    torch.testing.assert_close(fresh.effective_weight().detach(), expected)
    torch.testing.assert_close(base_of(fresh), base)


@pytest.mark.parametrize(
    "keep", [copy.deepcopy, lambda state: {k: state[k].clone() for k in state}]
)
def test_a_fold_of_what_was_loaded_as_it_had_been_merged(layer: Any, keep: Any) -> None:
    expected = layer.effective_weight().detach()
    best = keep(layer.eval().state_dict())
    randomize_(layer.train()).eval()
    layer.load_state_dict(best)
    layer.merged = False
    torch.testing.assert_close(base_of(layer.train()), expected)


def test_the_best_state_is_loaded_after_a_fold(layer: Any) -> None:
    expected = layer.effective_weight().detach()
    best = {key: value.clone() for key, value in layer.eval().state_dict().items()}
    fold(layer)
    layer.eval()
    layer.load_state_dict(best)
    torch.testing.assert_close(base_of(layer), expected)


def test_the_best_state_of_a_scaling_that_learns(layer: Any) -> None:
    scaling = layer.scaling
    del layer.scaling
    layer.scaling = nn.Parameter(torch.tensor(scaling))
    base, expected = base_of(layer), layer.effective_weight().detach()
    best = {key: value.clone() for key, value in layer.eval().state_dict().items()}
    layer.train().scaling.data.mul_(0.5)
    layer.eval()
    layer.load_state_dict(best)
    torch.testing.assert_close(base_of(layer), expected)
    torch.testing.assert_close(base_of(layer.train()), base)

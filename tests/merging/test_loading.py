"""Loading into layers whose merge is not, or not only, that of `eval()`."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from each_layer import base_of, weight_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fast as lora
from lora_fast import bypasses
from lora_fast.testing import randomize_


def delta_of(layer: Any) -> Tensor:
    """What the adapter adds to the weight, in its layout."""
    twin = copy.deepcopy(layer)
    twin.merged = False
    found: Tensor = twin.effective_weight().detach() - weight_of(twin).detach()
    return found


def merge_by_hand(layer: Any) -> None:
    """The usual helper, beside merge_weights=False."""
    if not layer.merged:
        weight_of(layer).data += delta_of(layer)
        layer.merged = True


def unmerge_by_hand(layer: Any) -> None:
    if layer.merged:
        weight_of(layer).data -= delta_of(layer)
        layer.merged = False


# --- `merged = True` after loading has undone a saved merge


@pytest.fixture(params=[True, False], ids=["marked", "unmarked"])
def loaded(request: pytest.FixtureRequest, layer: Any) -> tuple[Any, Tensor]:
    """A layer that has loaded a state that was saved merged, and its base weight."""
    layer.merge_weights = False
    base, fresh = base_of(layer), copy.deepcopy(layer)
    merge_by_hand(layer)
    state = copy.deepcopy(layer.state_dict())
    fresh.load_state_dict(state if request.param else dict(state))
    torch.testing.assert_close(base_of(fresh), base)
    return fresh, base


def test_the_delta_that_is_added_by_hand_is_in_once(loaded: tuple[Any, Tensor]) -> None:
    layer, base = loaded
    expected = layer.effective_weight().detach().clone()
    for _ in range(2):
        merge_by_hand(layer)
        torch.testing.assert_close(base_of(layer), expected)
        unmerge_by_hand(layer)
        torch.testing.assert_close(base_of(layer), base)


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: layer,
    "dtype": lambda layer: layer.double(),
    "copied": copy.deepcopy,
    "trained": lambda layer: (layer.lora_A.data.mul_(2.0), layer)[1],
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_the_mark_that_is_set_by_hand_merges(loaded: tuple[Any, Tensor], conversion: str) -> None:
    layer, base = loaded
    layer = CONVERSIONS[conversion](layer)
    expected = layer.effective_weight().detach().clone()
    layer.merged = True
    torch.testing.assert_close(base_of(layer), expected)
    layer.merge_weights = True
    torch.testing.assert_close(base_of(layer.train()), base.to(expected))


def test_a_delta_that_shows_in_one_row(backend: str) -> None:
    """An embedding's: of the words that were there."""
    layer = lora.Embedding(100, 6, r=2, merge_weights=False)
    layer.lora_A.data[:, 37] = 1.0
    base = base_of(layer)
    merge_by_hand(layer)
    state = copy.deepcopy(layer.state_dict())
    unmerge_by_hand(layer)
    layer.load_state_dict(state)
    merge_by_hand(layer)
    torch.testing.assert_close(base_of(layer), state["weight"])
    unmerge_by_hand(layer)
    torch.testing.assert_close(base_of(layer), base)


# --- subclasses with a train() of their own


def _train(layer: Any, mode: bool = True) -> Any:
    nn.Linear.train(layer, mode)
    if layer.merged == mode:
        layer.weight.data += (-1.0 if mode else 1.0) * layer.delta()
        layer.merged = not mode
    return layer


class Copied(lora.Linear):
    """Has loralib's train() copied in."""

    train = _train

    def delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.delta().T


class ByMode(Copied):
    """Adds its adapter in train mode, as `train()` keeps the two in step."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + x @ self.delta().T if self.training else y


class Gated(Copied):
    """Has a delta of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_E = nn.Parameter(torch.tensor([[2.5], [-1.0]]))

    def delta(self) -> Tensor:
        return self.lora_B @ (self.lora_A * self.lora_E) * self.scaling


class Several(Copied):
    """Has several adapters under the names of one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        factors = {"lora_A": (self.r, self.in_features), "lora_B": (self.out_features, self.r)}
        for name, size in factors.items():
            delattr(self, name)
            each = {task: nn.Parameter(torch.randn(size)) for task in ("one", "two")}
            setattr(self, name, nn.ParameterDict(each))

    def delta(self) -> Tensor:
        lora_A: Any = self.lora_A
        lora_B: Any = self.lora_B
        products = [lora_B[task] @ lora_A[task] for task in lora_A]
        return torch.stack(products).sum(0) * self.scaling


def made(kind: Any) -> Any:
    layer = kind(6, 5, r=2)
    return layer if kind is Several else randomize_(layer)


@pytest.fixture(params=[Copied, ByMode, Gated, Several])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("takes", [copy.deepcopy, lambda state: state], ids=["copied", "views"])
def test_a_subclass_that_is_merged_takes_its_own_merged_state(kind: Any, takes: Any) -> None:
    layer, x = made(kind), torch.randn(3, 6)
    base, y = base_of(layer), layer(x).detach()
    best = takes(layer.eval().state_dict())
    assert "lora_merged" not in best._metadata[""]
    layer.load_state_dict(best)
    assert layer.merged
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(base_of(layer.train()), base)
    torch.testing.assert_close(layer(x), y)


def test_another_state_of_a_subclass_that_is_merged(kind: Any) -> None:
    layer, x = made(kind), torch.randn(3, 6)
    base, y = base_of(layer), layer(x).detach()
    best = copy.deepcopy(layer.eval().state_dict())
    layer.train()
    for name, parameter in layer.named_parameters():
        parameter.data *= 2.0 if "lora" in name else 1.0
    layer.eval().load_state_dict(best)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(base_of(layer.train()), base)


def test_a_merged_state_in_a_fresh_one_of_a_subclass(kind: Any) -> None:
    """As with loralib, `merged = True` says what it is."""
    layer, fresh, x = made(kind), made(kind), torch.randn(3, 6)
    base, y = base_of(layer), layer(x).detach()
    fresh.load_state_dict(copy.deepcopy(layer.eval().state_dict()))
    fresh.merged = True
    torch.testing.assert_close(fresh.eval()(x), y)
    torch.testing.assert_close(base_of(fresh.train()), base)
    torch.testing.assert_close(fresh(x), y)


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_of_train_mode_in_a_subclass_that_is_merged(kind: Any, whole: bool) -> None:
    layer, other, x = made(kind), made(kind), torch.randn(3, 6)
    if not whole:
        other.weight.data.copy_(layer.weight)
        other.bias.data.copy_(layer.bias)
    base, y = base_of(other), other(x).detach()
    state = other.state_dict()
    if not whole:
        del state["weight"], state["bias"]
    layer.eval().load_state_dict(state, strict=False)
    assert not layer.training
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(base_of(layer.train()), base)


def test_the_adapter_of_a_subclass_that_is_merged_is_saved(tmp_path: Any) -> None:
    layer, other = nn.Sequential(made(Gated)), nn.Sequential(made(Gated))
    lora.save(layer.eval(), tmp_path / "adapter.safetensors")
    lora.load(other, tmp_path / "adapter.safetensors")
    assert torch.equal(other[0].lora_E, layer[0].lora_E)


# --- assign=True


def test_assigned_parameters_are_the_dicts_own(layer: Any) -> None:
    """But for the weight, which a merge writes to."""
    state = {name: nn.Parameter(p.detach().clone()) for name, p in layer.named_parameters()}
    layer.load_state_dict(state, assign=True)
    mine = dict(layer.named_parameters())
    assert {name for name in state if mine[name] is not state[name]} == {layer._weight_key()}
    base = base_of(layer)
    layer.eval()
    assert torch.equal(state[layer._weight_key()], base)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora.Linear(8, 12),
        lambda: lora.MergedLinear(8, 12),
        lambda: lora.Embedding(12, 8),
        lambda: lora.Conv2d(4, 6, 3),
    ],
)
def test_without_an_adapter_all_that_is_assigned_is_the_dicts_own(make: Any) -> None:
    layer = make()
    state = {key: nn.Parameter(p.detach().clone()) for key, p in layer.named_parameters()}
    layer.load_state_dict(state, assign=True)
    assert all(p is state[key] for key, p in layer.named_parameters())


# --- weights that are computed since the merge


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda owner: prune.custom_from_mask(
        owner, "weight", torch.rand_like(owner.weight) > 0.5
    ),
    "parametrized": lambda owner: parametrize.register_parametrization(owner, "weight", Halved()),
    "weight norm": lambda owner: parametrizations.weight_norm(owner),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_since_the_merge(layer: Any, how: str) -> None:
    other = randomize_(copy.deepcopy(layer))
    base = base_of(other)
    for each in (layer, other):
        each.eval()
        COMPUTED[how](getattr(each, "conv", each))
    expected = base_of(other)
    layer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert layer.merged
    owner = getattr(layer, "conv", layer)
    bypasses.recompute_weight(owner, torch.empty(0))
    torch.testing.assert_close(base_of(layer), expected)
    if how == "weight norm":
        with pytest.raises(RuntimeError, match="decomposed"):
            layer.train()
        return
    layer.train()
    stored = owner.weight_orig if how == "pruned" else owner.parametrizations.weight.original
    torch.testing.assert_close(stored.detach(), base)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", [prune.identity, nn.utils.weight_norm])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_hooks_compute_since_the_merge(
    layer: Any, compute: Callable[..., Any], factor: str
) -> None:
    """The state has what it is computed of, and the layer computes it in a forward alone."""
    other = randomize_(copy.deepcopy(layer))
    base = base_of(layer)
    layer.eval()
    for each in (layer, other):
        compute(each, factor)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    torch.testing.assert_close(base_of(other), base)


@pytest.mark.parametrize("other_factors", [False, True])
def test_a_base_that_was_put_back_is_saved_as_it_is(
    layer: Any, other_factors: bool, tmp_path: Path
) -> None:
    owner = layer._weight_owner()
    base = owner.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        owner.weight.copy_(base)
        if other_factors:
            layer.lora_A.add_(1.0)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    lora.save(layer, tmp_path / "a.safetensors", lora_only=False)
    for load in (
        lambda it: it.load_state_dict(torch.load(tmp_path / "a.pt")),
        lambda it: lora.load(it, tmp_path / "a.safetensors"),
    ):
        loaded = copy.deepcopy(layer).train()
        nn.init.zeros_(loaded._weight_owner().weight)
        load(loaded)
        assert torch.equal(loaded._weight_owner().weight, base)
    assert torch.equal(layer.train()._weight_owner().weight, base)


def test_a_state_of_a_layer_that_was_switched_off_while_merged_has_its_scaling(
    backend: str,
) -> None:
    layer = randomize_(lora.Linear(8, 8, r=2))
    base, layer.scaling = layer.weight.detach().clone(), 3.0
    layer.eval()
    layer.r = 0
    assert layer.state_dict()._metadata[""]["lora_scaling"] == 3.0
    loaded = lora.Linear(8, 8, r=2)
    with pytest.warns(UserWarning, match="saved with scaling 3.0"):
        loaded.load_state_dict(copy.deepcopy(layer.state_dict()))
    torch.testing.assert_close(loaded.weight, base)


def test_a_sum_that_was_made_the_base_is_loaded_into_its_like(layer: Any, backend: str) -> None:
    other = copy.deepcopy(layer).eval()
    layer.eval()
    layer.merged = False  # for good
    state = copy.deepcopy(layer.state_dict())
    view = other.train().state_dict()
    other.eval().load_state_dict(view)  # a view of the merged weight, and marked before the merge
    assert torch.equal(other.train()._weight_owner().weight, view[other._weight_key()])
    other.eval().load_state_dict(state)
    assert torch.equal(other.train()._weight_owner().weight, layer._weight_owner().weight)

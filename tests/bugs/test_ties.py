"""B14: a weight that others hold too is not merged, and what only refers to it is no obstacle."""

import copy
import gc
from typing import Any

import loralib
import pytest
import torch
import torch._dynamo.exc
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import readers
from lora_fast.testing import randomize_


class _LanguageModel(nn.Module):
    """An embedding and a head on one weight, each possibly with its own adapter."""

    def __init__(self, embedding: nn.Module, head: nn.Module, share: str) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head
        if share == "parameter":
            self.head.weight = self.embedding.weight
        else:
            self.head.weight.data = self.embedding.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


def tied(lib: Any, kind: str, share: str) -> _LanguageModel:
    embedding = lib.Embedding(9, 4, r=2) if "embedding" in kind else nn.Embedding(9, 4)
    with_adapter = lib.Linear(4, 9, r=2, bias=False)
    head = with_adapter if "head" in kind else nn.Linear(4, 9, bias=False)
    return randomize_(_LanguageModel(embedding, head, share))


def test_b14_weights_that_overlap_in_memory_stay_as_they_are() -> None:
    layers = [randomize_(lora.Linear(8, 8, r=2)) for _ in range(2)]
    flat = torch.randn(96)
    for layer, first in zip(layers, (0, 32), strict=True):
        layer.weight.data = flat[first : first + 64].view(8, 8)
    before = flat.clone()
    for layer in layers:
        assert not layer.eval().merged
    assert torch.equal(flat, before)


@pytest.mark.parametrize("share", ["parameter", "storage"])
@pytest.mark.parametrize("kind", ["embedding", "head", "embedding and head"])
def test_b14_tied_weights_stay_unmerged_and_right(kind: str, share: str) -> None:
    model = tied(lora, kind, share)
    before, x = model.embedding.weight.detach().clone(), torch.randint(0, 9, (3, 5))
    expected = model(x)
    model.eval()
    for layer in (model.embedding, model.head):
        assert not getattr(layer, "merged", False)
    assert torch.equal(model.embedding.weight, before)
    torch.testing.assert_close(model(x), expected)
    model.train()
    assert torch.equal(model.embedding.weight, before)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("is_held", [False, True])
def test_b14_frozen_objects_are_not_counted_in_each_merge(
    is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python counts them one by one: of a million, for 30 ms."""
    layer = randomize_(lora.Linear(4, 4, r=2))
    weight = layer.weight if is_held else None
    layer.eval()
    assert layer.merged
    layer.train()
    counted: list[int] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: counted.append(1) or 0)
    layer.eval()
    assert layer.merged
    assert not counted
    assert weight is None or weight is layer.weight


@pytest.mark.parametrize("share", ["parameter", "storage"])
def test_b14_modules_that_gc_hides_are_not_overlooked(share: str, unfrozen: None) -> None:
    model, alone = tied(lora, "head", share), randomize_(lora.Linear(4, 4, r=2))
    x = torch.randint(0, 9, (3, 5))
    expected = model(x)
    gc.freeze()
    try:
        model.eval()
        alone.eval()
    finally:
        gc.unfreeze()
    assert not model.head.merged
    assert alone.merged  # nothing else holds its weight
    model.eval()
    assert not model.head.merged
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("share", ["parameter", "storage"])
def test_b14_two_layers_on_one_weight_add_their_own_delta_only(case: Any, share: str) -> None:
    one, two = case.build(), case.build()
    if share == "parameter":
        two.weight = one.weight
    else:
        two.weight.data = one.weight.data
    before, x = case.weight(one).detach().clone(), case.input()
    for mode in (False, True, False):
        for layer in (one, two):
            layer.train(mode)
        for layer in (one, two):
            assert not layer.merged
            case.assert_right(layer, x)
        assert torch.equal(case.weight(one), before)
        assert torch.equal(case.weight(two), before)


def test_b14_a_weight_is_merged_again_when_the_other_owner_is_gone(case: Any) -> None:
    layer, other = case.build(), case.build()
    other.weight = layer.weight
    assert not layer.eval().merged
    del other
    assert layer.eval().merged


def test_b14_other_references_to_a_weight_do_not_prevent_the_merge(case: Any) -> None:
    """An optimizer, a list of parameters and a state dict refer to weights too."""
    layer = case.build()
    parameters, state = list(layer.parameters()), layer.state_dict()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert layer.eval().merged
    assert len(optimizer.param_groups[0]["params"]) == len(parameters) == len(state)


TIES: dict[str, Any] = {
    "past_registration": lambda head, weight: head._parameters.__setitem__("weight", weight),
    "memory": lambda head, weight: head._parameters.__setitem__(
        "weight", nn.Parameter(weight.data)
    ),
    "deepcopy": lambda head, weight: copy.deepcopy(head, {id(head.weight): weight}),
    "buffer": lambda head, weight: head.register_buffer("table", weight),
    "memory_of_a_buffer": lambda head, weight: head.register_buffer("table", weight.data),
    "buffer_alone": lambda head, weight: lone_buffer(weight),
}


def lone_buffer(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("table", weight.data)
    return module


@pytest.mark.parametrize("is_optimized", [False, True], ids=["alone", "optimized"])
@pytest.mark.parametrize("tie", TIES)
def test_b14_a_tie_that_is_made_after_a_first_eval(tie: str, is_optimized: bool) -> None:
    layer, head = randomize_(lora.Embedding(9, 4, r=2)), nn.Linear(4, 9, bias=False)
    parameters = [*layer.parameters(), *head.parameters()] if is_optimized else None
    layer.eval().train()
    holder = TIES[tie](head, layer.weight)
    base = layer.weight.detach().clone()
    assert not layer.eval().merged
    assert torch.equal(layer.weight, base)
    assert parameters is None or len(parameters) == 4
    del holder, head, parameters
    assert layer.eval().merged
    assert torch.equal(layer.train().weight, base)


def test_b14_a_scan_serves_until_there_are_more_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    found = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: scans.append(1) or found())
    layers = [randomize_(lora.Linear(4, 4, r=2)) for _ in range(3)]
    layers[0].eval().train()
    states = [layer.state_dict() for layer in layers]
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    for _ in range(3):
        for layer in layers:
            assert layer.eval().merged
            layer.train()
    assert len(scans) == 1
    assert len(states) == 3 and optimizer.param_groups


def test_b14_views_of_all_weights_are_looked_up_once_for_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever keeps the state of the best epoch holds a view of each weight."""
    model = nn.Sequential(*[randomize_(lora.Linear(4, 4, r=2)) for _ in range(40)])
    best = model.state_dict()
    model.eval().train()
    known = sum(map(len, map(list, map(readers._tensors, readers._holders.modules))))
    looked_up: list[int] = []
    place = readers._place
    monkeypatch.setattr(readers, "_place", lambda it: looked_up.append(1) or place(it))
    for _ in range(3):
        looked_up.clear()
        assert all(layer.merged for layer in model.eval())
        assert all(not layer.merged for layer in model.train())
        assert len(looked_up) <= known + len(model)
    assert len(best) == 4 * len(model)


def test_b14_memory_that_another_layer_takes_when_a_view_of_it_goes() -> None:
    """As many hold it as before."""
    model = nn.Sequential(*[randomize_(lora.Linear(4, 4, r=2)) for _ in range(2)])
    views = model.state_dict()
    for _ in range(2):
        assert all(layer.merged for layer in model.eval())
        model.train()
    one, other = model
    del views
    one.weight.data = other.weight.data
    base = one.weight.detach().clone()
    assert not other.eval().merged
    assert not one.eval().merged
    assert torch.equal(other.weight, base)


@pytest.mark.parametrize("ask", [lambda layer: layer.eval(), lora.merge], ids=["eval", "merge"])
def test_b14_memory_of_a_layer_that_was_not_asked_for_yet(ask: Any) -> None:
    one, two = (randomize_(lora.Linear(4, 4, r=2)) for _ in range(2))
    other, views = nn.Linear(4, 4), [layer.weight.detach() for layer in (one, two)]
    ask(one)
    assert one.merged
    views.pop()
    other.weight.data = two.weight.data
    base = two.weight.detach().clone()
    if ask is lora.merge:
        with pytest.raises(RuntimeError, match="the weight is tied"):
            ask(two)
    else:
        ask(two)
    assert not two.merged
    assert torch.equal(other.weight, base)


def test_b14_a_buffer_in_memory_of_its_own_is_no_tie() -> None:
    layer = randomize_(lora.Linear(4, 4, r=2))
    averages = nn.Module()
    averages.register_buffer("weight", layer.weight.data.clone())
    layer.register_buffer("mask", torch.ones(4, 4))
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    state = layer.state_dict()
    assert layer.eval().merged and averaged.eval().module.merged
    assert state and averages


@pytest.mark.parametrize("kind", ["embedding", "embedding and head"])
def test_b14_loralib_changes_the_other_layer(kind: str) -> None:
    model, x = tied(loralib, kind, "parameter"), torch.randint(0, 9, (3, 5))
    expected = model(x)
    model.eval()
    assert (model(x) - expected).abs().max() > 0.01

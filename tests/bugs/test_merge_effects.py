"""What a merge must not do to others: tied weights, saved graphs, computed weights, compilers."""

import copy
import gc
import logging
from typing import Any

import loralib
import pytest
import torch
import torch._dynamo.exc
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fast as lora
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


@pytest.mark.parametrize("share", ["parameter", "storage"])
def test_b14_modules_that_gc_hides_are_not_overlooked(share: str) -> None:
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


@pytest.mark.parametrize("needs_dx", [True, False], ids=["with_dx", "without_dx"])
def test_b19_backward_after_a_flip_is_right_or_refused(case: Any, needs_dx: bool) -> None:
    """Never silently the gradient at another weight."""
    layer, x = case.build(), case.input()
    x = x.requires_grad_(needs_dx and x.is_floating_point())
    inputs = [layer.lora_A, layer.lora_B] + ([x] if x.requires_grad else [])
    y = layer(x)
    seed = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, seed, retain_graph=True)
    layer.eval()
    try:
        got = torch.autograd.grad(y, inputs, seed)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert needs_dx  # without dX the weight plays no part
    else:
        torch.testing.assert_close(got, expected)


def test_b19_backward_after_a_flip_and_back_is_right(case: Any) -> None:
    """As in loralib, whose weight is only nearly the same then."""
    layer, x = case.build(), case.input()
    x = x.requires_grad_(x.is_floating_point())
    inputs = [layer.lora_A, layer.lora_B] + ([x] if x.requires_grad else [])
    y = layer(x)
    seed = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, seed, retain_graph=True)
    for _ in range(3):
        layer.eval()
        layer.train()
    for found, right in zip(torch.autograd.grad(y, inputs, seed), expected, strict=True):
        assert torch.equal(found, right)


def test_b19_backward_of_a_merged_forward_after_train(case: Any) -> None:
    layer, x = case.build().eval(), case.input()
    if not x.is_floating_point():
        x = x.double().long()
        assert not layer(x).requires_grad
        return
    x.requires_grad_()
    y = layer(x).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)
    (again,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(again, expected)


def test_b19_loralib_is_silently_wrong() -> None:
    layer, x = randomize_(loralib.Linear(4, 4, r=2)), torch.randn(1, 4, requires_grad=True)
    y = layer(x).sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.eval()
    (got,) = torch.autograd.grad(y, x)
    assert (got - expected).abs().max() > 0.01


def merge_records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lora_fast.merge"]


def test_b20_training_in_eval_mode_fails_as_in_loralib_and_says_why(
    case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer = case.build()
    lora.mark_only_lora_as_trainable(layer)
    layer.eval()
    with caplog.at_level(logging.INFO, logger="lora_fast.merge"):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="does not require grad"):
                layer(case.input()).sum().backward()
    (message,) = merge_records(caplog)
    assert type(layer).__name__ in message
    assert "train()" in message
    assert layer.lora_A.grad is None


def test_b20_every_layer_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        lora.Linear(4, 5, r=1), lora.Linear(5, 6, r=1, lora_dropout=0.1), lora.Conv1d(2, 3, 1, r=1)
    ).eval()
    for _ in range(2):
        model[2](model[:2](torch.randn(2, 4))[None])
    # In one line each, of what holds a module too.
    assert [m.split(",")[0] for m in merge_records(caplog)] == [
        "Linear(in_features=4",
        "Linear(in_features=5",
        "Conv1d(2",
    ]


def test_b20_inference_and_frozen_adapters_are_silent(
    case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = case.build().eval(), case.input()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)
    layer(x)
    case.build()(x)
    case.build(merge_weights=False).eval()(x)
    assert merge_records(caplog) == []


def test_b20_loralib_raises_the_same() -> None:
    layer = loralib.Linear(4, 4, r=2)
    loralib.mark_only_lora_as_trainable(layer)
    layer.eval()
    with pytest.raises(RuntimeError, match="does not require grad"):
        layer(torch.randn(1, 4)).sum().backward()


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


# torch deprecates the older weight_norm; models in the wild have it.
OLD_WEIGHT_NORM = "ignore:.*weight_norm.* is deprecated:FutureWarning"
COMPUTED = {
    "prune": lambda owner: prune.custom_from_mask(owner, "weight", owner.weight.abs() > 0.05),
    "parametrize": lambda owner: parametrize.register_parametrization(owner, "weight", _Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings(OLD_WEIGHT_NORM)
@pytest.mark.parametrize("how", COMPUTED)
def test_b24_a_computed_weight_is_not_merged(case: Any, how: str) -> None:
    layer, x = case.build(), case.input()
    owner = layer._weight_owner()
    COMPUTED[how](owner)
    own = {k: p.detach().clone() for k, p in layer.named_parameters()}
    expected = layer(x)
    case.assert_right(layer, x, got=expected)
    layer.eval()
    assert not layer.merged
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.testing.assert_close(layer(x), expected)
    for key, parameter in layer.named_parameters():
        assert torch.equal(parameter, own[key])
    assert lora.lora_state_dict(layer).keys() == {"lora_A", "lora_B"}


def test_b24_loralib_loses_the_adapter(old_case: Any) -> None:
    layer, x = old_case.build(loralib), old_case.input()
    prune.identity(getattr(layer, "conv", layer), "weight")
    expected = layer(x)
    layer.eval()
    assert (layer(x) - expected).abs().max() > 0.01


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_b24_pruning_a_merged_layer_keeps_the_base(case: Any, copied: bool) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()
    mask = before.abs() > before.abs().median()
    prune.custom_from_mask(layer.eval()._weight_owner(), "weight", mask)
    layer = copy.deepcopy(layer) if copied else layer
    layer.train()
    assert torch.equal(layer._weight_owner().weight_orig, before)
    case.assert_right(layer, x, base=before * mask)
    case.assert_right(layer.eval(), x, base=before * mask)


@pytest.mark.filterwarnings(OLD_WEIGHT_NORM)
@pytest.mark.parametrize("how", ["weight_norm", "old_weight_norm"])
def test_b24_decomposing_a_merged_weight_is_refused_at_train(case: Any, how: str) -> None:
    """The base cannot be had back from the norm; a wrong model would be worse than an error."""
    layer, x = case.build().eval(), case.input()
    expected = layer(x)
    COMPUTED[how](layer._weight_owner())
    with pytest.raises(RuntimeError, match="while the adapter was merged"):
        layer.train()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


def test_b24_a_parametrized_merged_weight_keeps_its_base(case: Any) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()
    owner = layer.eval()._weight_owner()
    parametrize.register_parametrization(owner, "weight", _Doubled())
    layer.train()
    assert torch.equal(owner.parametrizations.weight.original, before)
    case.assert_right(layer, x)


def flip_and_run(layer: Any, x: Tensor) -> Tensor:
    layer.eval()
    y = layer(x)
    layer.train()
    return y


def test_b48_compiled_code_that_flips_the_mode_breaks_the_graph_and_is_right(case: Any) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()
    run = torch.compile(flip_and_run, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(layer, x), layer(x))
        assert not layer.merged
        assert torch.equal(case.weight(layer), before)


def test_b48_a_flip_in_one_graph_is_refused(case: Any) -> None:
    run = torch.compile(flip_and_run, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(case.build(), case.input())


def test_b48_the_compiled_layer_alone_follows_flips(case: Any) -> None:
    layer, x = case.build(), case.input()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (True, False, True, False):
        randomize_(layer.train())
        expected = layer(x).detach()
        layer.train(mode)
        torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_b48_loralib_fails() -> None:
    layer = randomize_(loralib.Linear(8, 6, r=2))
    run = torch.compile(flip_and_run, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="frozen storage"):
        run(layer, torch.randn(2, 8))

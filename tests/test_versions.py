"""A merge between forward and backward: refused while it lasts, as if it had not been after."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional, torch_internals, versions
from lora_fast.testing import randomize_

WRITTEN = "modified by an inplace operation"


@pytest.fixture
def layer() -> lora.Linear:
    return randomize_(lora.Linear(6, 5, r=2))


def forward(layer: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 6, requires_grad=True)
    return x, layer(x).square().sum()


def refused(x: Tensor, loss: Tensor) -> bool:
    try:
        torch.autograd.grad(loss, x, retain_graph=True)
    except RuntimeError as error:
        assert WRITTEN in str(error)
        return True
    return False


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_state_has_its_own_number(layer: lora.Linear, backend: str) -> None:
    with lora.use_backend(backend):
        train = forward(layer)
        evaluated = []
        for _ in range(3):
            layer.eval()
            evaluated.append(forward(layer))
            assert [refused(*e) for e in evaluated] == [True] * (len(evaluated) - 1) + [False]
            assert refused(*train)
            layer.train()
            assert not refused(*train)
            assert all(refused(*e) for e in evaluated)


def test_whole_models(layer: lora.Linear) -> None:
    model = nn.Sequential(layer)
    before = forward(model)
    lora.merge(model)
    assert refused(*before)
    lora.unmerge(model)
    assert not refused(*before)


def test_a_write_to_the_base_weight_counts_on(layer: lora.Linear) -> None:
    before = forward(layer)
    layer.eval()
    merged = forward(layer)
    layer.train()
    with torch.no_grad():
        for _ in range(5):
            layer.weight.add_(1.0)
            assert refused(*before)
            assert refused(*merged)


def test_a_write_while_merged_is_not_forgotten(layer: lora.Linear) -> None:
    before = forward(layer)
    for _ in range(3):
        layer.eval()
        merged = forward(layer)
        with torch.no_grad():
            layer.weight.mul_(2.0)
        written = forward(layer)
        layer.train()
        after = forward(layer)
        assert [refused(*f) for f in (before, merged, written, after)] == [True] * 3 + [False]
    layer.eval()
    assert all(refused(*f) for f in (before, merged, written, after))


def test_a_write_between_the_functions_is_not_forgotten() -> None:
    """After unmerge_ the weight is not what the forward saw, whatever it was merged under."""
    weight, x = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    lora_A, lora_B = torch.randn(2, 4), torch.randn(4, 2)
    loss = (x @ weight).sum()
    record = functional.merge_(weight, lora_A, lora_B, 1.0)
    weight.add_(0.0)
    functional.unmerge_(weight, record)
    assert refused(x, loss)


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "file"]
)
def test_a_copy_of_a_merged_layer_has_numbers_of_its_own(
    layer: lora.Linear, carry: Callable[[Any], Any]
) -> None:
    for _ in range(3):  # so that the number of the original is one that a copy may have
        layer.weight.detach().add_(0.0)
    other = carry(layer.eval())
    merged = forward(other)
    other.train()
    assert refused(*merged)
    assert not refused(*forward(other))


def test_two_adapters_on_one_weight() -> None:
    weight = torch.randn(5, 6)
    x = torch.randn(3, 6, requires_grad=True)
    adapters = [(torch.randn(2, 6), torch.randn(5, 2)) for _ in range(2)]
    losses, records = [torch.nn.functional.linear(x, weight).sum()], []
    for a, b in adapters:
        records.append(functional.merge_(weight, a, b, 1.0))
        losses.append(torch.nn.functional.linear(x, weight).sum())
    assert [refused(x, loss) for loss in losses] == [True, True, False]
    for record in reversed(records):
        functional.unmerge_(weight, record)
        assert all(refused(x, loss) for loss in losses[1:])


def test_without_torchs_counter_it_only_counts(
    layer: lora.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_internals, "set_versions", None)
    before = forward(layer)
    layer.eval()
    layer.train()
    assert refused(*before)


def test_numbers_that_run_out_only_count(
    layer: lora.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_numbers", iter([versions._LAST]))
    before = forward(layer)
    layer.eval()
    assert layer.weight._version < versions._FIRST
    layer.train()
    assert refused(*before)


def test_a_weight_of_inference_mode_has_none(layer: lora.Linear) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        base = layer.weight.clone()
        layer.eval()
        layer.train()
        assert torch.equal(layer.weight, base)

"""Layers that are cloned past `copy`, as meta-learning does: one record, weights of their own."""

import copy
import itertools
import logging
import pickle
from typing import Any

import pytest
import torch
from each_layer import base_of, weight_of
from torch import nn

import lora_fast as lora
from lora_fast.testing import randomize_


def clone_module(module: nn.Module) -> Any:
    """Clone a module as learn2learn does, so that gradients reach its parameters."""
    cloned = module.__new__(type(module))
    cloned.__dict__ = module.__dict__.copy()
    cloned._parameters = {
        name: None if p is None else p.clone() for name, p in module._parameters.items()
    }
    cloned._buffers = module._buffers.copy()
    cloned._modules = {
        name: None if child is None else clone_module(child)
        for name, child in module._modules.items()
    }
    return cloned


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_each_clone_of_a_merged_layer_is_unmerged(layer: Any, order: Any) -> None:
    base = base_of(layer)
    for _ in range(3):
        layer.eval()
        layers = [layer, clone_module(layer), clone_module(layer)]
        for i in order:
            assert not torch.equal(weight_of(layers[i]), base)
            layers[i].train()
            assert not layers[i].merged
            assert torch.equal(weight_of(layers[i]), base)


def test_clones_of_a_frozen_model_that_is_merged_again(layer: Any) -> None:
    base = base_of(layer)
    for _ in range(3):
        layer.eval()
        task = clone_module(layer)
        task.train()
        layer.eval()  # merges anew: the record has served
        merged = weight_of(layer).detach().clone()
        task.eval()
        assert torch.equal(weight_of(task), merged)
    assert torch.equal(weight_of(layer.train()), base)
    assert torch.equal(weight_of(task.train()), base)


def test_a_clone_and_a_shallow_copy(layer: Any) -> None:
    base = base_of(layer)
    task, twin = clone_module(layer.eval()), copy.copy(layer)
    for one in (twin, task, layer):
        one.train()
        assert torch.equal(weight_of(one), base)


def test_lora_fast_unmerges_a_layer_beside_its_clone(layer: Any) -> None:
    base = base_of(layer)
    layer.eval()
    pair = nn.ModuleList([layer, clone_module(layer)])
    lora.unmerge(pair)
    assert all(torch.equal(weight_of(one), base) for one in pair)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_layer_whose_clone_was_unmerged(layer: Any, copied: Any) -> None:
    base = base_of(layer)
    merged = weight_of(layer.eval()).detach().clone()
    clone_module(layer).train()
    twin = copied(layer)
    assert twin.merged and torch.equal(weight_of(twin), merged)
    assert torch.equal(weight_of(twin.train()), base)
    assert torch.equal(weight_of(layer.train()), base)
    assert torch.equal(weight_of(copied(layer)), base)


def test_a_clone_whose_weight_has_gradients(layer: Any) -> None:
    weight_of(layer).requires_grad_()
    base = base_of(layer)
    task = clone_module(layer.eval())
    assert weight_of(task).grad_fn is not None
    layer.train()
    task.train()
    task.eval()
    task.train()
    assert torch.equal(weight_of(task), base)
    weight_of(task).sum().backward()
    assert torch.equal(weight_of(layer).grad, torch.ones_like(base))


def test_a_clone_that_was_written_to_is_told(layer: Any, caplog: pytest.LogCaptureFixture) -> None:
    task = clone_module(layer.eval())
    layer.train()
    with torch.no_grad():
        weight_of(task).add_(1.0)
    written = weight_of(task).detach().clone()
    with caplog.at_level(logging.WARNING, "lora_fast.merge"):
        task.train()
    assert "left as it is" in caplog.text
    assert torch.equal(weight_of(task), written)


def test_views_of_one_memory_are_unmerged_once(layer: Any) -> None:
    base = base_of(layer)
    twin = clone_module(layer.eval())
    owner = twin._weight_owner()
    owner._parameters["weight"] = nn.Parameter(weight_of(layer).data, requires_grad=False)
    layer.train()
    twin.train()
    assert torch.equal(weight_of(layer), base)


def test_clones_in_one_stacked_tensor(layer: Any) -> None:
    base = base_of(layer)
    tasks = [clone_module(layer.eval()) for _ in range(2)]
    stacked = torch.stack([weight_of(task) for task in tasks])
    for task, weight in zip(tasks, stacked, strict=True):
        task._weight_owner()._parameters["weight"] = weight
    for task in tasks:
        assert torch.equal(weight_of(task.train()), base)


def test_a_shallow_copy_whose_layer_moved_is_left() -> None:
    layer = randomize_(lora.Linear(8, 6, r=2))
    twin = copy.copy(layer.eval())
    layer.to(torch.float64)
    base = weight_of(layer).detach().clone()
    twin.train()
    assert not twin.merged
    assert torch.equal(weight_of(layer), base)

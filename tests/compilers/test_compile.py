"""Layers under torch.compile: what works for plain torch layers works for these.

All on a CPU and with the `aot_eager` backend, which takes every step of torch.compile but the code
generation.
"""

from typing import Any

import pytest
import torch
from layer_cases import CASES, QKV, WITH_DROPOUT, assert_same, build, grads, randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fast as lora
from lora_fast.testing import randomize_


@pytest.mark.parametrize("name", CASES)
def test_compile_fullgraph_trains(name: str) -> None:
    """One graph; output and gradients of the eager layer."""
    layer, x = build(name), CASES[name].input(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, got = layer(x), compiled(x)
    assert_same(got, expected)
    assert_same(grads(layer, got), grads(layer, expected))


@pytest.mark.parametrize("name", ["linear", "merged", "conv2d"])
def test_compile_gives_the_gradient_of_the_input(name: str) -> None:
    layer = build(name)
    x = CASES[name].input(3).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    seed = torch.randn_like(layer(x))
    (expected,) = torch.autograd.grad(layer(x), x, seed)
    (got,) = torch.autograd.grad(compiled(x), x, seed)
    assert_same(got, expected)


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_compile_with_dropout_draws_as_eager(name: str) -> None:
    layer, x = build(name, lora_dropout=0.4), CASES[name].input(16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    expected = layer(x)
    torch.manual_seed(7)
    got = compiled(x)
    assert_same(got, expected)
    assert_same(grads(layer, got), grads(layer, expected))
    assert not torch.equal(compiled(x), got)  # a new mask for every call


@pytest.mark.parametrize("name", CASES)
def test_compile_merged(name: str) -> None:
    """A layer merged before it is compiled computes with the merged weight alone."""
    layer, x = build(name), CASES[name].input(3)
    unmerged = layer(x)
    layer.eval()
    assert layer.merged
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert_same(compiled(x), unmerged)


@pytest.mark.parametrize("name", ["linear", "merged", "embedding", "conv2d"])
def test_three_flips_of_train_and_eval_make_two_graphs(name: str) -> None:
    layer, x = build(name), CASES[name].input(3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    expected = layer(x)
    for _ in range(3):
        layer.train()
        got = compiled(x)
        got.sum().backward()
        assert_same(got, expected)
        layer.eval()
        assert_same(compiled(x), expected)
    assert counter.frame_count == 2


def test_four_layers_that_differ_in_alpha_make_two_frames() -> None:
    """The second scaling makes the graph general in it; no graph for every value."""
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(3, 8)
    for alpha in (1, 2, 3, 5):
        layer = lora.Linear(8, 8, r=4, lora_alpha=alpha)
        randomize(layer)
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        assert_same(compiled(x), layer(x))
    assert counter.frame_count == 2


def test_layers_compiled_one_by_one_do_not_use_up_each_others_recompilations() -> None:
    """torch.compile allows 8 for a piece of code, and each class has its own."""
    torch.compiler.reset()
    x, index, image = torch.randn(2, 8), torch.tensor([1]), torch.randn(1, 8, 5, 5)
    layers = [
        (lora.Linear(8, 8, r=2), x),
        (lora.Linear(8, 8, r=2, lora_dropout=0.1), x),
        (lora.Linear(8, 8, r=2, fan_in_fan_out=True), x),
        (lora.Linear(8, 8), x),
        (lora.MergedLinear(8, 8, r=2, enable_lora=[True, False]), x),
        (lora.Embedding(8, 8, r=2), index),
        (lora.Conv2d(8, 8, 3, r=2), image),
    ]
    for training in (True, False):
        for layer, example in layers:
            layer.train(training)
            torch.compile(layer, backend="eager", fullgraph=True)(example)
    assert len({id(type(layer).forward.__code__) for layer, _ in layers}) == 4


@pytest.mark.parametrize("kind", [lora.Linear, lora.MergedLinear])
def test_compile_with_a_dropout_rate_that_changes(kind: Any) -> None:
    """Dynamo makes a symbol of it, in time or, with dynamic=True, at once."""
    blocks = {"enable_lora": [True, False, True]} if kind is lora.MergedLinear else {}
    layer = randomize_(kind(6, 9, r=2, lora_dropout=0.1, **blocks))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(4, 6)
    for rate in (0.1, 0.2, 0.3):
        layer.lora_dropout.p = rate
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
    torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)(x)


def test_compile_with_dynamic_shapes_makes_one_graph() -> None:
    layer = build("linear")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 8)
        assert_same(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_compile_a_model_of_all_layers_trains_as_eager() -> None:
    def train(compile_it: bool) -> list[float]:
        torch.manual_seed(3)
        model = nn.Sequential(
            lora.Embedding(10, 8, r=2),
            lora.MergedLinear(8, 12, r=2, lora_dropout=0.2, **QKV),
            nn.GELU(),
            lora.Conv1d(5, 4, 3, r=1),
            lora.Linear(10, 6, r=2, lora_dropout=0.1),
        )
        lora.mark_only_lora_as_trainable(model)
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        tokens, losses = torch.randint(0, 10, (7, 5)), []
        for _ in range(4):
            loss = step(tokens).square().mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        return losses

    assert train(True) == pytest.approx(train(False), rel=1e-4)


def test_a_program_with_compiled_autograd_that_has_no_adapter() -> None:
    """torch.compile makes modules within a backward, of which the hooks for all modules hear."""
    layer = nn.Linear(12, 18)

    @torch.compile(backend="eager")
    def train(x: Tensor) -> None:
        layer(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        train(torch.randn(40, 12, requires_grad=True))
    assert layer.weight.grad is not None

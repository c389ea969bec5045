"""torch.utils.checkpoint around the layers: the same gradients as without it, dropout included."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointError,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lora
from lora_fast.testing import randomize_


class Tokens(nn.Module):
    """An embedding as a layer of activations: position i looks up row i."""

    def __init__(self) -> None:
        super().__init__()
        self.table = lora.Embedding(6, 8, r=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(6, device=x.device))


def network(dropout: float) -> nn.Sequential:
    model = nn.Sequential(
        Tokens(),
        lora.Linear(8, 8, r=2, lora_dropout=dropout),
        nn.GELU(),
        lora.MergedLinear(8, 24, r=2, lora_dropout=dropout, enable_lora=[True, False, True]),
        nn.Unflatten(0, (1, 6)),
        lora.Conv1d(6, 3, 3, r=2),
    )
    randomize_(model)
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    return model


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> list[Tensor | None]:
    y.square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert [g is None for g in actual] == [g is None for g in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_hooks", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool, dropout: float, use_reentrant: bool) -> None:
    model = network(dropout).train(training)
    plain = copy.deepcopy(model)
    x = torch.randn(6, 8, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    expected = gradients(plain, plain(twin), twin)
    torch.manual_seed(1)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    torch.rand(1)  # the second forward must not draw where the first has left off
    assert_same(gradients(model, y, x), expected)
    assert training == (plain[1].lora_A.grad is not None)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_hooks", "reentrant"])
def test_gradients_of_segments(use_reentrant: bool) -> None:
    model = network(0.3)
    plain = copy.deepcopy(model)
    x = torch.randn(6, 8, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    expected = gradients(plain, plain(twin), twin)
    torch.manual_seed(1)
    y = checkpoint_sequential(model, 3, x, use_reentrant=use_reentrant)
    assert_same(gradients(model, y, x), expected)


def test_a_merge_between_forward_and_backward_raises() -> None:
    model = network(0.0)
    y = checkpoint(model, torch.randn(6, 8), use_reentrant=False)
    model.eval()
    with pytest.raises(CheckpointError, match="different number of tensors"):
        y.square().mean().backward()


COUNTED: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True]),
    "bf16": lambda: lora.Linear(8, 24, r=2).bfloat16(),
}


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("counted", ["forward", "backward"])
@pytest.mark.parametrize("name", COUNTED)
def test_operations_counted_in_one_pass(name: str, counted: str, rows: int) -> None:
    """The second forward, of backward, saves what the first one did."""
    layer = randomize_(COUNTED[name]())
    x = torch.randn(rows, 8, dtype=layer.weight.dtype, requires_grad=True)
    layer(x).sum().backward()
    expected = [t.grad for t in (x, layer.lora_A, layer.lora_B)]
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    counter = FlopCounterMode(display=False)
    with counter if counted == "forward" else nullcontext():
        y = checkpoint(layer, x, use_reentrant=False)
    with counter if counted == "backward" else nullcontext():
        y.sum().backward()
    assert counter.get_total_flops() > 0
    close = {"rtol": 0.05, "atol": 0.1} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    for t, grad in zip((x, layer.lora_A, layer.lora_B), expected, strict=True):
        torch.testing.assert_close(t.grad, grad, **close)


def test_products_that_are_kept() -> None:
    """Selective checkpointing refuses writes to what it keeps."""
    layer = randomize_(COUNTED["blocks"]())
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    x = torch.randn(40, 8, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.lora_A, layer.lora_B])
    y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B])
    torch.testing.assert_close(found, expected)

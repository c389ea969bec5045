"""torch.utils.checkpoint around the layers: the same gradients as without it, dropout included."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, checkpoint_sequential

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

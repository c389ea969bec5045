"""A table that was given more rows or fewer, as transformers does by `resize_token_embeddings`."""

import logging

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast.testing import randomize_

IDS = torch.tensor([[1, 5], [6, 0]])


def resized(rows: int, **options: bool) -> tuple[lora.Embedding, Tensor, Tensor]:
    """A layer made for 9 rows, its table, and what its adapter adds to the first 9 rows."""
    layer = randomize_(lora.Embedding(9, 4, r=2, **options))
    delta = layer.scaling * (layer.lora_B @ layer.lora_A).t().detach()
    layer.weight.data = torch.cat([layer.weight.detach(), torch.randn(3, 4)])[:rows].clone()
    layer.num_embeddings = rows
    return layer, layer.weight.detach().clone(), delta


@pytest.mark.parametrize("rows", [7, 12])
@pytest.mark.parametrize("merge_weights", [False, True])
def test_what_the_adapter_knows_of_is_as_before(
    rows: int, merge_weights: bool, backend: str
) -> None:
    layer, table, delta = resized(rows, merge_weights=merge_weights)
    expected = table[IDS] + delta[IDS]
    for training in (True, False, True):
        layer.train(training)
        torch.testing.assert_close(layer(IDS), expected)
        assert torch.equal(layer.weight, table)
    layer(IDS).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.abs().sum(0).nonzero().flatten().tolist() == [0, 1, 5, 6]


def test_new_rows_are_looked_up_alone(backend: str) -> None:
    layer, table, _ = resized(12)
    new = torch.tensor([9, 11])
    assert torch.equal(layer(new), table[new])
    assert torch.equal(layer.effective_weight()[9:], table[9:])
    with pytest.raises(IndexError):
        layer(torch.tensor([12]))


def test_it_is_not_merged_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    layer, table, _ = resized(12)
    with caplog.at_level(logging.WARNING, "lora_fast.merge"):
        layer.eval()
    assert "its table has 12 rows, and its adapter was made for 9" in caplog.text
    assert not layer.merged and torch.equal(layer.weight, table)
    with pytest.raises(RuntimeError, match="its table has 12 rows"):
        lora.merge(layer)


def test_one_that_was_merged_before_goes_on_with_the_sum() -> None:
    layer = randomize_(lora.Embedding(9, 4, r=2))
    expected = layer.eval()(IDS)
    layer.weight.data = torch.cat([layer.weight.detach(), torch.randn(3, 4)])
    assert torch.equal(layer(IDS), expected)

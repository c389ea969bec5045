"""A table that was given more rows or fewer, as transformers does by `resize_token_embeddings`."""

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_b55_new_rows_are_looked_up_alone(backend: str) -> None:
    layer, table, _ = resized(12)
    new = torch.tensor([9, 11])
    assert torch.equal(layer(new), table[new])
    assert torch.equal(layer.effective_weight()[9:], table[9:])
    with pytest.raises(IndexError):
        layer(torch.tensor([12]))


def test_b55_it_is_not_merged_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    layer, table, _ = resized(12)
    with caplog.at_level(logging.WARNING, "lora_fast.merge"):
        layer.eval()
    assert "its table has 12 rows, and its adapter was made for 9" in caplog.text
    assert not layer.merged and torch.equal(layer.weight, table)
    with pytest.raises(RuntimeError, match="its table has 12 rows"):
        lora.merge(layer)


def plain(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("rows", [7, 12])
@pytest.mark.parametrize("training", [False, True])
def test_a_plain_state_is_loaded(rows: int, training: bool, backend: str) -> None:
    layer, table, _ = resized(rows)
    state, other = plain(layer), resized(rows)[0].train(training)
    for one in (layer.train(training), other):
        one.load_state_dict(state)
        assert torch.equal(one.weight, table)
        assert torch.equal(one.lora_A, layer.lora_A)


def resized_while_merged(
    rows: int, size: tuple[int, int] = (9, 4), std: float = 1.0, dtype: Any = torch.float32
) -> tuple[lora.Embedding, Tensor]:
    """A layer, and its table as it is to be without the adapter: new rows have none."""
    layer = randomize_(lora.Embedding(*size, r=2)).to(dtype)
    nn.init.normal_(layer.lora_A, std=std)
    new = torch.randn(max(0, rows - size[0]), size[1], dtype=dtype)
    table = torch.cat([layer.weight.detach(), new])[:rows]
    layer.eval()
    layer.weight.data = torch.cat([layer.weight.detach(), new])[:rows].clone()
    layer.num_embeddings = rows
    assert layer.merged
    return layer, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("std", [0.0, 1e-3, 1.0, 30.0, 1e3])  # few, many and all in the list
@pytest.mark.parametrize("size", [(9, 4), (300, 70)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 12, 299, 301, 340])
def test_one_that_was_merged_before_is_unmerged_to_the_bit(
    rows: int, size: tuple[int, int], std: float, dtype: torch.dtype, backend: str
) -> None:
    layer, table = resized_while_merged(rows, size, std, dtype)
    layer.train()
    assert not layer.merged and torch.equal(layer.weight, table)


def through_file(layer: lora.Embedding) -> Any:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


WAYS: dict[str, Any] = {
    "train": lambda layer: layer.train(),
    "training": lambda layer: setattr(layer, "training", True),
    "merge_weights": lambda layer: setattr(layer, "merge_weights", False),
    "unmerge": lora.unmerge,
    "to": lambda layer: layer.to("cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "copy": copy.copy,
    "its own state": lambda layer: layer.load_state_dict(layer.state_dict()),
    "a plain state": lambda layer: layer.load_state_dict(plain(layer)),
    "a file": lambda layer: layer.load_state_dict(through_file(layer)),
    "eval": lambda layer: layer.eval(),
}


@pytest.mark.parametrize("rows", [7, 12])
@pytest.mark.parametrize("way", WAYS)
def test_one_that_was_merged_before_is_used_like_any(rows: int, way: str, backend: str) -> None:
    layer, table = resized_while_merged(rows)
    expected = layer(IDS)
    found = WAYS[way](layer)
    twin = found if isinstance(found, lora.Embedding) else layer
    torch.testing.assert_close(twin(IDS), expected)
    torch.testing.assert_close(copy.deepcopy(twin).eval()(IDS), expected)
    for one in (twin, layer):
        one.merge_weights = True
        torch.testing.assert_close(one.train()(IDS), expected)
        assert not one.merged and torch.equal(one.weight, table)


@pytest.mark.parametrize("rows", [7, 12])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("taken", [nn.Module.state_dict, plain, through_file])
def test_the_state_of_one_that_was_merged_before(
    rows: int, copied: bool, taken: Any, backend: str
) -> None:
    layer, table = resized_while_merged(rows)
    source = copy.deepcopy(layer) if copied else layer
    state = taken(source)
    other = resized(rows)[0]
    other.weight.data.copy_(table)  # by which a plain state is told
    other.load_state_dict(state)
    assert torch.equal(other.weight, table)
    if taken is not plain:
        fresh = resized(rows)[0]
        fresh.load_state_dict(state)
        torch.testing.assert_close(fresh.weight.detach(), table)


def test_a_view_of_fewer_rows(backend: str) -> None:
    for unmerge in (lora.unmerge, nn.Module.train):
        layer, _ = resized_while_merged(9)
        base = copy.deepcopy(layer).train().weight.detach()
        layer.weight.data = layer.weight.data[:5]
        unmerge(layer)
        assert torch.equal(layer.weight, base[:5])


def test_rows_that_are_none_of_the_merged_ones_are_refused() -> None:
    layer, _ = resized_while_merged(7)
    layer.weight.data = layer.weight.data.flip(0)
    with pytest.raises(RuntimeError, match="the base weight cannot be restored"):
        layer.train()
    assert layer.merged


@pytest.mark.parametrize("rows", [50, 60])
def test_a_model_in_eval_mode_that_transformers_resize(rows: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 55, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    layer = randomize_(lora.Embedding(55, 8, r=2))
    base = layer.weight.detach().clone()
    model.set_input_embeddings(layer)
    ids = torch.tensor([[1, 2, 3]])
    expected = model.eval()(ids).logits[..., :50]
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert layer.merged and model.state_dict()["transformer.wte.weight"].shape == (rows, 8)
    for one in (copy.deepcopy(model), model):
        one.get_input_embeddings().train()
        torch.testing.assert_close(one(ids).logits[..., :50], expected)
        kept = min(rows, 55)
        assert torch.equal(one.get_input_embeddings().weight[:kept], base[:kept])

"""Layers as a whole that are pickled, copied, saved and sent to other processes."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from typing import Any

import loralib
import pytest
import torch
from torch import nn

import lora_fast as lora
from lora_fast.testing import randomize_


def through_torch_save(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "old_pickle": lambda layer: pickle.loads(pickle.dumps(layer, protocol=2)),
    "torch_save": through_torch_save,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("how", COPIES)
def test_b17_copies_are_whole_and_independent(
    case: Any, how: str, merged: bool, dtype: torch.dtype
) -> None:
    layer, x = case.build(dtype=dtype), case.input(dtype)
    base = case.weight(layer).detach().clone()
    layer.train(not merged)
    expected = layer(x)
    twin = COPIES[how](layer)
    assert type(twin) is type(layer)
    assert (twin.training, twin.merged) == (not merged, merged)
    assert torch.equal(twin(x), expected)
    randomize_(layer.train())
    assert torch.equal(twin(x), expected)
    assert torch.equal(case.weight(twin.train()), base)
    case.assert_right(twin, x)
    case.assert_right(twin.eval(), x, base=base)
    assert torch.equal(case.weight(twin.train()), base)
    assert torch.equal(case.weight(layer), base)


def test_b17_shallow_copies_are_layers_of_their_own(case: Any) -> None:
    layer, x = case.build(), case.input()
    expected = layer(x)
    twin = copy.copy(layer)
    assert type(twin) is type(layer)
    assert twin.lora_A is layer.lora_A and case.weight(twin) is case.weight(layer)
    for mode in ((False, True), (True, False), (False, False), (True, True)):
        for one, training in zip((layer, twin), mode, strict=True):
            one.train(training)
        for one in (layer, twin):
            assert not one.merged  # the other would compute with the adapter twice
            torch.testing.assert_close(one(x), expected)
    with torch.no_grad():
        layer.lora_B.mul_(2.0)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("how", ["first", "second", "model"])
def test_b17_shallow_copies_of_a_merged_layer_unmerge_once(case: Any, how: str) -> None:
    layer, x = case.build(), case.input()
    base, expected = case.weight(layer).detach().clone(), layer(x)
    twin = copy.copy(layer.eval())
    assert torch.equal(twin(x), layer(x))
    if how == "model":
        assert lora.unmerge(nn.ModuleList([layer, twin])) == 2
    for one in (layer, twin) if how == "first" else (twin, layer):
        one.train()
        assert torch.equal(case.weight(layer), base)
    for one in (layer, twin):
        torch.testing.assert_close(one(x), expected)
        assert not one.eval().merged


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("how", COPIES)
def test_b17_dropout_is_copied_too(linear_case: Any, how: str, p: float) -> None:
    layer, x = linear_case.build(lora_dropout=p), linear_case.input()
    twin = COPIES[how](layer)
    outputs = []
    for module in (layer, twin):
        torch.manual_seed(1)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    names = [name for name, _ in twin.named_modules()]
    assert names == (["", "lora_dropout"] if p > 0 else [""])  # as in loralib


@pytest.mark.parametrize("how", COPIES)
def test_b17_whole_models_are_copied(how: str) -> None:
    model = nn.Sequential(lora.Embedding(9, 8, r=2), lora.Linear(8, 4, r=2, lora_dropout=0.1))
    model = randomize_(model).eval()
    x = torch.randint(0, 9, (3, 5))
    twin = COPIES[how](model)
    assert torch.equal(twin(x), model(x))
    for mine, theirs in zip(twin.train().parameters(), model.train().parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", COPIES)
def test_b17_tied_weights_stay_tied_and_unmerged(how: str) -> None:
    model = nn.Sequential(lora.Embedding(9, 4, r=2), lora.Linear(4, 9, r=2, bias=False))
    model[1].weight = model[0].weight
    twin = COPIES[how](randomize_(model))
    assert twin[0].weight is twin[1].weight
    x, expected = torch.arange(9), twin(torch.arange(9))
    torch.testing.assert_close(twin.eval()(x), expected)
    assert not twin[0].merged
    assert not twin[1].merged


@pytest.fixture(scope="module")
def other_process() -> Iterator[Pool]:
    """A process that knows nothing but what it is sent, as torch.multiprocessing starts them."""
    spawn = multiprocessing.get_context("spawn")
    # Tensors that autograd made cannot be sent back.
    with spawn.Pool(1, initializer=torch.set_grad_enabled, initargs=(False,)) as pool:
        yield pool


@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
def test_b17_layers_go_to_another_process_and_back(
    case: Any, merged: bool, other_process: Pool
) -> None:
    layer, x = case.build(), case.input()
    base = case.weight(layer).detach().clone()
    layer.train(not merged)
    expected = layer(x)
    sent = copy.deepcopy(layer)  # the processes share the memory of what is sent
    assert torch.equal(other_process.apply(sent.forward, (x,)), expected)
    flipped = other_process.apply(sent.train, (merged,))
    assert flipped.merged is not merged
    torch.testing.assert_close(flipped(x), expected)
    assert torch.equal(case.weight(flipped.train()), base)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_b17_loralib_cannot_be_pickled(name: str) -> None:
    layer = getattr(loralib, name)(4, 6, *([1] if name == "Conv2d" else []), r=2)
    with pytest.raises(AttributeError, match="local object"):
        pickle.dumps(layer)


class _InOurPlace(pickle.Unpickler):
    """Finds loralib's classes here, as where `sys.modules["loralib"] = lora_fast`."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module.replace("loralib", "lora_fast"), name)


@pytest.mark.parametrize("merges", [False, True])
def test_a_layer_that_loralib_pickled(merges: bool) -> None:
    """It can, where there is a dropout."""
    theirs = randomize_(loralib.Linear(4, 5, r=2, lora_dropout=0.1, merge_weights=merges))
    layer = _InOurPlace(io.BytesIO(pickle.dumps(theirs))).load()
    assert type(layer) is lora.Linear and layer.merge_weights is merges
    state, x = randomize_(lora.Linear(4, 5, r=2)).state_dict(), torch.randn(3, 4)
    layer.eval().load_state_dict(state)
    assert layer.merged is merges
    expected = lora.Linear(4, 5, r=2)
    expected.load_state_dict(state)
    torch.testing.assert_close(layer(x), expected.eval()(x))
    assert torch.equal(layer.train().weight, state["weight"])


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
def test_copies_of_a_compiled_layer_compute_with_their_own_weights(copier: Any) -> None:
    layer, x = randomize_(lora.Linear(4, 5, r=2)), torch.randn(3, 4)
    layer.compile(backend="eager")
    layer(x)
    copied = copier(layer)
    copied.weight = nn.Parameter(torch.zeros(5, 4))
    copied.bias = copied.lora_B = None
    copied.r = 0
    assert torch.equal(copied(x), torch.zeros(3, 5))


def test_a_compiled_layer_is_pickled() -> None:
    layer, x = randomize_(lora.Linear(4, 5, r=2)), torch.randn(3, 4)
    layer.compile(backend="eager")
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("how", COPIES)
def test_copies_know_that_the_base_was_put_back_while_merged(case: Any, how: str) -> None:
    """As an average of the weights does after a validation."""
    layer, x, fresh = case.build(), case.input(), case.build()
    base, expected = case.weight(layer).detach().clone(), layer(x)
    with torch.no_grad():
        case.weight(layer.eval()).copy_(base)
    twin = COPIES[how](layer)
    fresh.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert torch.equal(case.weight(fresh), base)
    torch.testing.assert_close(COPIES[how](twin).eval()(x), expected)
    torch.testing.assert_close(twin.eval()(x), expected)
    assert torch.equal(case.weight(twin.train()), base)

"""What is trained and what is saved, for models of any shape."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_
from lora_fast.utils import UnknownBiasError

MODES = ["none", "all", "lora_only"]
LEAVES = {
    "linear": lambda: lora.Linear(3, 4, r=2),
    "linear_no_bias": lambda: lora.Linear(3, 4, r=2, bias=False),
    "linear_off": lambda: lora.Linear(3, 4),
    "merged": lambda: lora.MergedLinear(3, 4, r=1, enable_lora=[True, False]),
    "merged_off": lambda: lora.MergedLinear(3, 4, r=1, enable_lora=[False, False]),
    "embedding": lambda: lora.Embedding(5, 3, r=1),
    "conv": lambda: lora.Conv1d(2, 2, 1, r=1),
    "conv_no_bias": lambda: lora.Conv2d(2, 2, 1, r=1, bias=False),
    "conv_off": lambda: lora.Conv2d(2, 2, 1),
    "plain": lambda: nn.Linear(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "norm": lambda: nn.BatchNorm1d(3),
    "lstm": lambda: nn.LSTM(2, 2),
}
LAYER_NAMES = st.sampled_from(["a", "b", "lora_net", "bias", "conv", "flora_A", "lora_A"])
TREES = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda children: st.dictionaries(LAYER_NAMES, children, min_size=1, max_size=3),
    max_leaves=6,
)
Tree = str | dict[str, "Tree"]


def built(tree: Tree) -> nn.Module:
    if isinstance(tree, str):
        return LEAVES[tree]()
    module = nn.Module()
    for name, child in tree.items():
        module.add_module(name, built(child))
    return module


def expected(tree: Tree, mode: str, prefix: str = "") -> Iterator[str]:
    """The names that the documentation promises, from the tree itself."""
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from expected(child, mode, f"{prefix}{name}.")
        return
    has_adapter = tree.startswith(("linear", "merged", "embedding", "conv"))
    has_adapter &= not tree.endswith("off")
    if has_adapter:
        yield from (f"{prefix}lora_A", f"{prefix}lora_B")
    if mode == "all" or (mode == "lora_only" and has_adapter):
        yield from (prefix + name for name in biases(tree))


def biases(leaf: str) -> list[str]:
    if leaf == "attention":
        return ["in_proj_bias", "out_proj.bias", "bias_k", "bias_v"]
    if leaf == "lstm":
        return ["bias_ih_l0", "bias_hh_l0"]
    if leaf == "embedding" or leaf.endswith("no_bias"):
        return []
    return ["conv.bias" if leaf.startswith("conv") else "bias"]


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@given(tree=TREES, mode=st.sampled_from(MODES))
def test_what_is_trained_is_what_is_saved(tree: Tree, mode: str) -> None:
    model = built(tree)
    lora.mark_only_lora_as_trainable(model, mode)
    assert set(trained(model)) == set(expected(tree, mode))
    state = lora.lora_state_dict(model, mode)
    assert set(state) == set(expected(tree, mode))
    assert type(state) is dict


@given(tree=TREES, first=st.sampled_from(MODES), second=st.sampled_from(MODES))
def test_marking_again_forgets_the_first_mode(tree: Tree, first: str, second: str) -> None:
    model, other = built(tree), built(tree)
    lora.mark_only_lora_as_trainable(model, first)
    lora.mark_only_lora_as_trainable(model, second)
    lora.mark_only_lora_as_trainable(other, second)
    assert trained(model) == trained(other)


@given(tree=TREES, mode=st.sampled_from(MODES))
def test_values_and_buffers_are_left_alone(tree: Tree, mode: str) -> None:
    model = built(tree)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lora.mark_only_lora_as_trainable(model, mode)
    for name, value in lora.lora_state_dict(model, mode).items():
        assert not value.requires_grad
        assert value.data_ptr() == model.state_dict()[name].data_ptr()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = lora.Embedding(9, 4, r=2)
        self.qkv = lora.MergedLinear(4, 12, r=2, enable_lora=[True, False, True])
        self.plain = nn.Linear(12, 16)
        self.conv = lora.Conv2d(1, 2, 3, r=1, padding=1)
        self.head = lora.Linear(32, 3, r=2, lora_dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.plain(self.qkv(self.table(x)).relu())
        return self.head(self.conv(h.view(-1, 1, 4, 4)).flatten(1))


X, TARGET = torch.arange(9), torch.arange(9) % 3


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_training_changes_what_is_marked_alone(mode: str) -> None:
    model = randomize_(Net())
    lora.mark_only_lora_as_trainable(model, mode)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(X), TARGET).backward()
    optimizer.step()
    marked = set(trained(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (name not in marked), name


@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_trained_moves_to_another_copy_of_the_base(mode: str, merged: bool) -> None:
    model = randomize_(Net())
    other = copy.deepcopy(model)
    lora.mark_only_lora_as_trainable(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), TARGET).backward()
        optimizer.step()
    state = lora.lora_state_dict(model.train(not merged), mode)
    keys = other.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_the_adapters_of_a_merged_model_are_the_same() -> None:
    model = randomize_(Net())
    before = {name: value.clone() for name, value in lora.lora_state_dict(model, "all").items()}
    after = lora.lora_state_dict(model.eval(), "all")
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value)


def test_a_layer_that_two_modules_hold() -> None:
    layer = lora.Linear(3, 3, r=1)
    model = nn.ModuleDict({"a": layer, "b": layer})
    lora.mark_only_lora_as_trainable(model, "lora_only")
    assert trained(model) == ["a.bias", "a.lora_A", "a.lora_B"]
    state = lora.lora_state_dict(model, "lora_only")
    assert set(state) == {f"{m}.{leaf}" for m in "ab" for leaf in ("lora_A", "lora_B", "bias")}
    assert state["a.lora_A"].data_ptr() == state["b.lora_A"].data_ptr()


def test_a_bare_layer_and_a_model_without_any() -> None:
    layer, plain = lora.Linear(3, 3, r=1), nn.Linear(3, 3)
    lora.mark_only_lora_as_trainable(layer)
    assert trained(layer) == list(lora.lora_state_dict(layer)) == ["lora_A", "lora_B"]
    lora.mark_only_lora_as_trainable(plain)
    assert trained(plain) == list(lora.lora_state_dict(plain)) == []


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    lora.mark_only_lora_as_trainable(model, "lora_only")
    state = lora.lora_state_dict(model, "lora_only")
    assert set(state) == set(trained(model))
    assert all(value.is_meta for value in state.values())


def test_the_error_is_of_both_kinds() -> None:
    assert issubclass(UnknownBiasError, ValueError)
    assert issubclass(UnknownBiasError, NotImplementedError)

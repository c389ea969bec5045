"""States and writes that say nothing of a merge, recognised by what they are."""

import copy
import gc
import io
import itertools
import logging
import types
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import loaded_state, saved_state, sums
from lora_fast.testing import randomize_

SPLIT = {"enable_lora": [True, False, True]}
MAKERS = {
    "linear": lambda lib: lib.Linear(6, 8, r=2, lora_alpha=3),
    "transposed": lambda lib: lib.Linear(6, 8, r=2, fan_in_fan_out=True),
    "merged_linear": lambda lib: lib.MergedLinear(6, 9, r=2, **SPLIT),
    "embedding": lambda lib: lib.Embedding(7, 6, r=2),
    "conv2d": lambda lib: lib.Conv2d(4, 6, 3, r=2),
}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def owner(layer: Any) -> Any:
    return getattr(layer, "conv", layer)


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which carry no mark; what a file of safetensors holds."""
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("saved_by", [lora, loralib], ids=["lora_fast", "loralib"])
def test_a_merged_state_without_a_mark(
    name: str, saved_by: Any, training: bool, dtype: torch.dtype, backend: str
) -> None:
    """The best epoch of a run, say, after the adapter has learned on: the base is the same."""
    layer, source = randomize_(MAKERS[name](lora)).to(dtype), MAKERS[name](saved_by).to(dtype)
    base = owner(layer).weight.detach().clone()
    state = plain(layer.state_dict())
    factors = {k: torch.randn_like(v) for k, v in state.items() if "lora_" in k}
    source.load_state_dict(state | factors, strict=False)  # loralib's mask is a buffer
    source.eval()
    layer.train(training)
    layer.load_state_dict(plain(source.state_dict()), strict=False)
    assert layer.merged is not training
    if not training:
        torch.testing.assert_close(owner(layer).weight, owner(source).weight, rtol=0.05, atol=0.05)
    layer.train()
    assert torch.equal(owner(layer).weight, base)
    assert all(torch.equal(layer.state_dict()[key], factors[key]) for key in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_merged_state_of_its_own_after_the_base_has_learned(
    name: str, training: bool, dtype: torch.dtype, backend: str
) -> None:
    """The best epoch of a run in which the base weights were trained, too."""
    layer = randomize_(MAKERS[name](lora)).to(dtype)
    states = []
    for _ in range(3):
        states.append((plain(layer.eval().state_dict()), layer.effective_weight().clone()))
        layer.train()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
    unmerged = plain(layer.state_dict())
    for state, merged in states:
        layer.train(training).load_state_dict(state)
        assert layer.merged is not training
        torch.testing.assert_close(layer.effective_weight(), merged, rtol=0.05, atol=0.05)
        layer.load_state_dict(unmerged)
        assert torch.equal(owner(layer.train()).weight, unmerged[layer._weight_key()])


def test_a_merged_weight_of_its_own_with_other_factors_is_a_base() -> None:
    """Of these it is no sum: somebody has folded an adapter, and begun another."""
    layer = randomize_(lora.Linear(6, 8, r=2))
    state = plain(layer.eval().state_dict())
    with torch.no_grad():
        layer.train().weight.add_(1.0)
    state |= {k: torch.randn_like(v) for k, v in state.items() if "lora_" in k}
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])


def test_who_changes_a_states_mark_changes_no_memory_of_it() -> None:
    layer = randomize_(lora.Linear(6, 8, r=2))
    merged = layer.effective_weight().detach()
    state = layer.eval().state_dict()
    values = plain(state)
    for element in state._metadata[""]["lora_sample"]:
        element[2] += 1.0
    with torch.no_grad():
        layer.train().weight.add_(1.0)
    layer.load_state_dict(values)
    torch.testing.assert_close(layer.effective_weight().detach(), merged)


def test_the_oldest_of_many_merged_states_is_forgotten() -> None:
    layer = randomize_(lora.Linear(6, 8, r=2))
    for _ in range(saved_state._GIVEN + 5):
        layer.eval().state_dict()
        layer.state_dict()
        with torch.no_grad():
            layer.train().lora_B.add_(1.0)
    given = layer.__dict__["_given_merged"]
    assert len(given) == saved_state._GIVEN
    assert all(a != b for a, b in itertools.pairwise(given))
    assert "_given_merged" not in copy.deepcopy(layer).__dict__


def test_another_base_without_a_mark_is_a_base(name: str, backend: str) -> None:
    layer, other = (randomize_(MAKERS[name](lora)) for _ in range(2))
    state = plain(other.state_dict())
    layer.eval().load_state_dict(state)
    assert torch.equal(owner(layer.train()).weight, owner(other).weight)


def test_another_base_in_the_state_of_a_merged_layer(name: str, backend: str) -> None:
    """The mark is of the weight that was there."""
    layer, other = (randomize_(MAKERS[name](lora)) for _ in range(2))
    state = layer.eval().state_dict()
    state.update({key: v.clone() for key, v in other.state_dict().items() if "lora" not in key})
    layer.load_state_dict(state)
    assert torch.equal(owner(layer.train()).weight, owner(other).weight)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_merged_base_without_the_factors_that_are_here(
    name: str, backend: str, evaluates: bool
) -> None:
    """As of a state that was cut in two, adapter and base."""
    layer = randomize_(MAKERS[name](lora))
    base = owner(layer).weight.detach().clone()
    part = copy.deepcopy(layer.eval().state_dict())
    for key in ("lora_A", "lora_B"):
        del part[key]
    layer.train(not evaluates).load_state_dict(part, strict=False)
    assert torch.equal(owner(layer.train()).weight, base)


def test_a_weight_alone_that_was_merged_for_good(name: str, backend: str) -> None:
    """Without a mark and without factors it is what it is, as ReLoRA loads it."""
    layer = randomize_(MAKERS[name](lora))
    merged = layer.effective_weight().detach().clone()
    key = "conv.weight" if hasattr(layer, "conv") else "weight"
    layer.load_state_dict({key: merged}, strict=False)
    assert torch.equal(owner(layer).weight, merged)


def test_a_plain_convolutions_state_put_into_a_saved_one() -> None:
    layer, pretrained = lora.Conv2d(4, 6, 3, r=2), nn.Conv2d(4, 6, 3)
    saved = plain(layer.state_dict())
    saved.update(pretrained.state_dict())
    layer.load_state_dict(saved)
    assert torch.equal(layer.conv.weight, pretrained.weight)
    assert torch.equal(layer.conv.bias, pretrained.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_merged_weight_in_another_dtype(name: str, backend: str, dtype: torch.dtype) -> None:
    layer = randomize_(MAKERS[name](lora))
    base = owner(layer).weight.detach().clone()
    state = layer.eval().state_dict()
    state.update({key: v.to(dtype) for key, v in state.items() if "lora" not in key})
    layer.load_state_dict(state)
    torch.testing.assert_close(owner(layer.train()).weight, base, rtol=0.02, atol=0.02)


def test_a_marked_state_of_an_unmerged_layer_is_believed() -> None:
    """Somebody folds by hand, keeps the factors, and saves in training mode."""
    layer = randomize_(lora.Linear(6, 8, r=2))
    with torch.no_grad():
        layer.weight += layer.scaling * layer.lora_B @ layer.lora_A
    state, other = layer.state_dict(), randomize_(lora.Linear(6, 8, r=2))
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("marked", [True, False])
def test_users_of_loralib_say_by_hand_that_what_they_loaded_is_merged(
    marked: bool, backend: str
) -> None:
    layer = randomize_(lora.Linear(6, 8, r=2))
    x, base = torch.randn(3, 6), layer.weight.detach().clone()
    y = layer(x)
    file = io.BytesIO()
    state = layer.eval().state_dict()
    torch.save(state if marked else plain(state), file)
    file.seek(0)
    other = lora.Linear(6, 8, r=2)
    with torch.no_grad():
        other.weight.copy_(base)
    other.load_state_dict(torch.load(file))
    other.merged = True
    assert other.merged
    torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(other.train()(x), y)
    assert torch.equal(other.weight, base)
    other.merged = True  # no longer about that file: what loralib does
    assert other._merge_state.record is None


def test_factors_of_other_kinds_are_saved() -> None:
    class Tasks(lora.Linear):
        def __init__(self) -> None:
            super().__init__(6, 8, r=2, merge_weights=False)
            self.scaling = {"a": 1.0, "b": 2.0}

    class Unscaled(lora.Linear):
        def __init__(self) -> None:
            super().__init__(6, 8, r=2, merge_weights=False)
            del self.scaling

    vector = lora.Linear(6, 8, r=2, merge_weights=False)
    vector.scaling = torch.linspace(0.1, 1.0, 8)
    for layer in (Tasks(), Unscaled(), vector):
        state = layer.state_dict()
        assert list(state) == ["weight", "bias", "lora_A", "lora_B"]
        assert "lora_scaling" not in state._metadata[""]
        assert layer.load_state_dict(state).missing_keys == []


def test_a_factor_that_changes_while_merged(backend: str) -> None:
    layer = randomize_(lora.Linear(6, 8, r=2))
    base = layer.weight.detach().clone()
    layer.scaling = nn.Parameter(torch.tensor(0.5))
    assert layer.eval().merged
    with torch.no_grad():
        layer.scaling.mul_(3.0)
    assert torch.equal(layer.train().weight, base)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_write_that_torch_does_not_count(backend: str, autocast: bool) -> None:
    """Pretrained weights copied in through `.data` after `eval()`."""
    layer, pretrained = randomize_(lora.Linear(6, 8, r=2)), torch.randn(8, 6)
    layer.eval()
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    layer.weight.data.copy_(pretrained)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer.train()
    torch.testing.assert_close(layer.weight, pretrained - delta)


def test_who_is_left_unmerged_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = randomize_(lora.Linear(6, 8, r=2))
    holder = nn.Linear(6, 8)
    holder.weight = layer.weight
    with caplog.at_level(logging.DEBUG, logger="lora_fast.merge"):
        for _ in range(3):
            layer.eval().train()
    told = [record for record in caplog.records if "stays unmerged" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING, logging.DEBUG, logging.DEBUG]
    assert "effective_weight()" in told[0].getMessage()
    del holder
    assert layer.eval().merged


def test_what_nobody_can_reach_holds_no_weight() -> None:
    layer, old = randomize_(lora.Linear(6, 8, r=2)), nn.Linear(6, 8)
    layer.weight = old.weight
    old.forward = types.MethodType(lambda self, x: x, old)  # a cycle
    gc.disable()
    try:
        del old
        assert layer.eval().merged
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half], ids=str
)
def test_a_sum_is_told_from_its_neighbours(dtype: torch.dtype) -> None:
    base, lora_A, lora_B = (torch.randn(size).to(dtype) for size in ((40, 30), (4, 30), (40, 4)))
    base[0, 0], base[1, 1] = float("inf"), float("nan")
    exact = base.double() + 0.7 * lora_B.double() @ lora_A.double()
    theirs = base + (lora_B @ lora_A) * 0.7  # loralib's order of roundings
    for weight in (exact.to(dtype), theirs):
        assert sums.is_sum(weight, base, lora_A, lora_B, 0.7)
        assert not sums.is_sum(weight, base, lora_A, lora_B, 0.75)
        assert not sums.is_sum(weight, base, lora_A, lora_B, 0.0)
        weight[2, 3] += 100 * torch.finfo(dtype).eps * (1.0 + weight[2, 3].abs())
        assert not sums.is_sum(weight, base, lora_A, lora_B, 0.7)


@pytest.mark.parametrize("zeros", [0.0, 0.3])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half], ids=str
)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_layer_takes_its_own_merged_weight_for_anothers(
    kind: str, dtype: torch.dtype, size: float, zeros: float, backend: str
) -> None:
    """A copy is thrown away where it seems that somebody wrote to the weight: never by mistake."""
    for seed in range(5):
        torch.manual_seed(seed)
        layer: Any = lora.Linear(96, 128, r=4) if kind == "linear" else lora.Conv1d(32, 64, 3, r=4)
        layer = layer.to(dtype)
        weight = layer.weight if kind == "linear" else layer.conv.weight
        with torch.no_grad():
            layer.lora_B.normal_().mul_(size)
            weight[torch.rand(weight.shape) < zeros] = 0.0
        base = weight.detach().clone()
        del weight  # of which nobody else must know, or each merge looks for who does
        for merged in (copy.deepcopy(layer.eval()), layer):
            merged.train()
            restored = merged.weight if kind == "linear" else merged.conv.weight
            assert torch.equal(restored, base)


def test_a_delta_that_rounding_hides_is_taken_out_of_the_layers_own_state() -> None:
    for seed in range(100):
        torch.manual_seed(seed)
        layer = lora.Linear(16, 12, r=2, lora_alpha=2, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.lora_B.normal_().mul_(1e-4)
        base = layer.weight.detach().clone()
        best = copy.deepcopy(layer.eval().state_dict())
        layer.train()
        with torch.no_grad():
            layer.lora_A.add_(1)
        layer.load_state_dict(best)
        assert torch.equal(layer.weight, base)


def test_a_merged_state_of_another_base_is_told_of_in_eval_mode(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells that it is merged; the remedy that the log names works."""
    monkeypatch.setattr(loaded_state, "_told", set())
    source = nn.Sequential(*(randomize_(loralib.Linear(6, 6, r=2)) for _ in range(2))).eval()
    x, state = torch.randn(3, 6), plain(source.state_dict())
    model = nn.Sequential(*(lora.Linear(6, 6, r=2) for _ in range(2)))
    with caplog.at_level(logging.WARNING, "lora_fast.merge"):
        model.load_state_dict(state)
        model.eval().load_state_dict(plain(model.train().state_dict()))
        model.load_state_dict(lora.lora_state_dict(model), strict=False)
        assert not caplog.records  # loaded in train mode; its own; an adapter alone
        model.eval().load_state_dict({k: v + 1 for k, v in state.items()})
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["0.weight"]
    assert "load it in train mode, set merged = True" in caplog.text
    model.train().load_state_dict(state)
    for layer in model:
        layer.merged = True
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_own_merged_state_under_another_scaling(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    """The mark says by which scaling it was merged, so no bit of the base is lost."""
    layer = randomize_(MAKERS[name](lora)).to(dtype)
    base = owner(layer).weight.detach().clone()
    state = copy.deepcopy(layer.eval().state_dict())
    layer.train().scaling = 2.0
    with pytest.warns(UserWarning, match="saved with scaling"):
        layer.load_state_dict(state)
    assert torch.equal(owner(layer).weight, base)


@pytest.mark.parametrize(
    "make", [lambda: lora.Linear(8, 8, r=2), lambda: lora.Conv2d(4, 4, 3, r=2)]
)
@pytest.mark.parametrize("marked", [False, True])
def test_all_objects_are_looked_through_once_in_a_load(
    make: Any, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for each layer: in a process of a million objects that takes a tenth of a second."""
    model = randomize_(nn.Sequential(*(make() for _ in range(5)))).eval()
    state = copy.deepcopy(model.state_dict())
    searches, search = [], gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: searches.append(1) or search())
    model.load_state_dict(state if marked else plain(state))
    assert len(searches) <= 1
    assert all(layer.merged for layer in model)

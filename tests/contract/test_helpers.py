"""`mark_only_lora_as_trainable` and `lora_state_dict`, on models where loralib's are right."""

from collections.abc import Callable
from types import ModuleType

import loralib
import pytest
import torch
from torch import nn

import lora_fast

LIBRARIES = [lora_fast, loralib]
MODES = ["none", "all", "lora_only"]
QKV = {"enable_lora": [True, False, True]}


def encoder(library: ModuleType, r: int = 2) -> nn.Module:
    """Adapted and plain layers, nested; every biased LoRA layer has an adapter."""
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {
            "attention": library.MergedLinear(6, 18, r=r, **QKV),
            "norm": nn.LayerNorm(6),
            "out": nn.Linear(6, 6),
            "up": library.Linear(6, 12, r=r, lora_dropout=0.1),
            "down": library.Linear(12, 6, r=r, bias=False),
        }
    )
    return nn.ModuleDict(
        {
            "embed": library.Embedding(11, 6, r=r),
            "blocks": nn.ModuleList([block, nn.Sequential(library.Linear(6, 6, r=r))]),
            "conv": library.Conv2d(1, 2, 3, r=r, bias=False),
            "plain_embed": library.Embedding(5, 6),
            "head": nn.Linear(6, 3),
        }
    )


def plain(library: ModuleType) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


def a_layer(library: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return library.Linear(4, 6, r=2)


def biased_conv(library: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(library.Conv2d(1, 2, 3, r=1), library.Conv1d(2, 2, 1))


def without_adapters(library: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(library.Embedding(5, 4), library.Linear(4, 4, bias=False))


MODELS = {
    "encoder": encoder,
    "plain": plain,
    "a layer": a_layer,
    "convolutions": biased_conv,
    "without adapters": without_adapters,
}
# There loralib's `lora_only` neither trains nor saves the convolution's bias.
CASES = [
    (name, mode)
    for name in MODELS
    for mode in MODES
    if (name, mode) != ("convolutions", "lora_only")
]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("model", "mode"), CASES)
def test_the_same_parameters_are_trained(model: str, mode: str) -> None:
    ours, theirs = (MODELS[model](library) for library in LIBRARIES)
    assert lora_fast.mark_only_lora_as_trainable(ours, bias=mode) is None
    assert loralib.mark_only_lora_as_trainable(theirs, bias=mode) is None
    assert trainable(ours) == trainable(theirs)


@pytest.mark.parametrize(("model", "mode"), CASES)
def test_the_same_entries_are_saved(model: str, mode: str) -> None:
    ours, theirs = (MODELS[model](library) for library in LIBRARIES)
    mine = lora_fast.lora_state_dict(ours, bias=mode)
    its = loralib.lora_state_dict(theirs, bias=mode)
    assert type(mine) is type(its) is dict
    assert list(mine) == list(its)
    for key, value in its.items():
        assert type(mine[key]) is type(value)
        assert not mine[key].requires_grad
        if model != "plain":  # whose values are not seeded
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_can_be_positional(mode: str) -> None:
    models = [encoder(library) for library in LIBRARIES]
    for library, model in zip(LIBRARIES, models, strict=True):
        library.mark_only_lora_as_trainable(model, mode)
    assert trainable(models[0]) == trainable(models[1])
    keys = [list(lib.lora_state_dict(m, mode)) for lib, m in zip(LIBRARIES, models, strict=True)]
    assert keys[0] == keys[1]


def test_the_default_mode_is_none() -> None:
    model = encoder(lora_fast)
    lora_fast.mark_only_lora_as_trainable(model)
    names = trainable(model)
    assert names
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in names)
    assert list(lora_fast.lora_state_dict(model)) == names


@pytest.mark.parametrize("helper", ["mark_only_lora_as_trainable", "lora_state_dict"])
def test_an_unknown_mode_is_refused(helper: str) -> None:
    for library in LIBRARIES:
        with pytest.raises(NotImplementedError):
            getattr(library, helper)(encoder(library), "biases")


def test_the_layers_of_each_library_are_served_by_both_sets_of_helpers() -> None:
    for mode in ("none", "all"):
        ours, theirs = (encoder(library) for library in LIBRARIES)
        lora_fast.mark_only_lora_as_trainable(theirs, mode)
        loralib.mark_only_lora_as_trainable(ours, mode)
        assert trainable(ours) == trainable(theirs)
        assert list(loralib.lora_state_dict(ours, mode)) == list(
            lora_fast.lora_state_dict(theirs, mode)
        )


@pytest.mark.parametrize("mode", MODES)
def test_entries_are_the_models_own_tensors(mode: str) -> None:
    for library in LIBRARIES:
        model = encoder(library)
        state, full = library.lora_state_dict(model, mode), model.state_dict()
        assert state
        for key, value in state.items():
            assert value.data_ptr() == full[key].data_ptr(), key


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "module.": nn.DataParallel,
    "_orig_mod.": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_prefixes_are_kept(prefix: str, mode: str) -> None:
    ours, theirs = (WRAPPERS[prefix](encoder(library)) for library in LIBRARIES)
    mine = lora_fast.lora_state_dict(ours, mode)
    assert list(mine) == list(loralib.lora_state_dict(theirs, mode))
    assert all(key.startswith(prefix) for key in mine)
    lora_fast.mark_only_lora_as_trainable(ours, mode)
    loralib.mark_only_lora_as_trainable(theirs, mode)
    assert trainable(ours) == trainable(theirs)


def test_marking_twice_is_marking_once() -> None:
    for library in LIBRARIES:
        model = encoder(library)
        library.mark_only_lora_as_trainable(model, "all")
        library.mark_only_lora_as_trainable(model, "none")
        assert trainable(model) == list(library.lora_state_dict(model))


def test_a_frozen_adapter_stays_frozen() -> None:
    models = [encoder(library).requires_grad_(False) for library in LIBRARIES]
    for library, model in zip(LIBRARIES, models, strict=True):
        library.mark_only_lora_as_trainable(model, "lora_only")
    assert trainable(models[0]) == trainable(models[1])
    assert not any("lora_" in name for name in trainable(models[0]))


def test_users_own_subclasses_of_the_mixin_count() -> None:
    """A layer that a user wrote on `LoRALayer`, with parameters named as the library's."""
    found = []
    for library in LIBRARIES:

        class Scaled(nn.Module, library.LoRALayer):
            def __init__(self, mixin: type = library.LoRALayer) -> None:
                nn.Module.__init__(self)
                mixin.__init__(self, r=2, lora_alpha=1, lora_dropout=0.0, merge_weights=False)
                self.lora_A = nn.Parameter(torch.zeros(2, 3))
                self.weight = nn.Parameter(torch.zeros(3))
                self.bias = nn.Parameter(torch.zeros(3))

        model = nn.Sequential(Scaled(), nn.Linear(3, 3))
        library.mark_only_lora_as_trainable(model, "lora_only")
        found.append((trainable(model), list(library.lora_state_dict(model, "lora_only"))))
    assert found[0] == found[1] == (["0.lora_A", "0.bias"], ["0.lora_A", "0.bias"])

"""Which parameters the helpers train and save."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from torch import nn

import lora_fast as lora

HELPERS: dict[str, Callable[..., Any]] = {
    "mark": lora.mark_only_lora_as_trainable,
    "state": lora.lora_state_dict,
}


def trained(model: nn.Module, bias: str = "none", lib: ModuleType = lora) -> list[str]:
    """Names of the parameters that are trainable once `lib` has marked the model."""
    assert lib.mark_only_lora_as_trainable(model, bias) is None
    return [name for name, p in model.named_parameters() if p.requires_grad]


def saved(model: nn.Module, bias: str = "none", lib: ModuleType = lora) -> list[str]:
    return list(lib.lora_state_dict(model, bias))


def named(name: str) -> nn.Module:
    """A model with a module and a parameter whose names only look like an adapter's."""
    model = nn.ModuleDict({name: nn.Linear(2, 2), "b": lora.Linear(2, 2, r=1)})
    model.register_parameter("flora_A", nn.Parameter(torch.zeros(2)))
    return model


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("name", ["flora_net", "lora_net", "my_lora_", "lora_A"])
def test_b25_only_parameters_whose_own_name_begins_with_lora(name: str, bias: str) -> None:
    model = named(name)
    expected = {"b.lora_A", "b.lora_B"}
    if bias == "all":
        expected |= {f"{name}.bias", "b.bias"}
    elif bias == "lora_only":
        expected |= {"b.bias"}
    assert set(trained(model, bias)) == expected
    assert set(saved(model, bias)) == expected


def experts(lib: ModuleType) -> nn.Module:
    """A layer with several adapters in the place of one, as for several tasks."""

    class Experts(nn.Linear, lib.LoRALayer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            nn.Linear.__init__(self, 4, 4)
            lib.LoRALayer.__init__(self, 2, 1, 0.0, False)
            self.lora_A = nn.ParameterList([torch.zeros(2, 4) for _ in range(2)])
            self.lora_B = nn.ModuleList([nn.Linear(2, 4, bias=False) for _ in range(2)])
            self.lora_route = nn.Linear(4, 2)

    return nn.ModuleDict({"lora_A": nn.Linear(2, 2), "body": Experts()})


def test_b25_a_layer_under_two_names_is_saved_under_both() -> None:
    model = experts(lora)
    model["again"] = model["body"]
    names = {name.removeprefix("again.") for name in saved(model) if name.startswith("again.")}
    assert (
        names == {name.removeprefix("body.") for name in saved(model) if "body." in name} != set()
    )


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_b25_what_a_lora_layer_holds_in_the_place_of_a_parameter(bias: str) -> None:
    found = set(trained(experts(lora), bias))
    assert {"body.lora_A.1", "body.lora_B.0.weight", "body.lora_route.bias"} <= found
    assert not {"body.weight", "lora_A.weight"} & found
    assert set(saved(experts(lora), bias)) == found
    theirs = trained(experts(loralib), bias, loralib)
    assert found - {"lora_A.bias"} == {name for name in theirs if name.startswith("body.")}


def test_b25_every_layer_is_found(case: Any) -> None:
    model = nn.ModuleDict({"body": nn.ModuleList([case.build(), nn.Linear(2, 2)])})
    expected = ["body.0.lora_A", "body.0.lora_B"]
    assert trained(model) == expected
    assert saved(model) == expected


def test_b25_loralib_trains_and_saves_the_lookalike() -> None:
    model = nn.ModuleDict({"flora_net": nn.Linear(2, 2), "b": loralib.Linear(2, 2, r=1)})
    assert "flora_net.weight" in trained(model, lib=loralib)
    assert "flora_net.weight" in saved(model, lib=loralib)


def biased() -> nn.Module:
    model = nn.ModuleDict(
        {
            "rel_bias_mlp": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
            "attention": nn.MultiheadAttention(2, 1),
            "lstm": nn.LSTM(2, 2),
            "conv": lora.Conv2d(2, 2, 1, r=1),
            "off": lora.Linear(2, 2),
        }
    )
    model.register_parameter("unbiased", nn.Parameter(torch.zeros(2)))
    return model


def test_b26_all_biases_are_those_that_are_called_so() -> None:
    """A module called bias-something has a weight too; biases such as in_proj_bias count."""
    expected = {
        "rel_bias_mlp.bias",
        "norm.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "conv.conv.bias",
        "off.bias",
        "conv.lora_A",
        "conv.lora_B",
    }
    assert set(trained(biased(), "all")) >= expected
    assert set(saved(biased(), "all")) >= expected
    weights = {"rel_bias_mlp.weight", "norm.weight", "off.weight", "unbiased"}
    assert not weights & set(trained(biased(), "all"))
    assert not weights & set(saved(biased(), "all"))


def test_b26_what_is_trained_is_what_is_saved() -> None:
    for bias in ("none", "all", "lora_only"):
        assert set(trained(biased(), bias)) == set(saved(biased(), bias))


def test_b26_loralib_trains_a_weight() -> None:
    model = nn.ModuleDict({"rel_bias_mlp": nn.Linear(2, 2)})
    assert trained(model, "all", loralib) == ["rel_bias_mlp.weight", "rel_bias_mlp.bias"]


def test_b27_a_layer_without_adapter_does_not_train_its_bias(case: Any) -> None:
    """What "lora_only" trains is saved, and the other way round."""
    off = lora.Linear(2, 2, r=0)
    none_enabled = lora.MergedLinear(2, 2, r=1, enable_lora=[False])
    model = nn.ModuleDict({"off": off, "none": none_enabled, "on": case.build()})
    expected = {"on.lora_A", "on.lora_B"}
    if case.name != "embedding":
        expected.add("on.conv.bias" if case.name.startswith("conv") else "on.bias")
    assert set(trained(model, "lora_only")) == expected
    assert set(saved(model, "lora_only")) == expected


def test_b27_loralib_loses_what_it_trained() -> None:
    model = nn.ModuleDict({"a": loralib.Linear(2, 2), "b": loralib.Linear(2, 2, r=1)})
    assert "a.bias" in trained(model, "lora_only", loralib)
    assert "a.bias" not in saved(model, "lora_only", loralib)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_b28_the_bias_of_a_convolution_counts(conv_case: Any, bias: str) -> None:
    model = nn.Sequential(conv_case.build())
    expected = ["0.lora_A", "0.lora_B", "0.conv.bias"]
    assert sorted(trained(model, bias)) == sorted(expected)
    assert sorted(saved(model, bias)) == sorted(expected)
    model(conv_case.input()).sum().backward()
    assert model[0].conv.bias.grad is not None
    assert model[0].conv.weight.grad is None


def test_b28_the_bias_of_a_convolution_is_loaded_back(conv_case: Any) -> None:
    source, target = conv_case.build(), conv_case.build()
    target.load_state_dict(lora.lora_state_dict(source, "lora_only"), strict=False)
    assert torch.equal(target.bias, source.bias)
    assert torch.equal(target.lora_B, source.lora_B)


def test_b28_a_convolution_without_bias(conv_case: Any) -> None:
    model = nn.Sequential(conv_case.build(bias=False))
    assert trained(model, "lora_only") == saved(model, "lora_only") == ["0.lora_A", "0.lora_B"]


def test_b28_loralib_forgets_it() -> None:
    model = nn.Sequential(loralib.Conv2d(2, 2, 1, r=1))
    assert trained(model, "lora_only", loralib) == ["0.lora_A", "0.lora_B"]
    assert saved(model, "lora_only", loralib) == ["0.lora_A", "0.lora_B"]


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError])
@pytest.mark.parametrize("bias", ["nope", "", "None", "ALL", "lora", None])
@pytest.mark.parametrize("helper", HELPERS)
def test_b29_an_unknown_bias_mode_is_refused_and_nothing_frozen(
    helper: str, bias: Any, kind: type[Exception]
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), lora.Linear(2, 2, r=1), lora.Conv1d(2, 2, 1, r=1))
    model[1].bias.requires_grad = False
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match="bias must be one of none, all, lora_only, got") as caught:
        HELPERS[helper](model, bias)
    assert repr(bias) in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == before


def test_b29_loralib_freezes_and_then_refuses() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"^$"):
        loralib.mark_only_lora_as_trainable(model, "nope")
    assert not model.weight.requires_grad


@pytest.mark.parametrize("lib", [lora, loralib], ids=["lora_fast", "loralib"])
def test_b30_frozen_adapters_stay_frozen(old_case: Any, lib: ModuleType) -> None:
    """Mirrored: who froze an adapter before, wants it frozen."""
    model = nn.ModuleList([old_case.build(lib).requires_grad_(False), old_case.build(lib)])
    assert trained(model, lib=lib) == ["1.lora_A", "1.lora_B"]
    assert len(saved(model, lib=lib)) == 4


class AsPeft(nn.Module):
    """A layer as PEFT wraps one, with two adapters by name."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 6)
        self.lora_A = nn.ModuleDict({name: nn.Linear(4, 2, bias=False) for name in "ab"})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, 6, bias=False) for name in "ab"})
        self.lora_embedding_A = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 4))})


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_b25_adapters_of_peft_beside_ours(bias: Any) -> None:
    found = []
    for library in (loralib, lora):
        model = nn.Sequential(library.Linear(4, 4, r=2), AsPeft(), nn.Linear(6, 6))
        library.mark_only_lora_as_trainable(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        found.append((trained, set(library.lora_state_dict(model))))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2 + 5

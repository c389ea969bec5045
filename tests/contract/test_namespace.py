"""Names, signatures, bases and attributes: what code written for loralib reaches for."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import loralib
import pytest
import torch
from torch import nn

import lora_fast

CLASSES = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
)
FUNCTIONS = ("lora_state_dict", "mark_only_lora_as_trainable")
# What lora_fast takes besides loralib's arguments; it stands behind them.
ADDED = {"MergedLinear": ("out_splits",)}
MISSING = object()


def parameters(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """Name, kind and default of every argument; a mutable default and its tuple are the same."""
    found = []
    for p in inspect.signature(function).parameters.values():
        default = tuple(p.default) if isinstance(p.default, list) else p.default
        found.append((p.name, p.kind, default))
    return found


def of_both(cls: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return getattr(lora_fast, cls)(*args, **kwargs), getattr(loralib, cls)(*args, **kwargs)


@pytest.mark.parametrize("name", CLASSES + FUNCTIONS)
def test_names(name: str) -> None:
    submodule = "utils" if name in FUNCTIONS else "layers"
    for library in (loralib, lora_fast):
        assert getattr(getattr(library, submodule), name) is getattr(library, name)
    assert callable(getattr(lora_fast, name))


def test_these_are_all_of_loralibs_names() -> None:
    own = {
        name
        for name, value in vars(loralib).items()
        if getattr(value, "__module__", "").startswith("loralib")
    }
    assert own == {*CLASSES, *FUNCTIONS}


def test_the_packages_name() -> None:
    assert lora_fast.name == loralib.name == "lora"


@pytest.mark.parametrize("submodule", ["layers", "utils"])
def test_submodules(submodule: str) -> None:
    assert importlib.import_module(f"lora_fast.{submodule}") is getattr(lora_fast, submodule)
    assert inspect.ismodule(getattr(loralib, submodule))


def test_a_star_import_has_the_layers_and_helpers() -> None:
    scope: dict[str, Any] = {}
    exec("from lora_fast import *", scope)
    assert {*CLASSES, *FUNCTIONS, "layers", "utils"} <= scope.keys()


def test_utils_has_the_mixin_as_in_loralib() -> None:
    assert lora_fast.utils.LoRALayer is lora_fast.LoRALayer
    assert loralib.utils.LoRALayer is loralib.LoRALayer


@pytest.mark.parametrize("cls", CLASSES)
def test_constructor_signatures(cls: str) -> None:
    mine = parameters(getattr(lora_fast, cls).__init__)
    its = parameters(getattr(loralib, cls).__init__)
    added = ADDED.get(cls, ())
    assert [p for p in mine if p[0] not in added] == its
    if added:
        names = [p[0] for p in mine]
        assert names.index(added[0]) == names.index("merge_weights") + 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_helper_signatures(function: str) -> None:
    assert parameters(getattr(lora_fast, function)) == parameters(getattr(loralib, function))


METHODS = [
    (cls, method)
    for cls in CLASSES
    if cls != "LoRALayer"
    for method in ("forward", "train", "eval", "reset_parameters", "zero_pad", "merge_AB")
    if hasattr(getattr(loralib, cls), method)
]


@pytest.mark.parametrize(("cls", "method"), METHODS)
def test_method_signatures(cls: str, method: str) -> None:
    mine, its = (getattr(getattr(library, cls), method) for library in (lora_fast, loralib))
    assert parameters(mine) == parameters(its)


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_the_input_can_be_named_x(cls: str) -> None:
    layer = getattr(lora_fast, cls)(*(4, 6, 3) if cls == "Conv2d" else (4, 6), r=0)
    x = {"Embedding": torch.tensor([1]), "Conv2d": torch.randn(4, 5, 5)}.get(cls, torch.randn(4))
    assert torch.equal(layer(x=x), layer(x))


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
def test_the_third_argument_is_the_rank(cls: str) -> None:
    blocks = {"enable_lora": [True]} if cls == "MergedLinear" else {}
    ours, theirs = of_both(cls, 5, 6, 3, 9, 0.25, **blocks)
    assert ours.r == theirs.r == 3
    assert ours.lora_alpha == theirs.lora_alpha == 9
    assert ours.lora_dropout.p == theirs.lora_dropout.p == 0.25


def test_a_convolutions_fourth_argument_is_the_rank() -> None:
    ours, theirs = of_both("Conv2d", 3, 8, 3, 1, 1)
    assert ours.r == theirs.r == 1
    assert ours.conv.stride == theirs.conv.stride == (1, 1)
    assert ours.conv.padding == theirs.conv.padding == (0, 0)


def test_an_embeddings_third_argument_is_the_rank() -> None:
    ours, theirs = of_both("Embedding", 10, 4, 0)
    assert ours.r == theirs.r == 0
    assert ours.padding_idx is theirs.padding_idx is None


def test_an_embedding_has_no_dropout() -> None:
    for library in (lora_fast, loralib):
        with pytest.raises(TypeError, match="lora_dropout"):
            library.Embedding(4, 4, r=2, lora_dropout=0.1)


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_an_unknown_keyword_is_refused(cls: str) -> None:
    for library in (lora_fast, loralib):
        with pytest.raises(TypeError, match="rank"):
            getattr(library, cls)(*(4, 6, 3) if cls == "Conv2d" else (4, 6), rank=2)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_conv_lora_takes_the_module_first(conv: type[nn.Module]) -> None:
    ours, theirs = of_both("ConvLoRA", conv, 2, 4, 1, 3, 6, 0.0, False, stride=2)
    assert type(ours.conv) is type(theirs.conv) is conv
    assert (ours.r, ours.lora_alpha, ours.merge_weights) == (3, 6, False)
    assert ours.conv.stride == theirs.conv.stride


def test_a_subclass_can_use_the_mixin_alone() -> None:
    for library in (lora_fast, loralib):
        mixin = library.LoRALayer(4, 8, 0.0, True)
        assert not isinstance(mixin, nn.Module)
        assert (mixin.r, mixin.lora_alpha, mixin.merged, mixin.merge_weights) == (4, 8, False, True)
        assert mixin.lora_dropout("x") == "x"
        assert isinstance(library.LoRALayer(4, 8, 0.5, True).lora_dropout, nn.Dropout)


@pytest.mark.parametrize("cls", CLASSES)
def test_bases(cls: str) -> None:
    bases = (nn.Module, nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    mine, its = getattr(lora_fast, cls), getattr(loralib, cls)
    assert [issubclass(mine, b) for b in bases] == [issubclass(its, b) for b in bases]
    for other in CLASSES:
        expected = issubclass(its, getattr(loralib, other))
        assert issubclass(mine, getattr(lora_fast, other)) == expected, other


def test_every_layer_is_a_lora_layer_also_without_an_adapter(drawn: Any) -> None:
    for settings in (drawn, drawn.but(r=0)):
        assert isinstance(settings.build(lora_fast), lora_fast.LoRALayer)


ATTRIBUTES = (
    "r",
    "lora_alpha",
    "scaling",
    "merged",
    "merge_weights",
    "fan_in_fan_out",
    "enable_lora",
    "training",
    "in_features",
    "out_features",
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "scale_grad_by_freq",
    "sparse",
)


def test_attributes(drawn: Any) -> None:
    ours, theirs = drawn.build(lora_fast), drawn.build(loralib)
    for name in ATTRIBUTES:
        mine, its = getattr(ours, name, MISSING), getattr(theirs, name, MISSING)
        assert mine == its, name
        assert type(mine) is type(its), name
    for name in ("lora_A", "lora_B", "conv", "lora_dropout"):
        assert hasattr(ours, name) == hasattr(theirs, name), name


def test_the_parameters_of_an_adapter(drawn: Any) -> None:
    ours, theirs = drawn.build(lora_fast), drawn.build(loralib)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert type(mine) is nn.Parameter
        assert (mine.shape, mine.dtype, mine.device) == (its.shape, its.dtype, its.device)
        assert mine.requires_grad == its.requires_grad
    weight = ours.conv.weight if hasattr(ours, "conv") else ours.weight
    if drawn.has_adapter:
        assert not weight.requires_grad
        assert ours.lora_A.dtype == ours.lora_B.dtype == weight.dtype == drawn.dtype
        assert ours.lora_B.shape[1] == drawn.settings["r"] * drawn.settings.get("kernel_size", 1)
    else:
        assert weight.requires_grad == (not drawn.settings.get("_freeze"))
        assert not hasattr(ours, "scaling")


def test_layers_on_the_meta_device(drawn: Any) -> None:
    drawn = drawn.but(device="meta")
    ours, theirs = drawn.build(lora_fast), drawn.build(loralib)
    for (name, mine), (_, its) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine.is_meta, name
        assert (mine.shape, mine.stride()) == (its.shape, its.stride()), name


def test_lora_ind(drawn_merged_linear: Any) -> None:
    drawn = drawn_merged_linear.but(r=1)
    ours, theirs = drawn.build(lora_fast), drawn.build(loralib)
    assert ours.lora_ind.dtype is torch.bool
    assert torch.equal(ours.lora_ind, theirs.lora_ind)
    assert "lora_ind" not in ours.state_dict()


def test_dropout_is_a_submodule_only_where_it_drops(drawn: Any) -> None:
    ours, theirs = drawn.build(lora_fast), drawn.build(loralib)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    drops = drawn.settings.get("lora_dropout", 0.0) > 0.0
    assert ("lora_dropout" in dict(ours.named_modules())) == drops
    assert isinstance(ours.lora_dropout, nn.Module) == drops
    if not drops:
        x = torch.randn(3)
        assert ours.lora_dropout(x) is x


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
def test_the_layout_of_the_weight_outlives_load_state_dict(cls: str, fan_in_fan_out: bool) -> None:
    blocks = {"enable_lora": [True]} if cls == "MergedLinear" else {}
    ours, theirs = of_both(cls, 5, 6, r=2, fan_in_fan_out=fan_in_fan_out, **blocks)
    shape = (5, 6) if fan_in_fan_out else (6, 5)
    for layer in (ours, theirs):
        state = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
        state["weight"] = torch.randn(shape)
        layer.load_state_dict(state)
        assert torch.equal(layer.weight, state["weight"])
    assert ours.weight.shape == theirs.weight.shape == shape
    assert ours.weight.stride() == theirs.weight.stride()


@pytest.mark.parametrize("r", [0, -1, -7])
@pytest.mark.parametrize("cls", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_no_rank_means_no_adapter(cls: str, r: int) -> None:
    blocks = {"enable_lora": [True, False]} if cls == "MergedLinear" else {}
    ours, theirs = of_both(cls, *(4, 6, 3) if cls == "Conv2d" else (4, 6), r=r, **blocks)
    assert ours.r == theirs.r == r
    for layer in (ours, theirs):
        assert all(p.requires_grad for p in layer.parameters())
        assert not any(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling"))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_no_enabled_block_means_no_adapter() -> None:
    ours, theirs = of_both("MergedLinear", 4, 6, r=2, enable_lora=[False, False])
    for layer in (ours, theirs):
        assert layer.r == 2
        assert layer.weight.requires_grad
        assert not any(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling"))


def test_a_fresh_adapter_changes_nothing(drawn: Any) -> None:
    drawn = drawn.but(r=2, dtype=torch.float64)
    x = drawn.input()
    adapted, plain = drawn.build(lora_fast), drawn.but(r=0).build(lora_fast)
    weights = {k: v for k, v in adapted.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(weights)
    torch.testing.assert_close(adapted(x), plain(x))

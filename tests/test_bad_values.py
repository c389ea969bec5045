"""Functions and layers name the argument that is of the wrong kind."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional


class Call(NamedTuple):
    """A call that works: its positional arguments by name, and those that have no position."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    keywords: dict[str, Any]

    def __call__(self, **changes: Any) -> Any:
        arguments = {**self.arguments, **changes}
        keywords = {name: arguments.pop(name, value) for name, value in self.keywords.items()}
        return self.function(*arguments.values(), **keywords)


def _calls() -> dict[str, Call]:
    def tensors(scaling: float = 1.0, **shapes: tuple[int, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
        bias = {"bias": made.pop("bias")} if "bias" in made else {}
        return made | {"scaling": scaling} | bias

    linear = tensors(x=(3, 4), weight=(6, 4), lora_A=(2, 4), lora_B=(6, 2), bias=(6,))
    factors = {name: linear[name] for name in ("lora_A", "lora_B", "scaling")}
    weight = {"weight": linear["weight"], **factors}
    table = tensors(weight=(5, 6), lora_A=(2, 5), lora_B=(6, 2))
    conv = tensors(x=(1, 2, 5, 5), weight=(4, 2, 3, 3), lora_A=(3, 6), lora_B=(12, 3), bias=(4,))
    blocks = {"enable_lora": [True], "out_splits": [6]}
    return {
        "lora_linear": Call(functional.lora_linear, linear, {"dropout_p": 0.0, "training": True}),
        "lora_merged_linear": Call(
            functional.lora_merged_linear, linear, {"dropout_p": 0.0, "training": True, **blocks}
        ),
        "lora_embedding": Call(
            functional.lora_embedding, {"input": torch.tensor([1, 2]), **table}, {}
        ),
        "lora_conv": Call(functional.lora_conv, conv, {}),
        "merged_delta": Call(functional.merged_delta, factors, blocks),
        "merged_weight": Call(functional.merged_weight, weight, blocks),
        "merged_weight, one block": Call(functional.merged_weight, weight, {}),
        "merge_": Call(functional.merge_, weight, blocks),
        "merge_, one block": Call(functional.merge_, weight, {}),
    }


CALLS = _calls()
NO_TENSORS = [None, [1.0, 2.0], np.ones((6, 4), np.float32), "abc"]
NO_NUMBERS = [None, [1.0], np.ones((6, 4), np.float32), "2"]
# Which torch's own functions do not take.
FOREIGN = [Fraction(1, 2), Decimal("0.5"), np.array(0.5)]
WRONG = {
    "scaling": [*NO_NUMBERS, *FOREIGN],
    "dropout_p": [*NO_NUMBERS, *FOREIGN, True, -0.1, 1.1, float("nan")],
    "enable_lora": [3, "ab", True, {"q": True}, {True}, {"q": True}.keys()],
    "out_splits": ["6", 6, [6.0], [5], [6, 6], {6: 1}, {6}],
    "training": [],
}


def _scalar(t: Tensor) -> Tensor:
    return t.flatten()[0]


# Tensors of a dtype, or with dimensions, that do not fit, made of those that do.
OTHERS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "x": [Tensor.double, Tensor.bfloat16, Tensor.long, Tensor.cfloat, _scalar],
    "bias": [Tensor.double, Tensor.bfloat16, Tensor.cfloat, _scalar],
    "lora_A": [Tensor.long, Tensor.bool, Tensor.cfloat, _scalar],
    "lora_B": [Tensor.long, Tensor.bool, Tensor.cfloat, _scalar],
    "input": [Tensor.char, Tensor.short, Tensor.byte, Tensor.bool, Tensor.float],
}
CASES = [
    (name, argument, value)
    for name, call in CALLS.items()
    for argument in (*call.arguments, *call.keywords)
    for value in (
        *WRONG.get(argument, NO_TENSORS),
        *(make(call.arguments[argument]) for make in OTHERS.get(argument, [])),
    )
    if not (argument == "bias" and value is None)
    # Which widths are right, only the factors tell there, and the message names lora_B.
    and not (name == "merged_delta" and argument == "out_splits" and value == [5])
]


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_work_as_they_are(name: str) -> None:
    CALLS[name]()


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    CASES,
    ids=[f"{i}-{n}-{a}-{type(v).__name__}" for i, (n, a, v) in enumerate(CASES)],
)
def test_the_argument_is_named(name: str, argument: str, value: Any) -> None:
    weight = CALLS[name].arguments.get("weight")
    before = None if weight is None else weight.clone()
    draws = torch.get_rng_state()
    op = name.partition(",")[0]
    with pytest.raises((TypeError, ValueError), match=rf"^{op}: .*\b{argument}\b"):
        CALLS[name](**{argument: value})
    assert torch.equal(draws, torch.get_rng_state())
    if weight is not None:
        assert torch.equal(weight, before)


@pytest.mark.parametrize("argument", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_a_merge_takes_real_fractions(argument: str, dtype: torch.dtype) -> None:
    call = CALLS["merge_"]
    if argument == "weight" and dtype.is_complex:
        pytest.skip("a complex weight takes real and complex factors")
    value = call.arguments[argument].to(dtype)
    with pytest.raises(TypeError, match=rf"merge_: {argument} must have a floating-point dtype"):
        call(**{argument: value})


@pytest.mark.parametrize("name", ["lora_linear", "lora_merged_linear", "lora_embedding"])
def test_real_tensors_take_a_real_scaling(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: scaling must be real for real tensors"):
        CALLS[name](scaling=torch.tensor(2j))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), np.inf, torch.tensor(np.nan)])
def test_a_merge_takes_finite_factors(value: Any) -> None:
    for name in ("merge_", "merge_, one block"):
        weight = CALLS[name].arguments["weight"]
        before = weight.clone()
        with pytest.raises(ValueError, match="merge_: scaling must be finite, got"):
            CALLS[name](scaling=value)
        assert torch.equal(weight, before)


def test_what_is_unmerged_is_a_tensor() -> None:
    record = functional.merge_(torch.zeros(4, 3), torch.ones(2, 3), torch.ones(4, 2), 1.0)
    with pytest.raises(TypeError, match="unmerge_: weight must be a tensor, got 'a' of type str"):
        functional.unmerge_("a", record)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", [2, np.float32(2), torch.tensor(2.0), True], ids=repr)
@pytest.mark.parametrize("name", CALLS)
def test_whatever_is_a_number_scales(name: str, scaling: Any) -> None:
    call = CALLS[name]
    if call.function is functional.merge_:
        results = []
        for value in (scaling, float(scaling)):
            weight = call.arguments["weight"].clone()
            call(scaling=value, weight=weight)
            results.append(weight)
    else:
        results = [call(scaling=value) for value in (scaling, float(scaling))]
    torch.testing.assert_close(*results)


class Built(NamedTuple):
    """A layer that can be built: its class, and arguments that work."""

    cls: Callable[..., nn.Module]
    arguments: dict[str, Any]


def _layers() -> dict[str, Built]:
    settings = {"r": 2, "lora_alpha": 16}
    dropping = settings | {"lora_dropout": 0.1}
    linear = {"in_features": 4, "out_features": 6, **dropping}
    blocks = {"enable_lora": [True, False], "out_splits": [2, 4]}
    table = {"num_embeddings": 5, "embedding_dim": 6, **settings, "_weight": torch.randn(5, 6)}
    table["padding_idx"] = 1
    conv = {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "groups": 2, **settings}
    return {
        "Linear": Built(lora.Linear, linear),
        "MergedLinear": Built(lora.MergedLinear, linear | blocks),
        "Embedding": Built(lora.Embedding, table),
        "Embedding, r=0": Built(lora.Embedding, table | {"r": 0, "lora_alpha": 1}),
        "Conv2d": Built(lora.Conv2d, conv | {"lora_dropout": 0.0}),
        "ConvLoRA": Built(lora.ConvLoRA, {"conv_module": nn.Conv2d, **conv}),
    }


LAYERS = _layers()
SIZES = ["in_features", "out_features", "in_channels", "out_channels", "groups"]
SIZES += ["num_embeddings", "embedding_dim"]
UNFIT: dict[str, list[Any]] = {
    "r": [2.0, "2", None, True, [2], torch.tensor(2.0)],
    "lora_alpha": [*NO_NUMBERS, float("nan"), float("-inf"), np.float32("inf"), Decimal("nan")],
    "lora_dropout": WRONG["dropout_p"],
    **{size: ["6", 6.0, None, -1, b"6"] for size in SIZES},
    "padding_idx": ["1", 1.5, 5, -6],
    "enable_lora": WRONG["enable_lora"],
    "out_splits": WRONG["out_splits"],
    "kernel_size": [3.0, "3", b"\x03", bytearray(b"\x03"), None, (), (3, 5), {3.5}, {3}],
    "conv_module": [None, "Conv2d", nn.ConvTranspose2d, nn.Linear, nn.Identity, nn.Conv2d(2, 4, 3)],
    "_weight": [[1.0], np.ones((5, 6)), "abc"],
}
UNFIT_CASES = [
    (name, argument, value)
    for name, layer in LAYERS.items()
    for argument in layer.arguments
    if not (name == "Embedding, r=0" and argument == "lora_alpha")  # which it has no use for
    for value in UNFIT.get(argument, [])
]


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_can_be_built(name: str) -> None:
    cls, arguments = LAYERS[name]
    cls(**arguments)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    UNFIT_CASES,
    ids=[f"{i}-{n}-{a}-{type(v).__name__}" for i, (n, a, v) in enumerate(UNFIT_CASES)],
)
def test_the_argument_of_a_layer_is_named(name: str, argument: str, value: Any) -> None:
    cls, arguments = LAYERS[name]
    draws = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b must"):
        cls(**{**arguments, argument: value})
    assert torch.equal(draws, torch.get_rng_state())


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Conv2d"])
@pytest.mark.parametrize("p", [0, 1, False, np.float32(0.5), torch.tensor(0.5)], ids=repr)
def test_rates_that_are_no_floats(name: str, p: Any) -> None:
    cls, arguments = LAYERS[name]
    arguments = {**arguments, "lora_dropout": p}
    if name == "Conv2d" and p:
        with pytest.warns(UserWarning, match="no effect"):
            cls(**arguments)
    else:
        cls(**arguments)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding"])
def test_empty_layers_can_be_built(name: str) -> None:
    sizes = (0, 4) if name == "Embedding" else (0, 6)
    keywords: dict[str, Any] = {"enable_lora": [True]} if name == "MergedLinear" else {}
    layer = getattr(lora, name)(*sizes, **keywords)
    assert 0 in layer.weight.shape


def test_a_function_that_makes_convolutions_may_take_what_it_likes() -> None:
    def make(channels: str, out: int, k: int) -> nn.Conv2d:
        return nn.Conv2d(len(channels), out, k)

    assert lora.ConvLoRA(make, "rgb", 4, 3).in_channels == 3  # type: ignore[arg-type]

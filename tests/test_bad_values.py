"""The functions of `lora_fast.functional` name the argument that is of the wrong kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

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
WRONG = {
    "scaling": NO_NUMBERS,
    "dropout_p": [*NO_NUMBERS, -0.1, 1.1, float("nan")],
    "enable_lora": [3, "ab", True],
    "out_splits": ["6", 6, [6.0], [5], [6, 6]],
    "training": [],
}
CASES = [
    (name, argument, value)
    for name, call in CALLS.items()
    for argument in (*call.arguments, *call.keywords)
    for value in WRONG.get(argument, NO_TENSORS)
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

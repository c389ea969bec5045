"""What a layer cannot be built of is refused by name, and what it can comes as plain numbers."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lora_fast as lora
from lora_fast.testing import randomize_

QKV = {"enable_lora": [True, False, True]}
KINDS: dict[str, Callable[..., Any]] = {
    "linear": lambda **kw: lora.Linear(4, 6, **kw),
    "merged": lambda **kw: lora.MergedLinear(4, 6, **QKV, **kw),
    "conv1d": lambda **kw: lora.Conv1d(4, 6, 3, **kw),
    "conv2d": lambda **kw: lora.Conv2d(4, 6, 3, **kw),
    "conv3d": lambda **kw: lora.Conv3d(4, 6, 3, **kw),
}


@pytest.mark.parametrize("p", ["0.1", None, [0.1], 0.1j])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_that_is_no_number(kind: str, p: Any) -> None:
    expected = f"lora_dropout must be a number, got {p!r} of type {type(p).__name__}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        KINDS[kind](r=2, lora_dropout=p)


@pytest.mark.parametrize("r", ["2", 2.0, None, True, [2]])
def test_a_rank_of_a_wrong_type_with_a_given_table(r: Any) -> None:
    table = torch.randn(9, 4)
    with pytest.raises(TypeError, match="r must be an integer, got"):
        lora.Embedding(9, 4, r=r, _weight=table)


UNORDERED = [{"q": True, "k": False, "v": True}, {True, False}, frozenset((0, 1)), {0: 1}.keys()]


@pytest.mark.parametrize(
    "enable", [None, True, 1, "qv", b"qv", torch.tensor(True), np.array(1), *UNORDERED]
)
def test_enable_lora_that_is_no_sequence_of_truth_values(enable: Any) -> None:
    with pytest.raises(TypeError, match="MergedLinear: enable_lora must have an entry for each"):
        lora.MergedLinear(4, 6, r=2, enable_lora=enable)


SPLITS: dict[str, Any] = {
    "numpy": np.array([1, 5]),
    "numpy's ints": [np.int64(1), np.int64(5)],
    "tensor": torch.tensor([1, 5]),
    "bool": [True, 5],
    "tuple": (1, 5),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_widths_become_plain_ints(kind: str) -> None:
    layer = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False], out_splits=SPLITS[kind])
    assert layer.out_splits == [1, 5]
    assert [type(width) for width in layer.out_splits] == [int, int]
    randomize_(layer)
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    "splits",
    [
        3,
        "15",
        [1.0, 5.0],
        torch.tensor([1.0, 5.0]),
        torch.tensor(6),
        [None, 6],
        {1: 0, 5: 1},
        {1, 5},
    ],
    ids=repr,
)
def test_widths_that_are_no_integers(splits: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="MergedLinear: out_splits must be None or a list of int"):
        lora.MergedLinear(4, 6, r=2, enable_lora=[True, False], out_splits=splits)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_to_spread_that_are_no_tensor() -> None:
    layer = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False])
    with pytest.raises(TypeError, match="zero_pad: x must be a tensor, got 'abc'"):
        layer.zero_pad("abc")


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("Conv1d", (3, 3)), ("Conv2d", (3, 3, 3)), ("Conv3d", (3, 3)), ("Conv2d", [3, 5])],
)
def test_kernels_with_other_dimensions_or_sides(kind: str, kernel: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape(f"square kernels, got {kernel!r}")):
        getattr(lora, kind)(4, 6, kernel, r=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", [3.0, "3", None, True, (), torch.tensor(3.0), (3, True)])
def test_kernels_that_are_no_integers(kernel: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"square kernels, got {kernel!r}")):
        lora.Conv2d(4, 6, kernel, r=2)


@pytest.mark.parametrize(
    "kernel",
    [np.int64(3), torch.tensor(3), (np.int64(3), 3), torch.Size((3, 3)), np.array([3, 3])],
    ids=repr,
)
def test_integers_of_any_type_are_kernels(kernel: Any) -> None:
    layer = lora.Conv2d(4, 6, kernel, r=2)
    assert layer.kernel_size == (3, 3)
    assert layer.lora_A.shape == (6, 12)
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)


@pytest.mark.parametrize(("kind", "d"), [("Conv1d", 1), ("Conv2d", 2), ("Conv3d", 3)])
def test_square_tuples_work(kind: str, d: int) -> None:
    made = []
    for kernel in (3, (3,) * d, [3] * d):
        torch.manual_seed(1)
        made.append(getattr(lora, kind)(4, 6, kernel, r=2))
    x = torch.randn(2, 4, *[5] * d)
    assert made[0].weight.shape == (6, 4, *[3] * d)
    for layer in made[1:]:
        assert layer.kernel_size == made[0].kernel_size
        assert torch.equal(layer(x), made[0](x))

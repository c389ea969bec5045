"""What cannot be right is refused before anything was changed, and the message says both sides."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import randomize_

FACTORS = {"x": (5, 4), "weight": (6, 4), "lora_A": (2, 4), "lora_B": (6, 2), "bias": (6,)}


def call(op: str, shapes: dict[str, Any], p: float = 0.0, **kwargs: Any) -> Tensor:
    """Call a linear function with random tensors of these shapes."""
    t = {name: torch.randn(shape) for name, shape in (FACTORS | shapes).items()}
    if op == "lora_merged_linear":
        kwargs = {"enable_lora": [True]} | kwargs
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.0, t["bias"], p, True)
    return getattr(functional, op)(*args, **kwargs)


def test_wrong_inputs_are_also_what_torch_raises() -> None:
    """Who catches RuntimeError around a model catches them too."""
    for error, layer, x in (
        (ValueError, lora.Linear(4, 6, r=2), torch.randn(3, 5)),
        (ValueError, lora.MergedLinear(4, 6, r=2, enable_lora=[True]), torch.randn(3, 5)),
        (TypeError, lora.Embedding(4, 6, r=2), torch.tensor([0.5])),
    ):
        for kind in (error, RuntimeError):
            with pytest.raises(kind):
                layer(x)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 6), ()], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_layers_without_an_adapter_of_their_own_name_a_wrong_width(
    kind: str, shape: tuple[int, ...], r: int, fan_in_fan_out: bool
) -> None:
    """Plain ones, and merged ones."""
    kwargs: dict[str, Any] = {"enable_lora": [True, False]} if kind == "MergedLinear" else {}
    layer = getattr(lora, kind)(4, 6, r=r, fan_in_fan_out=fan_in_fan_out, **kwargs).eval()
    message = f"{kind}: x must have 4 features in its last dimension, as weight (6, 4) expects, got"
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=re.escape(f"{message} shape {shape}")):
            layer(torch.randn(shape))


@pytest.mark.parametrize(
    ("wrong", "expected", "got"),
    [
        ({"x": (5, 3)}, "x must have 4 features", "(5, 3)"),
        ({"x": ()}, "x must have 4 features", "()"),
        ({"x": (4, 5)}, "x must have 4 features", "(4, 5)"),
        ({"weight": (4,)}, "weight must have two dimensions", "(4,)"),
        ({"weight": (6, 4, 1)}, "weight must have two dimensions", "(6, 4, 1)"),
        ({"lora_A": (2, 3)}, "4)", "(2, 3)"),
        ({"lora_A": (4,)}, "4)", "(4,)"),
        ({"lora_A": (2, 4, 1)}, "4)", "(2, 4, 1)"),
        ({"lora_B": (5, 2)}, "lora_B must be (6, ", "(5, 2)"),
        ({"lora_B": (2, 6)}, "lora_B must be (6, ", "(2, 6)"),
        ({"lora_B": (6,)}, "lora_B must be (6, ", "(6,)"),
        ({"lora_B": (6, 3)}, "must be (", "(2, 4)"),
        ({"bias": (5,)}, "bias must have shape (6,)", "(5,)"),
        ({"bias": (1, 6)}, "bias must have shape (6,)", "(1, 6)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", ["lora_linear", "lora_merged_linear"])
def test_shapes_of_linear_functions(
    op: str, backend: str, wrong: dict[str, Any], expected: str, got: str
) -> None:
    with lora.use_backend(backend), pytest.raises(ValueError) as caught:
        call(op, wrong)
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    assert expected in message
    assert got in message


WIDE = {"weight": (15, 4), "bias": (15,), "lora_A": (4, 4), "lora_B": (10, 2)}
QKV = {"enable_lora": [True, False, True]}


@pytest.mark.parametrize(
    ("wrong", "blocks", "message"),
    [
        ({}, {"enable_lora": []}, "enable_lora must have an entry for each block"),
        ({}, {"enable_lora": [True] * 4}, "length of enable_lora (4) must divide out_features (15"),
        ({}, QKV | {"out_splits": [5, 5]}, "must be 3 positive widths"),
        ({}, QKV | {"out_splits": [5, 5, 6]}, "sum to out_features=15, got [5, 5, 6]"),
        ({}, QKV | {"out_splits": [10, 5, 0]}, "positive widths"),
        ({}, QKV | {"out_splits": [10, 10, -5]}, "positive widths"),
        ({}, QKV | {"out_splits": []}, "must be 3 positive widths"),
        ({"lora_B": (15, 2)}, QKV, "lora_B must be (10, r), the rows of the enabled blocks of"),
        ({"lora_A": (6, 4)}, QKV, "lora_A must be (2 * 2, 4), a rank block for each enabled"),
        ({}, QKV | {"out_splits": [4, 5, 6]}, None),
        ({}, QKV | {"out_splits": [4, 4, 7]}, "lora_B must be (11, r)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["lora_merged_linear", "merged_weight", "merge_"])
def test_blocks(op: str, wrong: dict[str, Any], blocks: dict[str, Any], message: str) -> None:
    shapes = FACTORS | WIDE | wrong
    weight, a, b = (torch.randn(shapes[name]) for name in ("weight", "lora_A", "lora_B"))
    before = weight.clone()

    def run() -> Any:
        if op == "lora_merged_linear":
            return call(op, shapes, **blocks)
        return getattr(functional, op)(weight, a, b, 1.0, **blocks)

    if message is None:
        run()
        return
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run()
    assert str(caught.value).startswith(f"{op}: ")
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "message"),
    [
        ((2, 4), (6, 3), {}, "lora_B must be (N, r) and lora_A (r, K), got (6, 3) and (2, 4)"),
        ((4,), (6,), {}, "got (6,) and (4,)"),
        ((2, 4), (6,), {"enable_lora": [True]}, "lora_B must be (6, r)"),
        ((2, 4), (5, 2), {"enable_lora": [True, True]}, "lora_B must be (4, r)"),
        ((0, 4), (0, 2), {"enable_lora": [False]}, "enables no block"),
        ((), (6, 2), {"enable_lora": [True]}, "got (6, 2) and ()"),
        ((2, 4), (), {"enable_lora": [True]}, "got () and (2, 4)"),
        ((), (), {}, "got () and ()"),
    ],
)
def test_merged_delta(
    a: tuple[int, ...], b: tuple[int, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.merged_delta(torch.randn(a), torch.randn(b), 1.0, **kwargs)


@pytest.mark.parametrize("op", ["merge_", "merged_weight", "merged_delta"])
def test_widths_of_blocks_of_which_none_is_enabled(op: str) -> None:
    weight, a, b = (torch.randn(FACTORS[name]) for name in ("weight", "lora_A", "lora_B"))
    before = weight.clone()
    operands = (a, b) if op == "merged_delta" else (weight, a, b)
    with pytest.raises(ValueError, match=rf"{op}: out_splits=\[2, 4\] must come with enable_lora"):
        getattr(functional, op)(*operands, 1.0, out_splits=[2, 4])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("op", ["merge_", "merged_weight"])
@pytest.mark.parametrize(
    ("weight", "a", "b"),
    [
        ((6, 5), (2, 4), (6, 2)),
        ((4, 6), (2, 4), (6, 2)),
        ((24,), (2, 4), (6, 2)),
        ((6, 4), (2, 4), (6, 3)),
        ((6, 4, 3), (2, 12), (5, 2)),
    ],
)
def test_a_weight_that_the_delta_does_not_cover(
    op: str, weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    w = torch.randn(weight)
    before = w.clone()
    with pytest.raises(ValueError) as caught:
        getattr(functional, op)(w, torch.randn(a), torch.randn(b), 1.0)
    assert all(str(shape) in str(caught.value) for shape in (weight, a, b))
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_A": torch.ones(2, 5)}, ValueError, "lora_A must be (r, 6), got (2, 5)"),
        ({"lora_A": torch.ones(6)}, ValueError, "lora_A must be (r, 6), got (6,)"),
        ({"lora_B": torch.ones(3, 2)}, ValueError, "lora_B must be (4, 2), got (3, 2)"),
        ({"lora_B": torch.ones(4, 3)}, ValueError, "lora_B must be (4, 2), got (4, 3)"),
        ({"weight": torch.ones(6)}, ValueError, "weight must have two dimensions, got shape (6,)"),
        ({"input": torch.ones(2)}, TypeError, "integer indices, int64 or int32, got torch.float32"),
        ({"input": torch.ones(2) > 0}, TypeError, "int64 or int32, got torch.bool"),
        ({"input": torch.ones(2).to(torch.int16)}, TypeError, "int64 or int32, got torch.int16"),
        ({"input": torch.ones(2).to(torch.uint8)}, TypeError, "int64 or int32, got torch.uint8"),
        ({"input": torch.tensor([6])}, IndexError, "out of range"),
        ({"input": torch.tensor([-1])}, IndexError, "out of range"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_lora_embedding(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    t = {"input": torch.tensor([1]), "weight": torch.ones(6, 4)}
    t |= {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(4, 2)} | changes
    with pytest.raises(error, match=re.escape(message)):
        functional.lora_embedding(t["input"], t["weight"], t["lora_A"], t["lora_B"], 1.0)


@pytest.mark.parametrize(
    ("weight", "b", "message"),
    [
        ((6, 4), (6, 3), "one to three kernel dimensions, got shape (6, 4)"),
        ((6, 4, 1, 1, 1, 1), (6, 3), "got shape (6, 4, 1, 1, 1, 1)"),
        ((6, 4, 3), (7, 3), "lora_B (7, 3) @ lora_A (3, 12) does not give a delta for a weight of"),
        ((6, 4, 3), (6, 4), "lora_B (6, 4) @ lora_A (3, 12) does not give a delta for a weight of"),
    ],
)
def test_lora_conv(weight: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.lora_conv(
            torch.randn(1, 4, 5), torch.randn(weight), torch.randn(3, 12), torch.randn(b), 1.0
        )


LAYERS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "linear": (lambda **kw: lora.Linear(4, 6, r=2, **kw), torch.ones(5, 3)),
    "merged": (lambda **kw: lora.MergedLinear(4, 6, r=2, **QKV, **kw), torch.ones(5, 3)),
    "conv": (lambda **kw: lora.Conv2d(4, 6, 3, r=2, **kw), torch.ones(1, 3, 9, 9)),
}


@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_name_both_sizes(name: str, merged: bool) -> None:
    make, x = LAYERS[name]
    layer = randomize_(make()).train(not merged)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"(?s)4.*3|3.*4"):
        layer(x)
    assert layer.merged is merged
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("p", [-0.1, 1.0001, math.nan, math.inf])
@pytest.mark.parametrize("op", ["lora_linear", "lora_merged_linear"])
def test_dropout_outside_its_range(op: str, p: float) -> None:
    state = torch.get_rng_state()
    t = [torch.zeros(FACTORS[name]) for name in ("x", "weight", "lora_A", "lora_B")]
    kwargs = {} if op == "lora_linear" else {"enable_lora": [True]}
    with pytest.raises(ValueError, match=f"{op}: dropout_p must be between 0 and 1, got {p}"):
        getattr(functional, op)(*t, 1.0, None, p, True, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", ["None", "ALL", "", None, True, ["all"]])
def test_unknown_bias(bias: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), lora.Linear(4, 4, r=2))
    expected = re.escape(f"bias must be one of none, all, lora_only, got {bias!r}")
    with pytest.raises(ValueError, match=expected):
        lora.mark_only_lora_as_trainable(model, bias)
    assert model[0].weight.requires_grad
    with pytest.raises(ValueError, match=expected):
        lora.lora_state_dict(model, bias)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_delta_that_overflows_stays_out_of_its_weight_alone(backend: str) -> None:
    """The layer goes on unmerged, the others are merged, the model computes the same."""
    model = nn.Sequential(*(lora.Linear(8, 8, r=1, bias=False) for _ in range(3))).half()
    randomize_(model, std=0.1)
    with torch.no_grad():
        model[0].lora_A.fill_(300.0)
        model[0].lora_B.fill_(300.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.full((2, 8), 2.0**-9, dtype=torch.float16)
    expected = model(x)
    assert expected.isfinite().all()
    with lora.use_backend(backend), torch.no_grad():
        with pytest.warns(
            RuntimeWarning, match="not merged: .* does not fit torch.float16"
        ) as told:
            model.eval()
        assert len(told) == 1
        assert [layer.merged for layer in model] == [False, True, True]
        largest = expected.abs().max().item()
        torch.testing.assert_close(model(x), expected, rtol=0.0, atol=4e-3 * largest)
        model.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])

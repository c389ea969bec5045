"""Mixed dtypes, autocast, and derivatives by finite differences, for every function."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import lora_fast
from lora_fast import functional
from lora_fast.testing import assert_within_budget, randomize_

HALF = [torch.bfloat16, torch.float16]
WIDE = [torch.float32, torch.float64]
QKV = {"enable_lora": [True, False, True]}
RAGGED = QKV | {"out_splits": [4, 2, 3]}
INDEX = torch.tensor([[1, 0, 4], [4, 4, 2]])
Tensors = dict[str, Tensor]


def _linear(t: Tensors, **kwargs: Any) -> Tensor:
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.5, t.get("bias"))
    return functional.lora_linear(*args, **kwargs)


def _merged(t: Tensors, **kwargs: Any) -> Tensor:
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.5, t.get("bias"))
    return functional.lora_merged_linear(*args, **(QKV | kwargs))


def _ragged(t: Tensors, **kwargs: Any) -> Tensor:
    return _merged(t, **(RAGGED | kwargs))


def _embedding(t: Tensors, **kwargs: Any) -> Tensor:
    args = (t["weight"], t["lora_A"], t["lora_B"], 1.5)
    return functional.lora_embedding(INDEX.to(t["weight"].device), *args, **kwargs)


def _conv(t: Tensors, **kwargs: Any) -> Tensor:
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.5, t.get("bias"))
    return functional.lora_conv(*args, padding=1, **kwargs)


LINEAR = {"x": (3, 2, 5), "weight": (9, 5), "bias": (9,)}
CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "lora_linear": (_linear, LINEAR | {"lora_A": (2, 5), "lora_B": (9, 2)}),
    "lora_merged_linear": (_merged, LINEAR | {"lora_A": (4, 5), "lora_B": (6, 2)}),
    "ragged": (_ragged, LINEAR | {"lora_A": (4, 5), "lora_B": (7, 2)}),
    "lora_embedding": (_embedding, {"weight": (5, 4), "lora_A": (2, 5), "lora_B": (4, 2)}),
    "lora_conv": (
        _conv,
        {
            "x": (2, 2, 4, 4),
            "weight": (4, 2, 3, 3),
            "bias": (4,),
            "lora_A": (3, 6),
            "lora_B": (12, 3),
        },
    ),
}
DROPPING = ["lora_linear", "lora_merged_linear", "ragged"]


def drawn(op: str, base: torch.dtype, adapter: torch.dtype | None = None) -> Tensors:
    """Leaves that require a gradient; A and B in `adapter`."""
    return {
        name: torch.randn(shape)
        .to((adapter or base) if name.startswith("lora_") else base)
        .requires_grad_()
        for name, shape in CALLS[op][1].items()
    }


def gradients(op: str, t: Tensors, dy: Tensor) -> tuple[Tensor, Tensors]:
    y = CALLS[op][0](t)
    grads = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))
    return y.detach(), dict(zip(t, grads, strict=True))


@pytest.mark.parametrize("adapter", WIDE, ids=str)
@pytest.mark.parametrize("base", HALF, ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_wide_adapters_on_a_base_of_16_bits(
    op: str, base: torch.dtype, adapter: torch.dtype, backend: str
) -> None:
    """The output has x's dtype, each gradient its parameter's; values as with adapters of 16."""
    t = drawn(op, base, adapter)
    narrow = {name: p.detach().to(base).requires_grad_() for name, p in t.items()}
    exact = {name: p.detach().double().requires_grad_() for name, p in narrow.items()}
    dy = torch.randn_like(CALLS[op][0](exact)).to(base)
    y, grads = gradients(op, t, dy)
    eager_y, eager = gradients(op, narrow, dy)
    oracle_y, oracle = gradients(op, exact, dy)
    assert y.dtype == base
    assert_within_budget(y, eager_y, oracle_y, what="y")
    for name, grad in grads.items():
        assert grad.dtype == t[name].dtype, name
        assert_within_budget(grad.to(base), eager[name], oracle[name], what=name)


@pytest.mark.parametrize("adapter", HALF, ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_narrow_adapters_on_a_wide_base(op: str, adapter: torch.dtype, backend: str) -> None:
    t = drawn(op, torch.float32, adapter)
    wide = {name: p.detach().float().requires_grad_() for name, p in t.items()}
    dy = torch.randn_like(CALLS[op][0](wide))
    y, grads = gradients(op, t, dy)
    expected, wide_grads = gradients(op, wide, dy)
    torch.testing.assert_close(y, expected)
    for name, grad in grads.items():
        assert grad.dtype == t[name].dtype, name
        tolerance = 1e-5 if grad.dtype == torch.float32 else 2 * torch.finfo(adapter).eps
        torch.testing.assert_close(grad.float(), wide_grads[name], rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("base", HALF, ids=str)
@pytest.mark.parametrize("op", DROPPING)
def test_dropout_with_wide_adapters(op: str, base: torch.dtype, p: float, backend: str) -> None:
    """The same elements are dropped as with adapters in x's dtype, which fixes the draw."""
    t = drawn(op, base, torch.float32)
    narrow = {name: tensor.detach().to(base).requires_grad_() for name, tensor in t.items()}
    found = []
    for leaves in (t, narrow):
        torch.manual_seed(5)
        y = CALLS[op][0](leaves, dropout_p=p, training=True)
        y.float().sum().backward()
        found.append((y, leaves["lora_A"].grad, leaves["x"].grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.to(base), want, rtol=0.02, atol=0.02)
    assert found[0][1].dtype == torch.float32


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_autocast_computes_in_bf16_and_gives_gradients_in_fp32(
    op: str, adapter: torch.dtype, backend: str
) -> None:
    t = drawn(op, torch.float32, adapter)
    exact = {name: p.detach().double() for name, p in t.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = CALLS[op][0](t)
    # torch's own rules: a lookup is not cast, and what it gives stays fp32.
    assert y.dtype == (torch.float32 if op == "lora_embedding" else torch.bfloat16)
    y.float().sum().backward()
    for name, tensor in t.items():
        assert tensor.grad.dtype == tensor.dtype, name
    oracle = CALLS[op][0](exact)
    torch.testing.assert_close(y.detach().double(), oracle, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("op", CALLS)
def test_autocast_that_is_switched_off_inside_leaves_the_dtypes(op: str, backend: str) -> None:
    t = drawn(op, torch.float32)
    expected = CALLS[op][0](t)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        y = CALLS[op][0](t)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("op", [*DROPPING, "lora_conv"])
def test_autocast_with_an_input_in_bf16(op: str, backend: str) -> None:
    """As in the middle of a model: the layer before gave bf16, the parameters are fp32."""
    t = drawn(op, torch.float32)
    x = t["x"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = CALLS[op][0](t | {"x": x})
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert t["lora_A"].grad.dtype == torch.float32


@pytest.mark.parametrize("op", ["merged_delta", "merged_weight"])
def test_the_dense_functions_follow_torchs_rules_under_autocast(op: str) -> None:
    weight, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        if op == "merged_delta":
            assert functional.merged_delta(a, b, 1.5).dtype == (b @ a).dtype
        else:
            merged = functional.merged_weight(weight, a, b, 1.5)
            torch.testing.assert_close(merged.float(), weight + 1.5 * b @ a, rtol=0.03, atol=0.05)


def checked(op: str, **kwargs: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The function of its tensors in fp64, and those."""
    t = drawn(op, torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return CALLS[op][0](dict(zip(t, tensors, strict=True)), **kwargs)

    return run, tuple(t.values())


@pytest.mark.parametrize("op", CALLS)
def test_gradcheck_and_gradgradcheck(op: str, backend: str) -> None:
    run, tensors = checked(op)
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("op", DROPPING)
def test_gradcheck_and_gradgradcheck_with_dropout(op: str, p: float, backend: str) -> None:
    run, tensors = checked(op, dropout_p=p, training=True)
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


@pytest.mark.parametrize(
    "needs", [s for n in (1, 2) for s in itertools.combinations(NAMES, n)], ids="+".join
)
@pytest.mark.parametrize("op", ["lora_linear", "ragged"])
def test_gradgradcheck_of_some_inputs(op: str, needs: tuple[str, ...], backend: str) -> None:
    t = drawn(op, torch.float64)
    fixed = {name: tensor.detach() for name, tensor in t.items() if name not in needs}

    def run(*tensors: Tensor) -> Tensor:
        return CALLS[op][0](fixed | dict(zip(needs, tensors, strict=True))).sin()

    tensors = tuple(t[name] for name in needs)
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_inputs_that_depend_on_each_other(op: str, create_graph: bool, backend: str) -> None:
    """B computed from A, and both from x where there is one: each path counts once."""
    t = drawn(op, torch.float64)
    mix = torch.randn(t["lora_A"].numel(), t["lora_B"].numel(), dtype=torch.float64) / 4

    def run(a: Tensor) -> Tensor:
        b = (a.flatten() @ mix).view(t["lora_B"].shape)
        tensors = t | {"lora_A": a, "lora_B": b}
        if "x" in t:
            tensors["x"] = t["x"].detach() * a.sum()
        return CALLS[op][0](tensors).sin().sum()

    a = t["lora_A"]
    (got,) = torch.autograd.grad(run(a), a, create_graph=create_graph)
    step, numeric = 1e-6, torch.zeros_like(a)
    with torch.no_grad():
        for at in itertools.product(*map(range, a.shape)):
            moved = torch.zeros_like(a)
            moved[at] = step
            numeric[at] = (run(a + moved) - run(a - moved)) / (2 * step)
    torch.testing.assert_close(got.detach(), numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enable_lora", [None, [True, False]], ids=["whole", "blocks"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_weight_keeps_its_dtype_under_autocast(
    base: torch.dtype, adapter: torch.dtype, enable_lora: Any
) -> None:
    weight = torch.randn(6, 5).to(base)
    a, b = torch.randn(2, 5).to(adapter), torch.randn(3 if enable_lora else 6, 2).to(adapter)
    a.requires_grad_()
    expected = functional.merged_weight(weight, a, b, 0.5, enable_lora=enable_lora)
    (gradient,) = torch.autograd.grad(expected.sum(), a)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.merged_weight(weight, a, b, 0.5, enable_lora=enable_lora)
    assert found.dtype == base
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), a)[0], gradient)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nested_inputs(dtype: torch.dtype, layout: torch.layout) -> None:
    rows = [torch.randn(3, 5).to(dtype), torch.randn(2, 5).to(dtype)]
    layer = randomize_(lora_fast.Linear(5, 6, r=2)).to(dtype)
    found = layer(torch.nested.nested_tensor(rows, layout=layout))
    for y, x in zip(found.unbind(), rows, strict=True):
        torch.testing.assert_close(y, layer(x), rtol=0.02, atol=0.02)

"""fp16 holds little above 65504 and below 6e-5: what loralib computes with a large or a small
scaling, which it multiplies by after the product with B and before those of backward, is in range.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast as lora
from lora_fast import functional
from lora_fast.backend import BackendName
from lora_fast.lora_first import lora_first
from lora_fast.testing import assert_within_budget

K, N = 256, 66
BLOCKS = {"enable_lora": [True, False, True]}
FEW, MANY = 4, 40  # csrc's ops serve up to 32 rows
Tensors = dict[str, Tensor]
Function = Callable[[Tensors, float], Tensor]


def _linear(t: Tensors, scaling: float) -> Tensor:
    return functional.lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], scaling)


def _dropping(t: Tensors, scaling: float) -> Tensor:
    """At a rate by which nothing is dropped, on as many rows as the eager dropout is for."""
    x = t["x"].repeat(2**16 // t["x"].numel() + 1, 1)
    operands = (x, t["weight"], t["lora_A"], t["lora_B"], scaling)
    return functional.lora_linear(*operands, None, 1e-12, True)[: len(t["x"])]


def _merged(t: Tensors, scaling: float) -> Tensor:
    operands = (t["x"], t["weight"], t["lora_A"], t["lora_B"], scaling)
    return functional.lora_merged_linear(*operands, **BLOCKS)


def _first(t: Tensors, scaling: float) -> Tensor:
    return lora_first(t["x"], t["weight"], t["lora_A"], t["lora_B"], scaling, None, 0.0)


def _as_loralib(t: Tensors, scaling: float) -> Tensor:
    x, weight, a, b = t["x"], t["weight"], t["lora_A"], t["lora_B"]
    if len(a) == b.shape[1]:
        return F.linear(x, weight) + F.linear(F.linear(x, a), b) * scaling
    (a0, a1), (b0, b1) = a.chunk(2), b.chunk(2)
    zero = b.new_zeros(N // 3, a.shape[1])
    return F.linear(x, weight) + F.linear(x, torch.cat([b0 @ a0, zero, b1 @ a1])) * scaling


def _by(backend: BackendName, function: Function) -> Function:
    def serve(t: Tensors, scaling: float) -> Tensor:
        with lora.use_backend(backend):
            return function(t, scaling)

    return serve


FUNCTIONS = {"linear": _linear, "dropping": _dropping, "merged": _merged, "first": _first}
BACKENDS: dict[str, BackendName] = {"reference": "reference"}
if not torch.cuda.is_available():  # where there is one, no kernel takes tensors of the CPU
    BACKENDS["kernels"] = "triton"
FUNCTIONS |= {
    f"{name} by {by}": _by(backend, FUNCTIONS[name])
    for name in ("linear", "merged")
    for by, backend in BACKENDS.items()
}


def drawn(name: str, rows: int, r: int, x: Tensor, b_std: float) -> Tensors:
    """Operands in fp16: A in [0, 1/16], so that S is large where x is."""
    groups, width = (2, N // 3 * 2) if name.startswith("merged") else (1, N)
    tensors = {
        "x": x,
        "weight": torch.randn(N, K) / K,
        "lora_A": torch.rand(r * groups, K) / 16,
        "lora_B": torch.randn(width, r) * b_std,
    }
    return {key: tensor.half() for key, tensor in tensors.items()}


def results(function: Function, t: Tensors, scaling: float, dy: Tensor, **kwargs: Any) -> Tensors:
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in t.items()}
    y = function(leaves, scaling)
    learn = {key: leaf for key, leaf in leaves.items() if key != "weight"}
    grads = torch.autograd.grad(y, list(learn.values()), dy.to(y.dtype), **kwargs)
    return {"y": y.detach()} | dict(zip(learn, (g.detach() for g in grads), strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_large_scaling_does_not_overflow(name: str, rows: int, autocast: bool) -> None:
    """S is about 1600, and 64 S more than fp16 holds."""
    if name == "first" and autocast:
        pytest.skip("lora_first serves one dtype, without autocast")
    t = drawn(name, rows, 4, torch.rand(rows, K) * 400, 1e-3)
    exact = _as_loralib({key: tensor.double() for key, tensor in t.items()}, 64.0)
    eager = _as_loralib(t, 64.0)
    if autocast:
        t = {key: tensor.float() for key, tensor in t.items()}
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = FUNCTIONS[name](t, 64.0)
    assert_within_budget(y, eager, exact)


@pytest.mark.parametrize("layer", ["linear", "merged"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_large_scaling_does_not_overflow_in_a_script(layer: str) -> None:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 256}
    made = lora.MergedLinear(K, N, **options, **BLOCKS) if layer == "merged" else None
    made = (made or lora.Linear(K, N, **options)).half()
    t = drawn(layer, FEW, 4, torch.rand(FEW, K) * 400, 1e-3)
    made.load_state_dict({key: t[key] for key in ("weight", "lora_A", "lora_B")}, strict=False)
    with torch.no_grad():
        made.bias.zero_()
    exact = _as_loralib({key: tensor.double() for key, tensor in t.items()}, 64.0)
    assert_within_budget(torch.jit.script(made)(t["x"]), _as_loralib(t, 64.0), exact)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rows", [FEW, MANY, 512])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_small_scaling_keeps_gradients_from_overflowing(
    name: str, rows: int, create_graph: bool
) -> None:
    """The gradient of B is 64 times that of the sum over all rows that it is made of."""
    t = drawn(name, rows, 64, torch.randn(rows, K) + 2, 0.5)
    dy = (torch.rand(rows, N) * 120).half()
    exact = results(_as_loralib, {k: v.double() for k, v in t.items()}, 1 / 64, dy)
    eager = results(_as_loralib, t, 1 / 64, dy)
    found = results(FUNCTIONS[name], t, 1 / 64, dy, create_graph=create_graph)
    for key, tensor in found.items():
        assert_within_budget(tensor, eager[key], exact[key], what=key)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_large_scaling_keeps_the_digits_of_small_gradients(
    name: str, rows: int, create_graph: bool
) -> None:
    t = drawn(name, rows, 4, torch.randn(rows, K) + 2, 0.5)
    dy = (torch.rand(rows, N) * 6e-6).half()
    exact = results(_as_loralib, {k: v.double() for k, v in t.items()}, 64.0, dy)
    eager = results(_as_loralib, t, 64.0, dy)
    found = results(FUNCTIONS[name], t, 64.0, dy, create_graph=create_graph)
    for key, tensor in found.items():
        assert_within_budget(tensor, eager[key], exact[key], what=key)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("scaling", [16.0, 64.0])
@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_b_that_are_small_but_for_the_scaling(
    name: str, rows: int, scaling: float, create_graph: bool
) -> None:
    """dY^T S is where fp16 has few digits, and `scaling` times as much is where it has all."""
    t = drawn(name, rows, 4, torch.randn(rows, K), 0.5)
    dy = (torch.randn(rows, N) * 2e-6).half()
    exact = results(_as_loralib, {k: v.double() for k, v in t.items()}, scaling, dy)
    eager = results(_as_loralib, t, scaling, dy)
    found = results(FUNCTIONS[name], t, scaling, dy, create_graph=create_graph)
    for key in ("x", "lora_A", "lora_B"):
        assert_within_budget(found[key], eager[key], exact[key], what=key)


@pytest.mark.parametrize("name", ["linear", "merged", "first"])
def test_small_gradients_of_b_in_a_batch(name: str) -> None:
    t = drawn(name, MANY, 4, torch.randn(MANY, K), 0.5)
    dy = (torch.randn(MANY, N) * 2e-6).half()
    exact = results(_as_loralib, {k: v.double() for k, v in t.items()}, 64.0, dy)
    eager = results(_as_loralib, t, 64.0, dy)
    found = results(FUNCTIONS[name], t, 64.0, dy.unsqueeze(0), is_grads_batched=True)
    for key in ("x", "lora_A", "lora_B"):
        assert_within_budget(found[key].squeeze(0), eager[key], exact[key], what=key)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("by", ["eager", *BACKENDS])
def test_small_gradients_of_an_embedding(by: str, create_graph: bool) -> None:
    def found(t: Tensors, scaling: float) -> Tensor:
        with lora.use_backend(BACKENDS.get(by, "auto")):
            operands = (t["weight"], t["lora_A"], t["lora_B"], scaling)
            return functional.lora_embedding(index, *operands)

    def as_loralib(t: Tensors, scaling: float) -> Tensor:
        return F.embedding(index, t["weight"]) + t["lora_A"].t()[index] @ t["lora_B"].t() * scaling

    index = torch.arange(MANY)
    t = drawn("linear", MANY, 4, torch.randn(1), 0.1)
    t = {"weight": torch.randn(K, N).half(), "lora_A": t["lora_A"], "lora_B": t["lora_B"]}
    dy = (torch.randn(MANY, N) * 5e-7).half()
    exact = results(as_loralib, {k: v.double() for k, v in t.items()}, 64.0, dy)
    eager = results(as_loralib, t, 64.0, dy)
    grads = results(found, t, 64.0, dy, create_graph=create_graph)
    for key in ("lora_A", "lora_B"):
        assert_within_budget(grads[key], eager[key], exact[key], what=key)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
@pytest.mark.parametrize("layer", ["linear", "merged"])
def test_a_large_scaling_of_a_bf16_factor_is_rounded_once(layer: str, autocast: bool) -> None:
    t = drawn(layer, MANY, 8, torch.randn(MANY, K), 0.5)
    t |= {key: t[key].bfloat16() for key in ("lora_A", "lora_B")}
    t["weight"].zero_()
    exact = _as_loralib({key: tensor.double() for key, tensor in t.items()}, 8 / 3)
    eager = _as_loralib({key: tensor.half() for key, tensor in t.items()}, 8 / 3)
    if autocast:
        t |= {key: t[key].float() for key in ("x", "weight")}
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = FUNCTIONS[layer](t, 8 / 3)
    error, its = ((found.double() - exact).norm() for found in (y, eager))
    assert error <= 2 * its


@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
def test_a_large_scaling_that_is_a_tensor(autocast: bool) -> None:
    for name, rows in (("linear", MANY), ("merged", MANY), ("merged", FEW)):
        t = drawn(name, rows, 4, torch.rand(rows, K) * 400, 1e-3)
        exact = _as_loralib({key: tensor.double() for key, tensor in t.items()}, 64.0)
        eager, scaling = _as_loralib(t, 64.0), torch.tensor(64.0, requires_grad=True)
        if autocast:
            t = {key: tensor.float() for key, tensor in t.items()}
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y = FUNCTIONS[name](t, scaling)
        assert_within_budget(y.detach(), eager, exact, what=name)
        assert torch.autograd.grad(y.float().mean(), scaling)[0].isfinite()

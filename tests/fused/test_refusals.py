"""What no kernel can serve: an error that says why where 'triton' is forced, else plain torch."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lora
from lora_fast import functional

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
K = 40


class Subclass(Tensor):
    pass


def vmapped(layer: lora.Linear, x: Tensor) -> Tensor:
    return torch.func.vmap(layer)(x)


def functional_gradient(layer: lora.Linear, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: layer(x).sum())(x)


def forward_mode(layer: lora.Linear, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent


def dispatch_mode(layer: lora.Linear, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return layer(x)


def jit_traced(layer: lora.Linear, x: Tensor) -> Tensor:
    return torch.jit.trace(layer, (x,))(x)


def exported(layer: lora.Linear, x: Tensor) -> Tensor:
    return torch.export.export(layer, (x,)).module()(x)


def subclass(layer: lora.Linear, x: Tensor) -> Tensor:
    return layer(x.as_subclass(Subclass)).as_subclass(Tensor)


def double(layer: lora.Linear, x: Tensor) -> Tensor:
    return layer.double()(x.double())


REFUSED = {
    vmapped: "inside a functorch transform",
    functional_gradient: "inside a functorch transform",
    forward_mode: "forward-mode differentiation",
    dispatch_mode: "inside a TorchDispatchMode",
    jit_traced: "traced by torch.jit",
    exported: "traced by torch.compile or torch.export",
    subclass: "a Subclass is not a plain tensor",
    double: "dtype torch.float64 is not fp32, fp16 or bf16",
}


@pytest.mark.parametrize(
    ("run", "reason"), REFUSED.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_refused_if_forced_and_served_if_not(
    run: Callable[..., Tensor], reason: str, make_layer: Any
) -> None:
    layer = make_layer()
    x = torch.randn(6, K, device=layer.weight.device)
    message = f"lora_linear: backend 'triton' was forced but cannot run: {reason}. Use set_backend"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(layer, x)
    with lora.use_backend("reference"):
        expected = run(layer, x)
    with lora.use_backend("auto"):
        torch.testing.assert_close(run(layer, x), expected)


@pytest.mark.parametrize("which", range(5))
def test_operands_that_torch_negates_when_it_reads_them(
    which: int, kernel_device: torch.device
) -> None:
    """A kernel that reads their memory would take them for their opposites."""
    operands = [
        torch.randn(size, device=kernel_device) for size in ((3, K), (6, K), (2, K), (6, 2), (6,))
    ]
    expected = functional_call(*operands)
    operands[which] = torch.complex(operands[which], -operands[which]).conj().imag
    assert operands[which].is_neg()
    with pytest.raises(RuntimeError, match="torch negates"):
        functional_call(*operands)
    with lora.use_backend("auto"):
        torch.testing.assert_close(functional_call(*operands), expected)


def functional_call(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return functional.lora_linear(x, weight, a, b, 0.5, bias)


def test_nested_tensors(make_layer: Any) -> None:
    layer = make_layer()
    rows = [torch.randn(m, K, device=layer.weight.device) for m in (2, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(RuntimeError, match="NestedTensor is not a plain tensor"):
        layer(x)
    with lora.use_backend("auto"):
        for y, row in zip(layer(x).unbind(), rows, strict=True):
            torch.testing.assert_close(y, layer(row))


@pytest.mark.parametrize(("n", "k", "r"), [(0, 5, 2), (6, 0, 2), (6, 5, 0)])
def test_empty_parameters(n: int, k: int, r: int, kernel_device: torch.device) -> None:
    """No kernel has to think of them; torch's own code does."""
    x, weight, a, b = (
        torch.randn(size, device=kernel_device) for size in ((3, k), (n, k), (r, k), (n, r))
    )
    with pytest.raises(RuntimeError, match=r"a parameter of shape \(\d, \d\) is empty"):
        functional.lora_linear(x, weight, a, b, 1.0)
    with lora.use_backend("auto"):
        y = functional.lora_linear(x, weight, a, b, 1.0)
    assert torch.equal(y, x @ weight.t())


def test_a_dimension_beyond_32_bits(make_layer: Any) -> None:
    layer = make_layer()
    x = torch.zeros(1, K, device=layer.weight.device).expand(2**31, K)
    with pytest.raises(ValueError, match=r"at most 2147418112 rows.*use_backend\('reference'\)"):
        layer(x)


def test_float8_and_integers(make_layer: Any) -> None:
    layer = make_layer()
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.complex64):
        x = torch.zeros(3, K, device=layer.weight.device).to(dtype)
        with pytest.raises(RuntimeError, match=f"dtype {dtype} is not fp32, fp16 or bf16"):
            layer(x)

"""The contracts of the fused operators: schema, fakes that tell the truth, and clear refusals."""

import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fast import ops

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)
# A CPU's interpreter has no bf16.
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)
# Only what holds for any op: these have no autograd of their own, `lora_fast.autograd` has it.
CHECKS = ("test_schema", "test_faketensor")
N, K, R = 7, 19, 3
SHAPES = [(K,), (5, K), (2, 3, K), (0, K)]
Args = tuple[Any, ...]


def fwd_args(
    device: torch.device,
    shape: tuple[int, ...] = (5, K),
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    p: float = 0.0,
    adapter: torch.dtype | None = None,
) -> Args:
    """Arguments of lora_linear_fwd; with dropout they hold a seed."""

    def drawn(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size).to(device, like)

    seed = torch.tensor([1234], device=device) if p > 0.0 else None
    a, b = drawn(R, K, like=adapter or dtype), drawn(N, R, like=adapter or dtype)
    return (drawn(*shape), drawn(N, K), drawn(N) if bias else None, a, b, 1.5, p, seed)


def bwd_args(
    device: torch.device,
    shape: tuple[int, ...] = (5, K),
    dtype: torch.dtype = torch.float32,
    *,
    needs: tuple[bool, ...] = (True,) * 5,
    p: float = 0.0,
    adapter: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
) -> Args:
    """Arguments of lora_linear_bwd as autograd gives them: no more than the gradients need."""
    x, weight, _, a, b, scaling, p, seed = fwd_args(device, shape, dtype, p=p, adapter=adapter)
    y, s, mask = ops.lora_linear_fwd(x, weight, None, a, b, scaling, p, seed)
    need_x, need_w, _, need_a, need_b = needs
    kept = (
        x if need_w or need_a else None,
        weight if need_x else None,
        a,
        b,
        s if need_b else None,
        mask if p > 0.0 and (need_x or need_a) else None,
    )
    dy = torch.randn(y.shape).to(y)
    return (dy, *kept, scaling, p, list(needs), bias_dtype or dtype)


def described(outputs: tuple[Tensor, ...]) -> list[Any]:
    return [(t.shape, t.dtype, t.device, t.stride()) for t in outputs]


def assert_fake_agrees(op: Any, args: Args) -> None:
    """Fail unless the fake gives the shapes, dtypes, devices and strides of the kernel."""
    real = op(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        pretended = op(*fakes)
    assert described(pretended) == described(real)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(
    kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], bias: bool, p: float
) -> None:
    args = fwd_args(kernel_device, shape, dtype, bias=bias, p=p)
    torch.library.opcheck(ops.lora_linear_fwd, args, test_utils=CHECKS)
    assert_fake_agrees(ops.lora_linear_fwd, args)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(
    kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], p: float
) -> None:
    args = bwd_args(kernel_device, shape, dtype, p=p)
    torch.library.opcheck(ops.lora_linear_bwd, args, test_utils=CHECKS)
    assert_fake_agrees(ops.lora_linear_bwd, args)


NEEDS = list(itertools.product([True, False], repeat=5))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs", NEEDS, ids=lambda n: "".join("01"[b] for b in n))
def test_backward_with_some_gradients(
    kernel_device: torch.device, needs: tuple[bool, ...], p: float
) -> None:
    args = bwd_args(kernel_device, needs=needs, p=p)
    assert_fake_agrees(ops.lora_linear_bwd, args)
    full = ops.lora_linear_bwd(*bwd_args_again(args, kernel_device, p))
    for got, want, need in zip(ops.lora_linear_bwd(*args), full, needs, strict=True):
        if need:
            torch.testing.assert_close(got, want)
        else:
            assert got.numel() == 0

"""The contracts of the fused operators: schema, fakes that tell the truth, and clear refusals."""

import itertools
import os
import re
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
FORWARD, BACKWARD = ops.KERNEL_OPS["lora_linear_fwd"], ops.KERNEL_OPS["lora_linear_bwd"]
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
    y, s, mask = FORWARD(x, weight, None, a, b, scaling, p, seed)
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
    torch.library.opcheck(FORWARD, args, test_utils=CHECKS)
    assert_fake_agrees(FORWARD, args)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(
    kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], p: float
) -> None:
    args = bwd_args(kernel_device, shape, dtype, p=p)
    torch.library.opcheck(BACKWARD, args, test_utils=CHECKS)
    assert_fake_agrees(BACKWARD, args)


EDGES = [[0, 2, 5, 7], [1, 3, 3, 4], [2, 7], [0, 7]]  # of 7 columns


def merged_args(
    device: torch.device, op: str, edges: list[int], rows: int = 5, p: float = 0.0
) -> Args:
    """Arguments of a linear op for an adapter of rank R on each of the blocks."""
    args = list((fwd_args if op == "lora_linear_fwd" else bwd_args)(device, (rows, K), p=p))
    blocks, columns = len(edges) // 2, sum(edges[1::2]) - sum(edges[::2])
    at = 3  # lora_a, in both
    args[at] = torch.randn(blocks * R, K, device=device)
    args[at + 1] = torch.randn(columns, R, device=device)
    if op == "lora_linear_bwd":
        args[5] = torch.randn(rows, blocks * R, device=device)
    return (*args, edges)


@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("edges", EDGES, ids=str)
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
def test_blocks_of_columns(
    kernel_device: torch.device, op: str, edges: list[int], p: float, rows: int
) -> None:
    args = merged_args(kernel_device, op, edges, rows, p)
    assert_fake_agrees(ops.KERNEL_OPS[op], args)
    if rows and edges is EDGES[0]:
        torch.library.opcheck(ops.KERNEL_OPS[op], args, test_utils=CHECKS)
        dynamic = "test_aot_dispatch_dynamic"
        torch.library.opcheck(ops.KERNEL_OPS[op], args, test_utils=dynamic)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([0, 2, 5, 8], "sum to out_features=7, got [2, 3, 3, -1]"),
        ([0, 4, 2, 7], "got [4, -2, 5]"),
        ([0, 3, 5, 7], "lora_B must be (5, r)"),
        ([0, 2, 2, 3, 5, 6], "lora_A must be (3 * 3, 19)"),
    ],
)
def test_the_fake_refuses_blocks_that_do_not_fit(
    kernel_device: torch.device, edges: list[int], message: str
) -> None:
    args = merged_args(kernel_device, "lora_linear_fwd", EDGES[0])
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args[:-1]]
        FORWARD(*fakes, edges)


NEEDS = list(itertools.product([True, False], repeat=5))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "".join("01"[n] for n in needs))
def test_backward_with_some_gradients(
    kernel_device: torch.device, needs: tuple[bool, ...], rows: int, p: float
) -> None:
    args = bwd_args(kernel_device, (rows, K), needs=needs, p=p)
    assert_fake_agrees(BACKWARD, args)
    found = BACKWARD(*args)
    shapes = ((rows, K), (N, K), (N,), (R, K), (N, R))
    for grad, shape, need in zip(found, shapes, needs, strict=True):
        assert grad.shape == (shape if need else (0,))
    # The schema promises outputs that share no memory.
    starts = [t.untyped_storage().data_ptr() for t in found if t.numel()]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_another_dtype(
    kernel_device: torch.device, dtype: torch.dtype, adapter: torch.dtype, rows: int
) -> None:
    args = fwd_args(kernel_device, (rows, K), dtype, adapter=adapter)
    assert_fake_agrees(FORWARD, args)
    args = bwd_args(kernel_device, (rows, K), dtype, adapter=adapter, bias_dtype=adapter)
    assert_fake_agrees(BACKWARD, args)
    dx, dw, dbias, da, db = BACKWARD(*args)
    assert (dx.dtype, dw.dtype) == (dtype, dtype)
    assert (dbias.dtype, da.dtype, db.dtype) == (adapter,) * 3


@pytest.mark.parametrize("which", ["x", "weight", "lora_a", "lora_b", "dy", "all"])
def test_strides_of_the_inputs_do_not_reach_the_outputs(
    kernel_device: torch.device, which: str
) -> None:
    wanted = ("dy", "x", "weight", "lora_a", "lora_b") if which == "all" else (which,)

    def strided(args: Args, names: tuple[str, ...]) -> Args:
        return tuple(
            a.repeat_interleave(2, -1)[..., ::2] if name in wanted else a
            for a, name in zip(args, names, strict=True)
        )

    args = fwd_args(kernel_device, (2, 3, K))
    names = ("x", "weight", "bias", "lora_a", "lora_b", "scaling", "p", "seed")
    assert_fake_agrees(FORWARD, strided(args, names))
    args = bwd_args(kernel_device, (2, 3, K))
    names = ("dy", "x", "weight", "lora_a", "lora_b", "s", "mask", "scaling", "p", "needs", "dtype")
    assert_fake_agrees(BACKWARD, strided(args, names))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fakes_take_symbolic_shapes(kernel_device: torch.device, p: float) -> None:
    """As in torch.compile with dynamic=True: one graph for every number of rows."""
    fwd = fwd_args(kernel_device, (2, 3, K), p=p)
    torch.library.opcheck(FORWARD, fwd, test_utils="test_aot_dispatch_dynamic")
    bwd = bwd_args(kernel_device, (2, 3, K), p=p)
    torch.library.opcheck(BACKWARD, bwd, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, (5, K + 1), f"x must have {K} features in its last dimension"),
        (1, (N, K, 1), "weight must have two dimensions"),
        (2, (N + 1,), f"bias must have shape ({N},), got ({N + 1},)"),
        (3, (R, K + 1), f"lora_A must be (r, {K}), got ({R}, {K + 1})"),
        (4, (N, R + 1), f"lora_B must be ({N}, {R})"),
    ],
)
def test_the_fake_refuses_with_the_words_of_the_function(
    kernel_device: torch.device, position: int, wrong: tuple[int, ...], message: str
) -> None:
    args = list(fwd_args(kernel_device))
    args[position] = torch.ones(wrong, device=kernel_device)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        FORWARD(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
def test_meta_tensors_compute_shapes_alone(kernel_device: torch.device, op: str) -> None:
    args = (fwd_args if op == "lora_linear_fwd" else bwd_args)(kernel_device, p=0.3)
    real = ops.KERNEL_OPS[op](*args)
    moved = (a.to("meta") if isinstance(a, Tensor) else a for a in args)
    for pretended, true in zip(ops.KERNEL_OPS[op](*moved), real, strict=True):
        assert pretended.is_meta
        assert (pretended.shape, pretended.dtype) == (true.shape, true.dtype)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = fwd_args(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"lora_linear_fwd got CPU tensors.*TRITON_INTERPRET=1"):
        FORWARD(*args)


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
def test_the_inputs_are_left_alone(kernel_device: torch.device, op: str) -> None:
    args = (fwd_args if op == "lora_linear_fwd" else bwd_args)(kernel_device, p=0.3)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    ops.KERNEL_OPS[op](*args)
    for now, then in zip(args, before, strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then


def merge_args(device: str, dtype: torch.dtype) -> Args:
    weights = [torch.randn(size, dtype=dtype, device=device) for size in ((6, 4), (5, 3))]
    a = [torch.randn(2, w.shape[1], dtype=dtype, device=device) for w in weights]
    b = [torch.randn(w.shape[0], 2, dtype=dtype, device=device) for w in weights]
    code = [torch.zeros_like(w, dtype=torch.int8) for w in weights]
    index = [torch.zeros(8, dtype=torch.int32, device=device) for _ in weights]
    value = [torch.zeros(8, dtype=dtype, device=device) for _ in weights]
    return (weights, a, b, [1.5, 0.5], code, index, value, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("op", ["merge_", "unmerge_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_merges(device: torch.device, dtype: torch.dtype, op: str) -> None:
    reason = ops.load_native(device.type)
    if reason is not None:
        pytest.skip(reason)
    args = merge_args(str(device), dtype)
    if op == "unmerge_":
        ops.merge_(*args)
    torch.library.opcheck(getattr(ops, op), args, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_native_dropout(dtype: torch.dtype) -> None:
    reason = ops.load_native("cpu")
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(40, dtype=dtype)
    keep = torch.zeros_like(x, dtype=torch.bool)
    args = (x, torch.zeros_like(x), keep, torch.get_rng_state(), 0.75, 1 / 0.75)
    torch.library.opcheck(ops.dropout_, args, test_utils=CHECKS)


@pytest.mark.parametrize("rows_apart", [False, True])
def test_the_native_delta(rows_apart: bool) -> None:
    reason = ops.load_native("cpu")
    if reason is not None:
        pytest.skip(reason)
    x, a, b, y = (torch.randn(size) for size in ((5, 7), (4, 7), (6, 2), (5, 12)))
    y = y[:, ::2] if rows_apart else y[:, :6].contiguous()  # which the op leaves to torch
    s, edges = torch.zeros(5, 4), [0, 3, 3, 6]
    arguments = (x, a, b, 0.75, edges, y, s)
    assert ops.lora_delta_fwd_(*arguments) is not rows_apart
    torch.library.opcheck(ops.lora_delta_fwd_, arguments, test_utils=CHECKS)
    grads = (x.clone(), a.clone(), b.clone())
    arguments = (y, x, a, b, s, None, 0.75, 1.0, edges, *grads)
    assert ops.lora_delta_bwd_(*arguments) is not rows_apart
    torch.library.opcheck(ops.lora_delta_bwd_, arguments, test_utils=CHECKS)


def test_plain_tensors_go_past_the_dispatcher() -> None:
    direct = ops._kernel("lora_linear_fwd")
    plain = torch.ones(2, 3)
    with torch.inference_mode():
        inference = torch.ones(2, 3)
    for x in (plain, plain.requires_grad_(), torch.nn.Parameter(plain), inference, plain[:, 1:]):
        assert ops.launcher("lora_linear_fwd", x) is direct


def test_what_is_watched_goes_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    op, plain = FORWARD, torch.ones(2, 3)
    found = []
    torch.func.vmap(lambda x: found.append(ops.launcher("lora_linear_fwd", x)) or x)(plain)
    torch.func.grad(lambda x: found.append(ops.launcher("lora_linear_fwd", x)) or x.sum())(plain)
    with FakeTensorMode() as mode:
        found.append(ops.launcher("lora_linear_fwd", plain))
        found.append(ops.launcher("lora_linear_fwd", mode.from_tensor(plain)))
    for x in (plain.to(torch.complex64).conj(), torch._neg_view(plain)):
        found.append(ops.launcher("lora_linear_fwd", x))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found.append(ops.launcher("lora_linear_fwd", plain))
    assert found == [op] * 7

"""`lora_linear` on torch's kernels, the update first: what a GPU runs where it has little to do."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lora
from lora_fast import backend, functional
from lora_fast.lora_first import lora_first
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
SHAPES = [(7,), (1, 7), (6, 7), (2, 3, 7), (0, 7), (2, 0, 7)]
SCALING = 0.7


def drawn(shape: tuple[int, ...], device: torch.device, n: int = 5, r: int = 3) -> list[Tensor]:
    k = shape[-1]
    sizes = (shape, (n, k), (r, k), (n, r), (n,))
    return [torch.randn(size, device=device) * (0.5 if i else 1.0) for i, size in enumerate(sizes)]


def run(tensors: list[Tensor], p: float = 0.0) -> Tensor:
    x, weight, a, b, bias = tensors
    return lora_first(x, weight, a, b, SCALING, bias, p)


def plain(tensors: list[Tensor], keep: Tensor | None = None) -> Tensor:
    x, weight, a, b, bias = tensors
    dropped = x if keep is None else x * keep.to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a) * SCALING, b)


def results(function: Any, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y = function(leaves)
    dy = torch.linspace(-1, 1, max(y.numel(), 1), device=y.device)[: y.numel()].view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: Any, dtype: torch.dtype, device: torch.device) -> None:
    tensors = [t.to(dtype) for t in drawn(shape, device)]
    found = results(run, tensors, dtype)
    eager, oracle = results(plain, tensors, dtype), results(plain, tensors, torch.float64)
    for name, *three in zip(("output", *NAMES), found, eager, oracle, strict=True):
        assert_within_budget(*three, what=name)
    assert found[0].is_contiguous()


def test_every_product_is_counted(device: torch.device) -> None:
    m, (n, k), r = 6, (5, 7), 3
    x, *rest = drawn((m, k), device)
    with FlopCounterMode(display=False) as counter:
        run([x, *rest])
    assert counter.get_total_flops() == 2 * m * (n * k + r * (n + k))
    leaves = [t.requires_grad_() for t in (x, *rest)]
    with FlopCounterMode(display=False) as counter:
        run(leaves).sum().backward()
    # Backward: dX and dW of the frozen layer's, dS, and of the adapter's dX, dA and dB.
    assert counter.get_total_flops() == 2 * m * (3 * n * k + 3 * r * (n + k))


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_dropout(shape: Any, p: float, device: torch.device) -> None:
    tensors = drawn(shape, device)

    def ours(tensors: list[Tensor]) -> Tensor:
        torch.manual_seed(0)
        return run(tensors, p)

    y = ours([t.detach().requires_grad_() for t in tensors])
    mask = y.grad_fn.saved_tensors[-1]
    keep = mask.view(shape).double() * (0.0 if p == 1.0 else 1.0 / (1.0 - p))
    found = results(ours, tensors, torch.float32)
    eager, oracle = (
        results(lambda tensors: plain(tensors, keep), tensors, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name, *three in zip(("output", *NAMES), found, eager, oracle, strict=True):
        assert_within_budget(*three, what=name)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_of_gradients(p: float, device: torch.device) -> None:
    tensors = [t.double().requires_grad_() for t in drawn((2, 3, 4), device, n=3, r=2)]

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(list(tensors), p)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    # Which unpacks what was saved one time only.
    found = []
    for y in (function(*tensors), checkpoint(function, *tensors, use_reentrant=False)):
        grads = torch.autograd.grad(y.sin().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), tensors))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5)), ids=str)
def test_only_needed_gradients(needed: tuple[bool, ...], device: torch.device) -> None:
    tensors = drawn((6, 7), device)
    for t, need in zip(tensors, needed, strict=True):
        t.requires_grad_(need)
    y = run(tensors)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.sum().backward()
    assert tuple(t.grad is not None for t in tensors) == needed


def test_batched_gradients(device: torch.device) -> None:
    tensors = [t.requires_grad_() for t in drawn((2, 3, 7), device)]
    y = run(tensors)
    seeds = torch.randn(4, *y.shape, device=device)
    batched = torch.autograd.grad(y, tensors, seeds, retain_graph=True, is_grads_batched=True)
    for i, seed in enumerate(seeds):
        alone = torch.autograd.grad(y, tensors, seed, retain_graph=True)
        torch.testing.assert_close(tuple(g[i] for g in batched), alone)


def test_vmap_over_the_backward(device: torch.device) -> None:
    """Uninitialised memory, here NaN, stays out of it."""
    tensors = [t.requires_grad_() for t in drawn((2, 3, 7), device)]
    y = run(tensors)
    seeds = torch.randn(4, *y.shape, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        batched = torch.vmap(lambda seed: torch.autograd.grad(y, tensors, seed, retain_graph=True))(
            seeds
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for i, seed in enumerate(seeds):
        alone = torch.autograd.grad(y, tensors, seed, retain_graph=True)
        torch.testing.assert_close(tuple(g[i] for g in batched), alone)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_under_autocast(create_graph: bool, device: torch.device) -> None:
    tensors = [t.requires_grad_() for t in drawn((2, 3, 7), device)]
    y = run(tensors)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = torch.autograd.grad(y, tensors, dy, create_graph=create_graph)
    torch.testing.assert_close(found, expected)


def test_draws_are_those_of_torch_in_any_order_of_memory(device: torch.device) -> None:
    tensors = drawn((5, 6, 7), device)
    for x in (tensors[0], tensors[0].transpose(0, 1), tensors[0].expand(5, 6, 7)):
        torch.manual_seed(3)
        y = run([x, *tensors[1:]], 0.5)
        torch.manual_seed(3)
        keep = F.dropout(torch.ones_like(x), 0.5)
        torch.testing.assert_close(y, plain([x, *tensors[1:]], keep))


def test_what_is_kept_for_backward(device: torch.device) -> None:
    """x, S and a byte a mask element, beside the parameters; where A is frozen, x is not."""
    tensors = [t.requires_grad_() for t in drawn((64, 32), device, n=16, r=4)]
    for p in (0.0, 0.5):
        kept = saved_bytes(lambda p=p: run(tensors, p), tensors)
        assert kept == 64 * 4 * 4 + (64 * 32 if p else 0)
    for t in tensors[:3]:
        t.requires_grad_(False)
    assert saved_bytes(lambda: run(tensors, 0.5), tensors[1:]) == 64 * 4 * 4


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_double_backward_of_frozen_factors(needed: tuple[bool, ...], device: torch.device) -> None:
    """Right, or an error that names the remedy where it takes an x that was not kept."""
    tensors = [t.double() for t in drawn((6, 7), device)]
    for t, need in zip(tensors[:4], needed, strict=True):
        t.requires_grad_(need)
    leaves = [t for t in tensors if t.requires_grad]
    if not leaves:
        return
    torch.manual_seed(2)
    y = run(tensors, 0.5)
    dy = torch.randn_like(y).requires_grad_()
    x_learns, weight_learns, a_learns, b_learns = needed
    if x_learns and b_learns and not (weight_learns or a_learns):
        with pytest.raises(RuntimeError, match=r"does not keep x.*use_backend\('reference'\)"):
            torch.autograd.grad(y, leaves, dy, create_graph=True)
        return
    keep = y.grad_fn.saved_tensors[-1]
    # Where B alone learns its gradient does not show the mask, which is not kept.
    assert (keep is None) == (not (x_learns or weight_learns or a_learns))
    mask = torch.zeros_like(tensors[0]) if keep is None else 2.0 * keep
    found, exact = (
        torch.autograd.grad(output, leaves, dy, create_graph=True)
        for output in (y, plain(tensors, mask))
    )
    if keep is not None:
        torch.testing.assert_close(found, exact)
        found, exact = (
            torch.autograd.grad(
                sum(g.square().sum() for g in grads), [*leaves, dy], materialize_grads=True
            )
            for grads in (found, exact)
        )
        torch.testing.assert_close(found, exact)


def asked(
    m: int, n: int, k: int, *, drops: bool = False, learns: bool = True,
    bias: torch.dtype | None = torch.bfloat16, dtype: torch.dtype = torch.bfloat16,
) -> bool:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = dtype, learns: bool = False) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype, requires_grad=learns)

    tensors = (
        *(empty(m, k, dtype=torch.bfloat16), empty(n, k), empty(8, k, learns=learns), empty(n, 8)),
        None if bias is None else empty(n, dtype=bias),
    )
    return backend._launching_outlasts(tensors, drops)


def test_little_work_is_left_to_torch() -> None:
    assert asked(8192, 1024, 1024)
    assert asked(2048, 2048, 4096)
    assert not asked(8192, 2048, 1025)
    assert not asked(8192, 4096, 4096)
    assert asked(8192, 1024, 1024, bias=None)


def test_what_drops_gains_more_by_the_kernels() -> None:
    assert asked(2048, 1024, 1024, drops=True)
    assert not asked(2049, 1024, 1024, drops=True)


def test_a_call_that_drops_does_not_ask_for_gradients() -> None:
    """A checkpoint runs it without gradients first, then with: the draws must be the same."""
    for rows in (1, 64, 65):
        assert asked(rows, 1024, 1024, drops=True, learns=False)
        assert asked(rows, 1024, 1024, drops=True, learns=True)


def test_few_rows_without_gradients_are_one_launch() -> None:
    assert not asked(64, 4096, 4096, learns=False)
    assert asked(65, 4096, 4096, learns=False)
    assert asked(1, 4096, 4096)
    with torch.no_grad():
        assert not asked(1, 4096, 4096)


def test_other_dtypes_are_converted_by_the_kernels() -> None:
    assert not asked(64, 64, 64, bias=torch.float32)
    assert not asked(64, 64, 64, dtype=torch.float32)


def test_a_graph_has_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not asked(64, 64, 64)


def test_a_layer_on_the_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp32 factors on a bf16 weight, whose gradients have their dtype."""
    monkeypatch.setattr(functional, "choose", lambda *a, **k: backend.Backend.EAGER_LORA_FIRST)
    layer = randomize_(lora.Linear(32, 16, r=4, lora_alpha=8)).bfloat16()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(3, 5, 32).bfloat16().requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_on_a_gpu(dropout: float, caplog: pytest.LogCaptureFixture) -> None:
    layer = randomize_(lora.Linear(256, 128, r=8, lora_dropout=dropout, device="cuda"))
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(2, 40, 256, device="cuda", requires_grad=True)
    found = []
    for name in ("auto", "reference"):
        torch.manual_seed(0)
        with lora.use_backend(name), caplog.at_level("DEBUG", logger="lora_fast.dispatch"):
            y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B])))
    assert caplog.records[0].getMessage().startswith("lora_linear -> eager_lora_first")
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)

"""`lora.MergedLinear` on the fused path: what autograd, autocast and torch.compile make of it."""

import os
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import lora_fast as lora
from lora_fast import ops
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="the kernels need a GPU or Triton's interpreter",
    ),
]

# enable_lora, out_splits; 30 columns.
BLOCKS = {
    "no_middle": ([True, False, True], None),
    "no_first": ([False, True, True], None),
    "no_last": ([True, False], [23, 7]),
    "grouped_query": ([True, True, True], [18, 6, 6]),
    "ints": ([0, 1, 0, 1], [1, 2, 3, 24]),
    "one": ([True], None),
}


def make(
    device: torch.device, blocks: str = "no_middle", dropout: float = 0.0, **options: Any
) -> lora.MergedLinear:
    enable_lora, out_splits = BLOCKS[blocks]
    layer = lora.MergedLinear(
        *(40, 30, 3, 6, dropout, enable_lora), out_splits=out_splits, device=device, **options
    )
    randomize_(layer)
    return layer


def gradients(layer: lora.MergedLinear, y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    dy = torch.linspace(-1.0, 2.0, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [layer.lora_A, layer.lora_B, layer.bias, *inputs], dy)


def check(found: Any, eager: Any, oracle: Any) -> None:
    for got, plain, true in zip(found, eager, oracle, strict=True):
        assert_within_budget(got, plain, true)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_layer_within_the_budget(
    kernel_device: torch.device, blocks: str, fan_in_fan_out: bool
) -> None:
    layer = make(kernel_device, blocks, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(7, 40, device=kernel_device, requires_grad=True)
    y = layer(x)
    found = (y, *gradients(layer, y, x))
    with lora.use_backend("reference"):
        y = layer(x)
        eager = (y, *gradients(layer, y, x))
        wide, wide_x = layer.double(), x.detach().double().requires_grad_()
        y = wide(wide_x)
        oracle = (y, *gradients(wide, y, wide_x))
    check(found, eager, oracle)


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40)], ids=str)
def test_any_number_of_dimensions(kernel_device: torch.device, shape: tuple[int, ...]) -> None:
    layer = make(kernel_device)
    x = torch.randn(shape, device=kernel_device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 30)
    found = gradients(layer, y, x)
    with lora.use_backend("reference"):
        expected = gradients(layer, layer(x), x)
    for got, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


def test_without_an_enabled_block_it_is_the_frozen_layer(kernel_device: torch.device) -> None:
    shapes = ((5, 8), (6, 8), (0, 8), (0, 2), (6,))
    x, weight, a, b, bias = (torch.randn(s, device=kernel_device) for s in shapes)
    blocks = {"enable_lora": [False, False], "out_splits": [2, 4]}
    with pytest.raises(RuntimeError, match="is empty"):
        lora.functional.lora_merged_linear(x, weight, a, b, 1.0, bias, **blocks)
    with lora.use_backend("auto"):
        y = lora.functional.lora_merged_linear(x, weight, a, b, 1.0, bias, **blocks)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


def test_what_is_saved_for_backward(kernel_device: torch.device) -> None:
    """S of both groups and a bit an element of x, beside x and the parameters."""
    layer = make(kernel_device, dropout=0.5)
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(64, 40, device=kernel_device, requires_grad=True)
    saved = saved_bytes(lambda: layer(x), [x, *layer.parameters()])
    assert saved == 64 * 40 // 8 + 64 * (3 + 3) * 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(
    kernel_device: torch.device, use_reentrant: bool
) -> None:
    layer = make(kernel_device, dropout=0.5)
    x = torch.randn(8, 40, device=kernel_device, requires_grad=True)
    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B])
    torch.manual_seed(3)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, plain[0])
    assert torch.equal(layer.lora_B.grad, plain[1])


@pytest.mark.parametrize("blocks", ["no_middle", "grouped_query"])
def test_double_backward_has_the_reference_values(kernel_device: torch.device, blocks: str) -> None:
    layer = make(kernel_device, blocks)
    x = torch.randn(6, 40, device=kernel_device, requires_grad=True)

    def penalty(layer: lora.MergedLinear, x: Tensor) -> tuple[Tensor, ...]:
        leaves = [x, layer.lora_A, layer.lora_B]
        first = torch.autograd.grad(layer(x).sin().sum(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, leaves)

    found = penalty(layer, x)
    with lora.use_backend("reference"):
        eager = penalty(layer, x)
        oracle = penalty(layer.double(), x.detach().double().requires_grad_())
    check(found, eager, oracle)


def test_double_backward_reads_the_mask_that_was_drawn(kernel_device: torch.device) -> None:
    layer = make(kernel_device, dropout=0.5)
    x = torch.randn(6, 40, device=kernel_device, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    leaves = [x, layer.lora_A, layer.lora_B, layer.bias]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    formulas = torch.autograd.grad(y, leaves, dy, create_graph=True)
    for kernel, formula in zip(first, formulas, strict=True):
        assert formula.grad_fn is not None or formula.numel() == 30
        torch.testing.assert_close(kernel, formula, rtol=1e-4, atol=1e-4)


def test_fp32_adapters_on_a_half_base(kernel_device: torch.device) -> None:
    layer = make(kernel_device, dtype=torch.float16)
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().float()))
    x = torch.randn(8, 40, device=kernel_device, dtype=torch.float16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_autocast_casts_as_torch_does(kernel_device: torch.device) -> None:
    layer = make(kernel_device)
    x = torch.randn(8, 40, device=kernel_device, requires_grad=True)
    with torch.autocast(kernel_device.type, torch.float16):
        y = layer(x)
    found = (y, *gradients(layer, y, x))
    assert y.dtype == torch.float16
    assert all(g.dtype == torch.float32 for g in found[1:])
    with lora.use_backend("reference"):
        with torch.autocast(kernel_device.type, torch.float16):
            y = layer(x)
        eager = (y, *gradients(layer, y, x))
    for got, plain in zip(found, eager, strict=True):
        torch.testing.assert_close(got, plain, rtol=0.02, atol=0.02)


# Dynamo makes an instance of the autograd function, and torch warns of its own doing.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("blocks", ["no_middle", "grouped_query"])
def test_compiles_to_one_graph(kernel_device: torch.device, blocks: str, dropout: float) -> None:
    layer = make(kernel_device, blocks, dropout)
    forward, backward = ops.KERNEL_OPS["lora_linear_fwd"], ops.KERNEL_OPS["lora_linear_bwd"]
    graphs: dict[Any, list[Any]] = {forward: [], backward: []}

    def recorder(op: Any) -> Any:
        def record(graph: Any, inputs: Any) -> Any:
            graphs[op].append(graph)
            return make_boxed_func(graph.forward)

        return record

    backend = aot_autograd(fw_compiler=recorder(forward), bw_compiler=recorder(backward))
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (4, 6):
        x = torch.randn(rows, 40, device=kernel_device, requires_grad=True)
        torch.manual_seed(5)
        y = layer(x)
        expected = (y, *gradients(layer, y, x))
        torch.manual_seed(5)
        y = compiled(x)
        found = (y, *gradients(layer, y, x))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for op, (graph,) in graphs.items():  # one of each for every number of rows
        assert [node.target for node in graph.graph.nodes].count(op) == 1


def test_merging_leaves_the_kernels(kernel_device: torch.device) -> None:
    """A merged layer is a plain one, and comes back to the fused path as it was."""
    layer = make(kernel_device)
    x = torch.randn(5, 40, device=kernel_device)
    before = layer(x)
    merged = layer.eval()(x)
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.train()(x), before)


def test_an_edge_off_by_one_is_seen(kernel_device: torch.device) -> None:
    """The tests can fail: blocks of other widths are out of the budget."""
    layer = make(kernel_device, "grouped_query")
    x = torch.randn(7, 40, device=kernel_device)
    with lora.use_backend("reference"):
        eager, oracle = layer(x), layer.double()(x.double())
    layer.float().out_splits = [18, 5, 7]
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(layer(x), eager, oracle)

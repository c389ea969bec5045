"""`lora_conv`, `merged_weight` and the convolution layers on the fused kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional, ops
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_backend")

Tensors = dict[str, Tensor]

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: lora.Conv1d(4, 6, 3, r=2, padding=1), (2, 4, 7)),
    "conv2d": (lambda: lora.Conv2d(5, 7, 3, r=2, stride=2, lora_alpha=3), (2, 5, 6, 6)),
    "unbatched": (lambda: lora.Conv2d(4, 6, 3, r=2), (4, 6, 6)),
    "groups": (lambda: lora.Conv2d(4, 6, 3, r=2, groups=2, dilation=2), (2, 4, 7, 7)),
    "depthwise": (lambda: lora.Conv2d(4, 4, 3, r=1, groups=4, bias=False), (2, 4, 5, 5)),
    "circular": (
        lambda: lora.Conv2d(4, 6, 3, r=2, padding=1, padding_mode="circular"),
        (1, 4, 5, 5),
    ),
    "conv3d": (lambda: lora.Conv3d(2, 4, 3, r=1, groups=2), (1, 2, 4, 4, 4)),
}


def results(layer: nn.Module, x: Tensor, dy: Tensor, backend: str) -> Tensors:
    """Output and gradients of a layer by a backend."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with lora.use_backend(backend):
        y = layer(x)
        y.backward(dy)
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | grads


def check(layer: nn.Module, x: Tensor) -> Tensors:
    """Fail unless the layer on the kernel is as near to float64 as on plain torch."""
    dy = torch.randn_like(layer(x))
    found, eager = results(layer, x, dy, "triton"), results(layer, x, dy, "reference")
    oracle = results(layer.double(), x.double(), dy.double(), "reference")
    assert {"lora_A", "lora_B"} < set(found) == set(eager)
    for name in found:
        assert_within_budget(found[name], eager[name], oracle[name], what=name)
    return found


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, channels_last: bool, kernel_device: torch.device) -> None:
    make, shape = LAYERS[name]
    layer = randomize_(make()).to(kernel_device)
    layer.conv.weight.requires_grad_()
    if channels_last:
        if layer.conv.weight.dim() != 4:
            pytest.skip("torch lays only two-dimensional kernels out so by this name")
        layer.conv.to(memory_format=torch.channels_last)
    check(layer, torch.randn(shape, device=kernel_device))


def test_fp32_adapters_on_a_kernel_of_16_bits(kernel_device: torch.device) -> None:
    weight = torch.randn(6, 4, 3, 3, device=kernel_device).half().requires_grad_()
    a = torch.randn(6, 12, device=kernel_device).requires_grad_()
    b = torch.randn(18, 6, device=kernel_device).requires_grad_()
    dw = torch.randn(6, 4, 3, 3, device=kernel_device).half()

    def grads(backend: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        with lora.use_backend(backend):
            merged = functional.merged_weight(*leaves, 0.75)
        return (merged, *torch.autograd.grad(merged, leaves, dw.to(leaves[0].dtype)))

    wide = [t.detach().double().requires_grad_() for t in (weight, a, b)]
    found, eager = grads("triton", weight, a, b), grads("reference", weight, a, b)
    for name, *triple in zip("ywab", found, eager, grads("reference", *wide), strict=True):
        assert_within_budget(*triple, what=name)


def test_double_backward(kernel_device: torch.device) -> None:
    sizes = ((6, 4, 3, 3), (6, 12), (18, 6), (2, 4, 5, 5))
    drawn = [torch.randn(size, device=kernel_device) for size in sizes]

    def second(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        weight, a, b, x = leaves = [t.to(dtype).requires_grad_() for t in drawn]
        with lora.use_backend(backend):
            y = functional.lora_conv(x, weight, a, b, 0.75)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found, eager = second(torch.float32, "triton"), second(torch.float32, "reference")
    for name, *triple in zip("wabx", found, eager, second(torch.float64, "reference"), strict=True):
        assert_within_budget(*triple, what=name)


def test_nothing_more_is_kept_for_backward(kernel_device: torch.device) -> None:
    layer = lora.Conv2d(4, 6, 3, r=2).to(kernel_device)
    x = torch.randn(2, 4, 6, 6, device=kernel_device)

    def kept(backend: str) -> int:
        with lora.use_backend(backend):
            return saved_bytes(lambda: layer(x), [x, *layer.parameters()])

    assert kept("triton") <= kept("reference")
    own = layer.conv.weight.nbytes  # the merged weight, which the convolution keeps
    assert kept("triton") == own


def test_a_backward_under_autocast_is_none_of_its_business(kernel_device: torch.device) -> None:
    weight, a, b = (torch.randn(s, device=kernel_device) for s in ((6, 4, 3), (6, 12), (6, 6)))
    leaves = [a.requires_grad_(), b.requires_grad_()]
    with lora.use_backend("triton"):
        merged = functional.merged_weight(weight, a, b, 0.75)
    seed = torch.randn_like(merged)
    expected = torch.autograd.grad(merged, leaves, seed, retain_graph=True)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        found = torch.autograd.grad(merged, leaves, seed)
    for ours, same in zip(found, expected, strict=True):
        assert torch.equal(ours, same)


def test_autocast_rounds_the_merged_weight_once(kernel_device: torch.device) -> None:
    layer = randomize_(lora.Conv2d(4, 6, 3, r=2)).to(kernel_device)
    x = torch.randn(2, 4, 6, 6, device=kernel_device)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        y = layer(x)
        expected = nn.functional.conv2d(x, layer.effective_weight(), layer.bias)
    assert y.dtype is torch.bfloat16
    assert layer.effective_weight().dtype is torch.float32
    assert torch.equal(y, expected)


# torch.compile itself makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph(kernel_device: torch.device) -> None:
    layer = randomize_(lora.Conv2d(4, 6, 3, r=2)).to(kernel_device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 6, 6, device=kernel_device)
    wanted = torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B))
    y = compiled(x)
    assert torch.equal(y, layer(x))
    found = torch.autograd.grad(y.square().sum(), (layer.lora_A, layer.lora_B))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_merging_gives_what_the_kernel_gives(kernel_device: torch.device) -> None:
    layer = randomize_(lora.Conv2d(4, 6, 3, r=2)).to(kernel_device)
    unmerged = layer.effective_weight()
    torch.testing.assert_close(layer.eval().conv.weight, unmerged)


def test_a_linear_layers_weight_with_blocks_is_torchs(kernel_device: torch.device) -> None:
    layer = randomize_(lora.MergedLinear(4, 6, r=2, enable_lora=[True, False])).to(kernel_device)
    with lora.use_backend("reference"):
        expected = layer.effective_weight()
    assert torch.equal(layer.effective_weight(), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_the_operator_keeps_its_contract(layout: str, kernel_device: torch.device) -> None:
    weight = torch.randn(6, 4, 3, 3, device=kernel_device)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "sliced":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    a, b = torch.randn(6, 12, device=kernel_device), torch.randn(18, 6, device=kernel_device)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.KERNEL_OPS["merged_weight"], (weight, a, b, 0.75), test_utils=checks)


def test_a_scale_off_by_two_percent_is_seen(kernel_device: torch.device) -> None:
    """The tests can fail, for every gradient that depends on the scaling."""
    layer = randomize_(lora.Conv2d(4, 6, 3, r=2)).to(kernel_device)
    x = torch.randn(2, 4, 6, 6, device=kernel_device)
    dy = torch.randn_like(layer(x))
    eager = results(layer, x, dy, "reference")
    layer.scaling *= 1.02
    found = results(layer, x, dy, "triton")
    layer.scaling /= 1.02
    oracle = results(layer.double(), x.double(), dy.double(), "reference")
    for name in ("y", "x", "lora_A", "lora_B"):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(found[name], eager[name], oracle[name], what=name)

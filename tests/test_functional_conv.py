"""`lora_conv` and the dense delta against sums in float64: outputs and gradients."""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import functional
from lora_fast.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
SCALING = 1.5
PATTERNS = list(itertools.product([True, False], repeat=3))
Tensors = dict[str, Tensor]
Formula = Callable[[Tensors], Tensor]


def results(formula: Formula, leaves: Tensors, dy: Tensor, needs: Iterable[str]) -> Tensors:
    copies = {name: t.clone().requires_grad_(name in needs) for name, t in leaves.items()}
    y = formula(copies)
    if any(name in needs for name in leaves):
        y.backward(dy.to(y.dtype))
    assert all(t.grad is None for name, t in copies.items() if name not in needs)
    return {"y": y.detach()} | {f"d{n}": t.grad for n, t in copies.items() if n in needs}


def assert_right(
    call: Formula, oracle: Formula, eager: Formula, leaves: Tensors, needs: Iterable[str] = NAMES
) -> None:
    """Fail unless output and gradients are as near to the oracle as eager torch's."""
    wide = {name: t.double() for name, t in leaves.items()}
    dy = torch.randn_like(eager(leaves))
    want = results(oracle, wide, dy.double(), needs)
    torchs = results(eager, leaves, dy, needs)
    got = results(call, leaves, dy, needs)
    factor = 8.0 if dy.dtype == torch.float64 else 2.0  # the oracle is no wider than fp64
    for name in want:
        assert_within_budget(got[name], torchs[name], want[name], factor=factor, what=name)


CHANNELS, OUT = 4, 6


def drawn_conv(
    d: int,
    kernel: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    groups: int = 1,
    batch: tuple[int, ...] = (2,),
    side: int = 8,
) -> Tensors:
    sizes = {
        "x": (*batch, CHANNELS, *[side] * d),
        "weight": (OUT, CHANNELS // groups, *[kernel] * d),
        "bias": (OUT,),
        "lora_A": (r * kernel, CHANNELS * kernel),
        "lora_B": (OUT // groups * kernel ** (d - 1), r * kernel),
    }
    return {name: torch.randn(size).to(device, dtype) for name, size in sizes.items()}


def convolve(x: Tensor, w: Tensor, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """A convolution as the sum over the kernel's positions of einsums over the channels."""
    d, kernel = w.dim() - 2, w.shape[-1]
    reach = dilation * (kernel - 1)
    x = F.pad(x, [padding] * (2 * d))
    sides = [(side - reach - 1) // stride + 1 for side in x.shape[2:]]
    x = x.unflatten(1, (groups, -1))
    w = w.unflatten(0, (groups, -1))
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for at in itertools.product(range(kernel), repeat=d):
        part = x
        for axis, (offset, side) in enumerate(zip(at, sides, strict=True), start=3):
            index = torch.arange(side, device=x.device) * stride + offset * dilation
            part = part.index_select(axis, index)
        total = total + torch.einsum("bgc...,goc->bgo...", part, w[(..., *at)])
    return total.flatten(1, 2)


def conv_oracle(stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Formula:
    def oracle(t: Tensors) -> Tensor:
        delta = torch.einsum("nr,rk->nk", t["lora_B"], t["lora_A"])
        w = t["weight"] + SCALING * delta.reshape(t["weight"].shape)
        d = w.dim() - 2
        x = t["x"] if t["x"].dim() == d + 2 else t["x"].unsqueeze(0)
        y = convolve(x, w, stride, padding, dilation, groups)
        if "bias" in t:
            y = y + t["bias"].view(-1, *[1] * d)
        return y if t["x"].dim() == d + 2 else y.squeeze(0)

    return oracle


def conv_eager(**options: Any) -> Formula:
    """What loralib computes."""

    def eager(t: Tensors) -> Tensor:
        w = t["weight"] + (t["lora_B"] @ t["lora_A"]).view(t["weight"].shape) * SCALING
        conv = (F.conv1d, F.conv2d, F.conv3d)[w.dim() - 3]
        return conv(t["x"], w, t.get("bias"), **options)

    return eager


def conv_call(**options: Any) -> Formula:
    def call(t: Tensors) -> Tensor:
        args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], SCALING, t.get("bias"))
        return functional.lora_conv(*args, **options)

    return call


def assert_conv_right(leaves: Tensors, needs: Iterable[str] = NAMES, **options: Any) -> None:
    formulas = (conv_call(**options), conv_oracle(**options), conv_eager(**options))
    assert_right(*formulas, leaves, needs)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(("d", "kernel"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_conv(dtype: torch.dtype, d: int, kernel: int, r: int, device: torch.device) -> None:
    assert_conv_right(drawn_conv(d, kernel, r, dtype, device))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"groups": 2},
        {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_options_of_the_convolution(d: int, options: dict[str, int]) -> None:
    leaves = drawn_conv(d, 3, 2, torch.float64, groups=options.get("groups", 1), side=7)
    assert_conv_right(leaves, **options)


@pytest.mark.parametrize("batch", [(), (0,), (1,)], ids=["unbatched", "empty", "one"])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_batches(d: int, batch: tuple[int, ...]) -> None:
    assert_conv_right(drawn_conv(d, 2, 2, torch.float64, batch=batch, side=5))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_without_a_bias(d: int) -> None:
    leaves = drawn_conv(d, 2, 2, torch.float64, side=5)
    del leaves["bias"]
    assert_conv_right(leaves)


@pytest.mark.parametrize(
    "needs", [s for n in range(5) for s in itertools.combinations(NAMES, n)], ids="+".join
)
def test_only_the_gradients_that_are_asked_for(needs: tuple[str, ...]) -> None:
    assert_conv_right(drawn_conv(2, 3, 2, torch.float64, side=5), needs, padding=1)


@pytest.mark.parametrize("which", ["x", "weight", "both"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_any_strides(layout: str, which: str) -> None:
    leaves = drawn_conv(2, 3, 2, torch.float64, side=6)
    expected = conv_oracle()(leaves)
    for name in ("x", "weight") if which == "both" else (which,):
        if layout == "sliced":
            leaves[name] = leaves[name].repeat_interleave(2, -1)[..., ::2]
        else:
            leaves[name] = leaves[name].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv_call()(leaves), expected)


@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
def test_padding_by_name_and_by_dimension(padding: Any) -> None:
    leaves = drawn_conv(2, 3, 2, torch.float64, side=6)
    y = conv_call(padding=padding)(leaves)
    torch.testing.assert_close(y, conv_eager(padding=padding)(leaves))


def dense(t: Tensors, enable: tuple[bool, ...], widths: list[int]) -> Tensor:
    """The delta, row by row."""
    rank, rows, group, row = t["lora_B"].shape[1], [], 0, 0
    for width, on in zip(widths, enable, strict=True):
        for _ in range(width):
            if on:
                a = t["lora_A"][group * rank : (group + 1) * rank]
                rows.append(SCALING * torch.einsum("r,rk->k", t["lora_B"][row], a))
                row += 1
            else:
                rows.append(torch.zeros_like(t["lora_A"][0] if len(t["lora_A"]) else t["k"]))
        group += on
    return torch.stack(rows)


@pytest.mark.parametrize("r", [1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_delta_and_merged_weight(dtype: torch.dtype, r: int, device: torch.device) -> None:
    sizes = {"weight": (17, 33), "lora_A": (r, 33), "lora_B": (17, r)}
    leaves = {name: torch.randn(size).to(device, dtype) for name, size in sizes.items()}
    factors = {name: leaves[name] for name in ("lora_A", "lora_B")}
    assert_right(
        lambda t: functional.merged_delta(t["lora_A"], t["lora_B"], SCALING),
        lambda t: SCALING * torch.einsum("nr,rk->nk", t["lora_B"], t["lora_A"]),
        lambda t: t["lora_B"] @ t["lora_A"] * SCALING,
        factors,
    )
    assert_right(
        lambda t: functional.merged_weight(t["weight"], t["lora_A"], t["lora_B"], SCALING),
        lambda t: t["weight"] + SCALING * torch.einsum("nr,rk->nk", t["lora_B"], t["lora_A"]),
        lambda t: t["weight"] + t["lora_B"] @ t["lora_A"] * SCALING,
        leaves,
    )


@pytest.mark.parametrize("splits", [None, [5, 1, 9]], ids=["equal", "unequal"])
@pytest.mark.parametrize("enable", PATTERNS, ids=str)
def test_merged_delta_and_weight_of_blocks(
    enable: tuple[bool, ...], splits: list[int] | None
) -> None:
    widths = splits or [5, 5, 5]
    rows = sum(w for w, on in zip(widths, enable, strict=True) if on)
    t = {"k": torch.zeros(7, dtype=torch.float64), "weight": torch.randn(15, 7).double()}
    t |= {
        "lora_A": torch.randn(2 * sum(enable), 7).double(),
        "lora_B": torch.randn(rows, 2).double(),
    }
    expected = dense(t, enable, widths)
    blocks = {"enable_lora": list(enable), "out_splits": splits}
    merged = functional.merged_weight(t["weight"], t["lora_A"], t["lora_B"], SCALING, **blocks)
    torch.testing.assert_close(merged, t["weight"] + expected)
    if any(enable) or splits is not None:  # B tells the width of equal blocks, if it has rows
        delta = functional.merged_delta(t["lora_A"], t["lora_B"], SCALING, **blocks)
        torch.testing.assert_close(delta, expected)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "sliced"])
def test_merged_weight_keeps_the_shape_of_any_weight(layout: str) -> None:
    weight = torch.randn(6, 4, 3, 3).double()
    if layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        weight = weight.transpose(2, 3)
    elif layout == "sliced":
        weight = weight.repeat_interleave(2, -1)[..., ::2]
    a, b = torch.randn(6, 12).double(), torch.randn(18, 6).double()
    before = weight.clone()
    merged = functional.merged_weight(weight, a, b, SCALING)
    expected = weight + SCALING * torch.einsum("nr,rk->nk", b, a).reshape(weight.shape)
    torch.testing.assert_close(merged, expected)
    assert torch.equal(weight, before)
    assert merged.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_merged_weight_with_fp32_factors_has_the_dtype_of_the_weight(base: torch.dtype) -> None:
    weight = torch.randn(6, 4).to(base)
    a, b = torch.randn(2, 4, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    merged = functional.merged_weight(weight, a, b, SCALING)
    assert merged.dtype == base
    merged.float().sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.float32)
    expected = weight.double() + SCALING * b.detach().double() @ a.detach().double()
    tolerance = 8 * torch.finfo(base).eps
    torch.testing.assert_close(merged.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "groups", "expected"),
    [
        ((2, 4, 5), 1, "x must be (batch, 4, *space) or (4, *space), with 2 dimensions of space"),
        ((4, 4), 1, "x must be (batch, 4, *space)"),
        ((1, 1, 4, 5, 5), 1, "x must be (batch, 4, *space)"),
        ((1, 3, 5, 5), 1, "x must be (batch, 4, *space)"),
        ((1, 4, 5, 5), 2, "x must be (batch, 8, *space) or (8, *space), with 2 dimensions"),
        ((1, 4, 5, 5), 4, "groups must be a positive integer that divides the 6 output channels"),
        ((1, 4, 5, 5), 0, "groups must be a positive integer"),
        ((1, 4, 5, 5), None, "groups must be a positive integer"),
        ((1, 4, 5, 5), "1", "groups must be a positive integer"),
    ],
    ids=str,
)
def test_an_input_or_groups_that_do_not_fit(
    shape: tuple[int, ...], groups: Any, expected: str
) -> None:
    weight, a, b = torch.randn(6, 4, 3, 3), torch.randn(3, 12), torch.randn(18, 3)
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=re.escape(f"lora_conv: {expected}")):
            functional.lora_conv(torch.randn(shape), weight, a, b, 1.0, groups=groups)


def test_torch_tells_what_else_is_wrong() -> None:
    weight, a, b = torch.randn(6, 4, 3, 3), torch.randn(3, 12), torch.randn(18, 3)
    with pytest.raises(RuntimeError, match="stride"):
        functional.lora_conv(torch.randn(1, 4, 5, 5), weight, a, b, 1.0, stride=0)

"""The linear functions against an einsum in float64 that is written here: outputs and gradients."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import functional
from lora_fast.testing import assert_within_budget

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
SCALING = 1.5
# Shape of x, out_features, rank.
SIZES = [
    ((33,), 17, 3),
    ((13, 33), 130, 1),
    ((3, 5, 19), 23, 64),
    ((2, 3, 5, 17), 9, 3),
    ((0, 19), 7, 3),
    ((3, 0, 19), 7, 1),
    ((1, 1), 1, 1),
]
PATTERNS = list(itertools.product([True, False], repeat=3))
Tensors = dict[str, Tensor]
Formula = Callable[[Tensors, Tensor], Tensor]


def drawn(
    shape: tuple[int, ...],
    n: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    bias: bool = True,
    groups: int = 1,
    rows: int | None = None,
) -> Tensors:
    k = shape[-1]
    sizes = {"x": shape, "weight": (n, k), "lora_A": (r * groups, k)}
    sizes["lora_B"] = (n if rows is None else rows, r)
    if bias:
        sizes["bias"] = (n,)
    return {name: torch.randn(size).to(device, dtype) for name, size in sizes.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor


def linear_oracle(t: Tensors, keep: Tensor) -> Tensor:
    y = torch.einsum("...k,nk->...n", t["x"], t["weight"]) + t.get("bias", 0.0)
    dropped = t["x"] * keep
    return y + SCALING * torch.einsum("...k,rk,nr->...n", dropped, t["lora_A"], t["lora_B"])


def linear_eager(t: Tensors, keep: Tensor) -> Tensor:
    y = F.linear(t["x"], t["weight"], t.get("bias"))
    return y + ((t["x"] * keep) @ t["lora_A"].t() @ t["lora_B"].t()) * SCALING


def merged_oracle(enable: tuple[bool, ...], widths: list[int]) -> Formula:
    """Every output column written on its own, as its block's A and its row of B say."""

    def oracle(t: Tensors, keep: Tensor) -> Tensor:
        base = torch.einsum("...k,nk->...n", t["x"], t["weight"]) + t.get("bias", 0.0)
        dropped, rank = t["x"] * keep, t["lora_B"].shape[1]
        columns, row, group, column = [], 0, 0, 0
        for width, on in zip(widths, enable, strict=True):
            for _ in range(width):
                y = base[..., column]
                if on:
                    a = t["lora_A"][group * rank : (group + 1) * rank]
                    update = torch.einsum("...k,rk,r->...", dropped, a, t["lora_B"][row])
                    y, row = y + SCALING * update, row + 1
                columns.append(y)
                column += 1
            group += on
        return torch.stack(columns, dim=-1)

    return oracle


def merged_eager(enable: tuple[bool, ...], widths: list[int]) -> Formula:
    """loralib's way: a dense delta, zeros where a block has no adapter."""

    def eager(t: Tensors, keep: Tensor) -> Tensor:
        rank, row, group, blocks = t["lora_B"].shape[1], 0, 0, []
        for width, on in zip(widths, enable, strict=True):
            if on:
                a = t["lora_A"][group * rank : (group + 1) * rank]
                blocks.append(t["lora_B"][row : row + width] @ a)
                row, group = row + width, group + 1
            else:
                blocks.append(t["weight"].new_zeros(width, t["weight"].shape[1]))
        y = F.linear(t["x"], t["weight"], t.get("bias"))
        return y + (t["x"] * keep) @ torch.cat(blocks).t() * SCALING

    return eager


def results(
    call: Callable[[Tensors], Tensor],
    leaves: Tensors,
    dy: Tensor,
    needs: Iterable[str],
    view: Callable[[Tensors], Tensors] = lambda t: t,
) -> Tensors:
    """The output and the gradients that `needs` names, of `call` on views of copies of leaves."""
    copies = {name: t.clone().requires_grad_(name in needs) for name, t in leaves.items()}
    y = call(view(copies))
    if any(name in needs for name in leaves):
        y.backward(dy.to(y.dtype))
    assert all(t.grad is None for name, t in copies.items() if name not in needs)
    return {"y": y.detach()} | {f"d{n}": t.grad for n, t in copies.items() if n in needs}


def assert_right(
    function: Callable[..., Tensor],
    formulas: tuple[Formula, Formula],
    leaves: Tensors,
    *,
    p: float = 0.0,
    training: bool = True,
    needs: Iterable[str] = NAMES,
    view: Callable[[Tensors], Tensors] = lambda t: t,
    **options: Any,
) -> None:
    """Fail unless output and gradients are as near to the oracle as eager torch's."""
    oracle, eager = formulas
    dtype = leaves["x"].dtype
    x = view(leaves)["x"]
    torch.manual_seed(7)
    keep = F.dropout(torch.ones_like(x), p, training)
    exact = (keep != 0).double() * (1.0 / (1.0 - p) if training and p < 1.0 else 1.0)
    dy = torch.randn_like(oracle(view(leaves), keep))

    def call(t: Tensors) -> Tensor:
        torch.manual_seed(7)
        args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], SCALING, t.get("bias"))
        return function(*args, p, training, **options)

    wide = {name: t.double() for name, t in leaves.items()}
    want = results(lambda t: oracle(t, exact), wide, dy.double(), needs, view)
    torchs = results(lambda t: eager(t, keep), leaves, dy, needs, view)
    got = results(call, leaves, dy, needs, view)
    factor = 8.0 if dtype == torch.float64 else 2.0  # the oracle is no wider than fp64
    for name in want:
        assert_within_budget(got[name], torchs[name], want[name], factor=factor, what=name)


LINEAR = (linear_oracle, linear_eager)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("shape", "n", "r"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    n: int,
    r: int,
    bias: bool,
    backend: str,
    device: torch.device,
) -> None:
    assert_right(functional.lora_linear, LINEAR, drawn(shape, n, r, dtype, device, bias=bias))


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(("shape", "n", "r"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_drops_what_torch_drops(
    dtype: torch.dtype, shape: tuple[int, ...], n: int, r: int, p: float, backend: str
) -> None:
    assert_right(functional.lora_linear, LINEAR, drawn(shape, n, r, dtype), p=p)


@pytest.mark.parametrize("splits", [None, [5, 1, 9]], ids=["equal", "unequal"])
@pytest.mark.parametrize("enable", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_merged_linear(
    dtype: torch.dtype,
    enable: tuple[bool, ...],
    splits: list[int] | None,
    backend: str,
    device: torch.device,
) -> None:
    widths = splits or [5, 5, 5]
    rows = sum(w for w, on in zip(widths, enable, strict=True) if on)
    leaves = drawn((2, 6, 19), 15, 3, dtype, device, groups=sum(enable), rows=rows)
    formulas = (merged_oracle(enable, widths), merged_eager(enable, widths))
    needs = NAMES if any(enable) else ("x", "weight", "bias")  # A and B have no elements
    options = {"enable_lora": enable, "out_splits": splits}
    assert_right(functional.lora_merged_linear, formulas, leaves, needs=needs, **options)


QKV = (True, False, True)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("shape", "n", "r"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_merged_linear_sizes(
    dtype: torch.dtype, shape: tuple[int, ...], n: int, r: int, bias: bool, p: float, backend: str
) -> None:
    widths = [n, 2, n + 1]
    leaves = drawn(shape, 2 * n + 3, r, dtype, bias=bias, groups=2, rows=2 * n + 1)
    formulas = (merged_oracle(QKV, widths), merged_eager(QKV, widths))
    options = {"enable_lora": QKV, "out_splits": widths}
    assert_right(functional.lora_merged_linear, formulas, leaves, p=p, **options)


def _lay(tensor: Tensor, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A leaf, and how its view in this layout is made."""
    shape = tensor.shape
    if layout == "sliced":
        return tensor.repeat_interleave(2, -1), lambda t: t[..., ::2]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous(), lambda t: t.transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].clone(), lambda t: t.expand(shape)
    if layout == "offset":
        return torch.cat([tensor.new_zeros(3), tensor.flatten()]), lambda t: t[3:].view(shape)
    raise AssertionError(layout)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
@pytest.mark.parametrize("which", [*NAMES, "all"])
@pytest.mark.parametrize("op", ["lora_linear", "lora_merged_linear"])
def test_any_strides(op: str, which: str, layout: str, p: float, backend: str) -> None:
    leaves = drawn((4, 3, 11), 12, 3, torch.float32)
    formulas, options = LINEAR, {}
    if op == "lora_merged_linear":
        leaves = drawn((4, 3, 11), 12, 3, torch.float32, groups=2, rows=8)
        formulas = (merged_oracle(QKV, [4, 4, 4]), merged_eager(QKV, [4, 4, 4]))
        options = {"enable_lora": list(QKV)}
    views = {name: whole for name in leaves}
    for name in NAMES if which == "all" else [which]:
        leaves[name], views[name] = _lay(leaves[name], layout)

    def view(t: Tensors) -> Tensors:
        return {name: views[name](tensor) for name, tensor in t.items()}

    assert_right(getattr(functional, op), formulas, leaves, p=p, view=view, **options)


SUBSETS = [s for n in range(6) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
@pytest.mark.parametrize("op", ["lora_linear", "lora_merged_linear"])
def test_only_the_gradients_that_are_asked_for(
    op: str, needs: tuple[str, ...], p: float, backend: str
) -> None:
    if op == "lora_linear":
        leaves = drawn((3, 4, 11), 12, 3, torch.float64)
        assert_right(functional.lora_linear, LINEAR, leaves, p=p, needs=needs)
    else:
        leaves = drawn((3, 4, 11), 12, 3, torch.float64, groups=2, rows=8)
        formulas = (merged_oracle(QKV, [4, 4, 4]), merged_eager(QKV, [4, 4, 4]))
        function = functional.lora_merged_linear
        assert_right(function, formulas, leaves, p=p, needs=needs, enable_lora=QKV)


# A few rows of 16 bits have an implementation of their own on a CPU, many numbers to drop another.
@pytest.mark.parametrize("rows", [1, 4, 64, 6000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["lora_linear", "lora_merged_linear"])
def test_dropout_only_in_training_and_then_one_draw(
    op: str, dtype: torch.dtype, rows: int, backend: str
) -> None:
    options = {} if op == "lora_linear" else {"enable_lora": [True]}
    leaves = drawn((rows, 11), 12, 3, dtype, bias=False)
    args = (leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], SCALING, None)
    function = getattr(functional, op)

    def state_after(p: float, training: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        y = function(*args, p, training, **options)
        return y, torch.get_rng_state()

    plain, untouched = state_after(0.0, True)
    for p in (0.3, 1.0):
        y, state = state_after(p, False)
        assert torch.equal(y, plain)
        assert torch.equal(state, untouched)
    dropped, state = state_after(0.3, True)
    torch.manual_seed(7)
    F.dropout(leaves["x"], 0.3, True)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(dropped, plain)


def test_without_an_enabled_block_there_is_no_adapter(backend: str) -> None:
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    state = torch.get_rng_state()
    none = (torch.empty(0, 8), torch.empty(0, 3))
    off = {"enable_lora": [False, False]}
    y = functional.lora_merged_linear(x, weight, *none, SCALING, None, 0.5, True, **off)
    assert torch.equal(y, F.linear(x, weight))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("op", ["lora_linear", "lora_merged_linear"])
def test_the_inputs_are_left_alone(op: str, backend: str) -> None:
    options = {} if op == "lora_linear" else {"enable_lora": [True]}
    leaves = drawn((4, 11), 12, 3, torch.float32)
    before = {name: t.clone() for name, t in leaves.items()}
    versions = {name: t._version for name, t in leaves.items()}
    args = (leaves["x"], leaves["weight"], leaves["lora_A"].requires_grad_(), leaves["lora_B"])
    y = getattr(functional, op)(*args, SCALING, leaves["bias"], 0.3, True, **options)
    y.sum().backward()
    for name, tensor in leaves.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor._version == versions[name], name

"""Kernels broken on purpose: each break must put a result out of its budget.

A break takes the place of a function that kernels call, which works in the interpreter alone:
compiled code does not look its functions up again.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

import triton
import triton.language as tl

from lora_fast.kernels import dropout, lora_gemm, reduce_partials
from lora_fast.kernels.configs import GemmConfig, GradAConfig, GradSBConfig, ShrinkConfig
from lora_fast.kernels.dropout import keep_scale, unpack_mask
from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd
from lora_fast.kernels.plans import BackwardPlan, ForwardPlan

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="breaks kernels in the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, on the NaN of a gap
]

M, N, K, R, P = 40, 36, 72, 8, 0.5
GEMM = GemmConfig(32, 32, 32, num_warps=4, num_stages=2)
SHRINK = ShrinkConfig(16, 32, 32, num_warps=4, num_stages=2)
BACKWARD = BackwardPlan(
    *("fused", False, GEMM),
    GradSBConfig(32, 32, 64, num_warps=4, num_stages=2),
    GradAConfig(16, 32, 32, num_warps=4, num_stages=2),
)


@triton.jit
def tile_skipped(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Each tile but the last, twice the one before it."""
    tile = tl.minimum(tile, num_m * num_n - 2)
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    group_m = min(num_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % group_m, (tile % per_group) // group_m


@triton.jit
def rows_moved(block, BLOCK: tl.constexpr):
    """Blocks of indices with a gap of one between them."""
    return block.to(tl.int64) * (BLOCK + 1) + tl.arange(0, BLOCK)


@triton.jit
def tf32_mma(a, b, acc, PRECISION: tl.constexpr):
    """The product of operands with ten bits of fraction."""
    ones = tl.full((1, 1), 0xFFFFE000, tl.uint32)
    a = (a.to(tl.float32).to(tl.uint32, bitcast=True) & ones).to(tl.float32, bitcast=True)
    b = (b.to(tl.float32).to(tl.uint32, bitcast=True) & ones).to(tl.float32, bitcast=True)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def mma_off_by_two_percent(a, b, acc, PRECISION: tl.constexpr):
    """A product that is too large."""
    return tl.dot(a.to(tl.float32) * 1.02, b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def mma_that_forgets(a, b, acc, PRECISION: tl.constexpr):
    """The last step of a loop alone."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc * 0, input_precision="ieee")


@triton.jit
def keep_shifted(
    keep_ptr, offs_m, start_col, M, COLS_TOTAL, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The mask of the row before."""
    width = tl.cdiv(COLS_TOTAL, 8)
    octets = start_col.to(tl.int64) // 8 + tl.arange(0, COLS // 8)
    rows = tl.maximum(offs_m - 1, 0)
    mask = (offs_m[:, None] < M) & (octets[None, :] < width)
    packed = tl.load(keep_ptr + rows[:, None] * width + octets[None, :], mask=mask, other=0)
    return dropout.unpack_keep_bits(packed, ROWS, COLS)


@triton.jit
def bits_reversed(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The bits of a byte from the other end."""
    bits = (packed[:, :, None] >> (7 - tl.arange(0, 8))[None, None, :].to(tl.uint8)) & 1
    return tl.reshape(bits, (ROWS, COLS))


@triton.jit
def nothing_dropped(values, keep):
    """The mask ignored."""
    return values


@triton.jit
def partial_dropped(
    partial_ptr, out_ptr, splits, length, block, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """A sum that leaves the last partial out."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits - 1):
        total += tl.load(partial_ptr + split * length + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@pytest.fixture
def break_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Replace a function in every file of kernels that calls it."""

    def replace(name: str, broken: Any) -> None:
        original = next(
            vars(m)[name] for m in (lora_gemm, dropout, reduce_partials) if name in vars(m)
        )
        users = [
            module
            for path, module in sys.modules.items()
            if path.startswith("lora_fast.kernels.") and vars(module).get(name) is original
        ]
        assert users, f"no kernel calls {name}"
        for module in users:
            monkeypatch.setattr(module, name, broken)

    return replace


def forward(inputs: Any, impl: str = "split", p: float = P) -> dict[str, Any]:
    """The output within the budget of its own mask, or an AssertionError."""
    plan = ForwardPlan(impl, GEMM, SHRINK)
    seed = torch.tensor([17], device=inputs.x.device) if p > 0.0 else None
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling)
    y, s, mask = lora_linear_fwd(*args, p, seed, plan=plan)
    keep = unpack_mask(mask, K).double() * keep_scale(p) if p > 0.0 else None
    assert_within_budget(y, inputs.forward(keep), inputs.wide().forward(keep), what="output")
    return {"s": s, "mask": mask if p > 0.0 else None, "keep": keep}


def backward(inputs: Any, saved: dict[str, Any], p: float = P) -> None:
    """Every gradient within the budget, or an AssertionError."""
    args = (inputs.dy, inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    found = lora_linear_bwd(
        *(*args, saved["s"], saved["mask"], inputs.scaling, p, [True] * 5, inputs.dy.dtype),
        plan=BACKWARD,
    )
    eager, oracle = inputs.gradients(saved["keep"]), inputs.wide().gradients(saved["keep"])
    for got, name in zip(found, eager, strict=True):
        assert_within_budget(got, eager[name], oracle[name], what=f"gradient of {name}")


def test_the_kernels_as_they_are(make_inputs: Any) -> None:
    """What the breaks below are compared with."""
    inputs = make_inputs(M, N, K, R)
    backward(inputs, forward(inputs))
    for impl in ("one_pass", "lora_first"):
        forward(inputs, impl, 0.0)


@pytest.mark.parametrize("impl", ["split", "one_pass", "lora_first"])
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("mma", mma_off_by_two_percent),
        ("mma", mma_that_forgets),
        ("mma", tf32_mma),
        ("block_offsets", rows_moved),
    ],
)
def test_breaks_of_any_forward(
    name: str, broken: Any, impl: str, make_inputs: Any, break_kernels: Any
) -> None:
    inputs = make_inputs(M, N, K, R)
    break_kernels(name, broken)
    with pytest.raises(AssertionError, match="output"):
        forward(inputs, impl, 0.0)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("grouped_tile", tile_skipped),
        ("unpack_keep_bits", bits_reversed),
        ("apply_keep", nothing_dropped),
    ],
)
def test_breaks_of_the_split_forward(
    name: str, broken: Any, make_inputs: Any, break_kernels: Any
) -> None:
    inputs = make_inputs(M, N, K, R)
    break_kernels(name, broken)
    with pytest.raises(AssertionError, match="output"):
        forward(inputs)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("mma", tf32_mma),
        ("grouped_tile", tile_skipped),
        ("load_keep", keep_shifted),
        ("unpack_keep_bits", bits_reversed),
        ("apply_keep", nothing_dropped),
        ("block_offsets", rows_moved),
        ("reduce_segment", partial_dropped),
    ],
)
def test_breaks_of_the_gradient_of_x(
    name: str, broken: Any, make_inputs: Any, break_kernels: Any
) -> None:
    inputs = make_inputs(M, N, K, R)
    saved = forward(inputs)
    break_kernels(name, broken)
    with pytest.raises(AssertionError, match="gradient of x"):
        backward(inputs, saved)


@pytest.mark.parametrize(
    ("name", "broken", "only"),
    [
        ("reduce_segment", partial_dropped, "bias"),
        ("reduce_segment", partial_dropped, "lora_a"),
        ("reduce_segment", partial_dropped, "lora_b"),
        ("mma", mma_that_forgets, "lora_a"),
        ("load_keep", keep_shifted, "lora_a"),
        ("mma", mma_off_by_two_percent, "lora_b"),
    ],
)
def test_breaks_of_one_gradient(
    name: str, broken: Any, only: str, make_inputs: Any, break_kernels: Any
) -> None:
    inputs = make_inputs(M, N, K, R)
    saved = forward(inputs)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    break_kernels(name, broken)
    args = (inputs.dy, inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    found = lora_linear_bwd(
        *(*args, saved["s"], saved["mask"], inputs.scaling, P),
        *([n == only for n in names], inputs.dy.dtype),
        plan=BACKWARD,
    )[names.index(only)]
    eager, oracle = inputs.gradients(saved["keep"]), inputs.wide().gradients(saved["keep"])
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        assert_within_budget(found, eager[only], oracle[only])

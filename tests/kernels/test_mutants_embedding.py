"""The kernels of the embedding and the merged weight broken on purpose, as in `test_mutants`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

import triton
import triton.language as tl

from lora_fast.kernels import lora_embedding_fwd, merged_weight, segment_sum
from lora_fast.kernels.configs import EmbeddingConfig, GradSBConfig, WeightConfig
from lora_fast.kernels.lora_embedding_bwd import lora_embedding_bwd
from lora_fast.kernels.plans import EmbeddingBackwardPlan

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="breaks kernels in the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, on the NaN of a gap
]

M, NUM, D, R, SCALING = 24, 5, 36, 4, 0.75
TILE = EmbeddingConfig(16, 16, 32, num_warps=4)
PLAN = EmbeddingBackwardPlan(
    library_sb=False,
    grad_sb=GradSBConfig(32, 32, 64, num_warps=4, num_stages=2),
    segment_m=4,
)


@triton.jit
def gather_the_one_before(a_ptr, a_strides, index, mask, offs_r, R, scaling, DTYPE: tl.constexpr):
    """The column of A before the one that is asked for."""
    column = tl.maximum(index - 1, 0)
    a_ptrs = a_ptr + column[:, None] * a_strides[1] + offs_r[None, :] * a_strides[0]
    a = tl.load(a_ptrs, mask=mask[:, None] & (offs_r < R)[None, :], other=0.0)
    return (a.to(tl.float32) * scaling).to(DTYPE)


@triton.jit
def gather_less(a_ptr, a_strides, index, mask, offs_r, R, scaling, DTYPE: tl.constexpr):
    """The last rank left out."""
    a_ptrs = a_ptr + index[:, None] * a_strides[1] + offs_r[None, :] * a_strides[0]
    a = tl.load(a_ptrs, mask=mask[:, None] & (offs_r < R - 1)[None, :], other=0.0)
    return (a.to(tl.float32) * scaling).to(DTYPE)


@triton.jit
def runs_that_flow_together(sum_after, closed, row, ends):
    """The sum goes on where a run ends."""
    return sum_after + row, closed | ends


@triton.jit
def runs_of_one(sum_after, closed, row, ends):
    """The sum holds the last row alone."""
    return row, closed | ends


@triton.jit
def rows_unsorted(rows_ptr, order_ptr, offs, mask, offs_r, R):
    """The rows as they lie, not as their keys are sorted."""
    row_ptrs = rows_ptr + offs[:, None] * R + offs_r[None, :]
    return tl.load(row_ptrs, mask=mask[:, None] & (offs_r < R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def offsets_of_a_contiguous_tensor(flat, sizes, strides):
    """Strides forgotten."""
    return flat


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices, W, A, B and dY."""
    index = torch.randint(0, NUM, (M,))
    return index, torch.randn(NUM, D), torch.randn(R, NUM), torch.randn(D, R), torch.randn(M, D)


def plain(index: Tensor, weight: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> dict[str, Tensor]:
    s = a.t()[index] * SCALING
    da = torch.zeros_like(a).index_add_(1, index, (dy @ b * SCALING).t())
    return {"y": weight[index] + s @ b.t(), "da": da, "db": dy.t() @ s}


def check(tensors: tuple[Tensor, ...], names: tuple[str, ...] = ("y", "da", "db")) -> None:
    index, weight, a, b, dy = tensors
    y = lora_embedding_fwd.lora_embedding_fwd(index, weight, a, b, SCALING, config=TILE)
    da, db = lora_embedding_bwd(
        dy, index, a, b, SCALING, None, False, True, [True, True], plan=PLAN
    )
    found = {"y": y, "da": da, "db": db}
    eager, oracle = plain(*tensors), plain(index, *(t.double() for t in tensors[1:]))
    for name in names:
        assert_within_budget(found[name], eager[name], oracle[name], what=name)


def test_the_kernels_as_they_are() -> None:
    """What the breaks below are compared with."""
    check(inputs())


@pytest.mark.parametrize("name", ["y", "db"])
@pytest.mark.parametrize("broken", [gather_the_one_before, gather_less])
def test_breaks_of_the_gather(broken: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_embedding_fwd, "gather_scaled", broken)
    with pytest.raises(AssertionError, match=rf"{name}: .*budget"):
        check(inputs(), (name,))


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("add_run", runs_that_flow_together),
        ("add_run", runs_of_one),
        ("load_rows", rows_unsorted),
    ],
)
def test_breaks_of_the_scatter(name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_sum, name, broken)
    with pytest.raises(AssertionError, match=r"da: .*budget"):
        check(inputs(), ("da",))


def test_a_break_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    a, b = torch.randn(6, 15), torch.randn(18, 6)

    def merged() -> None:
        config = WeightConfig(16, 32, num_warps=4)
        found = merged_weight.merged_weight(weight, a, b, SCALING, config=config)
        eager = weight + (b @ a * SCALING).view(weight.shape)
        oracle = weight.double() + (b.double() @ a.double() * SCALING).view(weight.shape)
        assert_within_budget(found, eager, oracle)

    merged()
    monkeypatch.setattr(merged_weight, "view_offsets", offsets_of_a_contiguous_tensor)
    with pytest.raises(AssertionError, match="budget"):
        merged()

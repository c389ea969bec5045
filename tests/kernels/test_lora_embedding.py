"""The kernels of the embedding against plain torch and float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from lora_fast.kernels.configs import EmbeddingConfig, GradSBConfig
from lora_fast.kernels.lora_embedding_bwd import lora_embedding_bwd
from lora_fast.kernels.lora_embedding_fwd import gather_columns, lora_embedding_fwd
from lora_fast.kernels.plans import EmbeddingBackwardPlan

# Tiles small enough to interpret, and smaller than most inputs here.
TILE = EmbeddingConfig(16, 16, 32, num_warps=4)
KERNEL = EmbeddingBackwardPlan(
    library_sb=False,
    grad_sb=GradSBConfig(32, 32, 64, num_warps=4, num_stages=2),
    segment_m=4,
)
PLANS = {"kernel": KERNEL, "library": replace(KERNEL, library_sb=True)}
# M tokens, num rows, D columns, R
SHAPES = [(1, 1, 1, 1), (7, 5, 130, 1), (40, 300, 33, 16), (33, 9, 7, 70)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALING = 0.75
Grads = dict[str, Tensor]


def make(
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
) -> dict[str, Tensor]:
    m, num, d, r = shape
    adapter = adapter or dtype
    return {
        "index": torch.randint(0, num, (m,), device=device),
        "weight": torch.randn(num, d, device=device).to(dtype),
        "a": torch.randn(r, num, device=device).to(adapter),
        "b": (torch.randn(d, r, device=device) * r**-0.5).to(adapter),
        "dy": torch.randn(m, d, device=device).to(dtype),
    }


def torchs(t: dict[str, Tensor], padding_idx: int | None = None, by_freq: bool = False) -> Grads:
    """What plain torch makes of it in these dtypes: y, da and db."""
    a, b = t["a"].detach().requires_grad_(), t["b"].detach().requires_grad_()
    dtype = t["weight"].dtype
    options: dict[str, Any] = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq}
    s = F.embedding(t["index"], a.to(dtype).t(), **options)
    y = F.embedding(t["index"], t["weight"]) + s @ b.to(dtype).t() * SCALING
    da, db = torch.autograd.grad(y, (a, b), t["dy"].expand_as(y))
    return {"y": y.detach(), "da": da, "db": db}


def kernels(
    t: dict[str, Tensor],
    plan: EmbeddingBackwardPlan | None = None,
    padding_idx: int | None = None,
    by_freq: bool = False,
    scaling: float = SCALING,
    needs: tuple[bool, bool] = (True, True),
) -> Grads:
    y = lora_embedding_fwd(t["index"], t["weight"], t["a"], t["b"], scaling, config=plan and TILE)
    da, db = lora_embedding_bwd(
        *(t["dy"].expand_as(y), t["index"], t["a"], t["b"], scaling),
        *(padding_idx, by_freq, True, list(needs)),
        plan=plan,
    )
    return {"y": y, "da": da, "db": db}


def check(
    t: dict[str, Tensor],
    found: Grads,
    *options: Any,
    names: tuple[str, ...] = ("y", "da", "db"),
) -> None:
    wide = {k: v.double() if v.is_floating_point() else v for k, v in t.items()}
    eager, oracle = torchs(t, *options), torchs(wide, *options)
    for name in names:
        assert_within_budget(found[name], eager[name], oracle[name], what=name)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape: Any, plan: str, kernel_device: torch.device) -> None:
    t = make(shape, kernel_device)
    check(t, kernels(t, PLANS[plan]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    t = make((40, 11, 48, 8), kernel_device, dtype)
    check(t, kernels(t, KERNEL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_on_a_table_of_16_bits(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    t = make((40, 11, 48, 8), kernel_device, dtype, torch.float32)
    found = kernels(t, KERNEL)
    assert (found["y"].dtype, found["da"].dtype) == (dtype, torch.float32)
    check(t, found)


@pytest.mark.parametrize("rank", [130, 512])
def test_large_ranks(rank: int, kernel_device: torch.device) -> None:
    t = make((5, 3, 20, rank), kernel_device)
    check(t, kernels(t, KERNEL))


@pytest.mark.parametrize("by_freq", [False, True], ids=["", "by_freq"])
@pytest.mark.parametrize("padding_idx", [None, 0, 3, 10])
def test_padding_and_frequencies(
    padding_idx: int | None, by_freq: bool, kernel_device: torch.device
) -> None:
    t = make((60, 11, 20, 4), kernel_device)
    t["index"][:20] = 3
    found = kernels(t, KERNEL, padding_idx, by_freq)
    check(t, found, padding_idx, by_freq)
    if padding_idx is not None:
        assert torch.count_nonzero(found["da"][:, padding_idx]) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_strides_and_index_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    t = make((24, 9, 40, 4), kernel_device)
    t["index"] = t["index"].to(dtype).view(4, 6).t()
    t["weight"] = t["weight"].t().contiguous().t()
    t["a"] = t["a"].t().contiguous().t()
    t["b"] = t["b"].repeat_interleave(2, 1)[:, ::2]
    t["dy"] = t["dy"].view(4, 6, 40).transpose(0, 1)
    check(t, kernels(t, KERNEL))
    t["dy"] = torch.ones((), device=kernel_device)  # the gradient of a sum: strides of zero
    check(t, kernels(t, KERNEL))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_a_scalar_and_no_tokens(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    t = make((1, 6, 20, 3), kernel_device)
    t["index"] = torch.full(shape, 4, device=kernel_device)
    t["dy"] = torch.randn(*shape, 20, device=kernel_device)
    found = kernels(t)
    assert found["y"].shape == (*shape, 20)
    check(t, found)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_not_needed_is_not_computed(
    needs: tuple[bool, bool], kernel_device: torch.device
) -> None:
    t = make((20, 9, 40, 4), kernel_device)
    found = kernels(t, KERNEL, needs=needs)
    names = tuple(n for n, need in zip(("da", "db"), needs, strict=True) if need)
    check(t, found, names=names)
    assert all(found[n].shape == (0,) for n in {"da", "db"} - set(names))


def test_without_the_scatter_its_addends_come(kernel_device: torch.device) -> None:
    t = make((20, 9, 40, 4), kernel_device)
    args = (t["dy"], t["index"], t["a"], t["b"], SCALING, 3, True, False, [True, False])
    ds, _ = lora_embedding_bwd(*args, plan=KERNEL)
    eager, oracle = t["dy"] @ t["b"] * SCALING, t["dy"].double() @ t["b"].double() * SCALING
    assert_within_budget(ds, eager, oracle)


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_an_index_out_of_range_is_refused(wrong: int) -> None:
    t = make((20, 9, 40, 4), torch.device("cpu"))
    t["index"][7] = wrong
    with pytest.raises(IndexError, match=f"indices from 0 to 8, the rows of weight, got {wrong}"):
        lora_embedding_fwd(t["index"], t["weight"], t["a"], t["b"], SCALING)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_with_their_token(value: float, kernel_device: torch.device) -> None:
    t = make((30, 9, 40, 4), kernel_device)
    t["index"][3] = 5
    t["weight"][5, 2] = t["a"][1, 6] = t["dy"][4, 7] = value
    found, expected = kernels(t, KERNEL), torchs(t)
    for name in ("y", "da", "db"):
        assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name


def test_the_same_bits_every_time(kernel_device: torch.device) -> None:
    t = make((40, 5, 40, 8), kernel_device, torch.float16)
    first, second = kernels(t, KERNEL), kernels(t, KERNEL)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["y", "da", "db"])
def test_a_scale_off_by_two_percent_is_seen(name: str, kernel_device: torch.device) -> None:
    """The tests can fail."""
    t = make((40, 11, 48, 8), kernel_device)
    found = kernels(t, KERNEL, scaling=SCALING * 1.02)
    with pytest.raises(AssertionError, match=f"{name}: .*budget"):
        check(t, found, names=(name,))


@pytest.mark.parametrize("name", ["y", "da"])
def test_a_token_that_is_skipped_is_seen(name: str, kernel_device: torch.device) -> None:
    """The tests can fail: the last token reads, and gives its gradient to, the next row."""
    t = make((40, 11, 48, 8), kernel_device)
    shifted = t | {"index": t["index"].clone()}
    shifted["index"][-1] = (shifted["index"][-1] + 1) % 11
    with pytest.raises(AssertionError, match=f"{name}: .*budget"):
        check(t, kernels(shifted, KERNEL), names=(name,))


def test_a_is_rounded_before_it_is_scaled(kernel_device: torch.device) -> None:
    """As torch does: A in the dtype of the table, then the product with the scaling."""
    index = torch.tensor([0, 2, 1], device=kernel_device)
    a = torch.full((1, 3), 1 + 2**-11 + 2**-20, device=kernel_device)  # rounds up to 1 + 2^-10
    weight, b = (
        torch.full(s, v, device=kernel_device).half() for s, v in (((3, 4), 0.0), ((4, 1), 1.0))
    )
    expected = torch.full((3, 4), 3 * (1 + 2**-10), device=kernel_device).half()
    assert torch.equal(lora_embedding_fwd(index, weight, a, b, 3.0), expected)
    assert torch.equal(gather_columns(index, a, 3.0, torch.float16), expected[:, :1])


def test_addends_have_the_dtype_of_a(kernel_device: torch.device) -> None:
    index = torch.tensor([1, 0, 1], device=kernel_device)
    a, b = torch.randn(2, 4, device=kernel_device), torch.randn(20, 2, device=kernel_device)
    dy = torch.randn(3, 20, device=kernel_device).half()
    for tokens in (3, 0):
        args = (dy[:tokens], index[:tokens], a, b, 0.75, None, False, False, [True, False])
        ds, _ = lora_embedding_bwd(*args)
        assert (ds.dtype, ds.shape) == (a.dtype, (tokens, 2))

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from lora_fast.kernels import lora_linear_fwd as module
from lora_fast.kernels.configs import GemmConfig, ShrinkConfig
from lora_fast.kernels.dropout import keep_scale, unpack_mask
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd
from lora_fast.kernels.plans import NO_DROPOUT, ONE_BLOCK, ForwardPlan

# Tiles small enough to interpret, and smaller than most inputs here.
GEMMS = {
    "pointers": GemmConfig(32, 32, 32, num_warps=4, num_stages=2),
    "tma": GemmConfig(32, 64, 32, num_warps=4, num_stages=2, tma=True, parts=2),
}
FORWARD = {
    f"{impl}-{gemm}": ForwardPlan(
        impl, GEMMS[gemm], ShrinkConfig(16, 32, 32, num_warps=4, num_stages=2)
    )
    for impl, gemm in product(
        ("one_pass", "split", "lora_first", "library_expand", "library"), GEMMS
    )
}
DROPPING = [name for name, plan in FORWARD.items() if plan.impl not in NO_DROPOUT]
# The interpreter has no bf16 arithmetic, so it upcasts; a GPU runs the real thing.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 7, 5, 1), (33, 65, 40, 4), (70, 32, 129, 16), (16, 96, 64, 70)]


def run(inputs: Any, plan: str | None = None, p: float = 0.0, seed: int | None = None) -> Any:
    seeds = None if seed is None else torch.tensor([seed], device=inputs.x.device)
    return lora_linear_fwd(
        *(inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling),
        *(p, seeds),
        plan=None if plan is None else FORWARD[plan],
    )


def check(inputs: Any, y: torch.Tensor, keep: torch.Tensor | None = None) -> None:
    assert_within_budget(y, inputs.forward(keep), inputs.wide().forward(keep))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plan", FORWARD)
def test_every_implementation_on_odd_shapes(plan: str, shape: Any, make_inputs: Any) -> None:
    if FORWARD[plan].impl in ONE_BLOCK and shape[3] > 64:
        pytest.skip("it keeps S in registers: a single block of the rank")
    inputs = make_inputs(*shape)
    y, s, mask = run(inputs, plan)
    check(inputs, y)
    assert mask.numel() == 0
    expected = inputs.wide().x @ inputs.wide().lora_a.t() * inputs.scaling
    torch.testing.assert_close(s.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", FORWARD)
def test_dtypes(plan: str, dtype: torch.dtype, make_inputs: Any) -> None:
    inputs = make_inputs(40, 48, 72, 8, dtype)
    check(inputs, run(inputs, plan)[0])


@pytest.mark.parametrize("rank", [8, 70])
@pytest.mark.parametrize("plan", DROPPING)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_by_the_mask_that_it_returns(
    plan: str, p: float, rank: int, make_inputs: Any
) -> None:
    if FORWARD[plan].impl in ONE_BLOCK and rank > 64:
        pytest.skip("it keeps S in registers: a single block of the rank")
    inputs = make_inputs(33, 40, 77, rank)
    y, _, mask = run(inputs, plan, p, seed=123)
    keep = unpack_mask(mask, 77).double() * keep_scale(p)
    check(inputs, y, keep)


@pytest.mark.parametrize(
    ("impl", "rank", "p", "reason"),
    [
        ("library", 4, 0.5, "plan: library draws no dropout"),
        ("one_pass", 4, 0.5, "plan: one_pass draws no dropout"),
        ("lora_first", 65, 0.0, "plan: lora_first takes a rank of at most 64, got 65"),
        ("one_pass", 65, 0.0, "plan: one_pass takes a rank of at most 64, got 65"),
    ],
)
def test_a_plan_that_would_run_as_another_is_refused(
    impl: str, rank: int, p: float, reason: str, make_inputs: Any
) -> None:
    inputs = make_inputs(9, 12, 20, rank)
    with pytest.raises(ValueError, match=reason):
        run(inputs, f"{impl}-pointers", p, seed=1 if p else None)


def test_who_makes_s_and_who_expands_it(make_inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ("lora_decode", "lora_shrink", "library_shrink", "library_expand", "lora_gemm")
    ran: list[str] = []
    for name in steps:
        step = getattr(module, name)
        noting = lambda *a, step=step, name=name, **k: ran.append(name) or step(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, name, noting)
    inputs = make_inputs(9, 12, 20, 4)
    for impl, expected in (
        ("decode", ["lora_decode"]),
        ("one_pass", ["lora_gemm"]),
        ("split", ["lora_shrink", "lora_gemm"]),
        ("lora_first", ["lora_shrink"]),
        ("library_expand", ["lora_shrink", "library_expand"]),
        ("library", ["library_shrink", "library_expand"]),
    ):
        ran.clear()
        plan = replace(FORWARD["split-pointers"], impl=impl)
        operands = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b)
        module.lora_linear_fwd(*operands, inputs.scaling, plan=plan)
        assert ran == expected


def test_the_mask_depends_on_the_seed_alone(make_inputs: Any) -> None:
    inputs = make_inputs(33, 40, 77, 8)
    masks = [run(inputs, plan, 0.3, seed=5)[2] for plan in ("split-pointers", "lora_first-tma")]
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], run(inputs, "split-pointers", 0.3, seed=6)[2])


def test_everything_dropped_leaves_the_frozen_layer(make_inputs: Any) -> None:
    inputs = make_inputs(9, 12, 20, 4)
    y, s, _ = run(inputs, None, 1.0, seed=1)
    assert torch.count_nonzero(s) == 0
    frozen = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    torch.testing.assert_close(y, frozen)


@pytest.mark.parametrize("plan", FORWARD)
def test_strides_and_dimensions(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(24, 40, 36, 4, bias=False)
    inputs.x = inputs.x.t().contiguous().t()
    inputs.weight = inputs.weight.t().contiguous().t()
    wide_x = torch.randn(2, 3, 8, 36, device=inputs.x.device)[:, :, ::2]
    check(inputs, run(inputs, plan)[0])
    inputs.x = wide_x
    y, _, _ = run(inputs, plan)
    assert y.shape == (2, 3, 4, 40)
    check(inputs, y)


@pytest.mark.parametrize("adapter", [torch.float32, torch.float16], ids=str)
def test_adapters_of_another_dtype(adapter: torch.dtype, make_inputs: Any) -> None:
    inputs = make_inputs(20, 24, 28, 4, torch.float16, adapter_dtype=adapter)
    for plan in FORWARD:
        check(inputs, run(inputs, plan)[0])


def test_no_rows(make_inputs: Any) -> None:
    inputs = make_inputs(0, 6, 20, 3)
    y, s, mask = run(inputs, None, 0.5, seed=1)
    assert (y.shape, s.shape, mask.shape) == ((0, 6), (0, 3), (0, 3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("plan", FORWARD)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_spread_as_in_torch(plan: str, value: float, make_inputs: Any) -> None:
    inputs = make_inputs(45, 40, 56, 8)
    inputs.x[3, 5] = value
    y, _, _ = run(inputs, plan)
    expected = inputs.forward()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("plan", FORWARD)
def test_the_same_bits_every_time(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(50, 40, 60, 8, torch.float16)
    assert torch.equal(run(inputs, plan)[0], run(inputs, plan)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("plan", [p for p in FORWARD if not p.startswith(("lora_f", "library-"))])
def test_a_row_does_not_depend_on_the_others(plan: str, make_inputs: Any) -> None:
    """The same bits for the first rows, however many follow and whatever they hold.

    So it is where the product is ours; where it is the vendor's, that is the vendor's affair.
    """
    p, seed = (0.0, None) if plan.startswith("one_pass") else (0.3, 9)
    inputs = make_inputs(50, 40, 60, 8, torch.float16)
    y, s, mask = run(inputs, plan, p, seed)
    inputs.x = inputs.x[:7]
    for first, whole in zip(run(inputs, plan, p, seed), (y, s, mask), strict=True):
        assert torch.equal(first, whole[:7])
    inputs.x = torch.cat([inputs.x, torch.full_like(inputs.x, float("nan"))])
    assert torch.equal(run(inputs, plan, p, seed)[0][:7], y[:7])


@pytest.mark.parametrize("plan", FORWARD)
def test_a_scale_off_by_two_percent_is_seen(plan: str, make_inputs: Any) -> None:
    """The tests can fail: a kernel that computes with another scaling is out of the budget."""
    inputs = make_inputs(40, 48, 72, 8)
    inputs.scaling *= 1.02
    y, _, _ = run(inputs, plan)
    inputs.scaling /= 1.02
    with pytest.raises(AssertionError, match="budget"):
        check(inputs, y)


@pytest.mark.parametrize("plan", FORWARD)
def test_no_overflow_that_the_factor_prevents(plan: str, make_inputs: Any) -> None:
    """x A^T alone passes fp16's range; the factor brings it back before anything is rounded."""
    inputs = make_inputs(20, 24, 32, 4, torch.float16)
    inputs.x.fill_(512.0)
    inputs.lora_a.fill_(16.0)
    inputs.scaling = 2.0**-8
    y, s, _ = run(inputs, plan)
    assert torch.equal(s, torch.full_like(s, 1024.0))
    assert y.isfinite().all()

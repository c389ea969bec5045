from itertools import product
from typing import Any

import pytest
import torch

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from lora_fast.kernels import lora_linear_bwd as module
from lora_fast.kernels import sizes
from lora_fast.kernels.configs import GemmConfig, GradAConfig, GradSBConfig
from lora_fast.kernels.dropout import keep_scale, unpack_mask
from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd
from lora_fast.kernels.plans import BackwardPlan, why_not_named

# Tiles small enough to interpret, and smaller than most inputs here.
GEMMS = {
    "pointers": GemmConfig(32, 32, 32, num_warps=4, num_stages=2),
    "tma": GemmConfig(32, 64, 32, num_warps=4, num_stages=2, tma=True, parts=2),
}
BACKWARD = {
    f"{input_grad}-{'library' if library else 'kernel'}-{gemm}": BackwardPlan(
        input_grad,
        library,
        GEMMS[gemm],
        GradSBConfig(32, 32, 64, num_warps=4, num_stages=2),
        GradAConfig(32, 32, 64, num_warps=4, num_stages=2),
    )
    for input_grad, library, gemm in product(
        ("fused", "lora_first", "library"), (False, True), GEMMS
    )
}
SHAPES = [(1, 7, 5, 1), (33, 65, 40, 4), (70, 32, 129, 16), (40, 96, 64, 70)]
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


def skip_unless_served(plan: str, rank: int, *, dropout: bool) -> None:
    reason = why_not_named(BACKWARD[plan], 1, rank, dropout)
    if reason is not None:
        pytest.skip(reason)


def run(
    inputs: Any,
    plan: str | None,
    p: float = 0.0,
    needs: Any = (True,) * 5,
    s_scaling: float = 1.0,
) -> Any:
    """The gradients by the kernels, and the mask of the forward."""
    seed = torch.tensor([17], device=inputs.x.device) if p > 0.0 else None
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b)
    _, s, mask = lora_linear_fwd(*args, inputs.scaling / s_scaling, p, seed)
    need_x, need_w, _, need_a, need_b = needs
    found = lora_linear_bwd(
        inputs.dy,
        inputs.x if need_w or need_a else None,
        inputs.weight if need_x else None,
        *(inputs.lora_a, inputs.lora_b, s if need_b else None, mask if p > 0.0 else None),
        *(inputs.scaling, p, list(needs), inputs.dy.dtype, None, s_scaling),
        plan=None if plan is None else BACKWARD[plan],
    )
    keep = unpack_mask(mask, inputs.x.shape[-1]).double() * keep_scale(p) if p > 0.0 else None
    return dict(zip(NAMES, found, strict=True)), keep


def check(inputs: Any, found: Any, keep: Any = None, names: Any = NAMES) -> None:
    eager, oracle = inputs.gradients(keep), inputs.wide().gradients(keep)
    for name in names:
        assert_within_budget(found[name], eager[name], oracle[name], what=f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plan", BACKWARD)
def test_every_implementation_on_odd_shapes(plan: str, shape: Any, make_inputs: Any) -> None:
    skip_unless_served(plan, shape[3], dropout=False)
    inputs = make_inputs(*shape)
    check(inputs, run(inputs, plan)[0])


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("rank", [4, 70])
@pytest.mark.parametrize("plan", BACKWARD)
def test_dropout(plan: str, rank: int, p: float, make_inputs: Any) -> None:
    skip_unless_served(plan, rank, dropout=True)
    inputs = make_inputs(40, 36, 77, rank)
    found, keep = run(inputs, plan, p)
    check(inputs, found, keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", BACKWARD)
def test_half_precision(plan: str, dtype: torch.dtype, make_inputs: Any) -> None:
    inputs = make_inputs(40, 48, 72, 8, dtype)
    check(inputs, run(inputs, plan)[0])


@pytest.mark.parametrize("plan", BACKWARD)
def test_what_s_lacks_multiplies_before_the_rounding(plan: str, make_inputs: Any) -> None:
    """dY^T S alone would be where fp16 has few digits, and S times the factor may overflow."""
    inputs = make_inputs(40, 48, 72, 8, torch.float16)
    inputs.scaling = 64.0
    inputs.dy = (inputs.dy.float() * 1e-6).half()
    check(inputs, run(inputs, plan, s_scaling=64.0)[0], names=["x", "lora_a", "lora_b"])


@pytest.mark.parametrize("missing", range(5), ids=NAMES)
@pytest.mark.parametrize("plan", ["fused-kernel-pointers", "lora_first-library-pointers"])
def test_what_is_not_needed_is_not_computed(plan: str, missing: int, make_inputs: Any) -> None:
    inputs = make_inputs(45, 40, 56, 8)
    needs = tuple(i != missing for i in range(5))
    found, _ = run(inputs, plan, needs=needs)
    assert found[NAMES[missing]].numel() == 0
    check(inputs, found, names=[n for n, need in zip(NAMES, needs, strict=True) if need])


@pytest.mark.parametrize("only", range(5), ids=NAMES)
def test_one_gradient_alone(only: int, make_inputs: Any) -> None:
    inputs = make_inputs(45, 40, 56, 8)
    found, _ = run(inputs, None, needs=tuple(i == only for i in range(5)))
    check(inputs, found, names=[NAMES[only]])


@pytest.mark.parametrize("plan", BACKWARD)
def test_strides(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(45, 40, 56, 8)
    inputs.x = inputs.x.t().contiguous().t()
    inputs.dy = inputs.dy.t().contiguous().t()
    inputs.weight = inputs.weight.t().contiguous().t()
    check(inputs, run(inputs, plan)[0])
    inputs.dy = torch.ones((), device=inputs.dy.device).expand(45, 40)
    check(inputs, run(inputs, plan)[0])


@pytest.mark.parametrize(
    ("input_grad", "rank", "p", "reason"),
    [
        ("library", 4, 0.5, "plan: library draws no dropout and applies no mask"),
        ("lora_first", 65, 0.0, "plan: lora_first takes a rank of at most 64, got 65"),
    ],
)
def test_a_plan_that_would_run_as_another_is_refused(
    input_grad: str, rank: int, p: float, reason: str, make_inputs: Any
) -> None:
    inputs = make_inputs(9, 12, 20, rank)
    with pytest.raises(ValueError, match=reason):
        run(inputs, f"{input_grad}-kernel-pointers", p)


@pytest.mark.parametrize("edges", [None, [0, 24, 40, 64]], ids=["whole", "blocks"])
@pytest.mark.parametrize(("rank", "p"), [(20, 0.0), (20, 0.5), (40, 0.0), (40, 0.5)])
def test_dx_is_made_as_the_plan_says(
    edges: list[int] | None, rank: int, p: float, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of 40 ranks are 80: no program holds them, and only the product masks them."""
    ran: list[str] = []
    plans: list[BackwardPlan] = []
    for name in ("lora_grad_a", "lora_gemm"):
        step = getattr(module, name)
        noting = lambda *a, step=step, name=name, **k: ran.append(name) or step(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, name, noting)
    planned = module.backward_plan
    monkeypatch.setattr(module, "backward_plan", lambda *a: plans.append(planned(*a)) or plans[-1])
    i = make_inputs(40, 64, 20, rank, edges=edges)
    s = torch.zeros(40, i.lora_a.shape[0], device=i.x.device)
    mask = torch.zeros(40, 3, device=i.x.device, dtype=torch.uint8) if p else None
    args = (i.dy, i.x, i.weight, i.lora_a, i.lora_b, s, mask, i.scaling, p, [True] * 5)
    module.lora_linear_bwd(*args, torch.float32, edges)
    crowded = edges is not None and rank == 40
    (plan,) = plans
    assert plan.input_grad == ("lora_first" if not crowded else "fused" if p else "library")
    expected = {
        "lora_first": ["lora_grad_a"],
        "fused": ["lora_grad_a", "lora_gemm"],
        "library": [],
    }
    assert ran == expected[plan.input_grad]


def test_no_rows(make_inputs: Any) -> None:
    inputs = make_inputs(0, 6, 20, 3)
    found, _ = run(inputs, None)
    assert found["x"].shape == (0, 20)
    for name in NAMES[1:]:
        assert torch.count_nonzero(found[name]) == 0
        assert found[name].shape == vars(inputs)[name].shape


@pytest.mark.parametrize("plan", BACKWARD)
def test_the_same_bits_every_time(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(50, 40, 60, 8, torch.float16)
    p = 0.0 if plan.startswith("library") else 0.2
    first, second = run(inputs, plan, p)[0], run(inputs, plan, p)[0]
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_long_axes_take_longer_chunks(make_inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more rows or columns than a grid's second axis has chunks for."""
    monkeypatch.setattr(sizes, "MAX_GRID_Y", 2)
    inputs = make_inputs(150, 140, 36, 4)
    found, keep = run(inputs, "lora_first-kernel-pointers", 0.5)
    check(inputs, found, keep)


@pytest.mark.parametrize("plan", BACKWARD)
def test_a_mask_shifted_by_a_column_is_seen(plan: str, make_inputs: Any) -> None:
    """The tests can fail: the gradients of another mask are out of the budget."""
    skip_unless_served(plan, 8, dropout=True)
    inputs = make_inputs(40, 36, 77, 8)
    found, keep = run(inputs, plan, 0.5)
    with pytest.raises(AssertionError, match="gradient of lora_a"):
        check(inputs, found, keep.roll(1, dims=1), names=["lora_a"])


def test_gradients_of_no_rows_have_the_dtypes_of_what_they_belong_to(make_inputs: Any) -> None:
    for rows in (0, 3):
        i = make_inputs(rows, 6, 20, 3, torch.float16, adapter_dtype=torch.float32)
        s = torch.zeros(rows, 3, device=i.x.device).half()
        args = (i.dy, i.x, i.weight, i.lora_a, i.lora_b, s, None, i.scaling, 0.0, [True] * 5)
        found = [grad.dtype for grad in lora_linear_bwd(*args, torch.float32)]
        assert found == [torch.float16, torch.float16, *[torch.float32] * 3]

"""Output and every gradient of the fused path, for whatever a layer meets."""

import itertools
import math
from typing import Any

import pytest
import torch

from lora_fast.testing import assert_within_budget

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
SUBSETS = [c for size in range(1, 6) for c in itertools.combinations(NAMES, size)]
subsets = pytest.mark.parametrize("needs", SUBSETS, ids="-".join)


@subsets
def test_any_subset_of_gradients(needs: tuple[str, ...], make_problem: Any) -> None:
    # Without the gradients of x and A nothing is kept that would tell the mask.
    p = 0.5 if {"x", "lora_A"} & set(needs) else 0.0
    make_problem((5, 19), 7, 3).check(needs, p)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(
    "shape", [(19,), (1, 19), (0, 19), (2, 3, 19), (2, 0, 19), (2, 1, 3, 19), (1, 2, 1, 2, 19)],
    ids=str,
)  # fmt: skip
def test_dimensions(shape: tuple[int, ...], p: float, make_problem: Any) -> None:
    y = make_problem(shape, 7, 3).check(NAMES, p)
    assert y.is_contiguous()


@pytest.mark.parametrize("rank", [1, 15, 17, 33, 64, 65, 130, 512])
def test_ranks(rank: int, make_problem: Any) -> None:
    make_problem((18, 24), 20, rank).check(NAMES, 0.0 if rank > 130 else 0.25)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (17, 1, 1), (17, 1, 7), (17, 7, 1), (7, 130, 257), (257, 7, 1), (130, 257, 7)],
)
def test_odd_sizes(m: int, n: int, k: int, make_problem: Any) -> None:
    make_problem((m, k), n, 2).check(NAMES, 0.25)


STRIDED = {
    "columns_of_a_wider": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows_of_a_longer": lambda x: x.repeat_interleave(3, 1)[:, 1::3],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded_rows": lambda x: x[:, :1].expand_as(x),
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_features": lambda x: x[..., :1].expand_as(x),
    "one_number": lambda x: x[0, 0, 0].expand_as(x),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "flipped": lambda x: x.flip(-1),
}
strided = pytest.mark.parametrize("layout", STRIDED)


@strided
def test_strided_inputs(layout: str, make_problem: Any) -> None:
    problem = make_problem((3, 4, 24), 20, 3)
    problem.x = STRIDED[layout](problem.x)
    problem.check(NAMES, 0.5)


@strided
def test_strided_gradients_of_the_output(layout: str, make_problem: Any) -> None:
    problem = make_problem((3, 4, 24), 20, 3)
    dy = torch.randn(3, 4, 20, device=problem.x.device)
    problem.check(NAMES, 0.5, STRIDED[layout](dy))


@pytest.mark.parametrize("layout", ["columns_of_a_wider", "transposed", "offset"])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_strided_parameters(name: str, layout: str, make_problem: Any) -> None:
    problem = make_problem((18, 24), 20, 3)
    setattr(problem, name, STRIDED[layout](getattr(problem, name)))
    problem.check(NAMES)


def test_a_strided_bias(make_problem: Any) -> None:
    problem = make_problem((18, 24), 20, 3)
    problem.bias = problem.bias.repeat_interleave(2)[::2]
    problem.check(NAMES)
    problem.bias = problem.bias[:1].expand(20)
    problem.check(NAMES, 0.5)


@pytest.mark.parametrize(
    ("dtype", "adapter", "rank"),
    [
        (torch.float16, torch.float32, 3),
        (torch.float16, torch.float32, 70),
        (torch.bfloat16, torch.float32, 3),
        (torch.float32, torch.bfloat16, 3),
        (torch.float16, torch.float16, 70),
        (torch.bfloat16, torch.bfloat16, 70),
    ],
    ids=str,
)
def test_half_precision_with_adapters_of_any_dtype(
    dtype: torch.dtype, adapter: torch.dtype, rank: int, make_problem: Any
) -> None:
    problem = make_problem((18, 24), 20, rank, dtype, adapter)
    leaves = problem.leaves(NAMES)
    y = problem.fused(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, dtype, dtype, adapter, adapter]
    problem.check(NAMES, 0.25)


def test_a_bias_of_another_dtype(make_problem: Any) -> None:
    problem = make_problem((18, 24), 20, 3, torch.float16)
    problem.bias = problem.bias.float()
    leaves = problem.leaves(["bias"])
    problem.fused(leaves).float().sum().backward()
    assert leaves["bias"].grad.dtype == torch.float32
    assert torch.equal(leaves["bias"].grad, torch.full_like(problem.bias, 18.0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [*NAMES, "dy"])
@pytest.mark.parametrize(("rows", "rank"), [(5, 3), (18, 3), (18, 70)])
def test_what_is_not_finite_spreads_as_in_torch(
    where: str, value: float, rows: int, rank: int, make_problem: Any
) -> None:
    problem = make_problem((rows, 24), 20, rank)
    dy = torch.randn(rows, 20, device=problem.x.device)
    tensor = dy if where == "dy" else getattr(problem, where)
    tensor.view(-1)[tensor.numel() // 2] = value
    found = []
    for run in (problem.fused, problem.plain):
        leaves = problem.leaves(NAMES)
        y = run(leaves)
        found.append([y, *torch.autograd.grad(y, list(leaves.values()), dy)])
    for what, ours, theirs in zip(("output", *NAMES), *found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), what
        assert torch.equal(ours.isinf(), theirs.isinf()), what


@pytest.mark.parametrize("rank", [4, 70])
def test_no_overflow_that_the_factor_prevents(rank: int, make_problem: Any) -> None:
    """dY B alone passes fp16's range; the factor brings it back before anything is rounded."""
    problem = make_problem((18, 24), 20, rank, torch.float16)
    problem.scaling = 2.0**-8
    dy = torch.full((18, 20), 512.0, device=problem.x.device, dtype=torch.float16)
    problem.lora_B.fill_(16.0)
    leaves = problem.leaves(["x", "lora_A"])
    grads = torch.autograd.grad(problem.fused(leaves), [leaves["x"], leaves["lora_A"]], dy)
    assert all(grad.isfinite().all() for grad in grads)


@subsets
def test_only_needed_kernels_run(
    needs: tuple[str, ...], make_problem: Any, launched: list[str]
) -> None:
    """dS is for x and A, the pass over x for A, the large product for x; dW is the vendor's."""
    problem = make_problem((18, 24), 20, 3, torch.float16)
    leaves = problem.leaves(needs)
    y = problem.fused(leaves)
    launched.clear()
    torch.autograd.grad(y, [leaves[k] for k in needs], torch.ones_like(y))
    expected = []
    if set(needs) - {"weight"}:
        expected += ["lora_grad_sb_kernel", "reduce_partials_kernel"]
    if "lora_A" in needs:
        expected += ["lora_grad_a_kernel", "reduce_partials_kernel"]
    if "x" in needs:
        expected += ["lora_gemm_tma_kernel"]
    plain = [name.replace("_tma", "") for name in launched]
    assert sorted(plain) == sorted(name.replace("_tma", "") for name in expected)


def test_the_forward_reads_x_once_or_twice(make_problem: Any, launched: list[str]) -> None:
    few, many = make_problem((8, 24), 20, 3, torch.float16), make_problem((80, 24), 20, 17)
    few.fused(few.leaves([]))
    assert len(launched) == 1
    launched.clear()
    many.fused(many.leaves([]))  # fp32: the vendor's product adds onto the kernel's output
    assert launched == ["lora_shrink_kernel"]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_same_bits_every_time(p: float, make_problem: Any) -> None:
    problem = make_problem((70, 40), 36, 5, torch.float16)
    runs = []
    for deterministic in (False, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            leaves = problem.leaves(NAMES)
            torch.manual_seed(3)
            y = problem.fused(leaves, p)
            runs.append([y, *torch.autograd.grad(y, list(leaves.values()), y.detach())])
        finally:
            torch.use_deterministic_algorithms(False)
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(two, three)


def test_gradients_accumulate_like_torchs(make_problem: Any) -> None:
    """Two backward passes into one .grad, and an x that is used twice."""
    problem = make_problem((18, 24), 24, 3)
    found = []
    for run, wide in ((problem.fused, False), (problem.plain, False), (problem.plain, True)):
        leaves = problem.leaves(NAMES, wide=wide)
        for factor in (1.0, -0.5):
            y = run(leaves)
            y = run({**leaves, "x": y}) + y
            (factor * y).sum().backward()
        found.append([t.grad for t in leaves.values()])
    for what, ours, eager, oracle in zip(NAMES, *found, strict=True):
        assert_within_budget(ours, eager, oracle, what=what)

"""Second derivatives through the fused path: those of plain torch, or a refusal that says why."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_fast.testing import assert_within_budget

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
SUBSETS = [c for size in range(1, 6) for c in itertools.combinations(NAMES, size)]
REFUSED = {c for c in SUBSETS if {"x", "lora_B"} <= set(c) and not {"weight", "lora_A"} & set(c)}


def second(y: Tensor, leaves: dict[str, Tensor], needs: tuple[str, ...], dy: Tensor) -> Any:
    """Gradients, for all leaves and dy, of the squared norm of the gradients."""
    inputs = [leaves[k] for k in needs]
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    grads = torch.autograd.grad(penalty, [*inputs, dy], allow_unused=True, materialize_grads=True)
    return [*first, *grads]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("needs", [c for c in SUBSETS if c not in REFUSED], ids="-".join)
def test_any_subset(needs: tuple[str, ...], p: float, make_problem: Any) -> None:
    problem = make_problem((5, 19), 7, 3)
    keep = drawn_mask(problem, p)
    dy = torch.randn(5, 7, device=problem.x.device)
    found = []
    for wide in (None, False, True):
        leaves = problem.leaves(needs, wide=bool(wide))
        torch.manual_seed(2)
        y = problem.fused(leaves, p) if wide is None else problem.plain(leaves, keep)
        found.append(second(y, leaves, needs, dy.to(y.dtype).requires_grad_()))
    names = [*needs, *(f"second, {k}" for k in (*needs, "dy"))]
    for what, ours, eager, oracle in zip(names, *found, strict=True):
        assert_within_budget(ours, eager, oracle, what=what)


def drawn_mask(problem: Any, p: float) -> Tensor | None:
    """The scaled mask that the fused path draws from this seed, float64."""
    if p == 0.0:
        return None
    from lora_fast.kernels.dropout import keep_scale, unpack_mask

    torch.manual_seed(2)
    y = problem.fused(problem.leaves(["lora_A"]), p)
    mask = y.grad_fn.saved_tensors[-1]
    return unpack_mask(mask, problem.x.shape[-1]).double() * keep_scale(p)


@pytest.mark.parametrize("needs", sorted(REFUSED), ids="-".join)
def test_what_was_not_kept_is_said(needs: tuple[str, ...], make_problem: Any) -> None:
    problem = make_problem((5, 19), 7, 3)
    leaves = problem.leaves(needs)
    y = problem.fused(leaves)
    inputs = [leaves[k] for k in needs]
    with pytest.raises(RuntimeError, match=r"does not keep x.*use_backend\('reference'\)"):
        torch.autograd.grad(y.sum(), inputs, create_graph=True)


def test_third_derivatives(make_problem: Any) -> None:
    """The second derivative is ordinary torch code, so there is no end to it."""
    problem = make_problem((5, 19), 7, 3)
    found = []
    for wide in (None, False, True):
        leaves = problem.leaves(["lora_A", "lora_B"], wide=bool(wide))
        y = (problem.fused if wide is None else problem.plain)(leaves)
        out = y.sin().mean()
        for _ in range(3):
            grads = torch.autograd.grad(out, list(leaves.values())[3:], create_graph=True)
            out = sum(g.sin().sum() for g in grads)
        found.append(grads)
    for ours, eager, oracle in zip(*found, strict=True):
        assert_within_budget(ours.detach(), eager.detach(), oracle.detach())


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_through_a_checkpoint(p: float, make_problem: Any) -> None:
    """Which unpacks what was saved one time only."""
    problem = make_problem((5, 19), 7, 3)
    found = []
    for wrap in (checkpoint, lambda run, *tensors, use_reentrant: run(*tensors)):
        leaves = problem.leaves(NAMES)
        torch.manual_seed(2)
        y = wrap(
            lambda *tensors: problem.fused(dict(zip(NAMES, tensors, strict=True)), p).sin(),
            *leaves.values(),
            use_reentrant=False,
        )
        found.append(second(y, leaves, NAMES, torch.ones_like(y).requires_grad_()))
    for checkpointed, plain in zip(*found, strict=True):
        assert torch.equal(checkpointed, plain)


def test_half_precision_with_fp32_adapters(make_problem: Any) -> None:
    problem = make_problem((5, 19), 7, 3, torch.float16, torch.float32)
    found = []
    for wide in (None, False, True):
        leaves = problem.leaves(NAMES, wide=bool(wide))
        y = (problem.fused if wide is None else problem.plain)(leaves)
        found.append(second(y, leaves, NAMES, torch.ones_like(y).requires_grad_()))
    for ours, eager, oracle in zip(*found, strict=True):
        assert_within_budget(ours, eager, oracle)

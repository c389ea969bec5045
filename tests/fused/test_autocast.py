"""Autocast around the fused path: torch's dtypes, and errors within those of plain torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast as lora
from lora_fast.testing import assert_within_budget

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ranks = pytest.mark.parametrize("rank", [3, 70])


def grads(y: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1.0, 2.0, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, list(leaves.values()), dy))


@ranks
@dtypes
@pytest.mark.parametrize("x_dtype", [torch.float32, "autocast"], ids=str)
def test_dtypes_and_values(dtype: torch.dtype, x_dtype: Any, rank: int, make_problem: Any) -> None:
    """The output in autocast's dtype, gradients in their leaves': as torch's linear."""
    problem = make_problem((18, 24), 20, rank)
    if x_dtype == "autocast":
        problem.x = problem.x.to(dtype)
    found = []
    for run, wide in ((problem.fused, False), (problem.plain, False), (problem.plain, True)):
        leaves = problem.leaves(NAMES, wide=wide)
        with torch.autocast(problem.x.device.type, dtype, enabled=not wide):
            y = run(leaves)
        found.append([y, *grads(y, leaves)])
    assert found[0][0].dtype == dtype
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    for what, ours, eager, oracle in zip(("output", *NAMES), *found, strict=True):
        # Torch rounds the gradients to autocast's dtype before it casts them to the leaves'.
        assert_within_budget(ours.to(dtype), eager.to(dtype), oracle, what=what)


@ranks
@dtypes
def test_a_backward_under_autocast(dtype: torch.dtype, rank: int, make_problem: Any) -> None:
    """Forward outside: the gradients are those of a backward outside, to the bit."""
    problem = make_problem((18, 24), 20, rank)
    leaves = problem.leaves(NAMES)
    y = problem.fused(leaves)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    with torch.autocast(problem.x.device.type, dtype):
        found = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        first = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
    for ours, same, plain in zip(found, expected, first, strict=True):
        assert torch.equal(ours, same)
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(plain, same)


def test_autocast_off_inside_a_region(make_problem: Any) -> None:
    problem = make_problem((18, 24), 20, 3)
    expected = problem.fused(problem.leaves([]))
    kind = problem.x.device.type
    with torch.autocast(kind, torch.bfloat16), torch.autocast(kind, enabled=False):
        assert torch.equal(problem.fused(problem.leaves([])), expected)


@dtypes
def test_a_weight_in_autocasts_dtype_and_fp32_inputs(dtype: torch.dtype, make_problem: Any) -> None:
    """As QLoRA-style models have them; refused outside of autocast, as torch refuses."""
    problem = make_problem((18, 24), 20, 3)
    problem.weight = problem.weight.to(dtype)
    with torch.autocast(problem.x.device.type, dtype):
        assert problem.fused(problem.leaves(NAMES)).dtype == dtype
    with pytest.raises(RuntimeError, match=r"x is torch.float32 and weight"):
        problem.fused(problem.leaves(NAMES))


@dtypes
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
def test_training(dtype: torch.dtype, scaler: bool, make_layer: Any) -> None:
    """Steps of AdamW under autocast follow those of the reference."""

    def train(backend: str) -> list[float]:
        torch.manual_seed(0)
        with lora.use_backend(backend):
            layer = make_layer()
            kind = layer.weight.device.type
            lora.mark_only_lora_as_trainable(layer)
            optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
            scale = torch.amp.GradScaler(kind, init_scale=256.0, enabled=scaler)
            x = torch.randn(20, 40, device=layer.weight.device)
            losses = []
            for _ in range(4):
                with torch.autocast(kind, dtype):
                    loss = layer(x).float().square().mean()
                optimizer.zero_grad()
                scale.scale(loss).backward()
                scale.step(optimizer)
                scale.update()
                losses.append(loss.item())
        return losses

    losses = train("triton")
    eps = torch.finfo(dtype).eps
    assert losses == pytest.approx(train("reference"), rel=4 * eps)
    assert losses[-1] < losses[0]


def test_the_adapter_alone_in_fp32(make_layer: Any) -> None:
    """A half-precision base with fp32 adapters needs no autocast: their gradients are fp32."""
    layer = make_layer(dtype=torch.float16)
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().float()))
    y = layer(torch.randn(8, 40, device=layer.weight.device, dtype=torch.float16))
    F.mse_loss(y.float(), torch.zeros_like(y, dtype=torch.float32)).backward()
    assert y.dtype == torch.float16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32

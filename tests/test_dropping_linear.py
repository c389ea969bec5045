"""A Linear on a CPU whose dropout draws many numbers: a backward of its own, torch's results."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

M, K, N, R, P = 256, 300, 70, 4, 0.25  # M K is over the number from which it pays


def problem(shape: tuple[int, ...] = (M, K)) -> list[Tensor]:
    torch.manual_seed(0)
    k = shape[-1]
    shapes = (shape, (N, k), (R, k), (N, R), (N,))
    return [torch.randn(s, dtype=torch.float64) / 4 for s in shapes]


def results(tensors: list[Tensor], backend: str, needs: str = "xabc") -> list[Tensor]:
    """Y, the gradients of what `needs` names (x, weight, a, b, bias c), and what is drawn next."""
    leaves = [
        t.clone().requires_grad_(name in needs) for name, t in zip("xwabc", tensors, strict=True)
    ]
    x, weight, lora_A, lora_B, bias = leaves
    torch.manual_seed(1)
    with lora.use_backend(backend):
        y = functional.lora_linear(x, weight, lora_A, lora_B, 0.5, bias, P, True)
    dy = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves if t.requires_grad), torch.rand(3)]


def chosen(caplog: pytest.LogCaptureFixture, call: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        call()
    return [r.getMessage() for r in caplog.records]


ALL = [(dtype, "xabc") for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
SOME = [(torch.float32, needs) for needs in ("xwabc", "ab", "x", "b", "wc")]


@pytest.mark.parametrize(("dtype", "needs"), ALL + SOME, ids=str)
@pytest.mark.parametrize("shape", [(M, K), (2, 3, 61, K), (70000, 1)], ids=str)
def test_values_gradients_and_draws(
    dtype: torch.dtype, shape: tuple[int, ...], needs: str, caplog: pytest.LogCaptureFixture
) -> None:
    """torch draws the same numbers in every dtype, so fp64 has the same mask."""
    tensors = [t.to(dtype) for t in problem(shape)]
    found: list[Tensor] = []
    said = chosen(caplog, lambda: found.extend(results(tensors, "auto", needs)))
    assert said == ["lora_linear -> eager: a dropout that keeps a byte of each number"]
    plain = results(tensors, "reference", needs)
    oracle = results([t.to(torch.float64) for t in tensors], "reference", needs)
    assert torch.equal(found.pop(), plain.pop())
    for got, eager, true in zip(found, plain, oracle, strict=False):
        assert_within_budget(got, eager, true)


def test_fp32_adapters_on_a_half_base() -> None:
    tensors = [t.to(torch.bfloat16) for t in problem()]
    tensors[2], tensors[3] = tensors[2].float(), tensors[3].float()
    found, plain = results(tensors, "auto"), results(tensors, "reference")
    oracle = results([t.double() for t in tensors], "reference")
    assert torch.equal(found.pop(), plain.pop())
    for got, eager, true in zip(found, plain, oracle, strict=False):
        assert_within_budget(got, eager, true)


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests can fail: what is drawn for one element too many is out of the budget."""
    from lora_fast import eager

    right = eager.dropout

    def shifted(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        dropped, keep = right(x, p)
        return dropped, keep.view(-1).roll(1).view_as(keep)

    tensors = [t.float() for t in problem()]
    plain, oracle = results(tensors, "reference"), results(problem(), "reference")
    monkeypatch.setattr(eager, "dropout", shifted)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(results(tensors, "auto")[1], plain[1], oracle[1])


def test_double_backward_reads_the_mask_that_was_drawn() -> None:
    def penalty(backend: str) -> tuple[Tensor, ...]:
        x, weight, *rest = (t.requires_grad_(i != 1) for i, t in enumerate(problem()))
        lora_A, lora_B, bias = rest
        torch.manual_seed(1)
        with lora.use_backend(backend):
            y = functional.lora_linear(x, weight, lora_A, lora_B, 0.5, bias, P, True)
        leaves = [x, lora_A, lora_B]
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, expected in zip(penalty("auto"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, expected)


def layer_and_x(rows: int = M, dropout: float = P) -> tuple[lora.Linear, Tensor]:
    layer = lora.Linear(K, N, r=R, lora_dropout=dropout)
    randomize_(layer)
    lora.mark_only_lora_as_trainable(layer)
    return layer, torch.randn(rows, K, requires_grad=True)


def test_what_is_saved_for_backward() -> None:
    """A byte an element of x and S; plain torch saves the dropped x and the noise, 8 bytes."""
    layer, x = layer_and_x()
    assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) == M * K + M * R * 4


@pytest.mark.parametrize("case", ["few", "no dropout", "eval", "strided", "a subclass", "autocast"])
def test_everything_else_is_left_to_torch(case: str, caplog: pytest.LogCaptureFixture) -> None:
    layer, x = layer_and_x(10 if case == "few" else M, 0.0 if case == "no dropout" else P)
    if case == "eval":
        layer.merge_weights = False
        layer.eval()
    if case == "strided":
        x = torch.randn(K, M).t()
    if case == "a subclass":
        x = x.detach().as_subclass(type("Marked", (Tensor,), {}))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        (said,) = chosen(caplog, lambda: layer(x))
    assert said.startswith("lora_linear -> reference: ")


def test_torch_compile_keeps_one_graph() -> None:
    layer, x = layer_and_x()
    torch.manual_seed(2)
    expected = layer(x)
    torch.manual_seed(2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_hooks_of_the_dropout_are_called(kind: str, hook: str) -> None:
    options = {"enable_lora": [True, False]} if kind == "MergedLinear" else {}
    layer = randomize_(getattr(lora, kind)(K, 40, r=R, lora_dropout=P, **options))
    calls: list[str] = []
    getattr(layer.lora_dropout, f"register_{hook}_hook")(lambda *args: calls.append(hook))
    layer(torch.randn(M, K, requires_grad=True)).sum().backward()
    assert calls == [hook]

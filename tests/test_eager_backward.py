"""The backward written by hand for a CPU, under what may surround it."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import lora_fast as lora
from lora_fast import backend, functional, products
from lora_fast.backend import BackendName
from lora_fast.testing import randomize_

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: lora.MergedLinear(24, 36, r=3, enable_lora=[True, False, True]),
    "one_block": lambda: lora.MergedLinear(24, 36, r=3, enable_lora=[True]),
    "dropped": lambda: lora.Linear(256, 36, r=3, lora_dropout=0.5),
}


def output(name: str) -> tuple[Tensor, list[Tensor]]:
    """What a layer makes of enough rows for its own dropout, and what learns."""
    layer = randomize_(LAYERS[name]())
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(256, layer.in_features, requires_grad=True)
    y = layer(x)
    assert "LowRankLinear" in y.grad_fn.name()
    return y, [x, layer.lora_A, layer.lora_B]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_around_the_backward_alone(name: str, create_graph: bool) -> None:
    y, learns = output(name)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, learns, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, learns, dy, create_graph=create_graph)
    # Sums in another order, by a hundredth of what bf16 would make of them.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_a_batch(name: str) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    y, learns = output(name)
    dys = torch.randn(3, *y.shape)
    batch = torch.autograd.grad(y, learns, dys, retain_graph=True, is_grads_batched=True)
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, learns, dy, retain_graph=True)
        torch.testing.assert_close(tuple(grad[i] for grad in batch), alone)


BATCHES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "Linear": (lambda: lora.Linear(64, 64, r=4), lambda rows: torch.randn(rows, 64)),
    "MergedLinear": (
        lambda: lora.MergedLinear(64, 96, r=4, enable_lora=[1, 0, 1]),
        lambda rows: torch.randn(rows, 64),
    ),
    "Embedding": (lambda: lora.Embedding(50, 64, r=4), lambda rows: torch.randint(50, (rows,))),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rows", [3, 33, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_in_a_batch_where_products_are_made_in_fp32(
    name: str, dtype: torch.dtype, rows: int, create_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "slow_dtypes", lambda: frozenset((dtype,)))
    make, draw = BATCHES[name]
    layer, x = randomize_(make()).to(dtype), draw(rows)
    y = layer(x.to(dtype) if x.is_floating_point() else x)
    dys, learns = torch.randn(3, *y.shape, dtype=dtype), list(layer.parameters())
    learns = [p for p in learns if p.requires_grad]
    batch = torch.autograd.grad(
        y, learns, dys, retain_graph=True, is_grads_batched=True, create_graph=create_graph
    )
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, learns, dy, retain_graph=True)
        found = tuple(grad[i].detach() for grad in batch)
        torch.testing.assert_close(found, alone, rtol=0.05, atol=0.05 * rows**0.5)


FEW: dict[str, Callable[[], nn.Module]] = {
    "blocks": LAYERS["blocks"],
    "bf16": lambda: lora.Linear(24, 36, r=3).bfloat16(),
}


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("name", FEW)
def test_tangents_of_gradients(name: str, rows: int) -> None:
    """Forward mode through a backward whose forward ran before it: gradients are linear in dY."""
    layer = randomize_(FEW[name]())
    x = torch.randn(rows, 24, dtype=layer.weight.dtype, requires_grad=True)
    y, learns = layer(x), [x, layer.lora_A, layer.lora_B]
    dy, tangent = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, learns, tangent, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, learns, forward_ad.make_dual(dy, tangent))
        tangents = tuple(forward_ad.unpack_dual(grad).tangent for grad in found)
    close = {"rtol": 0.05, "atol": 0.1} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(tangents, expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_what_gets_no_gradient_gives_none(
    name: str, dtype: torch.dtype, without_gradient: Callable[[Tensor], Tensor]
) -> None:
    """Of zeros AdamW would decay a parameter, and move it by what it had before."""
    layer = randomize_(LAYERS[name]()).to(dtype)
    y = layer(torch.randn(256, layer.in_features, dtype=dtype))
    without_gradient(y).sum().backward()
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_dropped_elements_do_not_overflow(rate: float) -> None:
    """The factor of those that are kept is not for what fp16 must hold of all."""
    layer = lora.Linear(16, 32, r=2, lora_alpha=2, lora_dropout=rate).half()
    nn.init.normal_(layer.lora_A, std=0.05)
    nn.init.normal_(layer.lora_B)
    x = (0.01 * torch.randn(64, 16)).half().requires_grad_()
    dy = torch.randn(64, 32)
    largest = (dy @ layer.lora_B.detach().float()).abs().max()
    dy = (dy * (65000 / largest)).half()  # dS fits
    found = []
    names: tuple[BackendName, ...] = ("auto", "reference")
    for name in names:
        torch.manual_seed(0)
        with lora.use_backend(name):
            y = layer(x)
        found.append(torch.autograd.grad(y, [x, layer.lora_A], dy))
    finite = [[grad.isfinite() for grad in grads] for grads in found]
    assert all(mine[theirs].all() for mine, theirs in zip(*finite, strict=True))
    assert any(theirs.any() for theirs in finite[1])


@pytest.mark.parametrize("name", FEW)
def test_second_derivatives_of_no_rows_in_lora_b_alone(name: str) -> None:
    layer = FEW[name]()
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(key == "lora_B")
    y = layer(torch.zeros(0, 24, dtype=layer.weight.dtype))
    (first,) = torch.autograd.grad(y.sum(), layer.lora_B, create_graph=True)
    assert torch.equal(first, torch.zeros_like(layer.lora_B))


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("width", [32, 33])
def test_what_is_not_finite_stays_in_its_block(width: int, rank: int) -> None:
    """Of bf16, whose rows oneDNN fills up to pairs and fours, from what lies beside a block."""
    settings = {"r": rank, "enable_lora": [True, True, False]}
    layer = randomize_(lora.MergedLinear(64, 3 * width, **settings)).bfloat16()
    x, dy = torch.randn(128, 64).bfloat16(), torch.randn(128, 3 * width).bfloat16()
    dy[5, width] = torch.inf
    layer(x).backward(dy)
    assert layer.lora_A.grad[:rank].isfinite().all()
    assert layer.lora_B.grad[:width].isfinite().all()
    with torch.no_grad():
        layer.lora_A[rank, 0] = torch.nan
    assert layer(x)[:, :width].isfinite().all()


WHO_LEARNS = [who for n in range(1, 6) for who in combinations(("x", "W", "A", "B", "bias"), n)]


@pytest.mark.parametrize("rows", [30, 300], ids=["s_is_kept", "s_is_made_again"])
@pytest.mark.parametrize("op", [functional.lora_linear, functional.lora_merged_linear])
@pytest.mark.parametrize("who", WHO_LEARNS, ids="".join)
def test_both_orders_of_gradients_with_a_dropout_of_whatever_learns(
    who: tuple[str, ...], op: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_MANY_DROPPED", 0)
    merged = op is functional.lora_merged_linear
    blocks: Any = {"enable_lora": [1, 0, 1]} if merged else {}
    shapes = {"x": (rows, 10), "W": (12, 10), "A": (4 if merged else 2, 10)}
    shapes |= {"B": (8 if merged else 12, 2), "bias": (12,)}

    def gradients(name: BackendName) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(1)
        t = {k: torch.randn(shape).double().requires_grad_(k in who) for k, shape in shapes.items()}
        learns = [t[k] for k in who]
        with lora.use_backend(name):
            y = op(t["x"], t["W"], t["A"], t["B"], 2.0, t["bias"], 0.5, True, **blocks)
            once = torch.autograd.grad((y**2).sum(), learns, create_graph=True)
            bent = torch.stack([(grad**2).sum() for grad in once]).sum()
            twice = torch.autograd.grad(bent, learns, materialize_grads=True)
        return y.grad_fn, [y.detach(), *once, *twice]

    served, found = gradients("auto")
    assert "LowRankLinear" in served.name()
    torch.testing.assert_close(found, gradients("reference")[1])

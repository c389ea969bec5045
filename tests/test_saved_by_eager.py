"""What the ops on torch's kernels keep for backward: S or, in a long batch, not even that."""

import itertools
from collections.abc import Callable
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lora_fast as lora
from lora_fast import eager, products
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

K, N, R = 24, 36, 4
BLOCKS = ((0, 12), (24, 36))
LONG = K * N // (2 * R) + 1  # rows from which S of both blocks is larger than the weight


def layers(dropout: float) -> tuple[lora.MergedLinear, loralib.MergedLinear]:
    made = []
    for lib in (lora, loralib):
        settings = {"r": R, "lora_dropout": dropout, "enable_lora": [True, False, True]}
        layer = randomize_(lib.MergedLinear(K, N, **settings))
        lib.mark_only_lora_as_trainable(layer)
        made.append(layer)
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rows", [8, LONG - 1, LONG, 4 * LONG])
def test_never_more_than_loralib(rows: int, dropout: float) -> None:
    x = torch.randn(rows, K, requires_grad=True)
    ours, theirs = (
        saved_bytes(lambda layer=layer: layer(x), [x, *layer.parameters()])
        for layer in layers(dropout)
    )
    assert ours <= theirs
    mask = rows * K if dropout else 0
    assert ours == mask + (rows * 2 * R * 4 if rows < LONG else 0)


@pytest.mark.parametrize("make", [lora.Linear, loralib.Linear])
def test_no_mask_is_kept_where_only_b_learns(make: Any) -> None:
    layer = make(256, N, r=R, lora_dropout=0.5)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "lora_B")
    x = torch.randn(256, 256)
    assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) == 256 * R * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_learns", [False, True])
def test_a_dropout_peaks_at_no_more_than_loralib(x_learns: bool, dtype: torch.dtype) -> None:
    """Also where x, of which backward makes a dropped copy, is larger than y."""
    if dtype in products.slow_dtypes():
        pytest.skip("its products are made in fp32, by parts that take room")
    # So many rows that the room which oneDNN takes for itself does not count.
    x, dy = torch.randn(2048, 2048).to(dtype).requires_grad_(x_learns), torch.randn(2048, 512)
    peaks = []
    for lib in (lora, loralib):
        layer = lib.Linear(2048, 512, r=4, lora_dropout=0.1).to(dtype)
        lib.mark_only_lora_as_trainable(layer)
        peaks.append(peak_bytes(lambda layer=layer: layer(x).backward(dy.to(dtype))))
        x.grad = None
    assert peaks[0] <= peaks[1]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that a step takes beside what was there, by torch's profiler."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("needs", ["x lora_A lora_B", "lora_B", "lora_A lora_B", "x"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_long_batch(dtype: torch.dtype, p: float, needs: str) -> None:
    shapes = {"x": (2 * LONG, K), "weight": (N, K), "lora_A": (2 * R, K), "lora_B": (24, R)}
    drawn = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    dy = torch.randn(2 * LONG, N).to(dtype)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        """By autograd over the formula, with the same draws."""
        leaves = {n: t.to(dtype).requires_grad_(n in needs.split()) for n, t in drawn.items()}
        x, weight, a, b = leaves.values()
        torch.manual_seed(5)
        keep = torch.empty(x.shape).bernoulli_(1.0 - p).to(dtype) / (1.0 - p)
        y = x @ weight.t()
        s = (x * keep) @ a.t() * 0.75
        delta = [s[:, :R] @ b[:12].t(), torch.zeros_like(y[:, :12]), s[:, R:] @ b[12:].t()]
        wanted = [leaves[n] for n in needs.split()]
        return torch.autograd.grad(y + torch.cat(delta, 1), wanted, dy.to(dtype))

    leaves = {n: t.clone().requires_grad_(n in needs.split()) for n, t in drawn.items()}
    torch.manual_seed(5)
    y = eager.low_rank_linear(*leaves.values(), 0.75, None, p, BLOCKS)
    found = torch.autograd.grad(y, [leaves[n] for n in needs.split()], dy)
    triples = zip(found, gradients(dtype), gradients(torch.float64), strict=True)
    for name, triple in zip(needs.split(), triples, strict=True):
        assert_within_budget(*triple, what=name)


ROUTES = {
    "few rows": (lora.MergedLinear, 8, torch.float32),
    "many rows": (lora.MergedLinear, 64, torch.float32),
    "few rows of 16 bits": (lora.Linear, 8, torch.bfloat16),
}


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A layer and an input that the ops on torch's kernels serve, in three ways."""
    kind, rows, dtype = ROUTES[request.param]
    blocks = {"enable_lora": [True, False, True]} if kind is lora.MergedLinear else {}
    layer = randomize_(kind(K, N, r=R, **blocks)).to(dtype)
    return layer, torch.randn(rows, K, dtype=dtype)


def test_frozen_adapters_keep_nothing_of_x(route: tuple[nn.Module, Tensor]) -> None:
    layer, x = route
    layer.requires_grad_(False)
    x.requires_grad_()
    assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) == 0
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    h = x * 1
    y = layer(h)
    h.add_(1)  # as nn.Linear and loralib allow
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, rtol=0, atol=0)


def test_second_derivatives_without_x(route: tuple[nn.Module, Tensor]) -> None:
    layer, x = route
    layer.requires_grad_(False)
    x.requires_grad_()
    weights = torch.randn(len(x), N, dtype=x.dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x), x, weights, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), weights)
    with torch.no_grad():
        merged = layer.effective_weight()
        expected = 2 * (weights @ merged) @ merged.t()
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K), (4, K)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_output_features(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layer in (lora.Linear(K, 0, r=R), lora.MergedLinear(K, 0, r=R, enable_lora=[True])):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        layer.to(dtype)(x).sum().backward()
        assert x.grad is not None
        assert not x.grad.any()
        assert layer.lora_A.grad.shape == layer.lora_A.shape


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_frozen_lora_A_keeps_no_input(route: tuple[nn.Module, Tensor], p: float) -> None:
    """Where x needs no gradient S is enough, and the input may be written to."""
    layer, x = route
    layer.lora_dropout = nn.Dropout(p)
    layer.lora_A.requires_grad_(False)
    given = x.clone()
    torch.manual_seed(1)
    y = layer(given)
    torch.manual_seed(1)
    expected = torch.autograd.grad(layer(x.clone()).sum(), layer.lora_B)
    with torch.no_grad():
        given.add_(1.0)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.lora_B)[0], expected[0])


def test_a_second_derivative_of_a_frozen_lora_A(route: tuple[nn.Module, Tensor]) -> None:
    layer, x = route
    layer.lora_A.requires_grad_(False)
    y = layer(x)
    dy = torch.ones_like(y, requires_grad=True)
    (dB,) = torch.autograd.grad(y, layer.lora_B, dy, create_graph=True)
    with lora.use_backend("reference"):
        y = layer(x)
        (theirs,) = torch.autograd.grad(y, layer.lora_B, dy, create_graph=True)
    found, expected = (torch.autograd.grad(t.square().sum(), dy)[0] for t in (dB, theirs))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))

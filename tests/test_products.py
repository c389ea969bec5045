"""The products of the eager ops where torch has none of its own for 16 bits, against float64."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lora
from lora_fast import products, torch_internals
from lora_fast.backend import BackendName
from lora_fast.testing import assert_within_budget, randomize_

DTYPES = [torch.bfloat16, torch.float16]
FEW_ROWS = products._few_rows  # before a test says otherwise
SIZES = [(1, 1, 1), (3, 5, 7), (17, 64, 33), (40, 33, 65), (5, 0, 3), (0, 4, 3), (4, 3, 0)]


@pytest.fixture(params=DTYPES, ids=str, autouse=True)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """A dtype that torch is said to be slow in, and so few numbers at a time that all is cut."""
    monkeypatch.setattr(products, "slow_dtypes", lambda: frozenset(DTYPES))
    monkeypatch.setattr(products, "_LEAST", 40)
    monkeypatch.setattr(products, "_few_rows", lambda summed: 0)
    monkeypatch.setattr(products, "_FEW", -1)
    yield request.param


def draw(dtype: torch.dtype, m: int, n: int, transposed: bool = False) -> Tensor:
    return (torch.randn(n, m).t() if transposed else torch.randn(m, n)).to(dtype)


def check(
    product: Callable[..., Tensor], formula: Callable[..., Tensor], *operands: Tensor
) -> None:
    """Compare a product with its formula in plain torch, and both with the formula in float64."""
    copies = [t.clone() for t in operands]
    eager, oracle = formula(*operands), formula(*(t.double() for t in operands))
    assert_within_budget(product(*operands), eager, oracle)
    assert all(map(torch.equal, operands[1:], copies[1:]))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products(size: tuple[int, int, int], transposed: bool, dtype: torch.dtype) -> None:
    m, k, n = size
    a, b = draw(dtype, m, k, transposed), draw(dtype, k, n, not transposed)
    check(products.mm, torch.mm, a, b)
    check(lambda a, b: products.scaled_mm(a, b, 0.3), lambda a, b: 0.3 * (a @ b), a, b)
    check(products.linear, torch.nn.functional.linear, a, b.t())
    check(products.linear, torch.nn.functional.linear, a, b.t(), draw(dtype, 1, n)[0])
    check(products.mm_over_rows, lambda a, b: a.t() @ b, a.t(), b)
    check(lambda a, b: products.mm_over_rows(a, b, 0.3), lambda a, b: 0.3 * (a.t() @ b), a.t(), b)
    y = draw(dtype, m, n + 3)[:, 1 : n + 1]
    check(
        lambda y, a, b: products.add_mm_(y.clone(), a, b, 0.3),
        lambda y, a, b: torch.addmm(y, a, b, alpha=0.3),
        *(y, a, b),
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 8, 9])
@pytest.mark.parametrize("on_amd", [False, True], ids=["intel", "amd"])
def test_thin_products(
    on_amd: bool, n: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which AMD's CPUs take any transposed, Intel's only a sum over many rows."""
    monkeypatch.setattr(torch_internals, "HAS_MKL_ON_AMD", on_amd)
    for m, k in [(30, 20), (30, 128), (5, 0), (0, 4)]:
        for transposed in (False, True):
            a, b = draw(kind, m, k, transposed), draw(kind, k, n)
            serves = on_amd or (transposed and k == 128)
            assert products._is_transposed(a, b) == (serves and n in (2, 8) and m > n)
            assert products.mm(a, b).stride() == (a @ b).stride()
            check(products.mm, torch.mm, a, b)
            check(products.mm_over_rows, lambda a, b: a.t() @ b, a.t(), b)
            check(lambda a, b: products.scaled_mm(a, b, 0.3), lambda a, b: 0.3 * (a @ b), a, b)


def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """Of 99 parts of one number each; rounded at each the sum of many ones would stay too small."""
    a = torch.ones(2, 9999, dtype=dtype)
    assert torch.equal(products.mm(a, a.t()), torch.full((2, 2), 9999.0).to(dtype))


def test_a_thin_gradient_is_made_of_few_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little room it takes: by parts of a few rows each it would be slower than torch."""
    monkeypatch.undo()
    monkeypatch.setattr(products, "slow_dtypes", lambda: frozenset(DTYPES))
    dy, s = draw(dtype, 512, 1024), draw(dtype, 512, 4)
    parts: list[int] = []
    add = products._add_counted_

    def counted(y: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        parts.append(a.shape[1])
        return add(y, a, b, scaling)

    monkeypatch.setattr(products, "_add_counted_", counted)
    check(products.mm_over_rows, lambda a, b: a.t() @ b, dy, s)
    assert sum(parts) == 512 and len(parts) <= 8
    products.mm_over_rows(s, dy)
    assert sum(parts) == 1024 and len(parts) <= 16


def test_the_factor_comes_before_the_rounding() -> None:
    a = torch.full((1, 2), 300.0, dtype=torch.float16)
    assert products.scaled_mm(a, a.t(), 0.1).item() == 18000.0


def test_two_dtypes_are_refused_as_torch_does(dtype: torch.dtype) -> None:
    x, weight = draw(dtype, 4, 6), torch.randn(3, 6)
    for product in (products.linear, lambda x, w: products.mm(x, w.t())):
        with pytest.raises(RuntimeError, match="dtype"):
            product(x, weight)


def test_gradients_of_any_order(dtype: torch.dtype) -> None:
    def all_orders(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        multiply = products.differentiable_mm if a.dtype is dtype else _plain
        inputs = [t.detach().requires_grad_() for t in (a, b)]
        y = multiply(*inputs, 0.5)
        first = torch.autograd.grad((y * c).sum(), inputs, create_graph=True)
        total = sum(grad.pow(2).sum() for grad in first)
        assert isinstance(total, Tensor)
        return [y, *first, *torch.autograd.grad(total, inputs)]

    operands = draw(dtype, 9, 5), draw(dtype, 5, 7), draw(dtype, 9, 7)
    oracle = all_orders(*(t.double() for t in operands))
    plain = [t.to(dtype) for t in all_orders(*(t.float() for t in operands))]
    for found, expected, exact in zip(all_orders(*operands), plain, oracle, strict=True):
        # In float32 plain torch rounds once; here each product and each sum of it does.
        assert_within_budget(found, expected, exact, factor=8.0)


def _plain(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return a @ b * scaling


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: lora.Linear(33, 20, r=3, lora_alpha=2),
    "transposed": lambda: lora.Linear(33, 20, r=3, fan_in_fan_out=True),
    "merged": lambda: lora.MergedLinear(33, 30, r=3, enable_lora=[True, False, True]),
    "embedding": lambda: lora.Embedding(50, 20, r=3, lora_alpha=2),
    "padded": lambda: lora.Embedding(50, 20, r=3, padding_idx=4, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, train_base: bool, dtype: torch.dtype) -> None:
    layer = randomize_(LAYERS[name]()).to(dtype)
    layer.weight.requires_grad_(train_base)
    is_lookup = isinstance(layer, lora.Embedding)
    x = torch.randint(50, (6, 9)) if is_lookup else torch.randn(6, 9, 33).to(dtype)
    dy = torch.randn(6, 9, layer.weight.shape[0 if not is_lookup and name != "transposed" else 1])

    def step(kind: torch.dtype, backend: BackendName) -> list[Tensor]:
        layer.to(kind).zero_grad()
        mine = x if is_lookup else x.to(kind, copy=True).requires_grad_()
        with lora.use_backend(backend):
            y = layer(mine)
            y.backward(dy.to(kind))
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        grads += [] if is_lookup or mine.grad is None else [mine.grad]
        return [y.detach(), *(grad.clone() for grad in grads)]

    oracle = step(torch.float64, "reference")
    for found, plain, exact in zip(
        step(dtype, "auto"), step(dtype, "reference"), oracle, strict=True
    ):
        assert_within_budget(found, plain, exact)


def test_every_product_is_counted(dtype: torch.dtype) -> None:
    layer, x = lora.Linear(64, 32, r=4).to(dtype), torch.randn(50, 64).to(dtype)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    # The frozen layer's, for whose input no gradient is asked; S, its update, dS, dA and dB.
    assert counter.get_total_flops() == 2 * 50 * (64 * 32 + 3 * 4 * 32 + 2 * 4 * 64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_autograd_traces_a_backward(name: str, dtype: torch.dtype) -> None:
    layer = randomize_(LAYERS[name]()).to(dtype)
    is_lookup = isinstance(layer, lora.Embedding)
    x = torch.randint(50, (40,)) if is_lookup else torch.randn(40, 33).to(dtype)

    def grads(context: contextlib.AbstractContextManager[object]) -> list[Tensor]:
        layer.zero_grad()
        total = layer(x).sum()
        with context:
            total.backward()
        return [p.grad.clone() for p in (layer.lora_A, layer.lora_B)]

    expected = grads(contextlib.nullcontext())
    compiled = compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True))
    for found, grad in zip(grads(compiled), expected, strict=True):
        eps = torch.finfo(dtype).eps  # the graph has torch's own products
        torch.testing.assert_close(found, grad, rtol=8 * eps, atol=eps * float(grad.abs().max()))


@pytest.mark.parametrize("size", [(3, 5, 7), (40, 33, 4)], ids=str)
def test_products_under_another_default_device(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, k, n = size
    a, b, y = draw(dtype, m, k), draw(dtype, k, n), draw(dtype, m, n)
    with torch.device("meta"):
        found = [products.mm(a, b), products.scaled_mm(a, b, 0.3), products.linear(a, b.t())]
        found += [products.mm_over_rows(a.t(), b), products.add_mm_(y, a, b)]
    assert {str(t.device) for t in found} == {"cpu"}


def test_several_threads_leave_more_rows_of_long_sums_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(threads: int) -> list[int]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return [FEW_ROWS(summed) for summed in (16, 4096)]

    assert found(1) == [5, 5]
    assert found(2) == [5, 16]

"""A factor of the update that is a tensor, one for each output feature say, as in loralib."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import randomize_

N = 9
BLOCKS: dict[str, dict[str, Any]] = {
    "whole": {},
    "blocks": {"enable_lora": [True, False, True]},
    "unequal": {"enable_lora": [True, False, True], "out_splits": [1, 2, 6]},
    "narrow": {"enable_lora": [False, True] + [False] * 7},  # a width of one broadcasts to any
}


def layer_of(kind: str, **kwargs: Any) -> Any:
    if kind == "whole":
        return randomize_(lora.Linear(4, N, r=2, dtype=torch.float64, **kwargs))
    return randomize_(lora.MergedLinear(4, N, r=2, dtype=torch.float64, **BLOCKS[kind], **kwargs))


def factor(shape: tuple[int, ...] = (N,)) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


def expected(layer: Any, x: Tensor, scaling: Tensor) -> Tensor:
    """loralib's formula: the update of all output features times the factor."""
    layer.scaling = 1.0
    base = F.linear(x, layer._as_delta(layer.weight), layer.bias)
    return base + (layer(x) - base) * scaling


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (N,), (3, 1), (3, N)], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_factor_for_each_output_feature(
    kind: str, shape: tuple[int, ...], fan_in_fan_out: bool, backend: str
) -> None:
    layer, x, scaling = layer_of(kind, fan_in_fan_out=fan_in_fan_out), factor((3, 4)), factor(shape)
    wanted = expected(layer, x, scaling)
    leaves = [layer.lora_A, layer.lora_B, x, scaling]
    dy = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, leaves, dy)
    layer.scaling = scaling
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, dy), gradients)


def test_loralib_computes_it() -> None:
    kwargs = {"r": 2, "enable_lora": [True, False, True]}
    theirs, ours = loralib.MergedLinear(4, N, **kwargs), lora.MergedLinear(4, N, **kwargs)
    ours.load_state_dict(randomize_(theirs).state_dict())
    theirs.scaling = ours.scaling = torch.rand(N)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_effective_weight_has_it_too(kind: str) -> None:
    layer, x, scaling = layer_of(kind), factor((3, 4)), factor()
    wanted = expected(layer, x, scaling)
    layer.scaling = scaling
    torch.testing.assert_close(F.linear(x, layer.effective_weight(), layer.bias), wanted)
    delta = functional.merged_delta(layer.lora_A, layer.lora_B, scaling, **layer._blocks())
    torch.testing.assert_close(layer.weight + delta, layer.effective_weight())


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_layer_with_it_stays_unmerged_and_right(kind: str) -> None:
    layer, x, scaling = layer_of(kind), factor((3, 4)), factor()
    wanted, weight = expected(layer, x, scaling), layer.weight.detach().clone()
    layer.scaling = scaling
    with pytest.warns(RuntimeWarning, match=r"not merged: scaling must be one number.*\(9,\)"):
        layer.eval()
    assert not layer.merged
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_merge_takes_one_number(backend: str) -> None:
    weight, a, b = torch.randn(N, 4), torch.randn(2, 4), torch.randn(N, 2)
    before = weight.clone()
    message = re.escape("scaling must be one number to be merged, got a tensor of shape (9,)")
    with lora.use_backend(backend), pytest.raises(ValueError, match=message):
        functional.merge_(weight, a, b, torch.rand(N))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("length", [2, N - 1, N + 3])
@pytest.mark.parametrize("kind", ["blocks", "unequal", "narrow"])
def test_another_number_of_factors_than_of_features(kind: str, length: int) -> None:
    layer = layer_of(kind)
    layer.scaling = factor((length,))
    for compute in (lambda: layer(factor((3, 4))), layer.effective_weight):
        with pytest.raises(ValueError, match=rf"scaling must be one number or 9.*\({length},\)"):
            compute()


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (1, 1, 1), (4, 1), (3, N - 1), (N, 1), (N - 1,)], ids=str
)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_factors_that_would_change_the_output_are_refused(
    kind: str, hooked: bool, shape: tuple[int, ...]
) -> None:
    layer = layer_of(kind, lora_dropout=0.5)
    if hooked:
        layer.lora_dropout.register_forward_hook(lambda *args: None)
    layer.scaling = factor(shape)
    each = "or 9 in a row, one for each output feature"
    message = re.escape(f"scaling must be one number {each}, got a tensor of shape {shape}")
    with pytest.raises(ValueError, match=message):
        layer(factor((3, 4)))


def test_factors_of_rows_follow_more_dimensions() -> None:
    """Also where the rows of all samples are multiplied as one matrix."""
    for shape in ((3, 1), (2, 1, 1), (2, 3, N), (1, 1)):
        layer, x, scaling = layer_of("whole"), factor((2, 3, 4)), factor(shape)
        wanted = expected(layer, x, scaling)
        layer.scaling = scaling
        torch.testing.assert_close(layer(x), wanted)
    table = randomize_(lora.Embedding(8, N, r=2, dtype=torch.float64))
    ids = torch.randint(8, (2, 3))
    wanted = expected_of_table(table, ids, scaling := factor((3, 1)))
    table.scaling = scaling
    torch.testing.assert_close(table(ids), wanted)


def expected_of_table(layer: Any, ids: Tensor, scaling: Tensor) -> Tensor:
    layer.scaling = 1.0
    base = F.embedding(ids, layer.weight)
    return base + (layer(ids) - base) * scaling


OTHERS: dict[str, tuple[Any, ...]] = {
    "lora_embedding": (
        torch.tensor([1, 2, 1]),
        torch.rand(5, N),
        torch.rand(2, 5),
        torch.rand(N, 2),
    ),
    "lora_conv": (torch.rand(1, 4, 7), torch.rand(N, 4, 1), torch.rand(2, 4), torch.rand(N, 2)),
    "merged_delta": (torch.rand(N, 4), torch.rand(N, N)),
    "merged_weight": (torch.rand(N, 4), torch.rand(N, 4), torch.rand(N, N)),
}
MANY = {"merged_delta": N, "merged_weight": N, "lora_embedding": N, "lora_conv": 1}


@pytest.mark.parametrize("shape", [(2, 1, 1), (N, 1), (1, N), (N - 1,), (0,)], ids=str)
@pytest.mark.parametrize("op", OTHERS)
def test_other_functions_refuse_them_too(op: str, shape: tuple[int, ...]) -> None:
    if op == "lora_embedding" and shape == (1, N):  # fits the rows
        shape = (2, N)
    each = " or 9 in a row" if MANY[op] > 1 else ""
    with pytest.raises(
        ValueError, match=rf"{op}: scaling must be one number{each}.*{re.escape(str(shape))}"
    ):
        getattr(functional, op)(*OTHERS[op], torch.rand(shape))


def test_a_convolution_takes_one_number() -> None:
    with pytest.raises(ValueError, match=r"lora_conv: scaling must be one number, got .*\(9,\)"):
        functional.lora_conv(*OTHERS["lora_conv"], torch.rand(N))


@pytest.mark.parametrize("enable", [None, [True, True, True]])
@pytest.mark.parametrize("op", ["merged_delta", "merged_weight"])
def test_a_single_element_in_a_matrix_scales_a_delta(op: str, enable: Any) -> None:
    rows = 3 if enable else 1
    weight, a, b = torch.rand(N, 4), torch.rand(2 * rows, 4), torch.rand(N, 2)
    given = (a, b) if op == "merged_delta" else (weight, a, b)
    call = getattr(functional, op)
    found = call(*given, torch.full((1, 1), 0.5), enable_lora=enable)
    torch.testing.assert_close(found, call(*given, 0.5, enable_lora=enable))


@pytest.mark.parametrize("kind", BLOCKS)
def test_factors_under_transforms_and_compilers(kind: str) -> None:
    layer = layer_of(kind).requires_grad_(False)
    x, scaling = torch.rand(5, 3, 4).double(), torch.rand(5, N).double()

    def run(x: Tensor, scaling: Tensor) -> Tensor:
        layer.scaling = scaling
        return layer(x)  # type: ignore[no-any-return]

    each = torch.stack([run(*pair) for pair in zip(x, scaling, strict=True)])
    torch.testing.assert_close(torch.func.vmap(run)(x, scaling), each)
    with pytest.raises(ValueError, match="scaling must be one number or 9"):
        torch.func.vmap(run)(x, scaling[:, :-1])
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x[0], scaling[0]), each[0])
    traced = torch.jit.trace(run, (x[0], scaling[0]), check_trace=False)
    torch.testing.assert_close(traced(x[1], scaling[1]), each[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", ["Linear", "MergedLinear", "Embedding"])
def test_a_wider_factor_leaves_the_dtype_of_the_output(make: str, dtype: torch.dtype) -> None:
    """One that is trained in fp32 beside a layer in 16 bits."""
    kwargs: dict[str, Any] = {"enable_lora": [True, False]} if make == "MergedLinear" else {}
    found = []
    for lib in (loralib, lora):
        layer = getattr(lib, make)(8, 6, r=2, **kwargs).to(dtype)
        layer.scaling = torch.nn.Parameter(torch.full((1,), 0.5))
        x = torch.arange(4) if make == "Embedding" else torch.ones(4, 8, dtype=dtype)
        y = layer(x)
        y.sum().backward()
        found.append((y.dtype, layer.scaling.grad.dtype, layer.lora_B.grad.dtype))
    assert found[0] == found[1] == (dtype, torch.float32, dtype)


def small(shape: Iterable[int]) -> Tensor:
    """Whole numbers so small that 16 bits hold their products and sums."""
    return torch.randint(-1, 2, tuple(shape)).double()


def assert_exact(
    compute: Callable[[torch.dtype, Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Fail unless output and gradient of a factor in fp32, of small operands, are those of fp64."""
    factors, dy, found = (small(shape) + 2.0) / 2.0, None, []
    for each, width in ((torch.float64, torch.float64), (dtype, torch.float32)):
        scaling = factors.to(width, copy=True).requires_grad_()
        y = compute(each, scaling)
        assert y.dtype is each
        dy = small(y.shape) if dy is None else dy
        (gradient,) = torch.autograd.grad(y, scaling, dy.to(each))
        found.append((y.double(), gradient.double()))
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (N,)], ids=str)
@pytest.mark.parametrize("blocks", ["", "blocks", "strided"])
@pytest.mark.parametrize("op", ["merged_delta", "merged_weight"])
def test_a_wider_factor_of_a_weight(
    op: str, blocks: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, b = small((N, 4)), small((N, 2))
    weight = weight.t().contiguous().t() if blocks == "strided" else weight
    a, enable = (small((6, 4)), [True] * 3) if blocks == "blocks" else (small((2, 4)), None)
    operands = (weight, a, b) if op == "merged_weight" else (a, b)
    call = getattr(functional, op)

    def compute(dtype: torch.dtype, scaling: Tensor) -> Tensor:
        return call(*(t.to(dtype) for t in operands), scaling, enable_lora=enable)  # type: ignore[no-any-return]

    assert_exact(compute, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_wider_factor_of_a_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    operands = [small(size) for size in ((2, 2, 5, 5), (3, 2, 3, 3), (6, 6), (9, 6))]
    assert_exact(
        lambda dtype, scaling: functional.lora_conv(*(t.to(dtype) for t in operands), scaling),
        shape,
        dtype,
    )


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "linear": (lambda: lora.Linear(4, N, r=2), lambda: small((3, 4))),
    "transposed": (lambda: lora.Linear(4, N, r=2, fan_in_fan_out=True), lambda: small((3, 4))),
    "blocks": (
        lambda: lora.MergedLinear(4, N, r=2, **BLOCKS["blocks"]),
        lambda: small((3, 4)),
    ),
    "table": (lambda: lora.Embedding(4, N, r=2), lambda: torch.arange(4)),
    "convolution": (lambda: lora.Conv2d(2, 3, 3, r=2), lambda: small((2, 2, 5, 5))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (N,)], ids=str)
@pytest.mark.parametrize("what", ["forward", "effective_weight"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_wider_factor_of_a_layer(
    kind: str, what: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if kind == "convolution" and shape == (N,):
        pytest.skip("a convolution takes one number")
    make, draw = LAYERS[kind]
    layer, x = make(), draw()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(small(parameter.shape))

    def compute(dtype: torch.dtype, scaling: Tensor) -> Tensor:
        layer.to(dtype).scaling = scaling
        given = (x if kind == "table" else x.to(dtype),) if what == "forward" else ()
        return getattr(layer, what)(*given)  # type: ignore[no-any-return]

    assert_exact(compute, shape, dtype)

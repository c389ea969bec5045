"""Dtypes that do not go together: both are named, and the error is torch's kind too."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import randomize_

QKV = {"enable_lora": [True, False, True]}
LINEAR = ["lora_linear", "lora_merged_linear"]
CASTABLE = [torch.float32, torch.bfloat16, torch.float16]


def tensors(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    groups, rows = (1, 9) if op == "lora_linear" else (2, 6)
    shapes = {"x": (5, 4), "weight": (9, 4), "lora_A": (2 * groups, 4), "lora_B": (rows, 2)}
    return {name: torch.randn(s).to(dtype) for name, s in (shapes | {"bias": (9,)}).items()}


def call(op: str, t: dict[str, Tensor], p: float = 0.0) -> Tensor:
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.5, t["bias"], p, True)
    return getattr(functional, op)(*args, **(QKV if op == "lora_merged_linear" else {}))


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
@pytest.mark.parametrize("which", ["x", "bias"])
@pytest.mark.parametrize("op", LINEAR)
def test_another_dtype_than_the_weights(
    op: str, which: str, other: torch.dtype, backend: str
) -> None:
    t = tensors(op)
    expected = f"{op}: {which} must have the dtype of weight, torch.float32, got {other}; "
    for kind in (TypeError, RuntimeError):
        with pytest.raises(kind, match=re.escape(expected)) as caught:
            call(op, t | {which: t[which].to(other)})
    message = str(caught.value)
    remedy = f"take {which}.real" if other.is_complex else f"convert it with {which}.to("
    assert remedy in message
    assert ("autocast" in message) is (other in CASTABLE)


@pytest.mark.parametrize("rows", [1, 5, 20000])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("op", LINEAR)
def test_whatever_serves_the_call(op: str, p: float, rows: int) -> None:
    """Few rows, many to drop, and factors in the dtype of x, which is the wrong one."""
    t = tensors(op)
    t["x"] = torch.randn(rows, 4).bfloat16()
    for factors in (torch.float32, torch.bfloat16):
        given = t | {name: t[name].to(factors) for name in ("lora_A", "lora_B")}
        with pytest.raises(RuntimeError, match=f"{op}: x must have the dtype of weight"):
            call(op, given, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("other", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize("op", LINEAR)
def test_factors_that_would_be_truncated(
    op: str, which: str, other: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    t = tensors(op, dtype)
    given = t | {which: t[which].real.to(other)}
    if dtype.is_complex and other.is_complex:
        assert call(op, given).dtype == dtype
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of imaginary parts that it drops
        with pytest.raises(TypeError, match=rf"{op}: {which} must .*got {other}"):
            call(op, given)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match=rf"{which} must .*got {other}"),
        ):
            call(op, given)


@pytest.mark.parametrize("enable_lora", [None, [True, True]], ids=["whole", "blocks"])
@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("other", [torch.int64, torch.complex64], ids=str)
def test_a_merged_weight_drops_no_fractions(
    other: torch.dtype, which: str, enable_lora: Any, backend: str
) -> None:
    a_rows = 1 if enable_lora is None else 2
    t = {"weight": torch.zeros(2, 2), "lora_A": torch.full((a_rows, 2), 0.9)}
    t |= {"lora_B": torch.ones(2, 1)}
    given = (t | {which: t[which].to(other)}).values()
    if which == "weight" and other.is_complex:
        merged = functional.merged_weight(*given, 1.0, enable_lora=enable_lora)
        torch.testing.assert_close(merged, torch.full((2, 2), 0.9, dtype=other))
        return
    with pytest.raises(TypeError, match=rf"merged_weight: {which} must .*got {other}"):
        functional.merged_weight(*given, 1.0, enable_lora=enable_lora)


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_the_factors_of_a_delta_have_one_dtype(which: str) -> None:
    t = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(6, 2)}
    given = t | {which: t[which].double()}
    for kind in (TypeError, RuntimeError):
        with pytest.raises(kind, match=r"merged_delta: lora_A must have the dtype of lora_B"):
            functional.merged_delta(*given.values(), 1.0)
    half = t | {which: t[which].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.merged_delta(*half.values(), 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
def test_a_table_that_holds_no_fractions(which: str, backend: str) -> None:
    t = {"weight": torch.ones(5, 6), "lora_A": torch.ones(2, 5), "lora_B": torch.ones(6, 2)}
    t[which] = t[which].long()
    with pytest.raises(TypeError, match=f"lora_embedding: {which} must have a floating-point"):
        functional.lora_embedding(torch.tensor([1, 2]), *t.values(), 1.0)


@pytest.mark.parametrize("op", LINEAR)
def test_autocast_goes_on_converting(op: str, backend: str) -> None:
    t = tensors(op)
    expected = call(op, t).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(op, t | {"x": t["x"].bfloat16(), "bias": t["bias"].bfloat16()})
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        # It leaves fp64 as it is.
        with pytest.raises(TypeError, match=r"x must have the dtype of .*got torch\.float64"):
            call(op, t | {"x": t["x"].double()})


@pytest.mark.parametrize("op", LINEAR)
def test_an_error_of_another_kind_stays_what_it_is(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(functional.reference, op, fail)
    t = tensors(op)
    with lora.use_backend("reference"), pytest.raises(RuntimeError, match=r"^out of memory$"):
        call(op, t)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"^out of mem"):
        call(op, t | {"x": t["x"].bfloat16()})


LAYERS: dict[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "Linear": (lambda **kw: lora.Linear(4, 6, **kw), torch.randn(3, 4)),
    "transposed": (lambda **kw: lora.Linear(4, 6, fan_in_fan_out=True, **kw), torch.randn(3, 4)),
    "MergedLinear": (lambda **kw: lora.MergedLinear(4, 6, **QKV, **kw), torch.randn(3, 4)),
    "Conv2d": (lambda **kw: lora.Conv2d(4, 6, 3, **kw), torch.randn(1, 4, 5, 5)),
    "no bias": (lambda **kw: lora.Conv2d(4, 6, 3, bias=False, **kw), torch.randn(1, 4, 5, 5)),
}


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_name_the_dtype_that_they_expect(name: str, training: bool, r: int) -> None:
    make, x = LAYERS[name]
    layer = randomize_(make(r=r)).train(training)
    expected = "x must have the dtype of weight, torch.float32, got torch.float64; convert it with"
    for kind in (TypeError, RuntimeError):
        with torch.no_grad(), pytest.raises(kind, match=re.escape(expected)):
            layer(x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_transforms_and_compilers_refuse_it_too(name: str) -> None:
    make, x = LAYERS[name]
    layer = make(r=2)
    with pytest.raises(TypeError, match="x must have the dtype of weight"):
        torch.vmap(layer)(x.double())
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="dtype"):
        compiled(x.double())
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: w[:1].expand(6, 4), ValueError, "memory of its own for each element, got shape"),
        (lambda w: w.to_sparse(), TypeError, "be dense, got layout torch.sparse_coo"),
        (lambda w: w.to_sparse_csr(), TypeError, "be dense, got layout torch.sparse_csr"),
        (lambda w: w.to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn; convert it"),
    ],
    ids=["expanded", "coo", "csr", "fp8"],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_weights_that_cannot_be_merged_into(
    make: Callable[[Tensor], Tensor], error: type[Exception], message: str, backend: str
) -> None:
    weight = make(torch.randn(6, 4))
    before = weight.clone()
    with lora.use_backend(backend), pytest.raises(error, match=f"merge_: weight must .*{message}"):
        functional.merge_(weight, torch.randn(2, 4), torch.randn(6, 2), 1.0)
    assert torch.equal(weight.to_dense().float(), before.to_dense().float())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: w.to_sparse(), TypeError, "weight must be dense, got layout torch.sparse_coo"),
        (lambda w: w.to(torch.float8_e4m3fn), TypeError, "weight must have a dtype"),
        (lambda w: w.to("meta"), ValueError, "weight, lora_A and lora_B must be on one device"),
    ],
    ids=["coo", "fp8", "meta"],
)
@pytest.mark.parametrize("enable_lora", [None, [True, True]], ids=["whole", "blocks"])
def test_weights_to_which_nothing_can_be_added(
    enable_lora: Any,
    make: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
    backend: str,
) -> None:
    a_rows = 2 if enable_lora is None else 4
    factors = torch.randn(a_rows, 4), torch.randn(6, 2)
    with pytest.raises(error, match=f"merged_weight: {message}"):
        functional.merged_weight(make(torch.randn(6, 4)), *factors, 1.0, enable_lora=enable_lora)
    meta = [t.to("meta") for t in (torch.randn(6, 4), *factors)]
    assert functional.merged_weight(*meta, 1.0, enable_lora=enable_lora).shape == (6, 4)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "one row"])
def test_weights_that_are_not_contiguous_are_merged_into(layout: str, backend: str) -> None:
    weight = {
        "transposed": lambda: torch.randn(4, 6).t(),
        "sliced": lambda: torch.randn(12, 8)[::2, ::2],
        "one row": lambda: torch.randn(4).expand(1, 4),
    }[layout]()
    before, a, b = weight.clone(), torch.randn(2, 4), torch.randn(weight.shape[0], 2)
    record = functional.merge_(weight, a, b, 0.5)
    torch.testing.assert_close(weight, before + 0.5 * b @ a)
    functional.unmerge_(weight, record)
    assert torch.equal(weight, before)

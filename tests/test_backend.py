"""Which implementation runs, and that it says why."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lora_fast
from lora_fast import backend, functional, ops, products

BY_HAND = "one backward by hand for all blocks"
PLAIN = "reference: not a CUDA tensor"
FEW_ROWS = "eager: few rows of 16 bits, to which one native op adds the update"
OPS = (
    *("lora_linear", "lora_merged_linear", "lora_embedding"),
    *("merged_weight", "merge_", "unmerge_"),
)


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    """Every test begins with the default, and the next file with what it was before."""
    with lora_fast.use_backend("auto"):
        yield


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody asked for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def factors(device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, device=device) for size in ((5, 4), (6, 4), (2, 4), (6, 2)))


def call_linear() -> Tensor:
    return functional.lora_linear(*factors(), 1.0)


def call_merged() -> Tensor:
    return functional.lora_merged_linear(*factors(), 1.0, enable_lora=[True])


def call_embedding() -> Tensor:
    return functional.lora_embedding(
        torch.tensor([1, 0]), torch.randn(6, 4), torch.randn(2, 6), torch.randn(4, 2), 1.0
    )


def call_conv() -> Tensor:
    return functional.lora_conv(
        torch.randn(2, 4, 7), torch.randn(6, 4, 1), torch.randn(2, 4), torch.randn(6, 2), 1.0
    )


CALLS = {
    "lora_linear": call_linear,
    "lora_merged_linear": call_merged,
    "lora_embedding": call_embedding,
    "merged_weight": call_conv,
}


def decisions(caplog: pytest.LogCaptureFixture, call: Callable[[], Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        call()
    return [r.getMessage() for r in caplog.records if r.name == "lora_fast.dispatch"]


@pytest.mark.parametrize("op", CALLS)
def test_a_cpu_call_says_what_ran_and_why(op: str, caplog: pytest.LogCaptureFixture) -> None:
    said = PLAIN
    if op == "lora_merged_linear":
        said = f"eager: {BY_HAND}"
    assert decisions(caplog, CALLS[op]) == [f"{op} -> {said}"]


@pytest.mark.parametrize(
    ("rows", "dtype", "is_built", "expected"),
    [
        (32, torch.bfloat16, True, FEW_ROWS),
        (1, torch.float16, True, FEW_ROWS),
        (33, torch.bfloat16, True, PLAIN),
        (32, torch.bfloat16, False, PLAIN),
        (32, torch.float32, True, PLAIN),
    ],
)
def test_few_rows_of_16_bits_on_a_cpu(
    rows: int,
    dtype: torch.dtype,
    is_built: bool,
    expected: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_built and ops.load_native("cpu") is not None:
        pytest.skip("the ops of csrc were not built")
    monkeypatch.setattr(ops, "load_native", lambda device: None if is_built else "not built")
    monkeypatch.setattr(products, "slow_dtypes", frozenset)
    x, *rest = (torch.ones(shape, dtype=dtype) for shape in ((rows, 6), (4, 6), (2, 6), (4, 2)))
    said = decisions(caplog, lambda: functional.lora_linear(x, *rest, 1.0))
    assert said == [f"lora_linear -> {expected}"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_that_torch_has_no_fast_products_of(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "slow_dtypes", lambda: frozenset((dtype,)))
    x, *rest = (torch.ones(shape, dtype=dtype) for shape in ((99, 6), (4, 6), (2, 6), (4, 2)))
    said = decisions(caplog, lambda: functional.lora_linear(x, *rest, 1.0))
    index = torch.zeros(99, dtype=torch.int64)
    said += decisions(caplog, lambda: functional.lora_embedding(index, rest[0].t(), *rest[1:], 1.0))
    names = ("lora_linear", "lora_embedding")
    reason = "products in fp32, as this CPU has no instructions for 16 bits"
    assert said == [f"{name} -> eager: {reason}" for name in names]


@pytest.mark.parametrize("op", CALLS)
def test_a_forced_reference_is_logged(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with lora_fast.use_backend("reference"):
        said = decisions(caplog, CALLS[op])
    assert said == [f"{op} -> reference: chosen by set_backend"]


@pytest.mark.parametrize(
    ("op", "options"), [("lora_linear", {}), ("lora_merged_linear", {"enable_lora": [True]})]
)
def test_a_forced_triton_is_logged(
    op: str, options: Any, kernel_device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    tensors = factors(kernel_device)
    with lora_fast.use_backend("triton"):
        said = decisions(caplog, lambda: getattr(functional, op)(*tensors, 1.0, **options))
    assert said == [f"{op} -> triton: chosen by set_backend"]


def test_merges_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    _, weight, a, b = factors()
    with lora_fast.use_backend("reference"):
        said = decisions(caplog, lambda: functional.merge_(weight, a, b, 1.0))
    assert said == ["merge_ -> reference: chosen by set_backend"]
    (line,) = decisions(caplog, lambda: functional.merge_(weight, a, b, 1.0))
    assert line.startswith(("merge_ -> native: plain tensors", "merge_ -> reference: "))


def test_nothing_is_logged_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_fast.dispatch"):
        call_linear()
    assert not caplog.records


class _Subclass(Tensor):
    pass


def _as_subclass() -> Tensor:
    x, *others = factors()
    return functional.lora_merged_linear(x.as_subclass(_Subclass), *others, 1.0, enable_lora=[True])


def _under_vmap() -> Tensor:
    x, *others = factors()

    def one(row: Tensor) -> Tensor:
        return functional.lora_merged_linear(row, *others, 1.0, enable_lora=[True])

    return torch.func.vmap(one)(x)


def _under_autocast() -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return call_merged()


def _dual() -> Tensor:
    x, *others = factors()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return functional.lora_merged_linear(x, *others, 1.0, enable_lora=[True])


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _under_a_mode() -> Tensor:
    with FlopCounterMode(display=False), _Mode():
        return call_merged()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_as_subclass, "a _Subclass is not a plain tensor"),
        (_under_vmap, "inside a functorch transform"),
        (_under_autocast, "autocast"),
        (_dual, "forward-mode differentiation"),
        (_under_a_mode, "inside a TorchDispatchMode"),
    ],
)
def test_what_only_torchs_own_code_serves(
    call: Callable[[], Tensor], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert decisions(caplog, call) == [f"lora_merged_linear -> reference: {reason}"]


def test_a_count_of_operations_changes_no_choice(caplog: pytest.LogCaptureFixture) -> None:
    with FlopCounterMode(display=False):
        said = decisions(caplog, call_merged)
    assert said == [f"lora_merged_linear -> eager: {BY_HAND}"]


def test_forced_triton_needs_cuda_or_the_interpreter(no_interpreter: None) -> None:
    with (
        lora_fast.use_backend("triton"),
        pytest.raises(RuntimeError, match="the input is on cpu, the kernels need CUDA"),
    ):
        call_linear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w: (x.double(), w.double()), "dtype torch.float64 is not fp32, fp16 or bf16"),
        (lambda x, w: (x.half(), w), "x is torch.float16 and weight torch.float32"),
        (lambda x, w: (x, w.to("meta")), "tensors on .* and meta"),
        (lambda x, w: (x.as_subclass(_Subclass), w), "a _Subclass is not a plain tensor"),
    ],
    ids=["fp64", "dtypes", "devices", "subclass"],
)
def test_forced_triton_says_what_the_kernels_cannot_take(
    change: Callable[..., tuple[Tensor, Tensor]], reason: str, kernel_device: torch.device
) -> None:
    x, weight, a, b = factors(kernel_device)
    x, weight = change(x, weight)
    with lora_fast.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        functional.lora_linear(x, weight, a, b, 1.0)


def test_forced_triton_takes_indices_of_an_embedding_as_torch_does(
    kernel_device: torch.device,
) -> None:
    t = [torch.randn(size, device=kernel_device) for size in ((6, 4), (2, 6), (4, 2))]
    index = torch.tensor([1, 0], device=kernel_device)
    with lora_fast.use_backend("triton"):
        for dtype in (torch.int64, torch.int32):
            assert functional.lora_embedding(index.to(dtype), *t, 1.0).shape == (2, 4)
        with pytest.raises(RuntimeError, match="int64 or int32"):
            functional.lora_embedding(index.to(torch.int8), *t, 1.0)
        with pytest.raises(RuntimeError, match=r"dtype torch\.float64 is not fp32, fp16 or bf16"):
            functional.lora_embedding(index, t[0].double(), *t[1:], 1.0)


def test_a_small_contiguous_weight_is_left_to_torch() -> None:
    a, b = torch.empty(3, 96), torch.empty(96, 3)
    weight = torch.empty(32, 32, 3, 3)
    small = "a small weight, torch is as fast"
    assert backend._why_torch_is_as_fast("merged_weight", (weight, a, b)) == small
    last = weight.to(memory_format=torch.channels_last)
    assert backend._why_torch_is_as_fast("merged_weight", (last, a, b)) is None
    assert backend._why_torch_is_as_fast("lora_linear", (weight, a, b)) is None


def test_forced_triton_without_triton(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_TRITON_FOUND", False)
    tensors = factors(kernel_device)
    with (
        lora_fast.use_backend("triton"),
        pytest.raises(RuntimeError, match="triton is not installed"),
    ):
        functional.lora_linear(*tensors, 1.0)


def test_a_forced_backend_that_cannot_run_changes_nothing() -> None:
    layer = lora_fast.MergedLinear(4, 6, r=2, enable_lora=[True, False]).double()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 4, dtype=torch.float64)
    with lora_fast.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert layer(x).shape == (5, 6)


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_a_dropout_that_no_kernel_does(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    layer = getattr(lora_fast, kind)(4, 6, r=2, lora_dropout=0.5)
    if kind == "MergedLinear":
        layer = lora_fast.MergedLinear(4, 6, r=2, lora_dropout=0.5, enable_lora=[True, False])
    layer.lora_dropout.inplace = True
    x = torch.randn(3, 4)
    (said,) = decisions(caplog, lambda: layer(x.clone()))
    assert "-> reference: the dropout has hooks, works in place" in said
    with (
        lora_fast.use_backend("triton"),
        pytest.raises(RuntimeError, match="forced but cannot run: the dropout has hooks"),
    ):
        layer(x)


def test_what_has_no_kernel_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, weight, a, b = factors()
    (said,) = decisions(caplog, lambda: functional.merged_delta(a, b, 1.0))
    assert said == "merged_delta -> reference: there is no kernel for it"
    (said,) = decisions(
        caplog, lambda: functional.merged_weight(weight, a, b, 1.0, enable_lora=[True])
    )
    assert said == "merged_weight -> reference: blocks, for which there is no kernel"


@pytest.mark.parametrize("chosen", ["auto", "reference", "triton"])
def test_explain_prints_a_line_for_every_op(
    chosen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with lora_fast.use_backend(chosen):
        text = lora_fast.explain()
    assert capsys.readouterr().out == text + "\n"
    first, *lines = text.splitlines()
    assert first.startswith(f"backend: {chosen} (of auto, triton, reference), torch ")
    on_cpu = [line for line in lines if line.split()[1] == "cpu"]
    names = [line.split()[0] for line in on_cpu]
    assert list(dict.fromkeys(names)) == list(OPS)
    assert all(" -> " in line and line.split("->")[1].split()[1:] for line in on_cpu)
    assert set(functional.__all__) == {line.split()[0] for line in lines if "->" in line}


def test_explain_of_a_forced_backend_says_why_it_cannot_run(no_interpreter: None) -> None:
    with lora_fast.use_backend("triton"):
        lines = lora_fast.explain().splitlines()
    (line,) = (x for x in lines if x.startswith("lora_linear ") and " cpu " in x)
    assert "-> none" in line
    assert "the kernels need CUDA" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_explain_says_that_there_is_no_gpu() -> None:
    assert "cuda: not available" in lora_fast.explain()

"""What `explain()` tells: that which runs, for the reason that the dispatch logs."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fast
from lora_fast import backend, decisions, functional, ops, products
from lora_fast.decisions import Call, Size

CALLED = [op for op in decisions.OPS if op not in ("merge_", "unmerge_")]
HALVES = frozenset((torch.bfloat16, torch.float16))
Says = Callable[..., None]


@pytest.fixture(autouse=True)
def auto() -> Any:
    with lora_fast.use_backend("auto"):
        yield


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Choose what this CPU is: which dtypes are slow on it, and whether csrc was built."""

    def is_like(slow: frozenset[torch.dtype], built: bool) -> None:
        if built and ops.load_native("cpu") is not None:
            pytest.skip("the ops of csrc were not built")
        monkeypatch.setattr(products, "slow_dtypes", lambda: slow)
        if not built:
            monkeypatch.setattr(ops, "load_native", lambda device: "not built")

    return is_like


def logged(caplog: pytest.LogCaptureFixture, op: str, call: Call) -> str:
    """What the dispatch logs of a call, made in earnest."""
    p = 0.5 if call.size.drops else 0.0
    tensors = [None if t is None else torch.zeros_like(t) for t in call.tensors]
    options: dict[str, Any] = {}
    if op in ("lora_linear", "lora_merged_linear"):
        options = {"bias": tensors.pop(), "dropout_p": p, "training": True}
    if op == "lora_merged_linear":
        options["enable_lora"] = [True]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        getattr(functional, op)(*tensors, 1.0, **options)
    (said,) = (r.getMessage() for r in caplog.records if r.name == "lora_fast.dispatch")
    return said


@pytest.mark.parametrize("op", CALLED)
@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(
    ("slow", "built"),
    [(frozenset(), True), (HALVES, True), (frozenset((torch.float16,)), True), (HALVES, False)],
)
def test_every_call_runs_and_logs_what_it_is_said_to(
    op: str,
    name: backend.BackendName,
    slow: frozenset[torch.dtype],
    built: bool,
    cpu: Says,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cpu(slow, built)
    with lora_fast.use_backend(name):
        told = [d for d in decisions.what_runs() if d[:2] == (op, "cpu")]
        calls = list(decisions.representative_calls(op, "cpu"))
        said = [logged(caplog, op, call) for call in calls]
    assert {f"{op} -> {d.implementation}: {d.reason}" for d in told} == set(said)
    for call, line in zip(calls, said, strict=True):
        (decision,) = (d for d in told if f"{op} -> {d.implementation}: {d.reason}" == line)
        assert decision.calls == "" or is_named(call, decision.calls)


def is_named(call: Call, words: str) -> bool:
    """Tell whether a call is one of those that the words of a decision mean."""
    for part in words.split("; "):
        names, _, sizes = part.rstrip(")").partition(" (")
        if not names.startswith(("float", "bfloat")):
            names, sizes = "", part
        if names and str(call.dtype).removeprefix("torch.") not in names.split(", "):
            continue
        if sizes.startswith("all but "):
            return call.size.words not in sizes
        return not sizes or call.size.words in sizes
    return False


def lines(op: str) -> list[str]:
    found = lora_fast.explain().splitlines()
    return [line.partition("-> ")[2] for line in found if line.split()[0] == op]


def test_a_cpu_without_instructions_for_16_bits(cpu: Says) -> None:
    cpu(HALVES, True)
    in_fp32 = "products in fp32, as this CPU has no instructions for 16 bits"
    on_cpu = [[line for line in lines(op)][:3] for op in ("lora_linear", "lora_embedding")]
    assert on_cpu[0] == [
        "reference        float32 (all but dropout of 2^16 numbers or more); bfloat16, float16 "
        "(1 row without a gradient of x): not a CUDA tensor",
        "eager            dropout of 2^16 numbers or more: "
        "a dropout that keeps a byte of each number",
        f"eager            bfloat16, float16 (2 to 32 rows, more than 32 rows): {in_fp32}",
    ]
    assert on_cpu[1][:2] == [
        "reference        float32; bfloat16, float16 (up to 8 indices): not a CUDA tensor",
        f"eager            bfloat16, float16 (more than 8 indices): {in_fp32}",
    ]


def test_a_cpu_with_instructions_for_16_bits(cpu: Says) -> None:
    cpu(frozenset(), True)
    assert lines("lora_linear")[:3] == [
        "reference        float32 (all but dropout of 2^16 numbers or more); bfloat16, float16 "
        "(more than 32 rows): not a CUDA tensor",
        "eager            dropout of 2^16 numbers or more: "
        "a dropout that keeps a byte of each number",
        "eager            bfloat16, float16 (1 row without a gradient of x, 2 to 32 rows): "
        "few rows of 16 bits, to which one native op adds the update",
    ]
    assert lines("lora_embedding")[0] == "reference        not a CUDA tensor"


def asked(op: str, device: str, dtype: torch.dtype, size: Size) -> str:
    """What serves a call of such a size."""
    tensors = decisions._tensors(op, device, dtype, size)
    return backend.choice(op, tensors, size.drops)[0].value


@pytest.mark.parametrize(
    ("op", "slow", "size", "expected"),
    [
        ("lora_linear", HALVES, Size("", 1, 1), "reference"),
        ("lora_linear", HALVES, Size("", 2, 1), "eager"),
        ("lora_linear", frozenset(), Size("", 32, 3), "eager"),
        ("lora_linear", frozenset(), Size("", 33, 3), "reference"),
        ("lora_linear", frozenset(), Size("", 2**14, 4, drops=True), "eager"),
        ("lora_linear", frozenset(), Size("", 2**16 - 1, 1, drops=True), "reference"),
        ("lora_embedding", HALVES, Size("", 8, 3, 5), "reference"),
        ("lora_embedding", HALVES, Size("", 9, 3, 5), "eager"),
    ],
)
def test_the_limits_on_a_cpu(
    op: str, slow: frozenset[torch.dtype], size: Size, expected: str, cpu: Says
) -> None:
    cpu(slow, True)
    assert asked(op, "cpu", torch.bfloat16, size) == expected


class OnGpu(Tensor):
    """What the dispatch sees of a tensor on a GPU, where there is none."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lora_fast.kernels import configs, plans

    made = decisions._tensors

    def on_gpu(op: str, device: str, *rest: Any) -> tuple[Tensor | None, ...]:
        if device == "cpu":
            return made(op, device, *rest)
        tensors = made(op, "meta", *rest)
        return tuple(None if t is None else t.as_subclass(OnGpu) for t in tensors)

    monkeypatch.setattr(decisions, "_tensors", on_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "Tensor", OnGpu)
    monkeypatch.setattr(backend, "_lacks_shared_memory", lambda device: False)
    monkeypatch.setattr(plans, "architecture", lambda device: configs.ARCHITECTURES["sm_90"])


SOONER = "torch launches sooner than so little is computed"


def test_a_gpu(gpu: None) -> None:
    found = [line for line in lora_fast.explain().splitlines() if " cuda  -> " in line]
    on_gpu = [line.replace("cuda  -> ", "") for line in found]
    assert [" ".join(line.split()) for line in on_gpu[:6]] == [
        "lora_linear triton up to 64 rows without gradients, M K N over 2^34, dropout of more "
        "than 2^21 numbers: plain CUDA tensors",
        "lora_linear eager_lora_first M K N up to 2^34, dropout of up to 2^21 numbers: " + SOONER,
        "lora_merged_linear triton plain CUDA tensors",
        "lora_embedding triton plain CUDA tensors",
        "merged_weight reference small weights: a small weight, torch is as fast",
        "merged_weight triton large weights: plain CUDA tensors",
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size("", 64, 9, 5), "triton"),
        (Size("", 65, 9, 5), "eager_lora_first"),
        (Size("", 2**12, 2**12, 2**10), "eager_lora_first"),
        (Size("", 2**12, 2**12, 2**10 + 1), "triton"),
        (Size("", 2**11, 2**10, 2**13, drops=True), "eager_lora_first"),
        (Size("", 2**11, 2**10, 2**13 + 1, drops=True), "triton"),
        (Size("", 2**11 + 1, 2**10, 1, drops=True), "triton"),
    ],
)
def test_the_limits_on_a_gpu(size: Size, expected: str, gpu: None) -> None:
    assert asked("lora_linear", "cuda", torch.bfloat16, size) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLED)
def test_every_call_on_a_gpu_runs_and_logs_what_it_is_said_to(
    op: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = {
        f"{op} -> {d.implementation}: {d.reason}"
        for d in decisions.what_runs()
        if d[:2] == (op, "cuda")
    }
    # But for the largest, whose results take gigabytes.
    calls = [c for c in decisions.representative_calls(op, "cuda") if c.size.M * c.size.N < 2**30]
    assert {logged(caplog, op, call) for call in calls} <= told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_forced_backend_is_told_in_a_line_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, said in (("triton", "none"), ("reference", "reference")):
        with lora_fast.use_backend(name):
            told = [d for d in decisions.what_runs() if d.op in CALLED]
        assert [(d.op, d.implementation, d.calls) for d in told] == [
            (op, said, "") for op in CALLED
        ]

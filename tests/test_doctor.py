"""`lora-fast doctor`: the report is whole, and an op that is wrong makes it fail."""

import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fast
from lora_fast import backend, decisions, doctor, eager, functional, ops, reference, selftest
from lora_fast.cli import main
from lora_fast.selftest import Outcome, outcomes

OPS = decisions.OPS
needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels cannot run: what is left takes no time."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["doctor"])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out


def sections(text: str) -> dict[str, list[str]]:
    """The lines under each title."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("  "):
            found[title].append(line.strip())
        else:
            title = line
            found[title] = []
    return found


@needs_kernels
def test_the_report_is_whole_and_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = report(capsys)
    assert status == 0, text
    assert text.splitlines()[-1] == "all well"
    found = sections(text)
    assert f"lora_fast {lora_fast.__version__}" in found["versions"]
    assert any(platform.python_version() in line for line in found["versions"])
    assert any(line.startswith(f"torch {torch.__version__}, CUDA") for line in found["versions"])
    assert any(line.startswith("triton ") for line in found["versions"])
    assert found["GPUs"]
    assert [line.partition(":")[0] for line in found["native ops"]] == ["cpu", "cuda"]
    assert found["what runs where"] == lora_fast.explain().splitlines()
    assert re.match("your tables (are|would be) in ", found["measured tables"][0])
    tested = found["self-test against the reference in float64"]
    assert {line.split()[0] for line in tested} == set(OPS)
    assert all(" ok, " in line or " skipped: " in line for line in tested)
    assert any(re.search(r"^lora_linear .* triton +ok, ", line) for line in tested)


@without_gpu
def test_without_a_gpu_or_interpreter_it_says_what_was_skipped(
    no_kernels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = report(capsys)
    found = sections(text)
    assert status == 0
    assert found["GPUs"][0] == "none that torch can use"
    assert "no GPU here, so no table is in force" in found["measured tables"]
    skipped = [line for line in text.splitlines() if "skipped: " in line]
    kernels = [op for op in OPS if backend.has_kernel(op)]
    assert [line.split()[:3] for line in skipped] == [[op, "cpu", "triton"] for op in kernels]
    assert all("the kernels need CUDA (or TRITON_INTERPRET=1)" in line for line in skipped)


def test_the_settings_are_those_of_the_process(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_FAST_CACHE", "elsewhere")
    monkeypatch.setenv("LORA_FAST_UNKNOWN", "1")
    monkeypatch.setattr(doctor.selftest, "outcomes", lambda: iter(()))
    with backend.use_backend("reference"):
        found = sections(report(capsys)[1])
    for line in ("LORA_FAST_CACHE=elsewhere", "LORA_FAST_UNKNOWN=1", "TRITON_INTERPRET=0"):
        assert line in found["settings"]
    precision = torch.backends.cuda.matmul.fp32_precision
    assert f"fp32 products on CUDA: {precision}" in found["settings"]
    assert found["what runs where"][0].startswith("backend: reference ")
    assert "your tables would be in elsewhere" in found["measured tables"]


def test_a_convolution_is_tested_with_its_weight(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functional.lora_conv
    monkeypatch.setattr(functional, "lora_conv", lambda **arguments: 1.02 * right(**arguments))
    status, text = report(capsys)
    assert status == 1
    failed = [line.split()[0] for line in text.splitlines() if "FAILED" in line]
    assert set(failed) == {"merged_weight"}


def test_it_does_not_tell_the_name_of_the_user(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LORA_FAST_CACHE", "/home/someone/tables")
    skipped = Outcome("op", "cpu", "", "triton", skipped="/home/someone/lib is missing")
    monkeypatch.setattr(doctor.selftest, "outcomes", lambda: iter([skipped]))
    _, text = report(capsys)
    assert "someone" not in text
    assert "your tables would be in ~/tables" in text
    assert "skipped: ~/lib is missing" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/tmp/t4/y: 3 rows", "~/y: 3 rows"),
        ("in /tmp/t4", "in ~"),
        ("/tmp/t4:/tmp/t4.", "~:~."),
        ("/tmp/t4x/y", "/tmp/t4x/y"),
        ("/tmp/t4-old /tmp/t4.old/y", "/tmp/t4-old /tmp/t4.old/y"),
    ],
)
def test_a_longer_name_is_no_home(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/tmp/t4")
    assert doctor._without_home(text) == told


def test_without_triton(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "_TRITON_FOUND", False)
    status, text = report(capsys)
    assert status == 0
    assert "triton is not installed" in sections(text)["measured tables"][0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_report_that_cannot_be_written_is_no_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["doctor"]) == 74
        monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora-fast doctor: the output cannot be written: ")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package", "numpy"))
    lines = list(doctor._versions())
    assert "no-such-package: not installed" in lines
    assert any(re.fullmatch(r"numpy \d.*", line) for line in lines)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 570.86.10; echo 570.86.10", "570.86.10"),
        ("exit 1", None),
        ("", None),
    ],
)
def test_the_driver_is_what_its_tool_says(
    script: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert doctor._driver() == expected


def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.02


def raising(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("an illegal memory access\nwas encountered")

    return broken


def failures(found: list[Outcome]) -> set[str]:
    return {outcome.op for outcome in found if outcome.problem is not None}


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("merge_", "unmerge_")])
def test_an_op_off_by_two_percent_fails(
    op: str, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, op, scaled(getattr(functional, op)))
    assert failures(list(outcomes())) == {op}


def test_a_failure_sets_the_status_and_is_told(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(functional, "lora_embedding", raising(functional.lora_embedding))
    status, text = report(capsys)
    assert status == 1
    lines = [line for line in text.splitlines() if "lora_embedding" in line and "FAILED" in line]
    told = [line for line in lines if line.split()[2] == "float32"]
    assert len(told) == len({decision.device for decision in decisions.what_runs()})
    assert all("FAILED: RuntimeError: an illegal memory access" in line for line in lines)
    assert re.fullmatch(r"\d failed", text.splitlines()[-1])


def test_a_wrong_gradient_fails(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = eager.low_rank_linear

    def wrong(x: Tensor, weight: Tensor, lora_A: Tensor, *rest: Any) -> Tensor:
        y = original(x, weight, lora_A, *rest)
        # Adds nothing to the values, and to the gradient of A a little.
        return y + (lora_A * 1e-2).sum() - (lora_A * 1e-2).sum().detach()

    monkeypatch.setattr(eager, "low_rank_linear", wrong)
    # Linear's few rows of 16 bits go there only for the sake of the native op.
    linear = {"lora_linear"} if ops.load_native("cpu") is None else set()
    assert failures(list(outcomes())) == {"lora_merged_linear"} | linear


def test_a_merge_that_is_wrong_fails(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.merge_

    def wrong(weight: Tensor, *rest: Any) -> Any:
        record = original(weight, *rest)
        weight[-1, -1] += 0.1
        return record

    monkeypatch.setattr(functional, "merge_", wrong)
    assert "merge_" in failures(list(outcomes()))


def test_an_unmerge_off_by_one_bit_fails(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.unmerge_

    def wrong(weight: Tensor, record: Any) -> None:
        original(weight, record)
        flat = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16).view(-1)
        flat[7] ^= 1

    monkeypatch.setattr(functional, "unmerge_", wrong)
    found = list(outcomes())
    assert failures(found) == {"unmerge_"}
    assert any("not restored bit for bit" in str(outcome) for outcome in found)


@needs_kernels
@pytest.mark.parametrize("index", [0, 3], ids=["dx", "dA"])
def test_a_wrong_kernel_fails_its_own_line_alone(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, original = ops.launcher, ops.KERNEL_OPS["lora_linear_bwd"]

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        grads = list(original(*args))
        grads[index] = grads[index] * 1.02
        return tuple(grads)

    monkeypatch.setattr(
        ops, "launcher", lambda op, x: wrong if op == "lora_linear_bwd" else find(op, x)
    )
    monkeypatch.setattr(decisions, "OPS", ("lora_linear",))
    found = [o for o in outcomes() if o.skipped is None]
    assert {(o.implementation, o.problem is not None) for o in found if o.device == "cpu"} <= {
        ("reference", False),
        ("eager", False),
        ("triton", True),
    }
    assert any(o.problem is not None for o in found)


def test_a_nan_is_a_failure_and_no_crash(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.lora_embedding
    monkeypatch.setattr(
        functional, "lora_embedding", lambda *a, **k: original(*a, **k) * float("nan")
    )
    found = list(outcomes())
    assert failures(found) == {"lora_embedding"}
    assert any("infinities or NaN are not where" in str(outcome) for outcome in found)


def test_a_forced_backend_is_what_is_tested(no_kernels: None) -> None:
    with backend.use_backend("reference"):
        found = list(outcomes())
    assert {o.implementation for o in found if o.skipped is None and o.device == "cpu"} == {
        "reference"
    }


@needs_kernels
def test_what_ran_once_is_not_run_again(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = decisions.Decision("lora_linear", kernel_device.type, "triton", "plain tensors")
    monkeypatch.setattr(decisions, "what_runs", lambda: [decision])
    monkeypatch.setattr(selftest, "_case_error", lambda *arguments: 0.5)
    found = [(outcome.dtype, outcome.used) for outcome in outcomes()]
    assert len(found) == len(set(found)) == len(decisions.DTYPES)


def test_every_implementation_that_is_told_of_ran(no_kernels: None) -> None:
    ran = {(o.op, o.device, o.implementation) for o in outcomes() if o.skipped is None}
    assert ran == {decision[:3] for decision in decisions.what_runs()}


def test_the_log_is_as_before(no_kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("lora_fast.dispatch")
    before = (log.level, log.propagate, list(log.handlers))
    list(outcomes())
    assert (log.level, log.propagate, list(log.handlers)) == before
    assert not caplog.records


def test_what_else_is_logged_is_passed_on(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that is ignored, for one, which the dispatch's logger warns of."""
    original, log = functional.lora_embedding, logging.getLogger("lora_fast.dispatch")

    def warning(**arguments: Any) -> Tensor:
        log.warning("%s is ignored", "a table")
        return original(**arguments)

    monkeypatch.setattr(functional, "lora_embedding", warning)
    assert failures(list(outcomes())) == set()
    assert "a table is ignored" in caplog.text


def test_plans_are_no_decisions(no_kernels: None) -> None:
    """Loggers below the dispatch's tell them, by which kernel's call and plan."""
    told: list[tuple[str, str]] = []
    with selftest.decisions_told(lambda *decision: told.append(decision)):
        logging.getLogger("lora_fast.dispatch.plan").debug("%s -> %s: %s", "call", "plan", "rule")
        backend.choose("merged_weight", *(torch.empty(2, 2) for _ in range(3)))
    assert [op for op, _ in told] == ["merged_weight"]


def test_every_op_has_a_case() -> None:
    for op in decisions.OPS:
        assert op in selftest._CASES or op in ("merge_", "unmerge_")
        assert op in dir(reference)

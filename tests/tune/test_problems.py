"""What a plan's results are compared with: every candidate passes, every mutant fails."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lora_fast.kernels import configs
from lora_fast.tune.problems import Job
from lora_fast.tune.shapes import Shape

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)
ARCH = configs.ARCHITECTURES["sm_90"]


def problem(
    device: torch.device, *, backward: bool, dropout: bool, dtype: torch.dtype = torch.float32
) -> Any:
    return Job(Shape(33, 24, 40, 4), dtype, dropout, backward, ARCH).prepare(device)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_candidate_of_a_small_call_is_right(
    backward: bool, dropout: bool, kernel_device: torch.device
) -> None:
    found = problem(kernel_device, backward=backward, dropout=dropout)
    found.check(found.job.rule)
    for step in found.job.steps:
        found.check(replace(found.job.rule, **step[0]))
        found.call(replace(found.job.rule, **step[-1]))()


def _off_by_two_percent(results: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    return (*results[:index], results[index] * 1.02, *results[index + 1 :])


def _last_row_missing(results: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    results[index][-1] = 0
    return results


@pytest.mark.parametrize("mutant", [_off_by_two_percent, _last_row_missing])
@pytest.mark.parametrize(
    ("op", "index", "name"),
    [("fwd", 0, "y"), ("fwd", 1, "S"), ("bwd", 0, "dx"), ("bwd", 3, "dA"), ("bwd", 4, "dB")],
)
def test_a_wrong_kernel_is_caught(
    op: str,
    index: int,
    name: str,
    mutant: Callable[..., Any],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = problem(kernel_device, backward=op == "bwd", dropout=False)
    module = f"lora_fast.kernels.lora_linear_{op}.lora_linear_{op}"
    original = getattr(__import__(module.rpartition(".")[0], fromlist=["x"]), f"lora_linear_{op}")
    monkeypatch.setattr(module, lambda *a, **k: mutant(original(*a, **k), index))
    with pytest.raises(AssertionError, match=f"^{name}: "):
        found.check(found.job.rule)


def test_another_dropout_mask_is_caught(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problem(kernel_device, backward=False, dropout=True)
    found.seed += 1
    with pytest.raises(AssertionError, match="dropout mask"):
        found.check(found.job.rule)

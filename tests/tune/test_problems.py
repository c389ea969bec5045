"""What a plan's results are compared with: every candidate passes, every mutant fails."""

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lora_fast.kernels import candidates, configs
from lora_fast.tune import embedding, search
from lora_fast.tune.problems import Job
from lora_fast.tune.shapes import Shape, of_convolution

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)
ARCH = configs.ARCHITECTURES["sm_90"]


SHAPES = {
    "lora_linear": Shape(33, 24, 40, 4),
    "lora_embedding": Shape(70, 24, 40, 4, "embedding"),
    "merged_weight": of_convolution(2, 8, 12, 3, 2),
}
CALLS = [
    *((op, dropout) for op in ("lora_linear_fwd", "lora_linear_bwd") for dropout in (False, True)),
    *((op, False) for op in ("lora_embedding_fwd", "lora_embedding_bwd", "merged_weight")),
]


def problem(
    device: torch.device, op: str, *, dropout: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    shape = SHAPES[op.removesuffix("_fwd").removesuffix("_bwd")]
    return Job(op, shape, dtype, dropout, ARCH).prepare(device)


@pytest.mark.parametrize(("op", "dropout"), CALLS)
def test_every_candidate_of_a_small_call_is_right(
    op: str, dropout: bool, kernel_device: torch.device
) -> None:
    found = problem(kernel_device, op, dropout=dropout)
    found.check(found.job.rule)
    for step in found.job.steps:
        found.check(replace(found.job.rule, **step[0]))
        found.call(replace(found.job.rule, **step[-1]))()


@pytest.mark.parametrize("op", ["lora_embedding_fwd", "lora_embedding_bwd", "merged_weight"])
def test_sixteen_bits_are_right_too(op: str, kernel_device: torch.device) -> None:
    found = problem(kernel_device, op, dtype=torch.float16)
    for step in found.job.steps:
        for change in step:
            found.check(replace(found.job.rule, **change))


def test_every_operator_with_a_table_has_problems() -> None:
    from lora_fast.kernels import plans
    from lora_fast.tune import embedding, linear, weight

    assert {*linear.PROBLEMS, *embedding.PROBLEMS, *weight.PROBLEMS} == set(plans.OPS)
    assert {op for op, _ in CALLS} == set(plans.OPS)


def test_tokens_come_as_often_as_words_do(kernel_device: torch.device) -> None:
    """The most frequent one makes a long run, and most of the others are rare."""
    shape = Shape(8192, 50257, 16, 2, "embedding")
    job = Job("lora_embedding_bwd", shape, torch.float32, False, ARCH)
    index = job.prepare(kernel_device).index
    assert (int(index.min()), int(index.max()) < 50257) == (0, True)
    counts = index.bincount()
    assert 0.04 < int(counts[0]) / 8192 < 0.09  # log(2) / log(50258) is 0.064
    assert int((counts == 1).sum()) > 1000


def _off_by_two_percent(results: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    return (*results[:index], results[index] * 1.02, *results[index + 1 :])


def _last_row_missing(results: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    results[index][-1] = 0
    return results


@pytest.mark.parametrize("mutant", [_off_by_two_percent, _last_row_missing])
@pytest.mark.parametrize(
    ("op", "index", "name"),
    [
        *(("lora_linear_fwd", 0, "y"), ("lora_linear_fwd", 1, "S")),
        *(("lora_linear_bwd", 0, "dx"), ("lora_linear_bwd", 3, "dA"), ("lora_linear_bwd", 4, "dB")),
        *(("lora_embedding_fwd", None, "y"), ("merged_weight", None, "W")),
        *(("lora_embedding_bwd", 0, "dA"), ("lora_embedding_bwd", 1, "dB")),
    ],
)
def test_a_wrong_kernel_is_caught(
    op: str,
    index: int | None,
    name: str,
    mutant: Callable[..., Any],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = problem(kernel_device, op)
    module = importlib.import_module(f"lora_fast.kernels.{op}")
    original = getattr(module, op)

    def broken(*args: Any, **options: Any) -> Any:
        results = original(*args, **options)
        return mutant((results,), 0)[0] if index is None else mutant(results, index)

    monkeypatch.setattr(module, op, broken)
    plan = found.job.rule
    with pytest.raises(AssertionError, match=f"^{name}: "):
        found.check(replace(plan, fused=True) if op == "merged_weight" else plan)


def test_another_dropout_mask_is_caught(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problem(kernel_device, "lora_linear_fwd", dropout=True)
    found.seed += 1
    with pytest.raises(AssertionError, match="dropout mask"):
        found.check(found.job.rule)


def test_a_wrong_candidate_is_dropped_and_the_next_one_wins(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search by a clock that likes the wrong tile best."""
    from lora_fast.kernels import lora_embedding_fwd as module

    job = Job("lora_embedding_fwd", SHAPES["lora_embedding"], torch.float32, False, ARCH)
    original = module.lora_embedding_fwd

    def broken(*args: Any, config: Any, **options: Any) -> Tensor:
        y = original(*args, config=config, **options)
        return y * 1.02 if config.block_m == 32 else y

    class Clock:
        def once(self, call: Callable[[], object]) -> float:
            return float(call())  # type: ignore[arg-type]

        def now(self) -> float:
            return 0.0

    tile = job.rule
    wrong, right = {"block_m": 32}, {"block_m": 16, "chunk_d": 2 * tile.chunk_d}
    times = {tile: 9.0, replace(tile, **wrong): 1.0, replace(tile, **right): 8.0}
    steps = {"lora_embedding_fwd": lambda arch, call, rule: [[wrong, right]]}
    monkeypatch.setattr(candidates, "_STEPS", steps)
    monkeypatch.setattr(module, "lora_embedding_fwd", broken)
    monkeypatch.setattr(embedding._Forward, "call", lambda self, plan: lambda: times[plan])
    found = search.Found()
    search.search([job], kernel_device, Clock(), 1.0, found, lambda job: None)
    (row,) = found.rows
    assert (row.call.op, row.plan, row.us) == (
        "lora_embedding_fwd",
        asdict(replace(tile, **right)),
        8.0,
    )
    (line,) = found.dropped
    assert "'block_m': 32" in line and "AssertionError: y: " in line

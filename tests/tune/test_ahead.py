"""Compiling ahead: every plan that will be measured runs once, in other processes."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels.configs import architecture
from lora_fast.tune import ahead
from lora_fast.tune.problems import Job
from lora_fast.tune.shapes import Shape


def job(
    op: str = "lora_linear_fwd", shape: tuple[int, ...] = (64, 64, 64, 4), **options: Any
) -> Job:
    settings = {"dtype": torch.float32, "dropout": False} | options
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Job(op, Shape(*shape), arch=architecture(device), **settings)


def test_one_call_stands_for_those_of_other_sizes() -> None:
    first = job()
    others = [
        job(dropout=True),
        job("lora_linear_bwd"),
        job(dtype=torch.float16),
        job(shape=(65, 64, 64, 4)),
        job(shape=(64, 64, 64, 8)),
    ]
    same = [job(shape=(64, 128, 64, 4)), job(shape=(33, 64, 32, 4))]
    assert list(ahead._representatives([first, *same, *others])) == [first, *others]


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd", "lora_embedding_fwd"])
def test_every_plan_is_in_one_portion(op: str) -> None:
    one = job(op)
    portions = list(ahead._portions(one))
    assert all(0 < len(changes) <= 4 for changes in portions)
    together = [change for changes in portions for change in changes]
    assert together == [change for step in one.steps for change in step]


class Noting:
    """A problem that notes the plans and fails for one."""

    def __init__(self) -> None:
        self.plans: list[Any] = []
        self.device = torch.device("cpu")

    def run(self, plan: Any) -> None:
        self.plans.append(plan)
        if plan.impl == "one_pass":
            raise RuntimeError("out of shared memory")


def test_what_fails_keeps_no_other_from_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    noting = Noting()
    monkeypatch.setattr(Job, "prepare", lambda self, device: noting)
    changes = [{"impl": impl} for impl in ("split", "one_pass", "library")]
    assert ahead._run_each(job(), changes, "cpu") == 2
    assert [plan.impl for plan in noting.plans] == ["split", "one_pass", "library"]


def test_a_tile_of_a_later_step_is_compiled_for_each_way_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noting = Noting()
    monkeypatch.setattr(Job, "prepare", lambda self, device: noting)
    one = job()
    assert ahead._run_each(one, one.steps[1][:1], "cpu") == 2
    assert [plan.impl for plan in noting.plans] == ["split", "lora_first"]
    backward = job("lora_linear_bwd").steps[2][0]
    assert [way["input_grad"] for way in ahead._ways(backward)] == ["fused", "lora_first"]


def test_a_call_that_cannot_be_made_is_left_to_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(self: Job, device: torch.device) -> None:
        raise MemoryError

    monkeypatch.setattr(Job, "prepare", prepare)
    assert ahead._run_each(job(), [{"impl": "split"}], "cpu") == 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="by the interpreter, which is inherited")
def test_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_portions", lambda job: [job.steps[0][:1], job.steps[0][1:2]])
    assert os.environ["TRITON_INTERPRET"] == "1"
    jobs = [job(), job(shape=(64, 64, 128, 4))]
    assert ahead.compile_ahead(jobs, torch.device("cpu"), workers=2) == 2


def test_how_many_processes() -> None:
    assert 1 <= ahead.processes() <= 16

"""A call to be tuned: its inputs, a way to run it by any plan, and what its results must be."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_fast.testing import assert_within_budget
from lora_fast.tune.shapes import Shape

SCALING = 0.5
# The large results are compared on so many rows, first and last among them.
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Job:
    """One kind of call, as far as it is known before there are tensors.

    Attributes:
        op: the operator of `lora_fast.ops`.
        shape: the sizes, for a layer that the operator serves.
        dtype: of all its tensors.
        dropout: whether it drops; only `lora_linear_fwd` and `lora_linear_bwd` can.
        arch: the `Architecture` of `lora_fast.kernels.configs`.
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    dropout: bool
    arch: Any

    @cached_property
    def call(self) -> Any:
        """The `Call` of `lora_fast.kernels.tables`."""
        from lora_fast.kernels.tables import Call

        shape = self.shape
        return Call.of(self.op, shape.M, shape.N, shape.K, shape.R, self.dtype, self.dropout)

    @cached_property
    def rule(self) -> Any:
        """The plan that serves the call where nothing was measured."""
        from lora_fast.kernels import plans

        return plans.rule_for(self.arch, self.call)

    @cached_property
    def steps(self) -> list[list[dict[str, Any]]]:
        """What is measured; see `lora_fast.kernels.candidates`."""
        from lora_fast.kernels.candidates import candidates

        return candidates(self.arch, self.call, self.rule)

    def prepare(self, device: torch.device) -> "Problem":
        """Return the call with tensors."""
        from lora_fast.tune import embedding, linear, weight  # made of what is in this file

        problems = linear.PROBLEMS | embedding.PROBLEMS | weight.PROBLEMS
        return problems[self.op](self, device)


class Problem:
    """A call with tensors."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.made = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        """Return normal random numbers in the dtype of the call."""
        drawn = torch.empty(size, device=self.device, dtype=self.job.dtype)
        return drawn.normal_(std=std, generator=self.made)

    def some_of(self, rows: int) -> Tensor:
        """Return the numbers of the rows, of so many, that are compared."""
        return torch.linspace(0, rows - 1, min(rows, _CHECKED_ROWS), device=self.device).long()

    def run(self, plan: Any) -> Any:
        """Run the call by a plan."""
        raise NotImplementedError

    def call(self, plan: Any) -> Callable[[], object]:
        """Return the call that is timed."""
        return lambda: self.run(plan)

    def results(self, plan: Any) -> dict[str, Tensor]:
        """Run the call by a plan; return what is compared."""
        raise NotImplementedError

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what `results` must be, by plain torch in a dtype."""
        raise NotImplementedError

    @cached_property
    def expected(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What the results must be, in the dtype of the call and in float64."""
        eager, oracle = self.formulas(self.job.dtype), self.formulas(torch.float64)
        return {name: (eager[name], oracle[name]) for name in eager}

    def check(self, plan: Any) -> None:
        """Compare the results of a plan with the reference.

        Raises:
            AssertionError: a result is off by more than `lora_fast.testing` allows.
        """
        found = self.results(plan)
        for name, (eager, oracle) in self.expected.items():
            assert_within_budget(found[name], eager, oracle, what=name)

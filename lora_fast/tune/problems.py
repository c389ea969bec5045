"""A call to be tuned: its inputs, a way to run it by any plan, and what its results must be."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.testing import assert_within_budget
from lora_fast.tune.shapes import Shape

DROPOUT_P = 0.1
SCALING = 0.5
# The large results are compared on so many rows, first and last among them.
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Job:
    """One kind of call, as far as it is known before there are tensors."""

    shape: Shape
    dtype: torch.dtype
    dropout: bool
    backward: bool
    arch: Any

    @cached_property
    def call(self) -> Any:
        """The `Call` of `lora_fast.kernels.tables`."""
        from lora_fast.kernels.tables import Call

        op = "lora_linear_bwd" if self.backward else "lora_linear_fwd"
        m, k, n, r = self.shape
        return Call.of(op, m, n, k, r, self.dtype, self.dropout)

    @cached_property
    def rule(self) -> Any:
        """The plan that serves the call where nothing was measured."""
        from lora_fast.kernels import plans

        m, k, n, r = self.shape
        if self.backward:
            return plans.backward_rule(self.arch, m, n, k, r, self.dtype)
        return plans.forward_rule(self.arch, m, n, k, r, self.dtype, self.dropout)

    @cached_property
    def steps(self) -> list[list[dict[str, Any]]]:
        """What is measured; see `lora_fast.kernels.candidates`."""
        from lora_fast.kernels.candidates import candidates

        return candidates(self.arch, self.call, self.rule)

    def prepare(self, device: torch.device) -> "Problem":
        """Return the call with tensors."""
        return (_Backward if self.backward else _Forward)(self, device)


class Problem:
    """A call with tensors. Its rule's forward has run: the same mask and S serve every plan."""

    def __init__(self, job: Job, device: torch.device) -> None:
        from lora_fast.kernels import plans

        self.job = job
        m, k, n, r = job.shape
        made = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            drawn = torch.empty(size, device=device, dtype=job.dtype)
            return drawn.normal_(std=std, generator=made)

        self.x, self.dy = normal(m, k), normal(m, n)
        self.weight = normal(n, k, std=k**-0.5)
        self.lora_a, self.lora_b = normal(r, k, std=k**-0.5), normal(n, r, std=r**-0.5)
        self.p = DROPOUT_P if job.dropout else 0.0
        self.seed = torch.tensor([1], device=device) if job.dropout else None
        self.rows = torch.linspace(0, m - 1, min(m, _CHECKED_ROWS), device=device).long()
        rule = plans.forward_rule(job.arch, m, n, k, r, job.dtype, job.dropout)
        _, self.s, self.mask = self.forward(rule)

    def forward(self, plan: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the forward by a plan: y, S and the mask."""
        from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd

        operands = (self.x, self.weight, None, self.lora_a, self.lora_b)
        y, s, mask = lora_linear_fwd(*operands, SCALING, self.p, self.seed, plan=plan)
        return y, s, mask

    @cached_property
    def keep(self) -> Tensor | None:
        """The mask, (M, K), 0 or the scale of what is kept."""
        from lora_fast.kernels.dropout import keep_scale, unpack_mask

        if self.seed is None:
            return None
        return unpack_mask(self.mask, self.x.shape[1]).to(self.job.dtype) * keep_scale(self.p)

    def call(self, plan: Any) -> Callable[[], object]:
        """Return the call that is timed."""
        raise NotImplementedError

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

    def dropped(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        """Return some rows' values times the mask."""
        return x if self.keep is None else x * self.keep[rows].to(x.dtype)


class _Forward(Problem):
    def call(self, plan: Any) -> Callable[[], object]:
        return lambda: self.forward(plan)

    def results(self, plan: Any) -> dict[str, Tensor]:
        y, s, mask = self.forward(plan)
        if not torch.equal(mask, self.mask):
            raise AssertionError("the dropout mask is not the one that the seed stands for")
        return {"y": y[self.rows], "S": s}

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, a = self.x.to(dtype), self.lora_a.to(dtype)
        s = self.dropped(x, slice(None)) @ a.t() * SCALING
        update = s[self.rows] @ self.lora_b.to(dtype).t()
        return {"y": F.linear(x[self.rows], self.weight.to(dtype)) + update, "S": s}


class _Backward(Problem):
    # What fine-tuning asks for: the gradients of x, A and B.
    NEEDS = (True, False, False, True, True)

    def run(self, plan: Any) -> tuple[Tensor, ...]:
        from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd

        mask = None if self.seed is None else self.mask
        operands = (self.dy, self.x, self.weight, self.lora_a, self.lora_b, self.s, mask)
        options = (SCALING, self.p, list(self.NEEDS), self.job.dtype)
        grads: tuple[Tensor, ...] = lora_linear_bwd(*operands, *options, plan=plan)
        return grads

    def call(self, plan: Any) -> Callable[[], object]:
        return lambda: self.run(plan)

    def results(self, plan: Any) -> dict[str, Tensor]:
        dx, _, _, da, db = self.run(plan)
        return {"dx": dx[self.rows], "dA": da, "dB": db}

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        dy, x, a = self.dy.to(dtype), self.x.to(dtype), self.lora_a.to(dtype)
        ds = dy @ self.lora_b.to(dtype) * SCALING
        update = self.dropped(ds[self.rows] @ a, self.rows)
        return {
            "dx": dy[self.rows] @ self.weight.to(dtype) + update,
            "dA": ds.t() @ self.dropped(x, slice(None)),
            "dB": dy.t() @ self.s.to(dtype),
        }

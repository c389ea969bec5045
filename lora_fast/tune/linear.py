"""Calls of the linear layer to be tuned."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.tune.problems import SCALING, Job, Problem

DROPOUT_P = 0.1


class _Linear(Problem):
    """A call of the layer. Its rule's forward has run: the same mask and S serve every plan."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        from lora_fast.kernels import plans

        m, k, n, r, _ = job.shape
        self.x, self.dy = self.normal(m, k), self.normal(m, n)
        self.weight = self.normal(n, k, std=k**-0.5)
        self.lora_a, self.lora_b = self.normal(r, k, std=k**-0.5), self.normal(n, r, std=r**-0.5)
        self.p = DROPOUT_P if job.dropout else 0.0
        self.seed = torch.tensor([1], device=device) if job.dropout else None
        self.rows = self.some_of(m)
        rule = plans.rule_for(job.arch, job.call._replace(op="lora_linear_fwd"))
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

    def dropped(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        """Return some rows' values times the mask."""
        return x if self.keep is None else x * self.keep[rows].to(x.dtype)


class _Forward(_Linear):
    """`lora_linear_fwd`."""

    def run(self, plan: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.forward(plan)

    def results(self, plan: Any) -> dict[str, Tensor]:
        y, s, mask = self.run(plan)
        if not torch.equal(mask, self.mask):
            raise AssertionError("the dropout mask is not the one that the seed stands for")
        return {"y": y[self.rows], "S": s}

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, a = self.x.to(dtype), self.lora_a.to(dtype)
        s = self.dropped(x, slice(None)) @ a.t() * SCALING
        update = s[self.rows] @ self.lora_b.to(dtype).t()
        return {"y": F.linear(x[self.rows], self.weight.to(dtype)) + update, "S": s}


class _Backward(_Linear):
    """`lora_linear_bwd`, with what fine-tuning asks for: the gradients of x, A and B."""

    NEEDS = (True, False, False, True, True)

    def run(self, plan: Any) -> tuple[Tensor, ...]:
        from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd

        mask = None if self.seed is None else self.mask
        operands = (self.dy, self.x, self.weight, self.lora_a, self.lora_b, self.s, mask)
        options = (SCALING, self.p, list(self.NEEDS), self.job.dtype)
        grads: tuple[Tensor, ...] = lora_linear_bwd(*operands, *options, plan=plan)
        return grads

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


PROBLEMS: dict[str, type[Problem]] = {"lora_linear_fwd": _Forward, "lora_linear_bwd": _Backward}

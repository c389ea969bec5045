"""Calls of the embedding to be tuned."""

import math
from typing import Any

import torch
from torch import Tensor

from lora_fast.tune.problems import SCALING, Job, Problem


class _Embedding(Problem):
    """M tokens looked up in a table of K rows and N columns.

    The tokens are as frequent as words in a text (Zipf's law, exponent 1): how long the runs of
    equal ones are decides what the scatter of the backward takes.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        m, k, n, r, _ = job.shape
        drawn = torch.rand(m, device=device, generator=self.made, dtype=torch.float64)
        self.index = (drawn * math.log(k + 1)).exp().long().clamp(1, k) - 1
        self.lora_a, self.lora_b = self.normal(r, k), self.normal(n, r, std=r**-0.5)


class _Forward(_Embedding):
    """`lora_embedding_fwd`."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        self.weight = self.normal(job.shape.K, job.shape.N)
        self.rows = self.some_of(job.shape.M)

    def run(self, plan: Any) -> Tensor:
        from lora_fast.kernels.lora_embedding_fwd import lora_embedding_fwd

        factors = (self.lora_a, self.lora_b, SCALING)
        y: Tensor = lora_embedding_fwd(self.index, self.weight, *factors, config=plan)
        return y

    def results(self, plan: Any) -> dict[str, Tensor]:
        return {"y": self.run(plan)[self.rows]}

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        index = self.index[self.rows]
        s = self.lora_a.t()[index].to(dtype) * SCALING
        return {"y": self.weight[index].to(dtype) + s @ self.lora_b.to(dtype).t()}


class _Backward(_Embedding):
    """`lora_embedding_bwd`: the gradients of A and B."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        self.dy = self.normal(job.shape.M, job.shape.N)

    def run(self, plan: Any) -> tuple[Tensor, ...]:
        from lora_fast.kernels.lora_embedding_bwd import lora_embedding_bwd

        factors = (self.lora_a, self.lora_b, SCALING)
        options = (None, False, True, [True, True])  # no padding, not by frequency, dA whole
        grads: tuple[Tensor, ...] = lora_embedding_bwd(
            *(self.dy, self.index, *factors, *options), plan=plan
        )
        return grads

    def results(self, plan: Any) -> dict[str, Tensor]:
        da, db = self.run(plan)
        return {"dA": da, "dB": db}

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        dy, a = self.dy.to(dtype), self.lora_a.to(dtype)
        ds = dy @ self.lora_b.to(dtype) * SCALING
        # A sum in 16 bits, of a frequent token, would be off by more than any mistake.
        da = torch.zeros(a.shape, device=a.device, dtype=torch.promote_types(dtype, torch.float32))
        da.index_add_(1, self.index, ds.t().to(da.dtype))
        return {"dA": da.to(dtype), "dB": dy.t() @ (a.t()[self.index] * SCALING)}


PROBLEMS: dict[str, type[Problem]] = {
    "lora_embedding_fwd": _Forward,
    "lora_embedding_bwd": _Backward,
}

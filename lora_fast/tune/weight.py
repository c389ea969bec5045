"""The merged weight of a convolution to be tuned."""

from typing import Any

import torch
from torch import Tensor

from lora_fast import reference
from lora_fast.tune.problems import SCALING, Job, Problem


class _MergedWeight(Problem):
    """`merged_weight` of N K elements, contiguous and all of one dtype: what torch serves best."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        _, k, n, r, _ = job.shape
        self.weight = self.normal(n, k, std=k**-0.5)
        self.lora_a, self.lora_b = self.normal(r, k, std=k**-0.5), self.normal(n, r, std=r**-0.5)
        self.rows = self.some_of(n)

    def run(self, plan: Any) -> Tensor:
        from lora_fast.kernels.merged_weight import merged_weight

        operands = (self.weight, self.lora_a, self.lora_b, SCALING)
        if not plan.fused:
            return reference.merged_weight(*operands)
        merged: Tensor = merged_weight(*operands, config=plan.config)
        return merged

    def results(self, plan: Any) -> dict[str, Tensor]:
        return {"W": self.run(plan)[self.rows]}

    def formulas(self, dtype: torch.dtype) -> dict[str, Tensor]:
        weight, b = self.weight[self.rows].to(dtype), self.lora_b[self.rows].to(dtype)
        return {"W": weight + b * SCALING @ self.lora_a.to(dtype)}


PROBLEMS: dict[str, type[Problem]] = {"merged_weight": _MergedWeight}

"""Inputs for the kernels, and what plain torch makes of them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for hopper_model.py, made_tables.py


@dataclass
class Inputs:
    """The arguments of one call, in the dtype under test, and as float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    scaling: float = 0.75
    edges: list[int] | None = None

    def wide(self) -> "Inputs":
        """The same in float64."""
        parts = {k: v.double() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Inputs(**parts)

    def forward(self, keep: Tensor | None = None) -> Tensor:
        """Plain torch; `keep` is the scaled dropout mask (M, K)."""
        x = self.x if keep is None else self.x * keep.to(self.x.dtype)
        y = torch.nn.functional.linear(self.x, self.weight, self.bias)
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        if self.edges is None:
            return y + (x @ a.t() @ b.t()) * self.scaling
        blocks = list(zip(self.edges[::2], self.edges[1::2], strict=True))
        rows, columns = b.split([end - first for first, end in blocks]), y.shape[-1]
        for (first, end), a_g, b_g in zip(blocks, a.split(b.shape[1]), rows, strict=True):
            update = (x @ a_g.t() @ b_g.t()) * self.scaling
            y = y + torch.nn.functional.pad(update, (first, columns - end))
        return y

    def gradients(self, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Autograd's gradients of all arguments."""
        names = [
            n for n in ("x", "weight", "bias", "lora_a", "lora_b") if vars(self)[n] is not None
        ]
        leaves = {n: vars(self)[n].detach().requires_grad_() for n in names}
        y = Inputs(**{**vars(self), **leaves}).forward(keep)
        found = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return dict(zip(names, found, strict=True))


@pytest.fixture
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty folders in place of the user's and the package's own tables of measured choices."""
    from lora_fast.kernels import plans, tables

    monkeypatch.setenv("LORA_FAST_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    plans.reload_tables()
    yield
    plans.reload_tables()


@pytest.fixture
def make_inputs(kernel_device: torch.device) -> Any:
    """Make the arguments for M rows, N and K features and rank R, of each block between edges."""

    def make(
        m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.float32, *,
        bias: bool = True, adapter_dtype: torch.dtype | None = None,
        edges: list[int] | None = None,
    ) -> Inputs:  # fmt: skip
        def random(*shape: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, device=kernel_device) * scale).to(dtype)

        adapter = adapter_dtype or dtype
        groups = 1 if edges is None else len(edges) // 2
        adapted = n if edges is None else sum(edges[1::2]) - sum(edges[::2])
        return Inputs(
            x=random(m, k, scale=1.0),
            weight=random(n, k, scale=k**-0.5),
            bias=random(n, scale=1.0) if bias else None,
            lora_a=random(groups * r, k, scale=k**-0.5, dtype=adapter),
            lora_b=random(adapted, r, scale=r**-0.5, dtype=adapter),
            dy=random(m, n, scale=1.0),
            edges=edges,
        )

    return make

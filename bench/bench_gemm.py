"""The products behind the choice of a forward: two questions that only a GPU can answer.

`addmm_` with beta = 1 against `mm`: is the read of C hidden? Triton's GEMM against the vendor's,
on Hopper also the one in Gluon whose warps divide fetching and multiplying.
The third, loralib against the byte model, is answered by `model_table.py FOLDER`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from harness.contest import Absent, Contestant, Lab, Row
from harness.selection import Selection
from harness.shapes import TOY, Shape, dtype_name, find_shapes
from peers.implementations import fused_gemm

MM, ADDMM, TRITON, SPECIALISED = "mm", "addmm_", "triton", "specialised"


@dataclass(frozen=True)
class GemmRow(Row):
    """One line: x (M, K) times a weight (N, K) in bf16."""

    table: ClassVar[str] = "gemm"

    shape: Shape
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def id(self) -> str:
        """The name of the row."""
        return f"{self.shape.name}-M{self.tokens}"

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        return {
            "layer": "product",
            "shape": self.shape.name,
            "M": self.tokens,
            "K": self.shape.K,
            "N": self.shape.N,
            "dtype": dtype_name(self.dtype),
        }

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a product on as many copies of the data as the caches cannot hold."""
        K, N, M = self.shape.K, self.shape.N, self.tokens
        torch.manual_seed(0)
        moved = (N * K + M * (K + N)) * self.dtype.itemsize
        steps = []
        for _ in range(lab.clock.copies(moved)):
            x, weight, y = (
                torch.randn(shape, device=lab.device).to(self.dtype)
                for shape in ((M, K), (N, K), (M, N))
            )
            if peer == MM:
                steps.append(partial(torch.mm, x, weight.t()))
            elif peer == ADDMM:
                steps.append(partial(y.addmm_, x, weight.t()))
            else:
                step = fused_gemm(x, weight, specialised=peer == SPECIALISED)
                if step is None:
                    raise Absent("this chip has no kernel whose warps divide the work")
                steps.append(step)
        return Contestant(steps)


def peers(row: Row) -> list[str]:
    """Return who can take part in a row."""
    return [MM, ADDMM, TRITON, SPECIALISED]


def rows(selection: Selection) -> Iterator[GemmRow]:
    """Yield the rows of a selection; a CPU has no such question."""
    if selection.level == "toy":
        yield GemmRow(TOY, 9, torch.float32)
    elif selection.on_gpu:
        names = ["llama-3-8b.qo", "llama-3-8b.gate_up", "llama-3-70b.q", "gpt2-medium.attn_proj"]
        for shape in selection.shapes or find_shapes(names):
            for tokens in selection.tokens or (8192,):
                yield GemmRow(shape, tokens)


def test_gemm(measured: Any) -> None:
    """One product in one row."""
    measured.check()

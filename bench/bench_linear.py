"""`lora.Linear` against every peer: forward, and forward with backward.

Peers are listed in `peers/roster.py`, shapes in `harness/shapes.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.contest import Lab
from harness.floor import extra_seconds
from harness.selection import Selection, at_most
from harness.shapes import RANKS, TOKENS, TOY, Shape, find_shapes
from peers.adapter_row import AdapterRow
from peers.modules import Weights, drawn
from peers.roster import known


@dataclass(frozen=True)
class LinearRow(AdapterRow):
    """One line."""

    table: ClassVar[str] = "linear"
    kind: ClassVar[str] = "Linear"

    shape: Shape
    tokens: int
    r: int
    p: float
    dtype: torch.dtype
    backward: bool
    graph: bool = False

    @property
    def name(self) -> str:
        """What the row's name begins with."""
        return self.shape.name

    def sizes(self) -> dict[str, Any]:
        """Return the columns that tell the layer's size."""
        return {"shape": self.shape.name, "K": self.shape.K, "N": self.shape.N}

    def weights(self, lab: Lab) -> Weights:
        """Return the weights that all peers share."""
        size, bias = (self.shape.N, self.shape.K), self.shape.bias
        return drawn("Linear", size, self.r, bias=bias, p=self.p, **self.made(lab))

    def inputs(self, lab: Lab, copy: int = 0) -> tuple[Tensor, Tensor]:
        """Return x (M, K), which gets a gradient if there is a backward pass, and dy (M, N)."""
        made = self.made(lab, 1 + copy)
        x, dy = (torch.randn(self.tokens, n, **made) for n in (self.shape.K, self.shape.N))
        return x.requires_grad_(self.backward), dy

    def compiled_among_few(self, lab: Lab) -> bool:
        """Tell whether this is one of the few rows compiled where that takes longer than others."""
        name, tokens = ("llama-3-8b.qo", 8192) if lab.clock.is_cuda else ("square-1024", 512)
        return (self.shape.name, self.tokens, self.r, self.graph) == (name, tokens, 16, False)

    def extra_seconds(self, lab: Lab) -> float | None:
        """Return what a fused adapter must cost beside the frozen layer."""
        return extra_seconds(
            "fused",
            *(self.tokens, self.shape.K, self.shape.N, self.r),
            lab.ceilings(self.dtype),
            backward=self.backward,
            dropout=self.p > 0,
            size=self.dtype.itemsize,
        )


def peers(row: LinearRow) -> list[str]:
    """Return who can take part in a row."""
    return known(row.kind, backward=row.backward)


def rows(selection: Selection) -> Iterator[LinearRow]:
    """Yield the rows of a selection.

    Without `full` it is a star: all shapes and numbers of rows at rank 16 in bf16, then ranks,
    dtypes and CUDA graphs where they matter.
    """
    seen = set()
    make = {"toy": _toy, "quick": _quick, "standard": _standard, "full": _full}[selection.level]
    for row in make(selection):
        if row not in seen and selection.wants(tokens=row.tokens, r=row.r, dtype=row.dtype):
            seen.add(row)
            yield row


def _toy(selection: Selection) -> Iterator[LinearRow]:
    for p, backward in ((0.0, False), (0.0, True), (0.1, True)):
        yield LinearRow(TOY, 9, 4, p, torch.float32, backward)
    if selection.on_gpu:
        yield LinearRow(TOY, 9, 4, 0.0, torch.bfloat16, True, graph=True)


def _quick(selection: Selection) -> Iterator[LinearRow]:
    if not selection.on_gpu:
        shapes = selection.shapes or find_shapes(["square-1024"])
        for shape in shapes:
            for tokens in selection.tokens or (16, 512):
                for p in (0.0, 0.1):
                    for r in selection.ranks or (16,):
                        yield LinearRow(shape, tokens, r, p, torch.float32, True)
        return
    names = ("llama-3-8b.qo", "llama-3-8b.gate_up", "llama-3-70b.q", "gpt2-medium.attn_proj")
    for shape in selection.shapes or find_shapes(names):
        for r in selection.ranks or (16,):
            for tokens in selection.tokens or (8192,):
                for p in (0.0, 0.1):
                    for backward in (False, True):
                        yield LinearRow(shape, tokens, r, p, torch.bfloat16, backward)
    for shape in selection.shapes or find_shapes(names[:1]):
        for tokens in (1, 16):
            for r in (16, 64):
                yield LinearRow(shape, tokens, r, 0.0, torch.bfloat16, False, graph=True)


def _standard(selection: Selection) -> Iterator[LinearRow]:
    if not selection.on_gpu:
        yield from _standard_cpu(selection)
        return
    bf16 = torch.bfloat16
    models = ("gpt2-medium", "roberta-large", "llama-3-8b", "llama-3-70b")
    shapes = selection.shapes or find_shapes(models)
    few = selection.shapes or find_shapes(["llama-3-8b.qo", "gpt2-medium.attn_proj"])
    for r in selection.ranks or (16,):
        for shape in shapes:
            for tokens in selection.tokens or TOKENS:
                for backward in (False, True):
                    for p in (0.0, 0.1):
                        yield LinearRow(shape, tokens, r, p, bf16, backward)
                    if tokens <= 512:
                        yield LinearRow(shape, tokens, r, 0.0, bf16, backward, graph=True)
    for shape in few:
        for r in selection.ranks or RANKS:
            for tokens in selection.tokens or (16, 8192):
                for p in (0.0, 0.1):
                    yield LinearRow(shape, tokens, r, p, bf16, True)
        for dtype in (torch.float16, torch.float32):
            for backward in (False, True):
                yield LinearRow(shape, 8192, 16, 0.0, dtype, backward)


def _standard_cpu(selection: Selection) -> Iterator[LinearRow]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in selection.shapes or find_shapes(["square-768", "square-1024"]):
            for tokens in selection.tokens or (1, 16, at_most(512, dtype)):
                for r in selection.ranks or (16,):
                    yield LinearRow(shape, tokens, r, 0.0, dtype, False)
                    for p in (0.0, 0.1):
                        yield LinearRow(shape, tokens, r, p, dtype, True)
        for shape in selection.shapes or find_shapes(["square-1024"]):
            for r in selection.ranks or (4, 64):
                yield LinearRow(shape, at_most(512, dtype), r, 0.0, dtype, True)
        for shape in selection.shapes or find_shapes(["square-4096"]):
            yield LinearRow(shape, at_most(128, dtype), 16, 0.0, dtype, True)


def _full(selection: Selection) -> Iterator[LinearRow]:
    yield from _standard(selection)
    models = ("gpt2-medium", "roberta-large", "llama-3-8b", "llama-3-70b")
    shapes = selection.shapes or find_shapes(models if selection.on_gpu else ["square"])
    wide = selection.dtypes or ((torch.bfloat16,) if selection.on_gpu else (torch.float32,))
    tokens_tried = selection.tokens or (TOKENS if selection.on_gpu else (1, 16, 128, 512, 2048))
    for dtype in wide:
        for shape in shapes:
            for tokens in tokens_tried:
                for r in selection.ranks or (RANKS if selection.on_gpu else (4, 16, 64)):
                    for p in (0.0, 0.1):
                        for backward in (False, True):
                            for graph in (False, True) if selection.on_gpu else (False,):
                                yield LinearRow(shape, tokens, r, p, dtype, backward, graph)


def test_linear(measured: Any) -> None:
    """One peer in one row."""
    measured.check()

"""`MergedLinear`, `Embedding` and convolutions against every peer: forward, and with backward.

`peers/roster.py` lists the peers; `peers/peft_layers.py` tells what PEFT has in the place of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.contest import Lab
from harness.floor import extra_bytes, extra_operations
from harness.names import QKV
from harness.selection import Selection, at_most
from peers.adapter_row import AdapterRow
from peers.modules import Weights, drawn
from peers.roster import known

FP32, BF16 = torch.float32, torch.bfloat16
VOCABULARY = 50_000
KERNEL_SIZE = 3
# The longest side of a convolution's input, by its number of dimensions.
SIDES = {1: 512, 2: 32, 3: 8}


@dataclass(frozen=True)
class LayerRow(AdapterRow):
    """One line. `features` is the width, for a convolution the number of channels."""

    table: ClassVar[str] = "layers"

    kind: str
    features: int
    tokens: int
    r: int
    p: float
    dtype: torch.dtype
    backward: bool
    graph: bool = False
    vocabulary: int = VOCABULARY

    @property
    def name(self) -> str:
        """What the row's name begins with."""
        return f"{self.kind}-{self.features}"

    @property
    def _space(self) -> tuple[int, ...]:
        """A convolution's, as many times the same side as it has dimensions."""
        d = int(self.kind[4])
        return (min(SIDES[d], round(self.tokens ** (1 / d))),) * d

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        n = self.features
        if self.kind == "MergedLinear":
            return len(QKV) * n, n
        if self.kind == "Embedding":
            return self.vocabulary, n
        return n, n, *[KERNEL_SIZE] * len(self._space)

    def sizes(self) -> dict[str, Any]:
        """Return the columns that tell the layer's size."""
        if self.kind == "MergedLinear":
            return {"shape": f"{self.features} to {len(QKV) * self.features}"}
        return {"shape": " x ".join(map(str, self._weight_shape))}

    def weights(self, lab: Lab) -> Weights:
        """Return the weights that all peers share."""
        shape, bias = self._weight_shape, self.kind != "Embedding"
        return drawn(self.kind, shape, self.r, bias=bias, p=self.p, **self.made(lab))

    def inputs(self, lab: Lab, copy: int = 0) -> tuple[Tensor, Tensor]:
        """Return x: rows, indices, or the pixels of pictures; and dy."""
        made, n = self.made(lab, 1 + copy), self.features
        if self.kind == "MergedLinear":
            x, dy = (torch.randn(self.tokens, width, **made) for width in (n, len(QKV) * n))
        elif self.kind == "Embedding":
            indices = made | {"dtype": torch.int64}
            x = torch.randint(self.vocabulary, (self.tokens,), **indices)
            return x, torch.randn(self.tokens, n, **made)
        else:
            shape = (self.tokens // self._space[0] ** len(self._space), n, *self._space)
            x, dy = (torch.randn(shape, **made) for _ in range(2))
        return x.requires_grad_(self.backward), dy

    def compiled_among_few(self, lab: Lab) -> bool:
        """Tell whether this is one of the few rows compiled where that takes longer than others."""
        if lab.clock.is_cuda:
            return self.kind == "MergedLinear" and self.p == 0.0
        return lab.level in ("standard", "full") and self in COMPILED_ON_CPU

    def extra_seconds(self, lab: Lab) -> float | None:
        """Return what a fused MergedLinear must cost beside the frozen one."""
        if self.kind != "MergedLinear":
            return None
        ceilings, (out, n) = lab.ceilings(self.dtype), self._weight_shape
        moved = extra_bytes(
            *("fused", self.tokens, n, out),
            backward=self.backward,
            dropout=self.p > 0,
            size=self.dtype.itemsize,
        )
        operations = sum(QKV) * extra_operations(
            *(self.tokens, n, out // len(QKV), self.r), backward=self.backward
        )
        return moved / ceilings.bandwidth + operations / ceilings.rate

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the bandwidth of a look-up, which reads and writes as many elements."""
        if self.kind != "Embedding" or self.backward:
            return {}
        moved = 2 * self.tokens * self.features * self.dtype.itemsize
        return {"GB/s": moved / seconds / 1e9}


COMPILED_ON_CPU = (
    LayerRow("MergedLinear", 1024, 512, 16, 0.0, FP32, True),
    LayerRow("Embedding", 1024, 512, 16, 0.0, FP32, True),
    LayerRow("Conv2d", 64, 1024, 16, 0.0, FP32, True),
)


def peers(row: LayerRow) -> list[str]:
    """Return who can take part in a row."""
    return known(row.kind, backward=row.backward)


def rows(selection: Selection) -> Iterator[LayerRow]:
    """Yield the rows of a selection."""
    make = {"toy": _toy, "quick": _quick, "standard": _standard, "full": _full}[selection.level]
    seen = set()
    for row in make(selection) if not selection.shapes else ():
        if row not in seen and selection.wants(tokens=row.tokens, r=row.r, dtype=row.dtype):
            seen.add(row)
            yield row


def _toy(selection: Selection) -> Iterator[LayerRow]:
    toy = {"vocabulary": 64}
    for backward in (False, True):
        yield LayerRow("MergedLinear", 16, 6, 4, 0.0, FP32, backward)
        yield LayerRow("Embedding", 16, 6, 4, 0.0, FP32, backward, **toy)
        yield LayerRow("Conv2d", 8, 16, 2, 0.0, FP32, backward)
    yield LayerRow("MergedLinear", 16, 6, 4, 0.1, FP32, True)
    yield LayerRow("Conv1d", 8, 6, 2, 0.0, FP32, True)
    yield LayerRow("Conv3d", 4, 8, 3, 0.0, FP32, True)
    if selection.on_gpu:
        for kind, n, m in (("MergedLinear", 16, 6), ("Embedding", 16, 6), ("Conv2d", 8, 16)):
            yield LayerRow(kind, n, m, 4, 0.0, BF16, True, graph=True, **toy)


def _quick(selection: Selection) -> Iterator[LayerRow]:
    if not selection.on_gpu:
        for m in (16, 512):
            yield from _products(m, 1024, 16, FP32, backward=True)
            yield LayerRow("Embedding", 1024, m, 16, 0.0, FP32, True)
        yield LayerRow("Conv2d", 64, 1024, 16, 0.0, FP32, True)
        return
    for backward in (False, True):  # what docs/targets.md names
        yield from _products(8192, 4096, 16, BF16, backward=backward)
        yield LayerRow("Embedding", 4096, 8192, 16, 0.0, BF16, backward)
        for n in (256, 512):
            yield LayerRow("Conv2d", n, 16384, 16, 0.0, BF16, backward)


def _standard(selection: Selection) -> Iterator[LayerRow]:
    yield from (_of_gpu if selection.on_gpu else _of_cpu)((16,))


def _full(selection: Selection) -> Iterator[LayerRow]:
    yield from (_of_gpu if selection.on_gpu else _of_cpu)((4, 16, 64))


def _of_gpu(ranks: tuple[int, ...]) -> Iterator[LayerRow]:
    both = (False, True)
    for r, m, n, backward in product(ranks, (16, 512, 2048, 8192), (1024, 4096), both):
        for graph in both if m <= 512 else (False,):
            dropouts = (0.0,) if graph else (0.0, 0.1)
            yield from _products(m, n, r, BF16, dropouts, backward=backward, graph=graph)
            yield LayerRow("Embedding", n, m, r, 0.0, BF16, backward, graph)
    for n, backward, graph in product((256, 512), both, both):
        yield LayerRow("Conv2d", n, 16384, 16, 0.0, BF16, backward, graph)
    yield LayerRow("Conv1d", 256, 16384, 16, 0.0, BF16, True)
    yield LayerRow("Conv3d", 64, 16384, 16, 0.0, BF16, True)


def _of_cpu(ranks: tuple[int, ...]) -> Iterator[LayerRow]:
    both = (False, True)
    for dtype in (FP32, BF16):
        for r, m, backward in product(ranks, (16, at_most(512, dtype)), both):
            dropouts = (0.0, 0.1) if backward else (0.0,)
            for n in (768, 1024):
                yield from _products(m, n, r, dtype, dropouts, backward=backward)
            yield LayerRow("Embedding", 1024, m, r, 0.0, dtype, backward)
        for n, backward in product((64, 256), both):
            yield LayerRow("Conv2d", n, 1024, 16, 0.0, dtype, backward)
    yield LayerRow("Conv1d", 64, 1024, 16, 0.0, FP32, True)
    yield LayerRow("Conv3d", 16, 1024, 16, 0.0, FP32, True)


def _products(
    m: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    dropouts: tuple[float, ...] = (0.0, 0.1),
    *,
    backward: bool,
    graph: bool = False,
) -> Iterator[LayerRow]:
    for p in dropouts:
        yield LayerRow("MergedLinear", n, m, r, p, dtype, backward, graph)


def test_layers(measured: Any) -> None:
    """One peer in one row."""
    measured.check()

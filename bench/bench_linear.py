"""`lora.Linear` against every peer: forward, and forward with backward.

Peers are listed in `peers.py`, shapes in `shapes.py`. The gradients are those of x, A and B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import implementations
import torch
from contest import OURS, Absent, Contestant, Lab, Outputs, Row
from floor import extra_seconds
from peers import FROZEN, PEERS, SCALING, Layer, Weights, around
from selection import Selection
from shapes import RANKS, TOKENS, TOY, Shape, dtype_name, find_shapes
from torch import Tensor

from lora_fast import reference

CHECKED_ROWS_ON_CPU = 64  # a float64 product of all rows takes longer than the measurement


@dataclass(frozen=True)
class LinearRow(Row):
    """One line: a shape, M rows of x, a rank, a dropout rate, a dtype, a pass, eager or graph."""

    table: ClassVar[str] = "linear"

    shape: Shape
    tokens: int
    r: int
    p: float
    dtype: torch.dtype
    backward: bool
    graph: bool = False

    @property
    def id(self) -> str:
        """The name of the row."""
        return (
            f"{self.shape.name}-M{self.tokens}-r{self.r}-p{self.p:g}-{dtype_name(self.dtype)}-"
            f"{self._pass}-{'graph' if self.graph else 'eager'}"
        )

    @property
    def _pass(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        return {
            "layer": "Linear",
            "shape": self.shape.name,
            "M": self.tokens,
            "K": self.shape.K,
            "N": self.shape.N,
            "r": self.r,
            "dropout": self.p,
            "dtype": dtype_name(self.dtype),
            "pass": self._pass,
            "mode": "graph" if self.graph else "eager",
        }

    def weights(self, lab: Lab) -> Weights:
        """Return the weights that all peers share; the update is as large as the frozen output."""
        generator = torch.Generator(lab.device).manual_seed(0)
        made = partial(_normal, generator=generator, device=lab.device, dtype=self.dtype)
        K, N = self.shape.K, self.shape.N
        return Weights(
            made(N, K, std=K**-0.5),
            made(N, std=1.0) if self.shape.bias else None,
            made(self.r, K, std=K**-0.5),
            made(N, self.r, std=self.r**-0.5),
            self.p,
        )

    def inputs(self, lab: Lab, copy: int = 0) -> tuple[Tensor, Tensor]:
        """Return x (M, K), which gets a gradient if there is a backward pass, and dy (M, N)."""
        generator = torch.Generator(lab.device).manual_seed(1 + copy)
        made = partial(_normal, generator=generator, device=lab.device, dtype=self.dtype, std=1.0)
        x, dy = made(self.tokens, self.shape.K), made(self.tokens, self.shape.N)
        return x.requires_grad_(self.backward), dy

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer with its layers, one for each copy of the data."""
        measured_on_cpu = not (lab.is_toy or lab.clock.is_cuda)
        if peer == "loralib-compiled" and measured_on_cpu and not self._compiled_on_cpu():
            raise Absent("on a CPU compiled for one shape only, compiling takes long")
        size, K, N = self.dtype.itemsize, self.shape.K, self.shape.N
        moved = (N * K + self.tokens * (K + N)) * size
        copies = [
            (PEERS[peer](self.weights(lab), lab), *self.inputs(lab, i))
            for i in range(lab.clock.copies(moved))
        ]
        layer, x, dy = copies[0]
        with around(peer)():
            self._applies_dropout(peer, layer, x)
            chosen = self._choice(layer, x, dy) if peer == OURS else {}
        few = slice(None) if lab.clock.is_cuda else slice(CHECKED_ROWS_ON_CPU)
        return Contestant(
            [partial(self._run, *copy) for copy in copies],
            around(peer),
            forward=partial(layer.forward, x) if self.backward else None,
            known=[*layer.trained, *_frozen_tensors(layer), x],
            outputs=None if self.p or peer == FROZEN else lambda: self._named(layer, x, dy, few),
            told={"chosen": chosen} if chosen else {},
        )

    def _compiled_on_cpu(self) -> bool:
        return (self.shape.name, self.tokens, self.r) == ("square-1024", 512, 16)

    def _choice(self, layer: Layer, x: Tensor, dy: Tensor) -> dict[str, str]:
        with implementations.noted() as chosen:
            self._run(layer, x, dy)
        return chosen

    def _run(self, layer: Layer, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = layer.forward(x)
        if not self.backward:
            return (y,)
        return torch.autograd.grad(y, [x, *layer.trained], dy)

    def _applies_dropout(self, peer: str, layer: Layer, x: Tensor) -> None:
        if self.p and peer != FROZEN and torch.equal(layer.forward(x), layer.forward(x)):
            raise Absent("applies no dropout")

    def _named(self, layer: Layer, x: Tensor, dy: Tensor, few: slice) -> Outputs:
        x = x.detach()[few].requires_grad_(self.backward)
        y = layer.forward(x)
        if not self.backward:
            return {"y": y.detach()}
        grads = torch.autograd.grad(y, [x, *layer.trained], dy[few])
        return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), grads, strict=True))}

    def oracle(self, lab: Lab) -> tuple[Outputs, Outputs] | None:
        """Return plain torch's results in the row's dtype and in float64."""
        x, dy = self.inputs(lab)
        few = slice(None) if lab.clock.is_cuda else slice(CHECKED_ROWS_ON_CPU)
        found = []
        for dtype in (self.dtype, torch.float64):
            w = self.weights(lab)
            a, b = (t.to(dtype).requires_grad_() for t in (w.a, w.b))
            bias = None if w.bias is None else w.bias.to(dtype)
            layer = Layer(
                partial(_reference, weight=w.weight.to(dtype), lora_A=a, lora_B=b, bias=bias),
                [a, b],
            )
            found.append(self._named(layer, x.to(dtype), dy.to(dtype), few))
        return found[0], found[1]

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


def _reference(x: Tensor, **factors: Any) -> Tensor:
    return reference.lora_linear(x, scaling=SCALING, **factors)


def _normal(*shape: int, std: float, **made: Any) -> Tensor:
    return torch.randn(*shape, **made).mul_(std)


def _frozen_tensors(layer: Layer) -> list[Tensor]:
    module = getattr(layer.forward, "_orig_mod", layer.forward)
    return list(module.parameters()) if isinstance(module, torch.nn.Module) else []


def peers(row: Row) -> list[str]:
    """Return who can take part in a row."""
    return list(PEERS)


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
            for tokens in selection.tokens or (1, 16, 512):
                for r in selection.ranks or (16,):
                    yield LinearRow(shape, tokens, r, 0.0, dtype, False)
                    for p in (0.0, 0.1):
                        yield LinearRow(shape, tokens, r, p, dtype, True)
        for shape in selection.shapes or find_shapes(["square-1024"]):
            for r in selection.ranks or (4, 64):
                yield LinearRow(shape, 512, r, 0.0, dtype, True)
        for shape in selection.shapes or find_shapes(["square-4096"]):
            yield LinearRow(shape, 128, 16, 0.0, dtype, True)


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

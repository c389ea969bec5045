"""`MergedLinear`, `Embedding` and `Conv2d` against loralib and the frozen layer.

Forward with backward; the gradients are those of the input, where it has one, of A and of B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from contest import OURS, Absent, Contestant, Lab, Outputs, Row
from floor import extra_bytes, extra_operations
from peers import FROZEN
from selection import Selection
from shapes import dtype_name
from torch import Tensor, nn

import lora_fast

QKV = [True, False, True]
VOCABULARY = 50_000
REFERENCE = f"{OURS}:reference"
CONVOLUTION_SIDE = 32


@dataclass(frozen=True)
class LayerRow(Row):
    """One line. `features` is the width, for a convolution the number of channels."""

    table: ClassVar[str] = "layers"

    layer: str
    features: int
    tokens: int
    r: int
    p: float
    dtype: torch.dtype
    vocabulary: int = VOCABULARY

    @property
    def id(self) -> str:
        """The name of the row."""
        return (
            f"{self.layer}-{self.features}-M{self.tokens}-r{self.r}-p{self.p:g}-"
            f"{dtype_name(self.dtype)}-fwd+bwd"
        )

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        return {
            "layer": self.layer,
            "shape": self._shape(),
            "M": self.tokens,
            "r": self.r,
            "dropout": self.p,
            "dtype": dtype_name(self.dtype),
            "pass": "fwd+bwd",
            "mode": "eager",
        }

    def _shape(self) -> str:
        n = self.features
        return {
            "MergedLinear": f"{n} to {3 * n}",
            "Embedding": f"{self.vocabulary} x {n}",
            "Conv2d": f"{n} x {n} x 3 x 3",
        }[self.layer]

    def module(self, library: ModuleType, lab: Lab, dtype: torch.dtype) -> nn.Module:
        """Return the layer of a library; all have the same weights."""
        n, made = self.features, {"r": self.r, "device": lab.device, "dtype": dtype}
        layer: nn.Module
        if self.layer == "MergedLinear":
            layer = library.MergedLinear(
                n, 3 * n, enable_lora=QKV, lora_alpha=2 * self.r, lora_dropout=self.p, **made
            )
        elif self.layer == "Embedding":
            layer = library.Embedding(self.vocabulary, n, lora_alpha=2 * self.r, **made)
        else:
            layer = library.Conv2d(n, n, 3, padding=1, lora_alpha=2 * self.r, **made)
        library.mark_only_lora_as_trainable(layer)
        self._fill(layer, lab)
        return layer

    def _fill(self, layer: nn.Module, lab: Lab) -> None:
        # Drawn in the row's dtype, so that a float64 copy has the very same values.
        generator = torch.Generator(lab.device).manual_seed(0)
        with torch.no_grad():
            for _, parameter in sorted(layer.named_parameters()):
                made = {"device": lab.device, "dtype": self.dtype, "generator": generator}
                parameter.copy_(torch.randn(parameter.shape, **made).mul_(self.features**-0.5))

    def frozen(self, lab: Lab) -> nn.Module:
        """Return the layer without an adapter, nothing of it trained: the floor."""
        n, made = self.features, {"device": lab.device, "dtype": self.dtype}
        if self.layer == "Embedding":
            raise Absent("nothing of a frozen table has a gradient")
        layer: nn.Module
        if self.layer == "Conv2d":
            layer = nn.Conv2d(n, n, 3, padding=1, **made)
        else:
            layer = nn.Linear(n, 3 * n, **made)
        return layer.requires_grad_(False)

    def input(self, lab: Lab, copy: int = 0) -> Tensor:
        """Return the input: rows, indices, or the pixels of pictures."""
        generator = torch.Generator(lab.device).manual_seed(1 + copy)
        made = {"device": lab.device, "generator": generator}
        if self.layer == "Embedding":
            return torch.randint(self.vocabulary, (self.tokens,), **made)
        if self.layer == "Conv2d":
            side = min(CONVOLUTION_SIDE, round(self.tokens**0.5))
            shape = (self.tokens // side**2, self.features, side, side)
        else:
            shape = (self.tokens, self.features)
        return torch.randn(shape, dtype=self.dtype, **made).requires_grad_()

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer with its layers, one for each copy of the data."""
        make = {FROZEN: self.frozen}.get(peer)
        if make is None:
            library = lora_fast if peer.startswith(OURS) else import_module("loralib")
            make = partial(self.module, library, dtype=self.dtype)
        layers = [make(lab)]
        x = self.input(lab)
        moved = sum(t.nbytes for t in (*layers[0].parameters(), x))
        if self.layer == "Embedding":  # which reads a few rows of its table
            moved = 2 * self.tokens * self.features * self.dtype.itemsize
        copies = lab.clock.copies(moved)
        if self.layer == "Embedding":
            layers *= copies
        layers += [make(lab) for _ in range(copies - len(layers))]
        inputs = [self.input(lab, i) for i in range(copies)]
        if peer.endswith("-compiled"):
            if not (lab.is_toy or lab.clock.is_cuda):
                raise Absent("on a CPU only Linear is compiled, compiling takes long")
            backend = "eager" if lab.is_toy else "inductor"
            layers = [torch.compile(m, dynamic=False, backend=backend) for m in layers]
        steps = [_step(m, i) for m, i in zip(layers, inputs, strict=True)]
        forced = {REFERENCE: partial(lora_fast.use_backend, "reference")}
        around = {"around": forced[peer]} if peer in forced else {}
        return Contestant(
            steps,
            **around,
            forward=partial(layers[0], x),
            known=[*layers[0].parameters(), x],
            outputs=None if self.p or peer == FROZEN else partial(_outputs, layers[0], x),
        )

    def oracle(self, lab: Lab) -> tuple[Outputs, Outputs] | None:
        """Return the reference's results in the row's dtype and in float64."""
        x = self.input(lab)
        found = []
        with lora_fast.use_backend("reference"):
            for dtype in (self.dtype, torch.float64):
                wide = x if self.layer == "Embedding" else x.detach().to(dtype).requires_grad_()
                found.append(_outputs(self.module(lora_fast, lab, dtype), wide))
        return found[0], found[1]

    def extra_seconds(self, lab: Lab) -> float | None:
        """Return what a fused MergedLinear must cost beside the frozen one."""
        if self.layer != "MergedLinear":
            return None
        ceilings, n = lab.ceilings(self.dtype), self.features
        shape = (self.tokens, n, 3 * n)
        moved = extra_bytes(
            "fused", *shape, backward=True, dropout=self.p > 0, size=self.dtype.itemsize
        )
        # Two adapters of n outputs each.
        operations = 2 * extra_operations(self.tokens, n, n, self.r, backward=True)
        return moved / ceilings.bandwidth + operations / ceilings.rate


def _step(layer: nn.Module, x: Tensor) -> Any:
    dy = torch.randn_like(layer(x))
    wanted = _wanted(layer, x)
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def _wanted(layer: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [p for _, p in sorted(layer.named_parameters()) if p.requires_grad]
    return [*trained, x] if x.requires_grad else trained


def _outputs(layer: nn.Module, x: Tensor) -> Outputs:
    y = layer(x)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape)
    wanted = _wanted(layer, x)
    # Rounded to halves of a power of two, which every dtype holds.
    grads = torch.autograd.grad(y, wanted, (dy * 8).round().div(8).to(y.dtype))
    return {"y": y.detach(), **{str(i): g for i, g in enumerate(grads)}}


def peers(row: Row) -> list[str]:
    """Return who can take part in a row."""
    return [FROZEN, "loralib", "loralib-compiled", OURS, REFERENCE]


def rows(selection: Selection) -> Iterator[LayerRow]:
    """Yield the rows of a selection."""
    for row in _rows(selection):
        if selection.wants(tokens=row.tokens, r=row.r, dtype=row.dtype) and not selection.shapes:
            yield row


def _rows(selection: Selection) -> Iterator[LayerRow]:
    fp32, bf16 = torch.float32, torch.bfloat16
    level, on_gpu = selection.level, selection.on_gpu
    if level == "toy":
        for p in (0.0, 0.1):
            yield LayerRow("MergedLinear", 16, 6, 4, p, fp32)
        yield LayerRow("Embedding", 16, 6, 4, 0.0, fp32, vocabulary=64)
        yield LayerRow("Conv2d", 8, 16, 2, 0.0, fp32)
        return
    quick = level == "quick"
    dtypes = (bf16,) if on_gpu else (fp32,) if quick else (fp32, bf16)
    widths = ((1024,) if quick else (1024, 4096)) if on_gpu else ((1024,) if quick else (768, 1024))
    tokens = ((8192,) if quick else (16, 2048, 8192)) if on_gpu else (16, 512)
    ranks = (4, 16, 64) if level == "full" else (16,)
    for dtype in dtypes:
        for r in ranks:
            for m in tokens:
                for n in widths:
                    for p in (0.0, 0.1):
                        yield LayerRow("MergedLinear", n, m, r, p, dtype)
                yield LayerRow("Embedding", 1024, m, r, 0.0, dtype)
        for n in (256,) if on_gpu else (64,) if quick else (64, 256):
            yield LayerRow("Conv2d", n, 16384 if on_gpu else 1024, 16, 0.0, dtype)


def test_layers(measured: Any) -> None:
    """One peer in one row."""
    measured.check()

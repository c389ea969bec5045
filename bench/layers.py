"""The layers that are measured: loralib's, ours and the frozen layer alone, with equal weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import loralib
import torch
from harness import Step
from torch import Tensor, nn

import lora_fast

QKV = [True, False, True]
LIBRARIES: dict[str, ModuleType] = {"loralib": loralib, "lora_fast": lora_fast}


@dataclass(frozen=True)
class Case:
    """One line of the table. `features` is the width, for a convolution the number of channels."""

    layer: str
    features: int
    tokens: int
    r: int
    dropout: float
    dtype: torch.dtype

    def columns(self) -> dict[str, Any]:
        """Return the case as the first columns of a table."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.")}

    def build(self, library: ModuleType) -> Any:
        """Return the layer of a library, its adapter filled with random values."""
        torch.manual_seed(0)
        n, options = self.features, {"r": self.r, "dtype": self.dtype}
        if self.layer == "Linear":
            layer = library.Linear(n, n, lora_dropout=self.dropout, **options)
        elif self.layer == "MergedLinear":
            options["lora_dropout"] = self.dropout
            layer = library.MergedLinear(n, 3 * n, enable_lora=QKV, **options)
        elif self.layer == "Embedding":
            layer = library.Embedding(50_000, n, **options)
        else:
            layer = library.Conv2d(n, n, 3, padding=1, **options)
        library.mark_only_lora_as_trainable(layer)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.02)
        return layer

    def frozen(self) -> nn.Module:
        """Return the layer without an adapter, nothing of it trained: the limit."""
        torch.manual_seed(0)
        n = self.features
        made: nn.Module
        if self.layer == "Embedding":
            made = nn.Embedding(50_000, n, dtype=self.dtype)
        elif self.layer == "Conv2d":
            made = nn.Conv2d(n, n, 3, padding=1, dtype=self.dtype)
        else:
            made = nn.Linear(n, n * (3 if self.layer == "MergedLinear" else 1), dtype=self.dtype)
        return made.requires_grad_(False)

    def input(self) -> Tensor:
        """Return the input: `tokens` rows, indices, or pixels of one square picture."""
        if self.layer == "Embedding":
            return torch.randint(50_000, (self.tokens,))
        if self.layer == "Conv2d":
            side = round(self.tokens**0.5)
            return torch.randn(1, self.features, side, side, dtype=self.dtype, requires_grad=True)
        return torch.randn(self.tokens, self.features, dtype=self.dtype, requires_grad=True)

    def steps(self) -> dict[str, Step]:
        """Return forward and backward, with the gradient of the input, of all candidates."""
        x = self.input()
        layers = {name: self.build(library) for name, library in LIBRARIES.items()}
        steps = {name: _step(layer, x) for name, layer in layers.items()}
        if self.layer != "Embedding":
            steps["frozen"] = _step(self.frozen(), x)
        return steps


def _step(layer: nn.Module, x: Tensor) -> Step:
    dy = torch.randn_like(layer(x))
    wanted = [p for p in layer.parameters() if p.requires_grad]
    if x.requires_grad:
        wanted.append(x)

    def step() -> object:
        return torch.autograd.grad(layer(x), wanted, dy)

    return step


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield all cases, or the few that a first look needs."""
    dtypes = (torch.float32, torch.bfloat16)
    features = (768, 1024) if quick else (768, 1024, 4096)
    tokens = (1, 16, 512) if quick else (1, 16, 128, 512, 2048)
    for layer in ("Linear", "MergedLinear"):
        for dtype in dtypes:
            for n in features:
                for m in tokens:
                    for r in (16,) if quick else (4, 16, 64):
                        for p in (0.0, 0.1):
                            yield Case(layer, n, m, r, p, dtype)
    for dtype in dtypes:
        for m in tokens:
            yield Case("Embedding", 1024, m, 16, 0.0, dtype)
        yield Case("Conv2d", 64, 1024, 4, 0.0, dtype)
        if not quick:
            yield Case("Conv2d", 256, 1024, 16, 0.0, dtype)

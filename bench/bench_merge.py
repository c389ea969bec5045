"""One `eval()` and `train()` of a layer: against loralib, and against copying the weight twice.

loralib keeps nothing while it is merged, and does not restore the weight. `kept B/weight` is what
the merged layer keeps as its way back, `peak B/weight` what a merge holds at its peak.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from clock import Candidate
from contest import OURS, Contestant, Lab, Row
from selection import Selection
from shapes import dtype_name
from torch import nn

import lora_fast
from lora_fast.testing import randomize_

QKV = [True, False, True]
CLONES = "clones"
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Linear-4096x4096": lambda lib, **kw: lib.Linear(4096, 4096, **kw),
    "MergedLinear-3072x1024": lambda lib, **kw: lib.MergedLinear(1024, 3072, enable_lora=QKV, **kw),
    "Embedding-50000x1024": lambda lib, **kw: lib.Embedding(50_000, 1024, **kw),
    "Conv2d-512x512x3x3": lambda lib, **kw: lib.Conv2d(512, 512, 3, **kw),
    "Linear-1024x1024": lambda lib, **kw: lib.Linear(1024, 1024, **kw),
    "Linear-256x256": lambda lib, **kw: lib.Linear(256, 256, **kw),
}
TOYS: dict[str, Callable[..., nn.Module]] = {
    "Linear-32x48": lambda lib, **kw: lib.Linear(48, 32, **kw),
    "MergedLinear-48x16": lambda lib, **kw: lib.MergedLinear(16, 48, enable_lora=QKV, **kw),
    "Embedding-64x16": lambda lib, **kw: lib.Embedding(64, 16, **kw),
    "Conv2d-8x8x3x3": lambda lib, **kw: lib.Conv2d(8, 8, 3, **kw),
}


@dataclass(frozen=True)
class MergeRow(Row):
    """One line."""

    table: ClassVar[str] = "merge"

    layer: str
    r: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        """The name of the row."""
        return f"{self.layer}-r{self.r}-{dtype_name(self.dtype)}-eval+train"

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        layer, _, shape = self.layer.partition("-")
        return {
            "layer": layer,
            "shape": shape.replace("x", " x "),
            "r": self.r,
            "dtype": dtype_name(self.dtype),
            "pass": "eval+train",
        }

    def layers(self, library: Any, lab: Lab) -> list[Any]:
        """Return a library's layers, one for each copy; the delta is a hundredth of the weight."""
        make = {**LAYERS, **TOYS}[self.layer]
        made = {"r": self.r, "lora_alpha": self.r, "device": lab.device, "dtype": self.dtype}
        first = make(library, **made)
        copies = lab.clock.copies(max(p.nbytes for p in first.parameters()))
        layers = [first, *(make(library, **made) for _ in range(copies - 1))]
        return [randomize_(layer, 0.02 / self.r**0.25) for layer in layers]

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer ready to merge and unmerge."""
        torch.manual_seed(0)
        if peer == CLONES:
            weights = [_weight(m) for m in self.layers(lora_fast, lab)]
            copies = [w.detach().clone() for w in weights]
            return Contestant([partial(_clone_twice, weight) for weight in copies])
        layers = self.layers(lora_fast if peer == OURS else import_module("loralib"), lab)
        for layer in layers:
            _cycle(layer)
        after = partial(_memory, lab, layers[0]) if peer == OURS else None
        return Contestant([partial(_cycle, layer) for layer in layers], after=after)


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer._weight_owner().weight
    return weight


def _clone_twice(weight: torch.Tensor) -> None:
    weight.clone()
    weight.clone()


def _cycle(layer: nn.Module) -> None:
    layer.eval()
    layer.train()


def _memory(lab: Lab, layer: Any) -> dict[str, float]:
    weights = _weight(layer).numel()
    before = _weight(layer).detach().clone()
    peak = lab.clock.peak_bytes(Candidate([layer.eval]))
    kept = layer._record.nbytes()
    layer.train()
    if not torch.equal(before, _weight(layer)):
        raise AssertionError("the cycle did not restore the weight bit for bit")
    return {"kept B/weight": kept / weights, "peak B/weight": peak / weights}


def peers(row: Row) -> list[str]:
    """Return who can take part in a row."""
    return ["loralib", OURS, CLONES]


def rows(selection: Selection) -> Iterator[MergeRow]:
    """Yield the rows of a selection."""
    if selection.level == "toy":
        names, dtypes = TOYS, (torch.float32,)
    elif selection.level == "quick":
        names, dtypes = LAYERS, (torch.bfloat16 if selection.on_gpu else torch.float32,)
    else:
        names, dtypes = LAYERS, (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for name in names:
            several = name == "Linear-4096x4096" and selection.level != "quick"
            for r in (1, 8, 16, 64, 256) if several else (16,):
                if selection.wants(tokens=0, r=r, dtype=dtype) and not selection.shapes:
                    yield MergeRow(name, r, dtype)


def test_merge(measured: Any) -> None:
    """One peer in one row."""
    measured.check()

"""One `eval()` and `train()` of a layer: against loralib, and against copying the weight twice.

Of several layers, `lora_fast.merge(model)` and `lora_fast.unmerge(model)`, which serve all at once.
loralib keeps nothing while it is merged, and does not restore the weight. `kept B/weight` is what
the merged layer keeps as its way back, `peak B/weight` what a merge holds at its peak.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn

import lora_fast
from harness.clock import Candidate
from harness.contest import Contestant, Lab, Row
from harness.names import CLONES, LORALIB, OURS, QKV
from harness.selection import Selection
from harness.shapes import dtype_name
from lora_fast.products import slow_dtypes
from lora_fast.testing import randomize_


def _several(count: int, make: Callable[..., nn.Module], *args: Any, **kw: Any) -> nn.Module:
    return nn.ModuleList(make(*args, **kw) for _ in range(count))


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Linear-4096x4096": lambda lib, **kw: lib.Linear(4096, 4096, **kw),
    "MergedLinear-3072x1024": lambda lib, **kw: lib.MergedLinear(1024, 3072, enable_lora=QKV, **kw),
    "Embedding-50000x1024": lambda lib, **kw: lib.Embedding(50_000, 1024, **kw),
    "Conv2d-512x512x3x3": lambda lib, **kw: lib.Conv2d(512, 512, 3, **kw),
    "Linear-1024x1024": lambda lib, **kw: lib.Linear(1024, 1024, **kw),
    "Linear-256x256": lambda lib, **kw: lib.Linear(256, 256, **kw),
    "8 Linear-4096x4096": lambda lib, **kw: _several(8, lib.Linear, 4096, 4096, **kw),
    "32 Linear-1024x1024": lambda lib, **kw: _several(32, lib.Linear, 1024, 1024, **kw),
}
TOYS: dict[str, Callable[..., nn.Module]] = {
    "Linear-32x48": lambda lib, **kw: lib.Linear(48, 32, **kw),
    "MergedLinear-48x16": lambda lib, **kw: lib.MergedLinear(16, 48, enable_lora=QKV, **kw),
    "Embedding-64x16": lambda lib, **kw: lib.Embedding(64, 16, **kw),
    "Conv2d-8x8x3x3": lambda lib, **kw: lib.Conv2d(8, 8, 3, **kw),
    "3 Linear-32x48": lambda lib, **kw: _several(3, lib.Linear, 48, 32, **kw),
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
        return f"{self.layer.replace(' ', 'x')}-r{self.r}-{dtype_name(self.dtype)}-eval+train"

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
        copies = lab.clock.copies(sum(p.nbytes for p in first.parameters()))
        layers = [first, *(make(library, **made) for _ in range(copies - 1))]
        return [randomize_(layer, 0.02 / self.r**0.25) for layer in layers]

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer ready to merge and unmerge."""
        torch.manual_seed(0)
        if peer == CLONES:
            copies = [_weights(m) for m in self.layers(lora_fast, lab)]
            return Contestant([partial(_clone_twice, weights) for weights in copies])
        ours = peer == OURS
        layers = self.layers(lora_fast if ours else import_module("loralib"), lab)
        cycle = _cycle_at_once if ours and isinstance(layers[0], nn.ModuleList) else _cycle
        for layer in layers:
            cycle(layer)
        after = partial(_memory, lab, layers[0]) if ours else None
        return Contestant([partial(cycle, layer) for layer in layers], after=after)


def _members(layer: nn.Module) -> list[Any]:
    return list(layer) if isinstance(layer, nn.ModuleList) else [layer]


def _weights(layer: nn.Module) -> list[torch.Tensor]:
    return [one._weight_owner().weight.detach().clone() for one in _members(layer)]


def _clone_twice(weights: list[torch.Tensor]) -> None:
    for weight in weights:
        weight.clone()
        weight.clone()


def _cycle(layer: nn.Module) -> None:
    layer.eval()
    layer.train()


def _cycle_at_once(layers: nn.Module) -> None:
    lora_fast.merge(layers)
    lora_fast.unmerge(layers)


def _memory(lab: Lab, layer: nn.Module) -> dict[str, float]:
    before = _weights(layer)
    weights = sum(weight.numel() for weight in before)
    peak = lab.clock.peak_bytes(Candidate([layer.eval]))
    kept = sum(one._merge_state.record.nbytes() for one in _members(layer))
    layer.train()
    if not all(map(torch.equal, before, _weights(layer))):
        raise AssertionError("the cycle did not restore the weight bit for bit")
    return {"kept B/weight": kept / weights, "peak B/weight": peak / weights}


def peers(row: Row) -> list[str]:
    """Return who can take part in a row."""
    return [LORALIB, OURS, CLONES]


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
            if " " in name and not (selection.on_gpu or selection.level == "toy"):
                continue  # on a CPU a call from Python is no large part of a merge
            several = name == "Linear-4096x4096" and selection.level != "quick"
            for r in _ranks(dtype, selection) if several else (16,):
                if selection.wants(tokens=0, r=r, dtype=dtype) and not selection.shapes:
                    yield MergeRow(name, r, dtype)


def _ranks(dtype: torch.dtype, selection: Selection) -> tuple[int, ...]:
    # A cycle of loralib's at rank 256 takes a minute where torch multiplies 16 bits in loops.
    is_slow = not selection.on_gpu and dtype in slow_dtypes()
    return (1, 8, 16) if is_slow else (1, 8, 16, 64, 256)


def test_merge(measured: Any) -> None:
    """One peer in one row."""
    measured.check()

"""A row of one layer with an adapter: forward, or forward with backward, eager or as a CUDA graph.

`bench_linear.py` and `bench_layers.py` say which; peers are listed in `roster.py`. The gradients
are those of x, where it has one, of A and of B.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.contest import Absent, Contestant, Lab, Outputs, Row
from harness.names import FROZEN, OURS, is_ours
from harness.shapes import dtype_name
from peers import implementations, modules
from peers.modules import Layer, Weights
from peers.roster import PEERS, around

CHECKED_ROWS_ON_CPU = 64  # a float64 product of all rows takes longer than the measurement


class AdapterRow(Row):
    """One line: a layer, M rows of x, a rank, a dropout rate, a dtype, a pass, eager or graph.

    Attributes:
        kind: the name of loralib's class.
    """

    tokens: int
    r: int
    p: float
    dtype: torch.dtype
    backward: bool
    kind: str

    @property
    def name(self) -> str:
        """What the row's name begins with."""
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """Return the columns that tell the layer's size; `shape` in any case."""
        raise NotImplementedError

    def weights(self, lab: Lab) -> Weights:
        """Return the weights that all peers share."""
        raise NotImplementedError

    def inputs(self, lab: Lab, copy: int = 0) -> tuple[Tensor, Tensor]:
        """Return x, which gets a gradient if there is a backward pass and it can, and dy."""
        raise NotImplementedError

    def made(self, lab: Lab, seed: int = 0) -> dict[str, Any]:
        """Return what a random tensor of this row is made with."""
        generator = torch.Generator(lab.device).manual_seed(seed)
        return {"generator": generator, "device": lab.device, "dtype": self.dtype}

    def compiled_among_few(self, lab: Lab) -> bool:
        """Tell whether this is one of the few rows compiled where that takes longer than others."""
        raise NotImplementedError

    @property
    def id(self) -> str:
        """The name of the row."""
        return (
            f"{self.name}-M{self.tokens}-r{self.r}-p{self.p:g}-{dtype_name(self.dtype)}-"
            f"{self._pass}-{self._mode}"
        )

    @property
    def _pass(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def _mode(self) -> str:
        return "graph" if self.graph else "eager"

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        sizes = self.sizes()
        return {
            "layer": self.kind,
            "shape": sizes.pop("shape"),
            "M": self.tokens,
            **sizes,
            "r": self.r,
            "dropout": self.p,
            "dtype": dtype_name(self.dtype),
            "pass": self._pass,
            "mode": self._mode,
        }

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer with its layers, one for each copy of the data."""
        few_compile = lab.level == "quick" or not (lab.is_toy or lab.clock.is_cuda)
        compiles = peer.endswith("-compiled")
        if compiles and few_compile and not self.compiled_among_few(lab):
            raise Absent("compiled for one size only, compiling takes long")
        copies = self._copies(peer, lab)
        layer, x, dy = copies[0]
        if self.backward and not _wanted(layer, x):
            raise Absent("nothing of it has a gradient")
        with around(peer)():
            if self.p and peer != FROZEN and _is_repeatable(layer, x):
                raise Absent("applies no dropout")
            chosen = self._choice(layer, x, dy) if is_ours(peer) else {}
        few = self._checked(lab)
        return Contestant(
            [partial(self._run, layer, x, layer.divided(dy)) for layer, x, dy in copies],
            around(peer),
            forward=partial(layer.forward, x) if self.backward else None,
            known=[*layer.trained, *layer.frozen, x],
            outputs=None if self.p or peer == FROZEN else lambda: self._named(layer, x, dy, few),
            expected=layer.expected,
            told={"chosen": chosen} if peer == OURS else {},
        )

    def _copies(self, peer: str, lab: Lab) -> list[tuple[Layer, Tensor, Tensor]]:
        weights, (x, dy) = self.weights(lab), self.inputs(lab)
        looks_up = self.kind == "Embedding"  # and reads as many rows of its table as it writes
        moved = x.nbytes + dy.nbytes + (dy.nbytes if looks_up else weights.weight.nbytes)
        made = PEERS[peer](weights, lab)
        copies = [(made, x, dy)]
        for i in range(1, lab.clock.copies(moved)):
            layer = made if looks_up else PEERS[peer](self.weights(lab), lab)
            copies.append((layer, *self.inputs(lab, i)))
        return copies

    def _checked(self, lab: Lab) -> slice:
        """Return the rows whose results are checked: all where fewer would be compiled again."""
        every = lab.clock.is_cuda or self.compiled_among_few(lab)
        return slice(None) if every else slice(CHECKED_ROWS_ON_CPU)

    def _choice(self, layer: Layer, x: Tensor, dy: Tensor) -> dict[str, str]:
        with implementations.noted() as chosen:
            self._run(layer, x, dy)
        return chosen

    def _run(self, layer: Layer, x: Tensor, dy: Any) -> Any:
        y = layer.forward(x)
        return torch.autograd.grad(y, _wanted(layer, x), dy) if self.backward else y

    def _named(self, layer: Layer, x: Tensor, dy: Tensor, few: slice) -> Outputs:
        x = x.detach()[few].requires_grad_(x.requires_grad)
        y = layer.forward(x)
        found = {"y": layer.joined(y).detach()}
        if self.backward:
            wanted = _wanted(layer, x)
            grads = torch.autograd.grad(y, wanted, layer.divided(dy[few]))
            trained, half = grads[-len(layer.trained) :], len(layer.trained) // 2
            found |= {"dA": torch.cat(trained[:half]), "dB": torch.cat(trained[half:])}
            found |= {"dx": grads[0]} if x.requires_grad else {}
        return found

    def oracle(self, lab: Lab) -> tuple[Outputs, Outputs] | None:
        """Return plain torch's results in the row's dtype and in float64."""
        x, dy = self.inputs(lab)
        few, found = self._checked(lab), []
        for dtype in (self.dtype, torch.float64):
            layer = modules.oracle(self.weights(lab), dtype)
            wide = x.to(dtype) if x.is_floating_point() else x  # indices stay what they are
            found.append(self._named(layer, wide, dy.to(dtype), few))
        return found[0], found[1]


def _wanted(layer: Layer, x: Tensor) -> list[Tensor]:
    return [x, *layer.trained] if x.requires_grad else layer.trained


def _is_repeatable(layer: Layer, x: Tensor) -> bool:
    return torch.equal(*(layer.joined(layer.forward(x)) for _ in range(2)))

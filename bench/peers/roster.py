"""Who computes a layer with an adapter: each peer builds one from the same weights.

A peer takes the weights and returns a function of x and the parameters that are trained.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_fast
from harness.contest import Absent, Lab
from harness.names import (
    ADDMM_ORDER,
    CLONES,
    FROZEN,
    LORA_FIRST,
    LORAFUSION,
    LORALIB,
    LORALIB_COMPILED,
    OURS,
    PEFT,
)
from lora_fast.commands import in_one_line
from peers import implementations, lora_orders, modules, peft_layers
from peers.modules import SCALING, Layer, Weights, layer_of

Peer = Callable[[Weights, Lab], Layer]


def frozen(weights: Weights, lab: Lab) -> Layer:
    """torch's function on the frozen weight: the floor."""
    return modules.frozen(weights)


def loralib(weights: Weights, lab: Lab) -> Layer:
    """The released loralib."""
    if weights.kind in ("Conv1d", "Conv3d"):
        raise Absent("its delta does not have the weight's shape")
    return modules.module(layer_of(importlib.import_module("loralib"), weights))


def loralib_compiled(weights: Weights, lab: Lab) -> Layer:
    """loralib under torch.compile, one graph or an error."""
    layer = loralib(weights, lab)
    backend = "eager" if lab.is_toy else "inductor"
    layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
    return layer


def peft(weights: Weights, lab: Lab) -> Layer:
    """PEFT, of the same function."""
    return peft_layers.peft(weights)


def in_order(order: Callable[..., Tensor], weights: Weights, lab: Lab) -> Layer:
    """One of the orders in `lora_orders`."""
    if weights.p > 0:
        raise Absent("written without dropout")
    weight, bias = weights.weight, weights.bias
    a, b = weights.a.requires_grad_(), weights.b.requires_grad_()
    return Layer(lambda x: order(x, weight, bias, a, b, SCALING), [a, b], weights.frozen())


def lorafusion(weights: Weights, lab: Lab) -> Layer:
    """LoRAFusion's kernels from a checkout; they take three dimensions."""
    apply = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    a, b = weights.a.requires_grad_(), weights.b.requires_grad_()
    fused = partial(apply, dropout_p=weights.p, linear_bias=weights.bias)
    return Layer(
        lambda x: fused(x[None], weights.weight, a, b, SCALING)[0], [a, b], weights.frozen()
    )


def ours(weights: Weights, lab: Lab) -> Layer:
    """lora_fast; which implementation runs is chosen around the call, or by its dispatch."""
    return modules.module(layer_of(lora_fast, weights))


_FORCED = implementations.forced()
PEERS: dict[str, Peer] = {
    FROZEN: frozen,
    LORALIB: loralib,
    LORALIB_COMPILED: loralib_compiled,
    PEFT: peft,
    ADDMM_ORDER: partial(in_order, lora_orders.addmm_order),
    LORA_FIRST: partial(in_order, lora_orders.lora_first),
    LORAFUSION: lorafusion,
    OURS: ours,
    **dict.fromkeys(_FORCED, ours),
}
_LINEAR_ALONE = (ADDMM_ORDER, LORA_FIRST, LORAFUSION)


def known(kind: str, *, backward: bool) -> list[str]:
    """Return who can compute a kind of layer, forward or with backward."""
    forced = implementations.of(kind, backward=backward)
    return [
        peer
        for peer in PEERS
        if (peer in forced if peer in _FORCED else kind == "Linear" or peer not in _LINEAR_ALONE)
    ]


def around(peer: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what must hold while a peer runs."""
    return _FORCED.get(peer, nullcontext)


def select(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the known peers that were asked for, ours and the frozen layer always among them."""
    return [p for p in known if not wanted or p in wanted or p in (OURS, FROZEN, CLONES)]


def missing(lab: Lab) -> dict[str, str]:
    """Return the peers that can't take part in this run, with the reason.

    Raises:
        ValueError: there is no LoRAFusion where it was said to be.
    """
    found = {}
    for peer, package in ((LORALIB, "loralib"), (LORALIB_COMPILED, "loralib"), (PEFT, "peft")):
        if importlib.util.find_spec(package) is None:
            found[peer] = f"{package} is not installed"
    found |= {} if lab.lorafusion is not None else {LORAFUSION: "no --lorafusion DIR was given"}
    if lab.lorafusion is not None:
        if not (Path(lab.lorafusion) / "lorafusion").is_dir():
            expected = "expected a checkout that holds lorafusion/"
            raise ValueError(f"--lorafusion: {expected}, got {lab.lorafusion!r}")
        sys.path.append(lab.lorafusion)
        try:
            importlib.import_module("lorafusion.ops.lora_v1")
        except (Exception, SystemExit) as error:  # what a package does is not ours to know
            found[LORAFUSION] = f"{lab.lorafusion} can't be imported: {in_one_line(error)}"
    if not lab.clock.is_cuda and not lab.is_toy:
        for peer in _FORCED:
            if peer != implementations.REFERENCE:
                found[peer] = "Triton's kernels need a GPU"
    return found

"""Who computes a LoRA linear layer: each peer builds one from the same weights.

A peer takes the weights and returns a function of x and the parameters that are trained.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lora_orders
import torch
from contest import OURS, Absent, Lab
from implementations import forced
from torch import Tensor, nn

import lora_fast

FROZEN = "frozen"
SCALING = 2.0


@dataclass
class Weights:
    """What all peers share: weight (N, K), bias (N,) or None, a (R, K), b (N, R), dropout rate."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    p: float = 0.0

    def clone(self) -> "Weights":
        """Return a copy that shares no memory."""
        copied = {k: v.clone() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **copied)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every layer's constructor."""
        made = {"device": self.weight.device, "dtype": self.weight.dtype}
        return {"bias": self.bias is not None, **made}


@dataclass
class Layer:
    """A peer's layer: its function, and what it trains."""

    forward: Callable[[Tensor], Tensor]
    trained: list[Tensor]


def frozen(weights: Weights, lab: Lab) -> Layer:
    """`torch.nn.functional.linear` on the frozen weight: the floor."""
    weight, bias = weights.weight, weights.bias
    return Layer(lambda x: nn.functional.linear(x, weight, bias), [])


def layer_of(library: Any, weights: Weights) -> nn.Module:
    """Return the `Linear` of loralib or of lora_fast with these weights."""
    (n, k), r = weights.weight.shape, weights.a.shape[0]
    layer: nn.Module = library.Linear(
        k, n, r=r, lora_alpha=SCALING * r, lora_dropout=weights.p, **weights.options
    )
    library.mark_only_lora_as_trainable(layer)
    _fill(layer, weight=weights.weight, bias=weights.bias, lora_A=weights.a, lora_B=weights.b)
    return layer


def loralib(weights: Weights, lab: Lab) -> Layer:
    """The released loralib."""
    return _module(layer_of(importlib.import_module("loralib"), weights))


def loralib_compiled(weights: Weights, lab: Lab) -> Layer:
    """loralib under torch.compile, one graph or an error."""
    layer = layer_of(importlib.import_module("loralib"), weights)
    backend = "eager" if lab.is_toy else "inductor"
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    return Layer(compiled, _trained(layer))


def peft(weights: Weights, lab: Lab) -> Layer:
    """PEFT's layer, without the model that it is wrapped in."""
    library = importlib.import_module("peft")
    (n, k), r = weights.weight.shape, weights.a.shape[0]
    config = library.LoraConfig(
        r=r, lora_alpha=SCALING * r, lora_dropout=weights.p, target_modules=["0"]
    )
    base = nn.Sequential(nn.Linear(k, n, **weights.options))
    wrapped = library.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0].to(weights.weight.dtype)
    _fill(layer.base_layer, weight=weights.weight, bias=weights.bias)
    _fill(layer.lora_A["default"], weight=weights.a)
    _fill(layer.lora_B["default"], weight=weights.b)
    return _module(layer)


def in_order(order: Callable[..., Tensor], weights: Weights, lab: Lab) -> Layer:
    """One of the orders in `lora_orders`."""
    if weights.p > 0:
        raise Absent("written without dropout")
    a, b = weights.a.requires_grad_(), weights.b.requires_grad_()
    return Layer(lambda x: order(x, weights.weight, weights.bias, a, b, SCALING), [a, b])


def lorafusion(weights: Weights, lab: Lab) -> Layer:
    """LoRAFusion's kernels from a checkout; they take three dimensions."""
    apply = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    a, b = weights.a.requires_grad_(), weights.b.requires_grad_()
    fused = partial(apply, dropout_p=weights.p, linear_bias=weights.bias)
    return Layer(lambda x: fused(x[None], weights.weight, a, b, SCALING)[0], [a, b])


def ours(weights: Weights, lab: Lab) -> Layer:
    """lora_fast; which implementation runs is chosen around the call, or by its dispatch."""
    return _module(layer_of(lora_fast, weights))


_FORCED = forced()
PEERS: dict[str, Callable[[Weights, Lab], Layer]] = {
    FROZEN: frozen,
    "loralib": loralib,
    "loralib-compiled": loralib_compiled,
    "peft": peft,
    "addmm-order": partial(in_order, lora_orders.addmm_order),
    "lora-first": partial(in_order, lora_orders.lora_first),
    "lorafusion": lorafusion,
    OURS: ours,
    **dict.fromkeys(_FORCED, ours),
}
LABELS = {
    FROZEN: "F.linear, frozen",
    "loralib-compiled": "torch.compile(loralib)",
    "peft": "PEFT",
    "addmm-order": "addmm order (the formula of Unsloth and Axolotl)",
    "lora-first": "LoRA-first order in plain torch",
    "lorafusion": "LoRAFusion",
}


def around(peer: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what must hold while a peer runs."""
    return _FORCED.get(peer, nullcontext)


def select(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the known peers that were asked for, ours and the frozen layer always among them."""
    return [p for p in known if not wanted or p in wanted or p in (OURS, FROZEN, "clones")]


def missing(lab: Lab) -> dict[str, str]:
    """Return the peers that can't take part in this run, with the reason."""
    found = {}
    for peer, package in (
        ("loralib", "loralib"),
        ("loralib-compiled", "loralib"),
        ("peft", "peft"),
    ):
        if importlib.util.find_spec(package) is None:
            found[peer] = f"{package} is not installed"
    found |= {} if lab.lorafusion is not None else {"lorafusion": "no --lorafusion DIR was given"}
    if lab.lorafusion is not None:
        sys.path.append(lab.lorafusion)
        try:
            importlib.import_module("lorafusion.ops.lora_v1")
        except Exception as error:
            found["lorafusion"] = f"{lab.lorafusion} can't be imported: {error}"
    if not lab.clock.is_cuda and not lab.is_toy:
        for peer in _FORCED:
            if peer != f"{OURS}:reference":
                found[peer] = "Triton's kernels need a GPU"
    return found


def _module(layer: nn.Module) -> Layer:
    return Layer(layer, _trained(layer))


def _trained(layer: nn.Module) -> list[Tensor]:
    return [p for p in layer.parameters() if p.requires_grad]


@torch.no_grad()
def _fill(module: nn.Module, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None:
            getattr(module, name).copy_(value)

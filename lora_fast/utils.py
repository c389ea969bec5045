"""Which parameters are trained and which are saved."""

from typing import Dict, Literal, get_args  # noqa: UP035, loralib has it

import torch
from torch import Tensor, nn

from lora_fast import checks
from lora_fast.bypasses import expose_effective_weight
from lora_fast.lora_layer import LoRALayer
from lora_fast.saved_state import without_wrappers

# With what `from loralib.utils import *` brings along.
__all__ = [
    "Dict",
    "LoRALayer",
    "expose_effective_weight",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "nn",
    "torch",
]

# What PEFT calls the dictionaries in which it holds its adapters by their names.
_OF_PEFT = frozenset(
    ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
)
_DICTIONARIES = (nn.ModuleDict, nn.ParameterDict)
BiasMode = Literal["none", "all", "lora_only"]
_BIAS_MODES = get_args(BiasMode)


class UnknownBiasError(ValueError, NotImplementedError):
    """`bias` is not a mode; a NotImplementedError too, which is what loralib raises."""


def mark_only_lora_as_trainable(model: nn.Module, bias: BiasMode = "none") -> None:
    """Freeze every parameter of `model` that belongs to no adapter.

    Args:
        model: any module.
        bias: `"none"` freezes all biases, `"all"` trains all of them, `"lora_only"` those of LoRA
            layers that have an adapter.

    Raises:
        UnknownBiasError: `bias` is something else; nothing was frozen.

    Note:
        A parameter belongs to an adapter when its own name begins with `lora_`, or that of what it
        parametrizes, or that of the module of a LoRA layer which holds it: a list of experts in the
        place of `lora_A`, say; or when PEFT holds it, in a dictionary of any module that is called
        `lora_A`, `lora_B` or as it calls those of embeddings. Parameters that were frozen before
        stay frozen.
        Source: loralib/utils.py:13-30.
    """
    checks.module("mark_only_lora_as_trainable", model, "named_parameters")
    _check_bias(bias)
    adapters = _Adapters(model)
    for name, parameter in model.named_parameters():
        if adapters.owner(name) is None:
            parameter.requires_grad = False
    if bias == "all":
        for name, parameter in model.named_parameters():
            if _is_bias(name):
                parameter.requires_grad = True
    elif bias == "lora_only":
        for module in filter(_is_adapted, model.modules()):
            own: Tensor | None = getattr(module, "bias", None)
            if own is not None:
                own.requires_grad = True


def lora_state_dict(model: nn.Module, bias: BiasMode = "none") -> dict[str, Tensor]:
    """Return the adapters of `model`, and the biases that `bias` names.

    Args:
        model: any module.
        bias: as for `mark_only_lora_as_trainable`: what that trains, this returns.

    Returns:
        A plain dict in the order of `model.state_dict()`, whose tensors it shares.

    Raises:
        UnknownBiasError: `bias` is not a mode.

    Note:
        Rank and alpha are not in it; `lora_fast.save` keeps them. Source: loralib/utils.py:33-49.
    """
    checks.module("lora_state_dict", model, "state_dict")
    _check_bias(bias)
    state, adapters = model.state_dict(), _Adapters(model)
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        owner = adapters.owner(key)
        if owner is not None or (bias == "all" and _is_bias(key)):
            kept[key] = value
        if owner is not None and bias == "lora_only":
            for bias_key in (owner + "bias", owner + "conv.bias"):
                if bias_key in state:
                    kept[bias_key] = state[bias_key]
    return kept


def _check_bias(bias: str) -> None:
    if bias not in _BIAS_MODES:
        raise UnknownBiasError(f"bias must be one of {', '.join(_BIAS_MODES)}, got {bias!r}")


def _leaf(name: str) -> str:
    """Return a parameter's own name; of a parametrization's the name of what it computes."""
    _, is_parametrized, computed = name.rpartition("parametrizations.")
    return computed.partition(".")[0] if is_parametrized else name.rpartition(".")[2]


def _is_lora(name: str) -> bool:
    return _leaf(name).startswith("lora_")


class _Adapters:
    """Which names of parameters, as they are in a model and its state, belong to adapters."""

    def __init__(self, model: nn.Module) -> None:
        # What only has the methods that are asked for here is no module.
        is_module = isinstance(model, nn.Module)
        modules = model.named_modules(remove_duplicate=False) if is_module else ()
        self._owners: dict[str, str] = {}
        for name, module in modules:
            owner = without_wrappers(f"{name}." if name else "")
            is_ours = isinstance(module, LoRALayer)
            for child, held in vars(module)["_modules"].items():
                is_of_peft = child in _OF_PEFT and isinstance(held, _DICTIONARIES)
                if is_of_peft or (is_ours and child.startswith("lora_")):
                    self._owners[f"{owner}{child}."] = owner

    def owner(self, name: str) -> str | None:
        """Return the prefix of what a parameter is the adapter of; None where it is of none."""
        if _is_lora(name):
            return name[: name.rindex(_leaf(name))].removesuffix("parametrizations.")
        name = without_wrappers(name)
        for prefix, owner in self._owners.items():
            if name.startswith(prefix):
                return owner
        return None


def _is_bias(name: str) -> bool:
    # in_proj_bias, bias_ih_l0, bias_k: torch's own names.
    leaf = _leaf(name)
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


def _is_adapted(module: nn.Module) -> bool:
    adapters = _Adapters(module)
    names = (name for name, _ in module.named_parameters())
    return isinstance(module, LoRALayer) and any(adapters.owner(name) is not None for name in names)

"""Which parameters are trained and which are saved."""

from collections.abc import Iterator
from typing import Dict, Literal, get_args  # noqa: UP035, loralib has it

import torch
from torch import Tensor, nn

from lora_fast import checks
from lora_fast.bypasses import expose_effective_weight
from lora_fast.lora_layer import LoRALayer

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
        parametrizes. Parameters that were frozen before stay frozen.
        Source: loralib/utils.py:13-30.
    """
    checks.module("mark_only_lora_as_trainable", model, "named_parameters")
    _check_bias(bias)
    for name, parameter in model.named_parameters():
        if not _is_lora(name):
            parameter.requires_grad = False
    if bias == "all":
        for name, parameter in model.named_parameters():
            if _is_bias(name):
                parameter.requires_grad = True
    elif bias == "lora_only":
        for module in _adapted(model):
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
    state = model.state_dict()
    if bias == "none":
        return {k: v for k, v in state.items() if _is_lora(k)}
    if bias == "all":
        return {k: v for k, v in state.items() if _is_lora(k) or _is_bias(k)}
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        if _is_lora(key):
            kept[key] = value
            prefix = key[: key.rindex(_leaf(key))].removesuffix("parametrizations.")
            for bias_key in (prefix + "bias", prefix + "conv.bias"):
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


def _is_bias(name: str) -> bool:
    # in_proj_bias, bias_ih_l0, bias_k: torch's own names.
    leaf = _leaf(name)
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        names = (name for name, _ in module.named_parameters())
        if isinstance(module, LoRALayer) and any(map(_is_lora, names)):
            yield module

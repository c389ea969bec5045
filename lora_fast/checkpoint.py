"""Adapters and whole models on disk, with what loading needs to check: r, scaling, merged or not.

A `.safetensors` file carries it in its header, any other file (`torch.save`) in the metadata that
`state_dict()` has anyway. Files of loralib, which carry none of it, load too.
"""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_fast.lora_layer import MergingLayer
from lora_fast.utils import lora_state_dict

_HEADER = "lora_fast"


def save(
    model: nn.Module, path: str | os.PathLike[str], *, lora_only: bool = True, bias: str = "none"
) -> None:
    """Write the adapters of `model`, or all of it, to `path`.

    Args:
        model: any module with LoRA layers.
        path: `*.safetensors` gives a safetensors file, any other name a `torch.save` file. The file
            appears whole or not at all.
        lora_only: whether only adapters (and the biases that `bias` names) are written.
        bias: as for `lora_state_dict`; used with `lora_only`.

    Raises:
        ValueError: the model has no LoRA layers to save.
    """
    full = model.state_dict()
    metadata = {k: v for k, v in full._metadata.items() if "lora_merged" in v}  # type: ignore[attr-defined]
    kept: dict[str, Tensor] = lora_state_dict(model, bias) if lora_only else dict(full)
    if not metadata:
        raise ValueError("save: the model has no LoRA layer with r > 0; nothing was written")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".safetensors":
            # safetensors refuses strided tensors (fan_in_fan_out) and tensors that share memory.
            tensors = {k: v.detach().contiguous().clone() for k, v in kept.items()}
            header = {_HEADER: json.dumps(metadata)}
            safetensors.torch.save_file(tensors, part, metadata=header)
        else:
            state = OrderedDict(kept)
            state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
            torch.save(state, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load what `save`, or loralib with `torch.save`, wrote.

    Args:
        model: a module whose LoRA layers have the names, ranks and scalings of the file's.
        path: the file.
        strict: whether every adapter of the model must be in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or missing, a shape, rank or scaling differs. Every difference
            is named, and nothing was loaded.
    """
    state = _read(Path(path))
    problems = _problems(model, state, strict)
    if problems:
        raise ValueError(f"load: {path} does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict(state, strict=False)


def _read(path: Path) -> "OrderedDict[str, Tensor]":
    if path.suffix != ".safetensors":
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
            raise ValueError(f"load: {path} does not hold a state dict of tensors")
        state = OrderedDict(loaded)
        state._metadata = getattr(loaded, "_metadata", OrderedDict())  # type: ignore[attr-defined]
        return state
    with safetensors.safe_open(path, framework="pt") as file:
        state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    state._metadata = OrderedDict(header)  # type: ignore[attr-defined]
    return state


def _problems(model: nn.Module, state: "OrderedDict[str, Tensor]", strict: bool) -> list[str]:
    own = model.state_dict()
    aliases = {_released_conv_key(model, key): key for key in state}
    problems = [f"{key}: not in the model" for new, key in aliases.items() if new not in own]
    for new, key in aliases.items():
        if new in own and own[new].shape != state[key].shape:
            problems.append(
                f"{key}: the file has shape {tuple(state[key].shape)}, the model "
                f"{tuple(own[new].shape)}"
            )
    if strict:
        missing = [k for k in lora_state_dict(model) if k not in aliases]
        problems += [f"{key}: not in the file" for key in missing]
    for name, layer in model.named_modules():
        saved: dict[str, Any] = state._metadata.get(name, {})  # type: ignore[attr-defined]
        if isinstance(layer, MergingLayer) and hasattr(layer, "lora_A"):
            for mine, theirs in (("r", "lora_r"), ("scaling", "lora_scaling")):
                if theirs in saved and saved[theirs] != getattr(layer, mine):
                    problems.append(
                        f"{name or 'the model'}: saved with {mine}={saved[theirs]}, the layer has "
                        f"{getattr(layer, mine)}"
                    )
    return problems


def _released_conv_key(model: nn.Module, key: str) -> str:
    """Return the key under which loralib's release writes a convolution's weight and bias."""
    prefix, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        return key
    try:
        layer = model.get_submodule(prefix)
    except AttributeError:
        return key
    is_conv = isinstance(layer, MergingLayer) and layer._weight_key() == "conv.weight"
    return f"{prefix}.conv.{leaf}".lstrip(".") if is_conv else key

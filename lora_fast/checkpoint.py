"""Adapters and whole models on disk, with what loading needs to check: r, scaling, merged or not.

A `.safetensors` file carries it in its header, any other file (`torch.save`) in the metadata that
`state_dict()` has anyway. Files of loralib, which carry none of it, load too.
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_fast import checks, interrupts, marks, sharded
from lora_fast.files import written_whole
from lora_fast.lora_layer import MergingLayer
from lora_fast.saved_state import without_wrappers
from lora_fast.utils import BiasMode, lora_state_dict

_HEADER = "lora_fast"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    lora_only: bool = True,
    bias: BiasMode = "none",
) -> None:
    """Write the adapters of `model`, or all of it, to `path`.

    Args:
        model: any module with LoRA layers.
        path: `*.safetensors` gives a safetensors file, any other name a `torch.save` file. The file
            appears whole or not at all; where `path` is a link, what it points to.
        lora_only: whether only adapters (and the biases that `bias` names) are written.
        bias: as for `lora_state_dict`; used with `lora_only`.

    Raises:
        ValueError: the model has no LoRA layers to save, or adapters whose values are not here, or
            values that a safetensors file can't hold; or there is something other than a file at
            `path`. Nothing was written.
        TypeError: `model` is no module, or `path` no path.
        FileNotFoundError: there is no such folder.
        OSError: the file can't be written: no permission, no space. What was there is as it was.

    Note:
        Of a sharded model (FSDP2, tensor parallel, FSDP1 with FULL_STATE_DICT) every rank calls
        this and writes the whole. With FSDP1's `rank0_only` the other ranks, which get no values,
        write nothing.
    """
    checks.module("save", model, "state_dict")
    target = checks.path("save", path)
    with interrupts.merge_lock:  # no other thread's eval() between the marks and the values
        _save(model, target, lora_only, bias)


def _save(model: nn.Module, path: Path, lora_only: bool, bias: BiasMode) -> None:
    full = model.state_dict()
    every: dict[str, dict[str, Any]] = full._metadata  # type: ignore[attr-defined]
    adapted = {k: v for k, v in every.items() if "lora_merged" in v or "lora_r" in v}
    if not adapted:
        raise ValueError("save: the model has no LoRA layer with r > 0; nothing was written")
    kept: dict[str, Any] = lora_state_dict(model, bias) if lora_only else dict(full)
    kept = {key: sharded.whole(value) for key, value in kept.items()}
    _refuse_parts(full, kept)
    if _has_another_rank_the_values(adapted, kept):
        return
    if lora_only and not _holders(kept):
        raise ValueError(
            "save: the model's state_dict() must hold its adapters, but has neither lora_A nor "
            "lora_B; save before they are deleted, or with lora_only=False"
        )
    _refuse_what_is_not_here(kept)
    metadata = adapted if lora_only else every
    write = _write_safetensors if _names_safetensors(path) else _write_torch
    with written_whole(_target(path)) as part:
        write(kept, metadata, part)


def _refuse_parts(full: dict[str, Any], kept: dict[str, Any]) -> None:
    """Refuse what FSDP1 keeps in parts, unless `state_dict()` is asked for the whole."""
    parts = [key for key, value in kept.items() if sharded.is_sharded_tensor(value)]
    flat = [key for key in full if _leaf(key) == "_flat_param"]
    if flat and (_elsewhere(kept) or not _holders(kept)):
        parts += flat
    if parts:
        raise ValueError(
            f"save: {', '.join(dict.fromkeys(parts))} must be plain tensors or DTensors, but are "
            "FSDP1's parts, as with SHARDED_STATE_DICT and LOCAL_STATE_DICT; save inside "
            "FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT)"
        )


def _has_another_rank_the_values(adapted: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Tell whether this is a rank to which FSDP1's `rank0_only` gives no values, or not all."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if torch.distributed.get_rank() == 0:
        return False
    holders = _holders(kept)
    # What was merged and then deleted has no rank, and is nowhere.
    here = (without_wrappers(name) in holders for name, v in adapted.items() if "lora_r" in v)
    return not all(here)


def _holders(kept: dict[str, Any]) -> set[str]:
    """Return the names of the modules whose adapters, or what these are computed from, are here."""
    prefixes = {key.rpartition("lora_")[0] for key in kept if "lora_" in key}
    return {without_wrappers(p.removesuffix("parametrizations.")[:-1]) for p in prefixes}


def _elsewhere(kept: dict[str, Any]) -> list[str]:
    return [k for k, v in kept.items() if _leaf(k) in ("lora_A", "lora_B") and v.dim() != 2]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _refuse_what_is_not_here(kept: dict[str, Any]) -> None:
    empty = [key for key, value in kept.items() if isinstance(value, Tensor) and value.is_meta]
    if empty:
        raise ValueError(
            f"save: {', '.join(empty)} hold no values, being on the meta device; load or "
            "initialize the model first"
        )
    elsewhere = _elsewhere(kept)
    if elsewhere:
        raise ValueError(
            f"save: {', '.join(elsewhere)} must have two dimensions, but hold a part at most, as "
            "under DeepSpeed's ZeRO 3; save inside deepspeed.zero.GatheredParameters"
        )


def _names_safetensors(path: Path) -> bool:
    return path.name.endswith(".safetensors")  # a file of no other name has no suffix


def _target(path: Path) -> Path:
    """Return where a file is to appear; refuse what is there but no file."""
    # Else a link would be replaced, not what it points to. Path.resolve() raises RuntimeError for
    # a link to itself, which the system refuses below.
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise ValueError(f"save: {path} is no file but a folder, a device or a pipe")
    return path


def _write_safetensors(kept: dict[str, Any], metadata: dict[str, Any], path: Path) -> None:
    others = [key for key, value in kept.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"save: a safetensors file holds tensors alone, not {', '.join(others)}; "
            "choose another file name"
        )
    # safetensors refuses strided tensors (fan_in_fan_out) and tensors that share memory.
    plain = torch.contiguous_format
    tensors = {k: v.detach().clone(memory_format=plain) for k, v in kept.items()}
    safetensors.torch.save_file(tensors, path, metadata={_HEADER: json.dumps(metadata)})


def _write_torch(kept: dict[str, Any], metadata: dict[str, Any], path: Path) -> None:
    state = OrderedDict(kept)
    state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    torch.save(state, path)


def load(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load what `save`, or loralib with `torch.save`, wrote.

    Args:
        model: a module whose LoRA layers have the names, ranks and scalings of the file's.
        path: the file.
        strict: whether every adapter of the model must be in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind; or a key is unknown or missing, a shape,
            rank or scaling differs, a dtype can't become the model's, as that of integers can't for
            a factor, or a merge can't be taken out of the weight. Every difference is named, and
            nothing was loaded.
        TypeError: `model` is no module, or `path` no path.
        OSError: the file can't be read.
        MemoryError: there is no memory for what it holds; nothing was loaded.
        RuntimeError: another rank of a sharded model could not load its file; nothing was loaded.

    Note:
        What a module's own loading raises, a hook or `set_extra_state` say, comes as it is, and
        after what was loaded before it.
    """
    checks.module("load", model, "named_modules")
    own = model.state_dict()
    state = sharded.together(
        own.values(),
        lambda: _read_fitting(model, checks.path("load", path), strict),
        "load: it failed on another rank, whose error says why; nothing was loaded",
    )
    for key, value in state.items():
        state[key] = sharded.like(value, own[_released_conv_key(model, key)])
    every: dict[str, Any] = state._metadata  # type: ignore[attr-defined]
    every.update({name: _saved_of(state, name) for name, _ in model.named_modules()})
    with interrupts.held_back():
        model.load_state_dict(state, strict=False)


def _read_fitting(model: nn.Module, path: Path, strict: bool) -> "OrderedDict[str, Any]":
    state = _read(path)
    problems = _problems(model, state, strict)
    if problems:
        raise ValueError(f"load: {path} does not fit the model:\n  " + "\n  ".join(problems))
    return state


def _read(path: Path) -> "OrderedDict[str, Any]":
    is_safetensors = _names_safetensors(path)
    with path.open("rb"):  # what the system refuses, safetensors and torch may call something else
        pass
    try:
        loaded = _read_safetensors(path) if is_safetensors else _read_torch(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):  # clear enough
        raise
    except Exception as error:  # torch has many for a damaged file
        if "can't allocate memory" in str(error):  # torch's own, for which there is no class
            raise MemoryError(f"load: no memory for what {path} holds ({error})") from error
        kind = "safetensors" if is_safetensors else "torch.save"
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"load: {path} must hold a state dict of tensors, as save or "
                f"torch.save(model.state_dict(), path) writes it, but holds a {refused[1]}; "
                "nothing was loaded"
            ) from error
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # torch's advice first
        why = f"{type(error).__name__}: {cause}".splitlines()[0]
        raise ValueError(
            f"load: {path} is damaged or no {kind} file; nothing was loaded ({why})"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and (isinstance(value, Tensor) or _is_extra(key))
        for key, value in loaded.items()
    ):
        raise ValueError(f"load: {path} does not hold a state dict of tensors")
    metadata = getattr(loaded, "_metadata", OrderedDict())
    if not isinstance(metadata, dict) or not all(isinstance(m, dict) for m in metadata.values()):
        raise ValueError(f"load: what {path} says of its layers is damaged; nothing was loaded")
    state = OrderedDict(loaded)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_extra(key: Any) -> bool:
    return _leaf(str(key)) == "_extra_state"  # a module's own, of any type


def _read_safetensors(path: Path) -> "OrderedDict[str, Tensor]":
    with safetensors.safe_open(path, framework="pt") as file:
        state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    state._metadata = OrderedDict(header)  # type: ignore[attr-defined]
    return state


def _problems(model: nn.Module, state: "OrderedDict[str, Any]", strict: bool) -> list[str]:
    own = model.state_dict()
    names = {key: _released_conv_key(model, key) for key in state}
    problems = [f"{key}: not in the model" for key, new in names.items() if new not in own]
    for key, value in state.items():
        if _is_extra(key):
            continue
        if not _is_dense(value):
            problems.append(f"{key}: the file has no plain values for it, but {_kind(value)} ones")
        elif names[key] in own:
            problems += [f"{key}: {why}" for why in _misfits(key, value, own[names[key]])]
    if strict:
        missing = set(lora_state_dict(model)) - set(names.values())
        problems += [f"{key}: not in the file" for key in own if key in missing]
    layers = [
        (name, layer, _saved_of(state, name))
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, MergingLayer) and hasattr(layer, "lora_A")
    ]
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, saved in state._metadata.items():  # type: ignore[attr-defined]
        problem = marks.wrong_version(saved, modules.get(name))
        if problem:
            problems.append(f"{name or 'the model'}: {problem}")
    for name, layer, saved in layers:
        found = marks.misfits(layer, saved)
        problems += [f"{name or 'the model'}: {problem}" for problem in found]
    if problems:  # which may not be asked more
        return problems
    values = {names[key]: value for key, value in state.items()}
    for name, layer, saved in layers:
        key = f"{name}.{layer._weight_key()}".lstrip(".")
        key = key if key in values else without_wrappers(key)
        prefix = key.removesuffix(layer._weight_key())
        problem = marks.why_not_unmerged(layer, values, prefix, saved)
        if problem:
            problems.append(f"{name or 'the model'}: {problem}")
    return problems


def _misfits(key: str, value: Tensor, mine: Tensor) -> Iterator[str]:
    """Yield why the values of a file can't take the place of the model's."""
    if mine.shape != value.shape:
        yield f"the file has shape {tuple(value.shape)}, the model {tuple(mine.shape)}"
    if not _converts(value.dtype, mine.dtype, _leaf(key) in ("lora_A", "lora_B")):
        yield f"the file has dtype {value.dtype}, which can't become the model's {mine.dtype}"


def _converts(dtype: torch.dtype, mine: torch.dtype, is_factor: bool) -> bool:
    """Tell whether values of one dtype can become those of another, as torch converts them.

    Factors without fractions can't: they were quantized, and their scales are elsewhere.
    """
    if dtype is mine:
        return True
    if dtype.is_complex and not mine.is_complex:  # torch drops the imaginary parts
        return False
    has_fractions = dtype.is_floating_point or dtype.is_complex
    if is_factor and not has_fractions and (mine.is_floating_point or mine.is_complex):
        return False
    try:
        torch.empty(1, dtype=mine).copy_(torch.empty(1, dtype=dtype))
    except RuntimeError:  # packed fractions of bytes
        return False
    return True


def _saved_of(state: Any, name: str) -> dict[str, Any]:
    """What a file says of a module, which may be wrapped here, there, or in both."""
    marks = state._metadata
    found: dict[str, Any] = marks.get(name) or marks.get(without_wrappers(name)) or {}
    return found


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and not _state_of(value)


def _state_of(value: Tensor) -> str:
    names = ("meta", "quantized", "nested")
    return next((name for name in names if getattr(value, f"is_{name}")), "")


def _kind(value: Tensor) -> str:
    return _state_of(value) or str(value.layout)


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

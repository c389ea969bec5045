"""What is compared after the training: merging, restoring, and adapters that change hands."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import lora_fast
from lora_fast.files import written_whole


@dataclass(frozen=True)
class Drift:
    """How far the base weights are from what they were.

    Attributes:
        largest: largest difference, as a part of the largest weight of its layer.
        changed: part of all weights whose bits changed.
    """

    largest: float
    changed: float


@torch.no_grad()
def merged_difference(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Return the largest difference of the logits, merged and unmerged, and the largest logit."""
    model.train()
    unmerged = _without_dropout(model, ids)
    model.eval()
    merged = model(ids)
    model.train()
    return (merged - unmerged).abs().max().item(), unmerged.abs().max().item()


@torch.no_grad()
def drift(model: nn.Module, base: dict[str, Tensor], dtype: torch.dtype, cycles: int) -> Drift:
    """Return how `cycles` times eval() and train() change the base weights of a copy in `dtype`.

    Args:
        model: the model with its trained adapters.
        base: the weights of its adapted layers as they were before training; see `base_weights`.
        dtype: what the copy computes in.
        cycles: how often it is merged and unmerged.
    """
    model = copy.deepcopy(model).to(dtype).train()
    for name, weight in base_weights(model).items():
        weight.copy_(base[name])
    for _ in range(cycles):
        model.eval()
        model.train()
    largest, changed, total = 0.0, 0, 0
    for name, weight in base_weights(model).items():
        before = base[name].to(dtype)
        difference = (weight.double() - before.double()).abs().max()
        largest = max(largest, (difference / before.double().abs().max()).item())
        changed += int((weight != before).sum())
        total += weight.numel()
    return Drift(largest, changed / max(1, total))


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen weights of the layers that have an adapter, not copied."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(module.weight, Tensor)
    }


@torch.no_grad()
def exchanged_difference(
    giver: nn.Module, giver_library: ModuleType, taker: nn.Module, ids: Tensor
) -> float:
    """Return how far the logits are apart after a copy of `taker` took the giver's adapter."""
    taker = copy.deepcopy(taker)
    state = {k: v.clone() for k, v in giver_library.lora_state_dict(giver).items()}
    result = taker.load_state_dict(state, strict=False)
    if result.unexpected_keys:
        raise RuntimeError(f"keys that only one library knows: {result.unexpected_keys}")
    expected, got = _without_dropout(giver, ids), _without_dropout(taker, ids)
    return (got - expected).abs().max().item()


def save_adapter(model: nn.Module, library: ModuleType, path: Path) -> None:
    """Write the adapter as users of the library do."""
    if library is lora_fast:
        lora_fast.save(model, path)
    else:
        with written_whole(path) as part:
            torch.save(library.lora_state_dict(model), part)


def _without_dropout(model: nn.Module, ids: Tensor) -> Tensor:
    """The unmerged model's logits; dropout is off, the layers stay in train mode."""
    rates = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    for module in rates:
        module.p = 0.0
    try:
        logits: Tensor = model(ids)
        return logits
    finally:
        for module, p in rates.items():
            module.p = p

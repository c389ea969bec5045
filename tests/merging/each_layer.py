"""A layer of each kind, and where its weight is."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import lora_fast as lora

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: lora.Linear(8, 12, r=2),
    "transposed": lambda: lora.Linear(8, 12, r=2, fan_in_fan_out=True),
    "merged_linear": lambda: lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True]),
    "embedding": lambda: lora.Embedding(12, 8, r=2),
    "conv": lambda: lora.Conv2d(4, 6, 3, r=2),
}


def weight_of(layer: Any) -> Any:
    return getattr(layer, "conv", layer).weight


def base_of(layer: Any) -> Tensor:
    found: Tensor = weight_of(layer).detach().clone()
    return found

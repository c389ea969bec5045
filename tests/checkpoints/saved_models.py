"""What the tests of saving and loading save."""

from typing import Any

from torch import nn

import lora_fast as lora
from lora_fast.testing import randomize_

NAMES = ["a.safetensors", "a.pt"]


def net(**changes: Any) -> nn.ModuleDict:
    """A model with an adapter in each of its layers; `changes` replace or remove some."""
    layers: dict[str, Any] = {
        "q": lora.Linear(4, 6, r=2),
        "qkv": lora.MergedLinear(4, 12, r=2, enable_lora=[True, False, True]),
        "conv": lora.Conv2d(2, 4, 3, r=1),
        "table": lora.Embedding(9, 4, r=2),
    }
    kept = {name: layer for name, layer in (layers | changes).items() if layer is not None}
    return randomize_(nn.ModuleDict(kept))

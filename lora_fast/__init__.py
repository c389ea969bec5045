"""LoRA layers that replace `loralib`: same layers, helpers and checkpoints, fused kernels."""

# What `from loralib import *` brings along, too.
import math
from typing import Dict, List, Optional  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import nn

from lora_fast import functional, layers, reference, testing, utils
from lora_fast.backend import get_backend, set_backend, use_backend
from lora_fast.checkpoint import load, save
from lora_fast.decisions import explain
from lora_fast.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvLoRA,
    Embedding,
    Linear,
    LoRALayer,
    MergedLinear,
)
from lora_fast.utils import lora_state_dict, mark_only_lora_as_trainable
from lora_fast.whole_model import merge, unmerge

__version__ = "0.1.0"
name = "lora"  # as loralib has it

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Dict",
    "Embedding",
    "F",
    "Linear",
    "List",
    "LoRALayer",
    "MergedLinear",
    "Optional",
    "explain",
    "functional",
    "get_backend",
    "layers",
    "load",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "math",
    "merge",
    "name",
    "nn",
    "reference",
    "save",
    "set_backend",
    "testing",
    "torch",
    "unmerge",
    "use_backend",
    "utils",
]


def __dir__() -> list[str]:
    """The public names, and those that every module has."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]

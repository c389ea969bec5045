"""Warnings that point to the caller's line."""

import sys
import warnings
from types import FrameType

_PACKAGES = ("lora_fast", "torch")


def warn(message: str, category: type[Warning]) -> None:
    """Warn as `warnings.warn`, of the innermost line that is neither of this package nor torch's.

    What calls a layer's `train()` or loads its state is often `nn.Module`, at any depth.
    """
    level, frame = 1, sys._getframe()
    while _is_inside(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _PACKAGES

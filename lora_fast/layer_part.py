"""What the parts of a LoRA layer have of one another, declared once."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_fast.merge_state import MergeState
from lora_fast.record import MergeRecord


class LayerPart:
    """A part of `lora_fast.lora_layer.MergingLayer`, which has all that is only declared here."""

    r: int
    scaling: float
    merged: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _merge_state: MergeState
    # Of the layer: where its weight is, and how the delta lies in it.
    _has_adapter: Callable[[], bool]
    _weight_owner: Callable[[], nn.Module]
    _weight_key: Callable[[], str]
    _as_delta: Callable[[Tensor], Tensor]
    _blocks: Callable[[], dict[str, Any]]
    _described: Callable[[], str]
    effective_weight: Callable[[], Tensor]
    # Of the merge.
    _merge_adapter: Callable[[], None]
    _merge_arguments: Callable[[], tuple[Tensor, Tensor, Tensor, float]]
    _unmerge_adapter: Callable[[], None]
    _merged_itself: Callable[[], bool]
    _merged_target: Callable[[], Tensor]
    _remember: Callable[[bool, MergeRecord | None], None]
    _note: Callable[..., None]
    _weight_version: Callable[[], tuple[int, ...] | None]
    # Of the other parts.
    _restore: Callable[[Tensor, MergeRecord | None], None]
    _was_converted: Callable[[], bool]
    _was_put_back: Callable[[MergeRecord], bool]
    _other_factors: Callable[[MergeRecord], bool]
    _one_scaling: Callable[[], float | None]
    _set_scaling: Callable[[], float | None]
    _register_hooks: Callable[[], None]

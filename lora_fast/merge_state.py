"""What a layer remembers of its last merge, or of the load that has undone one."""

from typing import Any, NamedTuple

from torch import Tensor

from lora_fast.record import MergeRecord


class MergeState(NamedTuple):
    """What holds of a layer until it is next merged or unmerged.

    Attributes:
        record: of the merge; None of a layer that is not merged, or was by hand.
        version: what the layer's `_weight_version` was after it; None where it can't tell.
        marks: what the layer's `_factor_marks` were; None where they can't tell.
        is_empty: whether `eval()` found no adapter, and merged nothing.
        by_loading: whether a load has merged, and not `eval()`.
        told_written: whether it was said that somebody wrote to the merged weight.
        undone: whether a load has taken a merge out of the weight that it brought.
        left: a fingerprint of the weight as that load has left it, if it has values.
        given_to_child: the base weight, until a spawned process has opened its memory.
    """

    record: MergeRecord | None = None
    version: tuple[int, ...] | None = None
    marks: tuple[tuple[Any, ...], Any] | None = None
    is_empty: bool = False
    by_loading: bool = False
    told_written: bool = False
    undone: bool = False
    left: tuple[Tensor, Tensor] | None = None
    given_to_child: Tensor | None = None

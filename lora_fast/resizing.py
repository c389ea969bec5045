"""What becomes of a merge where the weight gets another size than the adapter was made for."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_fast.layer_part import LayerPart
from lora_fast.merging import restore_
from lora_fast.record import MergeRecord, are_same, some_of


class FitsResized(LayerPart):
    """The part of a LoRA layer that knows which of its weight is the adapter's: all of it.

    But for an `Embedding`, whose table may be given more rows or fewer.
    """

    _is_as_merged: Callable[[Tensor, MergeRecord], bool]  # of another part

    def _fitted(self, lora_A: Tensor, target: Tensor) -> Tensor:
        """Return A for a weight that has, as the delta lies, the shape of `target`."""
        return lora_A

    def _merged_part(self, target: Tensor, record: MergeRecord) -> tuple[Tensor, MergeRecord]:
        """Return what is left of a weight that was merged, as a view, and the record of that."""
        return target, record


@torch.no_grad()
def of_first_columns(left: Tensor, record: MergeRecord) -> MergeRecord | None:
    """Return a record of what is left of a weight in one block, its first columns.

    Args:
        left: those columns as they are now, merged.
        record: of the whole weight.

    Returns:
        None where these can't be told to be the merged ones.
    """
    count, original = left.shape[1], record.original
    if original is None:
        if left.dtype is not record.dtype or left.device != record.lora_A.device:
            return None
        # The code is of the whole: of another shape the products might have other bits.
        original = left.new_zeros(record.shape[::-1]).t()
        original[:, :count] = left
        if record.after is None or not _shows(original, record.after, count):
            return None
        restore_(original, replace(record, spent=False))
    return replace(
        record,
        shape=left.shape,
        original=original[:, :count].clone(),
        lora_A=record.lora_A[:, :count].contiguous(),
        codes=(),
        after=None,
        evidence=None,
    )


def _shows(weight: Tensor, after: Tensor, count: int) -> bool:
    """Tell whether the first columns have the elements that a merge's record holds of them."""
    columns = torch.arange(weight.shape[1], device=weight.device).expand(weight.shape)
    is_left = some_of(columns)[0] < count
    return are_same(some_of(weight)[:, is_left], after[:, is_left])

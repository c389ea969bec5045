"""What `merge_` leaves behind so that `unmerge_` can restore the weight bit for bit."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class MergeRecord:
    """The original weight, and the delta's factors for a weight that changes while merged.

    Attributes:
        original: copy of the weight (of this rank's shard for a DTensor), its dtype and shape.
        lora_A: copy of A at the time of the merge.
        lora_B: copy of B at the time of the merge.
        scaling: lora_alpha / r at the time of the merge.
        enable_lora: enabled blocks of a grouped weight, or None.
        out_splits: widths of the blocks, or None for equal ones.
    """

    original: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    enable_lora: list[bool] | None
    out_splits: list[int] | None

    def blocks(self) -> dict[str, Any]:
        """Return the arguments that describe a grouped weight to the functions."""
        return {"enable_lora": self.enable_lora, "out_splits": self.out_splits}

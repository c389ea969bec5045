"""Moving and converting a merged layer: its original weight, into which the adapter goes again."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_fast import functional, interrupts, readers
from lora_fast.record import MergeRecord
from lora_fast.resizing import FitsResized
from lora_fast.torch_internals import storage_id


class MovesWeight(FitsResized):
    """The part of a LoRA layer that `to()`, `half()` and their like go through."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the original weight, not the merged one, and merge again."""
        record = self._merge_state.record if self.merged and not self._was_converted() else None
        if record is not None and self._is_left_by(fn):
            record = None
        if record is not None:
            self.__dict__["_is_lent"] = True  # the views of a state stay as they were saved
            self._unmerge_adapter()
        try:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            if record is not None:
                self.__dict__["_is_moving"] = True  # what is shared now, nobody else has yet
                try:
                    self._merge_moved(record)
                finally:
                    self.__dict__.pop("_is_moving", None)

    def _is_left_by(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Tell whether `fn` leaves the weight and the factors where and as they are.

        As torch's `to()` of a device and dtype that they have. Asked of an empty tensor like each.
        """
        if getattr(fn, "__module__", "") != nn.Module.__module__:
            return False  # one of somebody's own, which may ask for more or write past torch
        weight = readers.stored_weight(self._weight_owner())
        found: list[Any] = [weight, getattr(self, "lora_A", None), getattr(self, "lora_B", None)]
        for tensor in found:
            # A memory format makes no difference to what has up to three dimensions.
            if type(tensor) is not nn.Parameter or tensor.dim() > 3:
                return False
            probe = tensor.new_empty((0,) * tensor.dim())
            if probe.is_inference():  # which has no version
                return False
            before = _state_of(probe)
            if fn(probe) is not probe or _state_of(probe) != before:
                return False
        return True

    def _merge_moved(self, record: MergeRecord) -> None:
        """Merge after a conversion what was merged before it."""
        owner: Any = self._weight_owner()
        stored = readers.stored_weight(owner)
        if stored is not None and stored.is_meta:
            # A frame for merged values, as torch.func.stack_module_state's recipe makes it.
            self._remember(True, None)
        elif stored is owner._parameters.get("weight") and (self._has_adapter() or self.r <= 0):
            self._merge_adapter()
        else:  # the factors were deleted after the merge, or the weight is computed of the merged
            with interrupts.merge_lock, interrupts.held_back():
                self._fold_again(record)

    def _fold_again(self, record: MergeRecord) -> None:
        """Merge what was merged, whatever has become of the adapter, into a moved weight."""
        weight = self._merged_target()
        lora_A, lora_B = record.lora_A.to(weight), record.lora_B.to(weight)
        lora_A = self._fitted(lora_A, weight)
        found = functional.merge_(weight, lora_A, lora_B, record.scaling, **record.blocks())
        self._remember(True, found)
        self._note(marks=None)  # they would be of the present factors


def _state_of(tensor: Tensor) -> tuple[int, int, bool]:
    return tensor._version, storage_id(tensor), tensor.is_shared()

"""Is a weight that a state brings merged, whatever its mark says, and if it has none?"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import notices, sample, sums
from lora_fast.resizing import FitsResized
from lora_fast.saved_state import merge_of_view, shares_memory

_log = logging.getLogger("lora_fast.merge")
# How far, relative to it, a merged weight may be from itself after a change of dtype: in fp8 with 3
# bits an element by at most 1/16.
_ROUNDED = 0.1


class RecognisesMerged(FitsResized):
    """The part of a LoRA layer that tells whether a weight to be loaded is merged."""

    def _is_mine_merged(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        is_marked: bool,
        scaling: float | None = None,
    ) -> bool:
        """Tell whether a saved weight is this layer's base weight with the saved delta.

        Args:
            state_dict: what is loaded.
            prefix: of the layer's keys there.
            is_marked: whether the state itself says that it is merged.
            scaling: that of the merge, by the mark; None for the layer's.
        """
        summands = self._summands(state_dict, prefix, is_marked)
        scaling = self._saved_scaling(state_dict, prefix) if scaling is None else scaling
        if summands is None or scaling is None:
            return False
        if not sums.is_sum(*summands, scaling, **self._blocks()):
            return False
        # What the delta does not change can't tell, and needs no telling.
        return is_marked or not sums.is_sum(*summands, 0.0, **self._blocks())

    def _was_given_merged(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Tell whether a weight is one that this layer gave out merged, on a base that has learned.

        The best epoch's, say, which a trainer has kept in a file without marks.
        """
        given = self.__dict__.get("_given_merged", ())
        summands = self._summands(state_dict, prefix, False)
        scaling = self._saved_scaling(state_dict, prefix)
        if not given or summands is None or scaling is None:
            return False
        weight, base, lora_A, lora_B = summands
        pairs = ((base, weight), (self.lora_A, lora_A), (self.lora_B, lora_B))
        if all(torch.equal(mine.to(its.dtype), its) for mine, its in pairs):
            return False
        merged = (weight, lora_A, lora_B, scaling)
        return any(sample.is_of(taken, *merged, **self._blocks()) for taken in given)

    def _is_rather_merged(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Tell whether a saved weight is nearer to the sum than to the base weight that is here.

        In loralib each `eval()` and `train()` leaves the rounding of a sum in the base weight; and
        an average of states is not quite the sum of what it holds.
        """
        summands = self._summands(state_dict, prefix, False)
        scaling = self._saved_scaling(state_dict, prefix)
        if summands is None or scaling is None:
            return False
        if not sums.is_nearer_to_sum(*summands, scaling, **self._blocks()):
            return False
        _log.log(
            logging.WARNING if notices.is_new(self, "rather merged") else logging.DEBUG,
            "%s: a state without a mark holds in %s about the base weight that was here plus the "
            "delta of its lora_A and lora_B, so it is taken for merged, and the delta is "
            "subtracted. Save in train mode, or by lora_fast.save, what is to be loaded as it is.",
            *(self._described(), prefix + self._weight_key()),
        )
        return True

    def _saved_scaling(self, state_dict: dict[str, Any], prefix: str) -> float | None:
        """Return the factor that a state without a mark was merged with; None if not one number."""
        saved = state_dict.get(prefix + "scaling")  # of a layer that learns it
        if isinstance(saved, Tensor) and saved.numel() == 1 and not saved.is_meta:
            return float(saved)
        return self._one_scaling()

    def _summands(
        self, state_dict: dict[str, Any], prefix: str, is_marked: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return a saved weight, the base weight that is here, A and B; None if not all are."""
        weight: Any = self._weight_owner().weight
        # Without factors, and without a mark, it may be what somebody has merged for good.
        mine = {n: getattr(self, n) if is_marked else None for n in ("lora_A", "lora_B")}
        factors = (state_dict.get(prefix + name, factor) for name, factor in mine.items())
        found = [weight, state_dict.get(prefix + self._weight_key()), *factors]
        if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in found):
            return None
        base, saved, lora_A, lora_B = (t.detach().to(weight.device) for t in found)
        if not base.is_floating_point() or not saved.is_floating_point():
            return None
        target = self._as_delta(base)
        return self._as_delta(saved), target, self._fitted(lora_A, target), lora_B

    def _is_still_merged(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> bool:
        """Tell whether a saved weight is merged: a view of a layer's own is what that layer is."""
        value = state_dict.get(prefix + self._weight_key())
        is_merged = merge_of_view(value)
        if is_merged is not None:
            return is_merged
        # Somebody may have put another weight there: the mark is of the one before.
        if not metadata.get("lora_merged") or self._was_replaced(state_dict, prefix, metadata):
            return False
        if shares_memory(state_dict.get(prefix + "lora_A"), self.lora_A):
            if not isinstance(value, Tensor) or value.is_meta:
                return False
            return self._is_like_merged(value)
        return True

    def _was_replaced(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> bool:
        """Tell whether a weight is no longer the merged one, but the base, say, or another's."""
        elements, scaling = metadata.get("lora_sample"), metadata.get("lora_scaling")
        names = (self._weight_key(), "lora_A", "lora_B")
        found: list[Any] = [state_dict.get(prefix + name) for name in names]
        then: Any = metadata.get("lora_norms")
        if not (elements or then) or scaling is None:
            return False
        if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in found):
            return False
        value, lora_A, lora_B = (t.detach() for t in found)
        if not elements:
            return sample.are_other(then, lora_A, lora_B)
        dtype: Any = self._weight_owner().weight.dtype
        target = self._as_delta(value)
        lora_A = self._fitted(lora_A, target)
        now = sample.compared(*(elements, target, lora_A, lora_B, scaling, dtype), **self._blocks())
        return now in ("base", "other")

    @torch.no_grad()
    def _is_like_merged(self, value: Tensor) -> bool:
        """Tell whether a weight is the merged one in another dtype, say, and no other base."""
        base: Any = self._weight_owner().weight
        merged = self.effective_weight().float()
        saved = value.to(merged)
        distance = torch.linalg.vector_norm(saved - merged)
        is_near = distance <= _ROUNDED * torch.linalg.vector_norm(merged)
        return bool(is_near and distance < torch.linalg.vector_norm(saved - base.float()))

"""What of a LoRA layer is pickled, copied, saved and loaded, merged or not."""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lora_fast import checks, fsdp, functional, readers, sample, sharded, sums
from lora_fast.record import MergeRecord
from lora_fast.torch_internals import mode_count, storage_id

# The weights that `state_dict()` took from merged layers, and whose they are: they are views, and
# show the original as soon as the layer is in train mode again, whatever the dict's mark says.
_views_of_merged = WeakTensorKeyDictionary()


# How far, relative to it, a merged weight may be from itself after a change of dtype, to fp8 too.
_ROUNDED = 0.1


class SavedState:
    """The part of a LoRA layer that writes and reads its state, without losing the base weight.

    A merged layer is pickled with a copy of the base weight, and its `state_dict` says that it is
    merged. `lora_fast.lora_layer.MergingLayer` has what is only declared here.
    """

    r: int
    scaling: float
    merged: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _record: MergeRecord | None
    _merged_version: tuple[int, ...] | None
    _has_adapter: Callable[[], bool]
    _weight_owner: Callable[[], nn.Module]
    _as_delta: Callable[[Tensor], Tensor]
    _blocks: Callable[[], dict[str, Any]]
    _unmerge: Callable[[], None]
    effective_weight: Callable[[], Tensor]
    _restore: Callable[[Tensor, MergeRecord | None], None]

    def __copy__(self) -> Any:
        """Return a shallow copy: a layer of its own on the same tensors.

        From then on two modules hold the weight, and none of them merges. Copies of a merged layer
        are unmerged by whichever is first.
        """
        owner = self._weight_owner()
        copied = _copied_module(self)
        modules = copied.__dict__["_modules"]
        modules.update({k: _copied_module(owner) for k, v in modules.items() if v is owner})
        readers.forget_holders()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled or copied: a copy of the base weight, which any machine reads."""
        state = self.__dict__.copy()
        state.pop("_given_to_child", None)
        record = self._record
        weight = readers.stored_weight(self._weight_owner())
        if not self.merged:  # by hand, perhaps: then the record is of no use
            state["_record"] = None
        elif record is not None and record.codes and weight is not None:
            mine = sharded.local(self._base_of(weight, record))
            if get_spawning_popen() is not None:  # the child has yet to open its memory
                self.__dict__["_given_to_child"] = mine
            state["_record"] = replace(
                record,
                shape=mine.shape,
                dtype=mine.dtype,
                original=mine,
                codes=(),
                of_shard=sharded.is_dtensor(weight),
            )
        return state

    def _base_of(self, weight: Tensor, record: MergeRecord) -> Tensor:
        """Return a copy of the base weight, as the delta lies, and leave the merged one."""
        original = self._as_delta(weight.detach()).clone()
        self._restore(original, replace(record))
        return original

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied layer; its tensors start to count their versions anew."""
        super().__setstate__(state)  # type: ignore[misc]
        readers.forget_holders()
        if self._merged_version is not None:
            self._merged_version = sharded.version(self._weight_owner().weight)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is None:
            return
        record = self._record
        if self._has_adapter() or record is not None:
            metadata["lora_merged"] = self.merged
        if self._has_adapter():
            metadata["lora_r"] = self.r
            scaling = self._one_scaling() if record is None else record.scaling
            if scaling is not None:
                metadata["lora_scaling"] = scaling
        if record is not None and not record.of_shard:
            metadata["lora_sample"] = self._sample(record)

    def _save_base_of_other_factors(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Save the base weight where the factors that are saved could not undo the merge."""
        record, weight = self._record, readers.stored_weight(self._weight_owner())
        if record is None or record.of_shard or weight is None or not _can_be_read(weight):
            return
        if not self._other_factors(record):
            return
        state_dict[prefix + self._weight_key()] = self._as_delta(self._base_of(weight, record))
        metadata["lora_merged"] = False
        metadata.pop("lora_sample", None)
        if self._one_scaling() is not None:
            metadata["lora_scaling"] = self._one_scaling()

    def _other_factors(self, record: MergeRecord) -> bool:
        """Tell whether A or B has changed since the merge."""
        pairs = ((getattr(self, n, None), getattr(record, n)) for n in ("lora_A", "lora_B"))
        return any(
            type(mine) is nn.Parameter
            and not mine.is_meta
            and not _are_equal(mine.detach(), merged)
            for mine, merged in pairs
        )

    def _sample(self, record: MergeRecord) -> sample.Sample:
        weight = readers.stored_weight(self._weight_owner())
        if weight is None or not _can_be_read(weight):
            return []
        factors = (record.lora_A, record.lora_B)
        if any(factor.device != weight.device for factor in factors):
            return []
        target = self._as_delta(weight.detach())
        return sample.taken(target, *factors, record.scaling, **record.blocks())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._has_adapter():
            errors = self._misfits(state_dict, prefix)
            if errors:  # all of a layer is loaded or nothing
                error_msgs.extend(errors)
                for key in [k for k in state_dict if k.startswith(prefix)]:
                    del state_dict[key]
                return
            holds_mine = self._holds_what_is_here(state_dict, prefix)
            self._unmerge()
            self._warn_of_another_scaling(state_dict, prefix, local_metadata)
            key = prefix + self._weight_key()
            if holds_mine:
                state_dict[key] = self._weight_owner().weight.detach()  # type: ignore[operator]
            else:
                self._undo_saved_merge(state_dict, prefix, local_metadata)
        elif self.merged:  # the adapter was switched off or deleted meanwhile
            self._unmerge()
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _weight_key(self) -> str:
        return "weight"

    def _misfits(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        errors = []
        if self._was_loaded_in_place(state_dict.get(prefix + self._weight_key())):
            errors.append(
                f"{prefix + self._weight_key()}: the values were written into the model's own "
                "memory while the adapter was merged, and the base weight cannot be told from "
                "them; call train() before loading"
            )
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                errors.append(  # in torch's words, which programs look for
                    f"size mismatch for {prefix + name}: copying a param with shape {value.shape} "
                    f"from checkpoint, the shape in current model is {parameter.shape}; nothing "
                    "of the layer was loaded"
                )
        return errors

    def _was_loaded_in_place(self, value: Any) -> bool:
        """Tell whether a merged weight was overwritten, as torch.distributed.checkpoint does."""
        if not self.merged or not isinstance(value, Tensor):
            return False
        fsdp.show_shard(self._weight_owner())
        weight = readers.stored_weight(self._weight_owner())
        if weight is None:
            return False
        if storage_id(sharded.local(value)) != storage_id(sharded.local(weight)):
            return False
        # Whether a shard was written to may differ between the ranks; they must agree.
        return (
            sharded.is_dtensor(weight)
            or sharded.version(self._weight_owner().weight) != self._merged_version
        )

    def _holds_what_is_here(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Tell whether a merged layer gets its own merged weight back, even without a mark."""
        weight: Any = self._weight_owner().weight
        if not self.merged or sharded.is_dtensor(weight) or weight.is_meta:
            return False
        if prefix + self._weight_key() not in state_dict:
            return False
        mine = {self._weight_key(): weight, "lora_A": self.lora_A, "lora_B": self.lora_B}
        return all(
            prefix + name not in state_dict or _are_equal(state_dict[prefix + name], tensor)
            for name, tensor in mine.items()
        )

    def _is_mine_merged(self, state_dict: dict[str, Any], prefix: str, is_marked: bool) -> bool:
        """Tell whether a saved weight is this layer's base weight with the saved delta."""
        names = (self._weight_key(), "lora_A", "lora_B")
        weight: Any = self._weight_owner().weight
        found = [weight, *(state_dict.get(prefix + name) for name in names)]
        scaling, blocks = self._one_scaling(), self._blocks()
        if scaling is None or any(
            type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in found
        ):
            return False
        base, saved, lora_A, lora_B = (t.detach().to(weight.device) for t in found)
        base, saved = self._as_delta(base), self._as_delta(saved)
        if not base.is_floating_point() or not saved.is_floating_point():
            return False
        if not sums.is_sum(saved, base, lora_A, lora_B, scaling, **blocks):
            return False
        # What the delta does not change can't tell, and needs no telling.
        return is_marked or not sums.is_sum(saved, base, lora_A, lora_B, 0.0, **blocks)

    def _one_scaling(self) -> float | None:
        """The factor of the update, if that is one number: a subclass may have several."""
        try:
            return checks.number(self.scaling)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None

    def _is_still_merged(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> bool:
        """Tell whether a saved weight is merged: a view of a layer's own is what that layer is."""
        value = state_dict.get(prefix + self._weight_key())
        source = _views_of_merged.get(value) if isinstance(value, Tensor) else None
        layer = None if source is None else source()
        if layer is not None:
            return bool(layer.merged)
        # In this layer's own state somebody has put another weight: the mark is of the one before.
        is_merged = bool(metadata.get("lora_merged"))
        if is_merged and self._became_base(value, metadata):
            return False
        if is_merged and shares_memory(state_dict.get(prefix + "lora_A"), self.lora_A):
            if not isinstance(value, Tensor) or value.is_meta:
                return False
            return self._is_like_merged(value)
        return is_merged

    def _became_base(self, value: Any, metadata: dict[str, Any]) -> bool:
        """Tell whether the layer that a state is of was unmerged before the state was written."""
        elements = metadata.get("lora_sample")
        if not elements or type(value) not in (Tensor, nn.Parameter) or value.is_meta:
            return False
        base: Any = self._weight_owner().weight
        return sample.is_base(
            elements,
            self._as_delta(value.detach()),
            base.dtype,
            *(self.lora_A.detach(), self.lora_B.detach()),
            **self._blocks(),
        )

    @torch.no_grad()
    def _is_like_merged(self, value: Tensor) -> bool:
        """Tell whether a weight is the merged one in another dtype, say, and no other base."""
        base: Any = self._weight_owner().weight
        merged = self.effective_weight().float()
        saved = value.to(merged)
        distance = torch.linalg.vector_norm(saved - merged)
        is_near = distance <= _ROUNDED * torch.linalg.vector_norm(merged)
        return bool(is_near and distance < torch.linalg.vector_norm(saved - base.float()))

    def _undo_saved_merge(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Put the base weight where the checkpoint holds a merged one."""
        is_merged = self._is_still_merged(state_dict, prefix, metadata)
        if not is_merged and "lora_merged" in metadata:
            return
        if self._is_mine_merged(state_dict, prefix, is_merged):
            weight: Any = self._weight_owner().weight
            state_dict[prefix + self._weight_key()] = weight.detach()
        elif is_merged:
            self._subtract_saved_delta(state_dict, prefix, metadata)
        else:
            return
        self.__dict__["_undid_merge"] = True

    def _subtract_saved_delta(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        scaling = metadata.get("lora_scaling", self.scaling)
        keys = [prefix + k for k in (self._weight_key(), "lora_A", "lora_B")]
        if not all(k in state_dict for k in keys):
            computed = f"{prefix}parametrizations.lora_"
            if any(key.startswith(computed) for key in state_dict):
                self.__dict__["_loaded_merged"] = scaling  # until the factors can be computed
            elif keys[0] in state_dict:
                warnings.warn(
                    f"{keys[0]}: it was saved merged, and without the lora_A and lora_B that would "
                    "take the adapter out of it again; it is loaded as it is",
                    UserWarning,
                    stacklevel=2,
                )
            return
        weight, lora_A, lora_B = (state_dict[k] for k in keys)
        with torch.no_grad():
            weight = weight.clone()
            functional.merge_(self._as_delta(weight), lora_A, lora_B, -scaling, **self._blocks())
        state_dict[keys[0]] = weight

    def _warn_of_another_scaling(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        mine = self._one_scaling()
        scaling = metadata.get("lora_scaling", mine)
        if scaling is not None and scaling != mine and prefix + "lora_A" in state_dict:
            warnings.warn(
                f"{prefix or 'the layer'}: the adapter was saved with scaling {scaling}, the layer "
                f"has {mine}; build the layer with the same r and lora_alpha",
                UserWarning,
                stacklevel=2,
            )


def _copied_module(module: Any) -> Any:
    """A shallow copy whose dictionaries are its own."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = module.__dict__[name].copy()
    return copied


def remember_view(
    layer: SavedState, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Note whose the weight is that was just saved of a merged layer (a state_dict post-hook)."""
    layer._save_base_of_other_factors(state_dict, prefix, metadata)
    value = state_dict.get(prefix + layer._weight_key())
    if metadata.get("lora_merged", layer.merged) and isinstance(value, Tensor):
        _views_of_merged[value] = weakref.ref(layer)


def shares_memory(value: Any, parameter: Any) -> bool:
    """Tell whether a value is a view of a plain parameter, as those of `state_dict()` are."""
    if not isinstance(value, Tensor) or not isinstance(parameter, Tensor) or value.is_meta:
        return False
    if sharded.is_dtensor(value) or sharded.is_dtensor(parameter):
        return False
    return storage_id(value) == storage_id(parameter)


def _can_be_read(weight: Tensor) -> bool:
    """Tell whether a weight's values may be asked for: not while something traces or fakes them."""
    traced = torch.compiler.is_compiling() or mode_count() > 0
    return not (traced or weight.is_meta or sharded.is_dtensor(weight))


def _are_equal(value: Any, tensor: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.dtype != tensor.dtype:
        return False
    return torch.equal(value.to(tensor.device), tensor)

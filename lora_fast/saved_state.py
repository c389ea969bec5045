"""What of a LoRA layer is pickled, copied and saved, merged or not."""

import weakref
from collections import deque
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lora_fast import bypasses, checks, fsdp, interrupts, readers, sample, sharded
from lora_fast.record import MergeRecord, are_same, some_of
from lora_fast.resizing import FitsResized
from lora_fast.torch_internals import mode_count, storage_id

# The weights that `state_dict()` took from layers, and whose they are: they are views, and show the
# original as soon as the layer is in train mode again, whatever the dict's mark says.
_views = WeakTensorKeyDictionary()
# Merged weights of a layer that are recognised when they come back without a mark: as many epochs,
# say, at most 1.5 KB each.
_GIVEN = 32
# A copy's version of the weight: like no number, as the base weight was put back before.
_WRITTEN: tuple[int, ...] = ()
# What wrappers of torch put into the names of modules, and take out of the keys of a state.
_WRAPPERS = frozenset(("_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


class SavedState(FitsResized):
    """The part of a LoRA layer that writes its state, without losing the base weight.

    A merged layer is pickled with a copy of the base weight, and its `state_dict` says that it is
    merged.
    """

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
        with interrupts.merge_lock:
            return self._pickled()

    def _pickled(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        state.pop("_given_merged", None)
        bypasses.without_exposed(state)
        record, mine = self._merge_state.record, self._merge_state._replace(marks=None)
        weight = readers.stored_weight(self._weight_owner())
        if record is not None and self._was_put_back(record):
            mine = mine._replace(version=_WRITTEN)
        if not self.merged or self._was_converted():  # then the record is of no use
            mine = mine._replace(record=None)
        elif record is not None and record.codes and weight is not None:
            base = self._base_of(weight, record)
            shard = sharded.local(base)
            if get_spawning_popen() is not None:  # the child has yet to open its memory
                self._note(given_to_child=shard)
            kept = replace(
                record,
                shape=shard.shape,
                dtype=shard.dtype,
                original=shard,
                codes=(),
                lora_A=self._fitted(record.lora_A, base),
                after=None,  # it may have been resized or written to since
                of_shard=sharded.is_dtensor(weight),
            )
            mine = mine._replace(record=kept)
        state["_merge_state"] = mine._replace(given_to_child=None)
        return state

    def _base_of(self, weight: Tensor, record: MergeRecord) -> Tensor:
        """Return a copy of the base weight, as the delta lies, and leave the merged one."""
        original = self._as_delta(weight.detach()).clone()
        self._restore(original, replace(record))
        return original

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied layer; its tensors start to count their versions anew."""
        super().__setstate__(state)  # type: ignore[misc]
        own = self.__dict__
        if "merge_weights" in own:  # a layer of loralib, in whose place this one was imported
            own["_merge_weights"] = own.pop("merge_weights")
        readers.forget_holders()
        if self._merge_state.version:
            self._note(version=self._weight_version())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self._register_hooks()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is None:
            return
        record, is_merged = self._merge_state.record, self.merged and not self._merge_state.is_empty
        if record is not None and self._shows_base(record):
            record, is_merged = None, False
        # What a subclass has merged it takes out itself, as the mark can't tell how.
        if (
            self._has_adapter() or self._merge_state.record is not None
        ) and not self._merged_itself():
            metadata["lora_merged"] = is_merged
        if self._has_adapter():
            metadata["lora_r"] = self.r
        if self._has_adapter() or record is not None:
            scaling = self._one_scaling() if record is None else record.scaling
            if scaling is not None:
                metadata["lora_scaling"] = scaling
        if record is not None and not record.of_shard:
            evidence = self._evidence(record)
            metadata.update(evidence)
            self._note_given(evidence["lora_sample"])

    def _note_given(self, taken: sample.Sample) -> None:
        """Keep samples of the merged weights that were given out, by which they are recognised."""
        given = self.__dict__.setdefault("_given_merged", deque(maxlen=_GIVEN))
        if taken and (not given or given[-1] != taken):
            given.append([[*element] for element in taken])  # a state is its owner's to change

    def _shows_base(self, record: MergeRecord) -> bool:
        """Tell whether what is saved of a merged layer is its base weight, which was put back."""
        weight = readers.stored_weight(self._weight_owner())
        if record.of_shard or weight is None or not _can_be_read(weight):
            return False
        return self._was_put_back(record)

    def _save_base_of_other_factors(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Save the base weight where the factors that are saved could not undo the merge."""
        record, weight = self._merge_state.record, readers.stored_weight(self._weight_owner())
        if record is None or record.of_shard or weight is None or not _can_be_read(weight):
            return
        if self._was_converted() or (
            not self._other_factors(record) and self._one_scaling() == record.scaling
        ):
            return
        state_dict[prefix + self._weight_key()] = self._as_delta(self._base_of(weight, record))
        metadata["lora_merged"] = False
        metadata.pop("lora_sample", None)
        metadata.pop("lora_norms", None)
        if self._one_scaling() is not None:
            metadata["lora_scaling"] = self._one_scaling()

    def _other_factors(self, record: MergeRecord) -> bool:
        """Tell whether A or B, which may be computed, have changed since the merge."""
        names = ("lora_A", "lora_B")
        pairs: list[Any] = [(getattr(self, name, None), getattr(record, name)) for name in names]
        return any(
            type(mine) in (nn.Parameter, Tensor)
            and not mine.is_meta
            and not are_equal(mine.detach(), merged)
            for mine, merged in pairs
        )

    def _is_stale(self) -> bool:
        """Tell whether what is merged is no longer what the adapter is."""
        record = self._merge_state.record
        if record is None:
            return self._merge_state.is_empty and self._has_adapter()
        if record.of_shard:  # the ranks must agree
            return False
        if self._was_put_back(record):
            return True
        blocks = self._blocks()
        if record.spent or (blocks and blocks != record.blocks()):
            return True
        marks = self._factor_marks()
        if (
            marks is not None
            and self._merge_state.marks is not None
            and marks[0] == self._merge_state.marks[0]
        ):
            return False
        if not self._has_adapter():  # switched off, or deleted to free their memory
            return self.r <= 0
        is_stale = self._one_scaling() != record.scaling or self._other_factors(record)
        if not is_stale:
            self._note(marks=marks)
        return is_stale

    def _factor_marks(self) -> tuple[tuple[Any, ...], Any] | None:
        """Return what changes with A, B or the scaling, if that shows at once; None if not.

        With the parameters themselves, so that no others get their addresses meanwhile.
        """
        own = self.__dict__["_parameters"]
        lora_A, lora_B, scaling = own.get("lora_A"), own.get("lora_B"), self.__dict__.get("scaling")
        for factor in (lora_A, lora_B):
            if type(factor) is not nn.Parameter or factor.is_inference():
                return None
        if type(scaling) is not float or self.r <= 0:
            return None
        versions = (lora_A._version, lora_B._version)
        places = (id(lora_A), id(lora_B), lora_A.data_ptr(), lora_B.data_ptr())
        return (versions, places, scaling), (lora_A, lora_B)

    def _set_scaling(self) -> float | None:
        """The factor that a state does not bring along, as it does a parameter."""
        scaling = getattr(self, "scaling", None)
        return None if isinstance(scaling, nn.Parameter) else self._one_scaling()

    def _one_scaling(self) -> float | None:
        """The factor of the update, if that is one number: a subclass may have several."""
        try:
            return checks.number(self.scaling)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None

    def _evidence(self, record: MergeRecord) -> dict[str, Any]:
        """Return by what a state shows, in its metadata, whether its weight is still merged."""
        nothing: dict[str, Any] = {"lora_sample": []}
        weight = readers.stored_weight(self._weight_owner())
        if weight is None or not _can_be_read(weight):
            return nothing
        factors = (record.lora_A, record.lora_B)
        if any(factor.device != weight.device for factor in factors) or weight.is_complex():
            return nothing
        if any(type(tensor.data) is not Tensor for tensor in (weight, *factors)):
            return nothing  # of a subclass, which may hold anything
        target = self._as_delta(weight.detach())
        if record.evidence is None or not self._seems_untouched(target, record):
            lora_A = self._fitted(record.lora_A, target)
            merged = (lora_A, record.lora_B, record.scaling)
            found = sample.taken(target, *merged, **record.blocks())
            # Where the delta shows nowhere, its factors must tell.
            norms = {} if found else {"lora_norms": sample.norms(*factors)}
            record.evidence = {"lora_sample": found, **norms}
        # Copies, as a state is its owner's to change.
        kept = record.evidence.items()
        return {k: [[*x] if isinstance(x, list) else x for x in value] for k, value in kept}

    def _seems_untouched(self, target: Tensor, record: MergeRecord) -> bool:
        """Tell whether the weight is as it was merged, by its number and some of its elements."""
        if self._merge_state.version is None or self._weight_version() != self._merge_state.version:
            return False
        return record.after is not None and are_same(some_of(target), record.after)


def _copied_module(module: Any) -> Any:
    """A shallow copy whose dictionaries are its own."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    copied.__dict__.pop("_compiled_call_impl", None)  # by Module.compile(): the other one's
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = module.__dict__[name].copy()
    return copied


def remember_view(
    layer: SavedState, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Note whose the weight is that was just saved of a merged layer (a state_dict post-hook)."""
    if not isinstance(layer, SavedState):  # it was given the class of a plain one since
        return
    layer._save_base_of_other_factors(state_dict, prefix, metadata)
    value = state_dict.get(prefix + layer._weight_key())
    is_view = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    if is_view and (layer._merge_state.record is None or metadata.get("lora_merged")):
        _views[value] = weakref.ref(layer)
    _mark_unwrapped(state_dict, prefix, metadata)


def _mark_unwrapped(state_dict: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """Mark a layer under the name that its keys get, too, from which wrappers take their part."""
    name = without_wrappers(prefix[:-1])
    marks = getattr(state_dict, "_metadata", None)
    if marks is not None and name != prefix[:-1]:
        ours = {key: value for key, value in metadata.items() if key.startswith("lora_")}
        marks.setdefault(name, {}).update(ours)


def without_wrappers(name: str) -> str:
    """Return the name of a module without what activation checkpointing and FSDP1 put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def layer_of_view(value: Any) -> Any:
    """Return the layer whose weight a value of a state is a view of, if it still is."""
    source = _views.get(value) if isinstance(value, Tensor) else None
    layer: Any = None if source is None else source()
    if layer is None:
        return None
    weight = fsdp.shard(layer._weight_owner())  # also while FSDP2 shows a gathered copy
    if not shares_memory(sharded.local(value), sharded.local(weight)):
        return None  # its weight has moved on
    return layer


def merge_of_view(value: Any) -> bool | None:
    """Tell whether the layer whose weight a value is a view of is merged; None if it is no view.

    Every rank that holds a shard of the value must ask, and gets the same answer.
    """
    layer = layer_of_view(value)
    if not sharded.is_dtensor(value) or value not in _views:
        return None if layer is None else bool(layer.merged)
    # A rank may hold no element of it, or have collected the layer before the others.
    if not sharded.on_any_rank(value, layer is not None):
        return None
    return sharded.on_any_rank(value, layer is not None and bool(layer.merged))


def base_of_view(value: Any) -> Tensor | None:
    """Return a copy of the base weight of the merged layer whose weight a value is a view of.

    What the layer remembers of its merge tells it, as A, B and the scaling may be others by now.
    """
    layer = layer_of_view(value)
    if layer is None or not _can_be_read(value) or layer._was_converted():
        return None
    if not layer.merged or layer._merge_state.record is None:
        return None
    base: Tensor = layer._as_delta(layer._base_of(value, layer._merge_state.record))
    return base


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


def are_equal(value: Any, tensor: Tensor) -> bool:
    """Tell whether a value of a state has a tensor's dtype and numbers."""
    if not isinstance(value, Tensor) or value.is_meta or value.dtype != tensor.dtype:
        return False
    return are_same(value.to(tensor.device), tensor)

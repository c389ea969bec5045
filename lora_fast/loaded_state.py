"""What of a LoRA layer is loaded: the base weight, whether the state was saved merged or not."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from lora_fast import caller, fsdp, functional, readers, sample, sharded
from lora_fast.recognising import RecognisesMerged
from lora_fast.restoring import is_as_merged
from lora_fast.saved_state import are_equal, base_of_view, shares_memory
from lora_fast.torch_internals import in_fake_mode, is_fake_tensor, storage_id

_log = logging.getLogger("lora_fast.merge")
_told: set[str] = set()  # what was said once in this process


@dataclass
class Loading:
    """What the load of a layer's own state leaves to be done after that of the modules inside.

    Attributes:
        was_merged: whether `eval()` had merged the layer before.
        is_refused: whether nothing of the layer was loaded.
        mode: to set again, if the layer was put into train mode.
        scaling: of a delta to subtract, once the factors that make it can be computed.
    """

    was_merged: bool = False
    is_refused: bool = False
    mode: bool | None = None
    scaling: float | None = None


class LoadedState(RecognisesMerged):
    """The part of a LoRA layer that reads its state, without losing the base weight."""

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
        self._register_hooks()
        loading = self.__dict__["_loading"] = Loading()
        was_merged = self.merged and self._merge_state.record is not None  # by eval()
        # Before anything is judged, as they may rename or transpose; super() finds none left.
        hooks = self.__dict__["_load_state_dict_pre_hooks"]
        rest = (state_dict, prefix, local_metadata, strict)
        for hook in tuple(hooks.values()):
            hook(*rest, missing_keys, unexpected_keys, error_msgs)
        key = prefix + self._weight_key()
        given = state_dict.get(key)
        if self._was_converted() or self._takes_a_computed_one(local_metadata):
            pass  # it stays merged, and takes the like of what it is
        elif self._has_adapter():
            errors = self._misfits(state_dict, prefix)
            if errors:  # all of a layer is loaded or nothing
                error_msgs.extend(errors)
                self._keep_what_is_here(state_dict, prefix)
                loading.is_refused = True
                return
            self._warn_of_another_scaling(state_dict, prefix, local_metadata)
            is_like_mine = key in state_dict and "lora_merged" not in local_metadata
            if not (self._merged_itself() and is_like_mine):  # else only the subclass can tell
                self._load_base(state_dict, prefix, local_metadata)
        elif self.merged:  # the adapter was switched off or deleted meanwhile
            self._unmerge_adapter()
        if local_metadata.get("assign_to_params_buffers", False) and key in state_dict:
            self.__dict__["_is_lent"] = True
            self._own_parameter(state_dict, key)
        owner: Any = self._weight_owner()
        is_own = owner is self
        if not is_own and state_dict.get(key) is not given:
            self._leave_no_alias(state_dict, key)
        loading.was_merged = was_merged
        self.__dict__["_load_state_dict_pre_hooks"] = type(hooks)()
        try:
            super()._load_from_state_dict(  # type: ignore[misc]
                *rest, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self.__dict__["_load_state_dict_pre_hooks"] = hooks
            if is_own and given is not None:  # as `_leave_no_alias`, for what is loaded by now
                state_dict[key] = given

    def _leave_no_alias(self, state_dict: dict[str, Any], key: str) -> None:
        """Put a copy in the place of the layer's own weight, which a module inside is yet to load.

        Held there too, it would be looked for among all objects of the process when it is merged.
        """
        if shares_memory(state_dict[key], readers.stored_weight(self._weight_owner())):
            state_dict[key] = state_dict[key].clone()

    def _takes_a_computed_one(self, metadata: dict[str, Any]) -> bool:
        """Tell whether a merged layer, pruned since, gets the weight of one that is so as well.

        What is pruned then is the sum: without its delta it is no longer the same.
        """
        is_computed = "weight" not in self._weight_owner()._parameters
        return self.merged and is_computed and bool(metadata.get("lora_merged"))

    def _own_parameter(self, state_dict: dict[str, Any], key: str) -> None:
        """Take the memory of a dict's weight, not the parameter: a merge moves its own."""
        if type(state_dict[key]) is nn.Parameter and getattr(self, "lora_A", None) is not None:
            state_dict[key] = state_dict[key].detach()

    def _load_base(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        """Put the base weight into the state and, as far as it goes, into the layer."""
        holds_mine = self._holds_what_is_here(state_dict, prefix)
        if metadata.get("lora_merged") is False and not self._is_view_of_mine(state_dict, prefix):
            holds_mine = False  # the sum was made the base, there
        if self._merged_itself():
            self.__dict__["_loading"].mode = self.training  # type: ignore[attr-defined]
            self.train()  # type: ignore[attr-defined]
        if holds_mine or self._merge_state.record is not None:
            self._unmerge_adapter()
        else:  # by hand, or emptied since: nothing to restore, and the state's base comes
            self._remember(False, None)
        if holds_mine:
            weight: Any = self._weight_owner().weight
            state_dict[prefix + self._weight_key()] = weight.detach()
        else:
            self._undo_saved_merge(state_dict, prefix, metadata)

    def _is_view_of_mine(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Tell whether a state's weight changes with the layer's, and its mark does not."""
        weight: Any = self._weight_owner().weight
        value = state_dict.get(prefix + self._weight_key())
        return sharded.is_dtensor(weight) or shares_memory(value, weight)

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

    def _keep_what_is_here(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give the modules inside, which are loaded next, their own values; others have no use."""
        module: Any = self
        mine = {prefix + name: p.detach() for name, p in module.named_parameters()}
        mine |= {prefix + name: buffer for name, buffer in module.named_buffers()}
        for key in [k for k in state_dict if k.startswith(prefix)]:
            if key in mine:
                state_dict[key] = mine[key]
            else:
                del state_dict[key]

    def _was_loaded_in_place(self, value: Any) -> bool:
        """Tell whether a merged weight was overwritten, as torch.distributed.checkpoint does."""
        if not self.merged or self._merged_itself():
            return False
        fsdp.show_shard(self._weight_owner())
        weight = readers.stored_weight(self._weight_owner())
        if weight is None:
            return False
        is_mine = isinstance(value, Tensor) and (
            storage_id(sharded.local(value)) == storage_id(sharded.local(weight))
        )
        if not sharded.is_dtensor(weight):
            if not is_mine or self._weight_version() == self._merge_state.version:
                return False
            record, target = self._merge_state.record, self._as_delta(weight.detach())
            return record is None or not self._is_as_merged(target, record)
        # torch does not count what is written to a shard through a state; and into an empty shard
        # nothing is written at all.
        return sharded.on_any_rank(weight, is_mine and not self._is_shard_as_merged(weight))

    def _is_shard_as_merged(self, weight: Tensor) -> bool:
        shard, record = sharded.local(self._as_delta(weight.detach())), self._merge_state.record
        if shard.is_meta:
            return True
        return record is not None and record.of_shard and is_as_merged(shard, record)

    def _holds_what_is_here(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Tell whether a merged layer gets its own merged weight back, even without a mark."""
        weight: Any = self._weight_owner().weight
        value = state_dict.get(prefix + self._weight_key())
        if not self.merged or not isinstance(value, Tensor) or weight.is_meta:
            return False
        if sharded.is_dtensor(weight):  # a view of it shows the base weight from now on
            return storage_id(sharded.local(value)) == storage_id(sharded.local(weight))
        mine = {self._weight_key(): weight, "lora_A": self.lora_A, "lora_B": self.lora_B}
        return all(
            prefix + name not in state_dict or are_equal(state_dict[prefix + name], tensor)
            for name, tensor in mine.items()
        )

    def _undo_saved_merge(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Put the base weight where the checkpoint holds a merged one."""
        is_merged = self._is_still_merged(state_dict, prefix, metadata)
        if not is_merged and "lora_merged" in metadata:
            return
        key, scaling = prefix + self._weight_key(), metadata.get("lora_scaling")
        base = base_of_view(state_dict.get(key))
        if base is not None:
            state_dict[key] = base
        elif self._is_mine_merged(state_dict, prefix, is_merged, scaling):
            weight: Any = self._weight_owner().weight
            state_dict[key] = weight.detach()
        elif (
            is_merged
            or self._was_given_merged(state_dict, prefix)
            or self._is_rather_merged(state_dict, prefix)
        ):
            self._subtract_saved_delta(state_dict, prefix, metadata)
        else:
            self._tell_it_is_merged_now(state_dict, prefix)
            return
        self._note(undone=True, left=None)

    def _tell_it_is_merged_now(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Log that eval mode adds an adapter to a weight of which nothing tells what it holds."""
        module: Any = self
        if module.training or not module.merge_weights:
            return
        summands = self._summands(state_dict, prefix, False)
        if summands is None or not summands[3].any():
            return
        saved, base = summands[:2]
        if torch.equal(saved, base.to(saved.dtype)):  # whose dtypes torch may not compare
            return
        level = logging.DEBUG if _told else logging.WARNING  # as all layers of a model are alike
        _told.add("merged now")
        _log.log(
            level,
            "%s: a state without a mark, with another base weight than was here, was loaded in "
            "eval mode; it is taken for one that was saved in train mode, and the adapter is added "
            "to it. If it was saved in eval mode, so by loralib, say: load it in train mode, set "
            "merged = True on the LoRA layers, then call eval().",
            prefix + self._weight_key(),
        )

    def _note_what_is_left(self) -> None:
        """Note, after a load, the weight in which it has undone a merge."""
        weight = readers.stored_weight(self._weight_owner())
        if self._merge_state.undone and weight is not None and _has_values(weight):
            self._note(left=sample.fingerprint(sharded.local(weight.detach())))

    def _is_as_loading_left_it(self) -> bool:
        """Tell whether nobody has changed the weight since loading undid a merge in it."""
        then, weight = self._merge_state.left, readers.stored_weight(self._weight_owner())
        if then is None or weight is None or not _has_values(weight):
            return True  # there is nothing that could tell
        is_other = not sample.has_fingerprint(sharded.local(weight.detach()), then)
        if sharded.is_dtensor(weight):  # which all ranks merge or none
            is_other = sharded.on_any_rank(weight, is_other)
        return not is_other

    def _subtract_saved_delta(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        scaling = self._merged_scaling(state_dict, prefix, metadata)
        keys = [prefix + k for k in (self._weight_key(), "lora_A", "lora_B")]
        missing = [name for name in ("lora_A", "lora_B") if prefix + name not in state_dict]
        if missing or keys[0] not in state_dict:
            if keys[0] in state_dict and all(map(self._computes, missing)):
                self.__dict__["_loading"].scaling = scaling
            elif keys[0] in state_dict:
                caller.warn(
                    f"{keys[0]}: it was saved merged, and without the lora_A and lora_B that would "
                    "take the adapter out of it again; it is loaded as it is",
                    UserWarning,
                )
            return
        weight, lora_A, lora_B = (state_dict[k] for k in keys)
        if in_fake_mode() or any(is_fake_tensor(state_dict[key]) for key in keys):
            return  # there are no values to subtract from
        state_dict[keys[0]] = self._without_delta(weight, lora_A, lora_B, scaling)

    def _merged_scaling(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> float:
        """Return the factor that a state was merged with; the layer's own where nothing tells."""
        saved = self._saved_scaling(state_dict, prefix)
        scaling: float = metadata.get("lora_scaling", self.scaling if saved is None else saved)
        return scaling

    def _computes(self, name: str) -> bool:
        """Tell whether a factor is made of something else, or is kept by no state."""
        module: Any = self
        is_kept = name in module._buffers and name not in module._non_persistent_buffers_set
        is_own = name in module._parameters or is_kept
        return not is_own and isinstance(getattr(self, name, None), Tensor)

    @torch.no_grad()
    def _without_delta(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """Return a copy of a merged weight from which the delta of these factors is taken."""
        weight = weight.float() if weight.itemsize < 2 else weight.clone()  # 8 bits add nothing
        target = self._as_delta(weight)
        lora_A = self._fitted(lora_A, target)
        functional.merge_(target, lora_A, lora_B, -scaling, **self._blocks())
        return weight

    def _warn_of_another_scaling(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        mine = self._set_scaling()
        scaling = metadata.get("lora_scaling", mine)
        if mine is not None and scaling != mine and prefix + "lora_A" in state_dict:
            caller.warn(
                f"{prefix or 'the layer'}: the adapter was saved with scaling {scaling}, the layer "
                f"has {mine}; build the layer with the same r and lora_alpha",
                UserWarning,
            )


def _has_values(weight: Tensor) -> bool:
    is_plain = type(weight) in (Tensor, nn.Parameter) or sharded.is_dtensor(weight)
    is_here = not weight.is_meta and weight.layout is torch.strided
    return is_plain and is_here and not in_fake_mode()


def merge_after_load(layer: Any, incompatible_keys: Any) -> None:
    """Merge what was just loaded into a layer in eval mode (a load_state_dict post-hook)."""
    loading = layer.__dict__.pop("_loading", Loading())
    if LoadedState not in type(layer).__mro__:  # it was given the class of a plain one since
        return
    if loading.scaling is not None:  # its factors are computed, and there only now
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, (BasePruningMethod, WeightNorm)):  # else by the next forward
                hook(layer, ())
        layer._subtract(layer._merged_target(), loading.scaling)
    if loading.is_refused and layer.merged:
        layer._remember(True, layer._merge_state.record)  # what was written was what had been there
        layer._note(marks=None)  # but what was merged may be older
    # A subclass with a train() of its own merges itself, or never.
    merges = loading.was_merged or not layer._has_own_train()
    if not layer.training and layer.merge_weights and merges and not layer.merged:
        was_in = loading.was_merged and layer._merge_state.undone  # by loralib's count, too
        layer._merge_adapter()
        layer._note(by_loading=layer.merged and not was_in)
    if loading.mode is not None:
        layer.train(loading.mode)
    layer._note_what_is_left()

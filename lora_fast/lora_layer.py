"""What every LoRA layer shares: the adapter's settings, and the merge of `eval()` and `train()`."""

import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import checks, fsdp, functional, interrupts, readers, sharded
from lora_fast.record import MergeRecord

_log = logging.getLogger("lora_fast.merge")
# Merging and unmerging is seldom and short: one lock for all layers keeps them picklable.
merge_lock = threading.RLock()


def identity(x: Tensor) -> Tensor:
    """Return `x`: stands for the dropout of a layer that has none."""
    return x


class LoRALayer:
    """The settings of an adapter, as in loralib: a plain mixin, `isinstance` marks a LoRA layer.

    Args:
        r: rank; 0 or less means that there is no adapter.
        lora_alpha: scale of the update; the layer multiplies it by `lora_alpha / r`.
        lora_dropout: rate of the dropout on the adapter's input, in [0, 1].
        merge_weights: whether `eval()` folds the adapter into the weight.

    Raises:
        TypeError: `r` is not an integer or `lora_dropout` not a number.
        ValueError: `lora_dropout` is outside [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        checks.lora_dropout(lora_dropout)
        self.r = checks.rank(r)
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(p=lora_dropout) if lora_dropout > 0.0 else identity
        self.merged = False
        self.merge_weights = merge_weights


class MergingLayer:
    """The part of a LoRA layer that `eval()` merges into the weight and `train()` takes out again.

    A layer tells through `_weight_owner`, `_as_delta` and `_blocks` where its weight is and how the
    delta lies in it. The weight's original bits come back whatever happens while it is merged.
    Stands before the `nn.Module` in a layer's bases, `LoRALayer` behind it.
    """

    r: int
    lora_alpha: float
    merged: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    _record: MergeRecord | None = None
    _merged_version: tuple[int, int] | None = None
    _merge_weights: bool = True
    _in_python = True
    __jit_unused_properties__: tuple[str, ...] = ("merge_weights",)

    def _has_adapter(self) -> bool:
        # The dictionary first: hasattr takes ten times as long. A parametrized A is not in it.
        return "lora_A" in self.__dict__["_parameters"] or hasattr(self, "lora_A")

    def _look_up(self, x: Tensor, *names: str) -> list[Any]:
        """Return parameters by name, for a forward of `x`."""
        # Straight from the dictionary: nn.Module's lookups, a call each, take a twentieth of a
        # short step. What is parametrized is not there, and fx puts proxies before it.
        own = self.__dict__["_parameters"] if type(x) is Tensor else {}
        return [own[name] if name in own else getattr(self, name) for name in names]

    def _weight_owner(self) -> nn.Module:
        """Return the module that holds `weight`."""
        return self  # type: ignore[return-value]

    def _as_delta(self, weight: Tensor) -> Tensor:
        """Return the view of `weight` that has the rows and columns of the delta B A."""
        return weight

    def _blocks(self) -> dict[str, Any]:
        """Return the arguments that describe a grouped weight to the functions."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output for `x`, as the layer it replaces, and add the adapter's."""
        # As torch.jit.is_scripting(), without the call: a script has no attributes of the class.
        if hasattr(self, "_in_python"):
            return self._forward(x)
        else:
            return self._forward_in_script(x)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward_in_script(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """Return W + scaling B A, (differentiable), or the weight itself where it is merged."""
        weight: Tensor = self._weight_owner().weight  # type: ignore[assignment]
        if self.merged or not self._has_adapter():
            return weight
        merged = functional.merged_weight(
            self._as_delta(weight), self.lora_A, self.lora_B, self.scaling, **self._blocks()
        )
        return self._as_delta(merged)  # a transposition undoes itself

    @property
    def merge_weights(self) -> bool:
        """Whether `eval()` merges. Switching it off unmerges at once."""
        return self._merge_weights

    @merge_weights.setter
    def merge_weights(self, value: bool) -> None:
        self._merge_weights = value
        if not value:
            self._unmerge()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; merge the adapter into the weight in eval mode, take it out in train mode.

        Returns:
            The layer itself.
        """
        super().train(mode)  # type: ignore[misc]
        if self.merge_weights:
            change = self._unmerge if mode else self._merge
            if torch.compiler.is_compiling():  # nothing of it can be traced
                change = torch._dynamo.disable(change)
            change()
        return self

    def _obstacle(self) -> str | None:
        """Say why the weight must not be written to, if so."""
        owner = self._weight_owner()
        return readers.why_not_merge(self, owner) or fsdp.why_not_merge(owner)

    def _merge(self) -> None:
        with merge_lock:
            if self.merged:
                return
            obstacle = self._obstacle() if self._has_adapter() else None
            if obstacle is not None:
                _log.debug("%s stays unmerged: %s", self._described(), obstacle)
                return
            try:
                self._merge_now()
            except Exception as error:  # whatever it was: unmerged, the layer is right
                warnings.warn(
                    f"{self._described()} was not merged: {error}. It goes on unmerged, with "
                    "the same results; merge_weights=False avoids the attempt.",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _merge_now(self) -> None:
        """Merge, or raise with the weight and the layer as they were."""
        with merge_lock, interrupts.held_back():
            if self._has_adapter():
                arguments = self._merge_arguments()
                self._remember(True, functional.merge_(*arguments, **self._blocks()))
            else:
                self._remember(True, None)

    def _merge_arguments(self) -> tuple[Tensor, Tensor, Tensor, float]:
        owner = self._weight_owner()
        fsdp.show_shard(owner)
        target = self._as_delta(owner.weight.detach())  # type: ignore[operator]
        return target, self.lora_A, self.lora_B, self.scaling

    def _unmerge(self) -> None:
        with merge_lock, interrupts.held_back():
            if not self.merged:
                return
            if self._has_adapter():
                self._restore(self._merged_target(), self._record)
            self._remember(False, None)

    def _merged_target(self) -> Tensor:
        owner = self._weight_owner()
        fsdp.show_shard(owner)
        weight = readers.stored_weight(owner)
        if weight is None:
            raise RuntimeError(
                f"{self._described()}: the weight was decomposed (by weight norm, say) while the "
                "adapter was merged into it, and the base weight cannot be restored; call train() "
                "first, then decompose it"
            )
        return self._as_delta(weight.detach())

    def _remember(self, merged: bool, record: MergeRecord | None) -> None:
        """Set what belongs together, past `nn.Module.__setattr__`, which looks for parameters."""
        version = None if record is None else _version(self._weight_owner().weight)
        self.__dict__.update(merged=merged, _record=record, _merged_version=version)

    def _restore(self, target: Tensor, record: MergeRecord | None) -> None:
        if record is None:  # someone set `merged` by hand: do what loralib does
            functional.merge_(target, self.lora_A, self.lora_B, -self.scaling, **self._blocks())
        elif sharded.is_dtensor(target) and not record.of_shard:  # sharded while merged
            whole = sharded.whole(target)
            self._restore(whole, record)
            target.copy_(sharded.like(whole, target))
        elif self._changed_while_merged(target, record):
            _log.debug("%s: the weight changed while merged; subtracting", self._described())
            factors = (record.lora_A, record.lora_B, -record.scaling)
            functional.merge_(sharded.local(target), *factors, **record.blocks())
            sharded.count_version(target)
        else:
            functional.unmerge_(target, record)

    def _changed_while_merged(self, target: Tensor, record: MergeRecord) -> bool:
        """Tell whether somebody wrote to the weight since the merge, so that nothing is lost."""
        if (
            self._merged_version is None
            or _version(self._weight_owner().weight) == self._merged_version
        ):
            return False
        shard = sharded.local(target)
        original = shard.clone()
        functional.unmerge_(original, replace(record))
        factors = (record.lora_A, record.lora_B, record.scaling)
        functional.merge_(original, *factors, **record.blocks())
        return not torch.equal(original, shard)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled or copied: a copy of the base weight, which any machine reads."""
        state = self.__dict__.copy()
        record = self._record
        weight = readers.stored_weight(self._weight_owner())
        if record is not None and record.codes and weight is not None:
            original = self._as_delta(weight.detach()).clone()
            self._restore(original, replace(record))
            mine = sharded.local(original)
            state["_record"] = replace(
                record,
                shape=mine.shape,
                original=mine,
                codes=(),
                of_shard=sharded.is_dtensor(weight),
            )
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the original weight, not the merged one, and merge again."""
        remerge = self.merged and self._record is not None
        if remerge:
            was_meta = self._weight_owner().weight.is_meta
            self._unmerge()
        try:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            # From meta to a device the values are yet to be filled in.
            if remerge and not (was_meta and not self._weight_owner().weight.is_meta):
                self._merge()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied layer; its tensors start to count their versions anew."""
        super().__setstate__(state)  # type: ignore[misc]
        readers.forget_holders()
        if self._merged_version is not None:
            self._merged_version = _version(self._weight_owner().weight)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and self._has_adapter():
            metadata["lora_merged"] = self.merged
            metadata["lora_r"] = self.r
            metadata["lora_scaling"] = float(self.scaling)

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
            self._unmerge()
            self._undo_saved_merge(state_dict, prefix, local_metadata)
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
                errors.append(
                    f"size mismatch for {prefix + name}: the checkpoint has "
                    f"{tuple(value.shape)}, the layer {tuple(parameter.shape)}; nothing of the "
                    "layer was loaded"
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
        storages = (sharded.local(t).untyped_storage() for t in (value, weight))
        if len({storage._cdata for storage in storages}) > 1:
            return False
        # Whether a shard was written to may differ between the ranks; they must agree.
        return (
            sharded.is_dtensor(weight)
            or _version(self._weight_owner().weight) != self._merged_version
        )

    def _undo_saved_merge(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Put the base weight where the checkpoint holds a merged one."""
        scaling = metadata.get("lora_scaling", self.scaling)
        if scaling != self.scaling and prefix + "lora_A" in state_dict:
            warnings.warn(
                f"{prefix or 'the layer'}: the adapter was saved with scaling {scaling}, the layer "
                f"has {self.scaling}; build the layer with the same r and lora_alpha",
                UserWarning,
                stacklevel=2,
            )
        keys = [prefix + k for k in (self._weight_key(), "lora_A", "lora_B")]
        if not metadata.get("lora_merged") or not all(k in state_dict for k in keys):
            return
        weight, lora_A, lora_B = (state_dict[k] for k in keys)
        with torch.no_grad():
            weight = weight.clone()
            functional.merge_(self._as_delta(weight), lora_A, lora_B, -scaling, **self._blocks())
        state_dict[keys[0]] = weight

    def _described(self) -> str:
        return repr(self).split("\n")[0]

    def extra_repr(self) -> str:
        """Return the layer's own settings and the adapter's."""
        base: str = super().extra_repr()  # type: ignore[misc]
        if not self._has_adapter():
            return base
        mine = f"r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"
        return f"{base}, {mine}" if base else mine


def merge_after_load(layer: MergingLayer, incompatible_keys: Any) -> None:
    """Merge what was just loaded into a layer in eval mode (a load_state_dict post-hook)."""
    if not layer.training and layer.merge_weights:  # type: ignore[attr-defined]
        layer._merge()


def tell_no_gradient(layer: MergingLayer) -> None:
    """Log, once a layer, that a merged forward gives A and B no gradient."""
    if not layer.merged or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    told = layer.__dict__.get("_told_no_gradient", False)
    # A tracer has put its own object in the place of layer.lora_A.
    lora_A = layer.__dict__["_parameters"].get("lora_A")
    if not told and lora_A is not None and lora_A.requires_grad:
        layer.__dict__["_told_no_gradient"] = True
        _log.warning(
            "%s computes with merged weights while gradients are enabled: lora_A and lora_B get "
            "none. Call train(), or set merge_weights=False; for inference use torch.no_grad().",
            layer._described(),
        )


def _version(weight: Any) -> tuple[int, int] | None:
    """Return a number that grows with every write to a weight, where torch counts them."""
    if weight.is_inference():
        return None
    # A DTensor and the shard that it holds count separately.
    return weight._version, sharded.local(weight)._version

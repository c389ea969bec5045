"""What every LoRA layer shares: the adapter's settings, and the merge of `eval()` and `train()`."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_fast import checks, fsdp, functional, interrupts, notices, readers, sharded
from lora_fast.interrupts import merge_lock
from lora_fast.loaded_state import LoadedState, merge_after_load
from lora_fast.merge_state import MergeState
from lora_fast.moving import MovesWeight
from lora_fast.record import MergeRecord
from lora_fast.restoring import RestoresWeight, merge_layers, settle
from lora_fast.saved_state import SavedState, remember_view
from lora_fast.torch_internals import outside_of_graphs

Layer = TypeVar("Layer", bound="MergingLayer")


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
        TypeError: `r` is not an integer, or `lora_alpha` or `lora_dropout` not a number.
        ValueError: `lora_alpha` is not finite or `lora_dropout` outside [0, 1].
    """

    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        self.r = checks.adapter(r, lora_alpha, lora_dropout)
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(p=lora_dropout) if lora_dropout > 0.0 else identity
        self.merged = False
        self.merge_weights = merge_weights


class MergingLayer(SavedState, LoadedState, MovesWeight, RestoresWeight):
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
    _merge_state: MergeState = MergeState()
    _merge_weights: bool = True
    _in_python = True
    # TorchScript takes the annotations of a class for its own types.
    __jit_ignored_attributes__ = ("_merge_state",)
    __jit_unused_properties__: tuple[str, ...] = ("merge_weights",)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; three of them do what belongs to them.

        `merged = True` merges where loading has undone a saved merge, and left the weight as it is
        now: users of loralib write it after they have loaded a state that was saved merged, and
        others after they have added the delta themselves. `merged = False` folds the adapter
        into the weight for good, or takes it out where loading has merged: by loralib's count such
        a layer is not merged. `training = True` takes out what `eval()` has merged, as `train()`
        does, past which Lightning restores the mode after a validation. `r` that is set where
        `eval()` found none leaves the layer unmerged.
        """
        own = self.__dict__
        if name == "training":
            # Past nn.Module.__setattr__, which looks for parameters: part of each eval().
            object.__setattr__(self, name, value)
            if value and own.get("merged") and self.merge_weights and self._is_ours():
                outside_of_graphs(self._unmerge_adapter)
            return
        if name == "merged" and value and self._merge_state.undone:
            if self._is_as_loading_left_it():
                self._merge_now()
                self._note(by_loading=True)  # as eval() would have: merged = False is no fold yet
                return
            self._note(undone=False, left=None)
        if name == "merged" and not value and self._merge_state.by_loading:
            self._unmerge_adapter()
        super().__setattr__(name, value)
        if name == "merged" and not value and self._merge_state.record is not None:
            self._remember(False, None)
        if name == "r" and self._merge_state.is_empty:  # is switched on again
            self._remember(False, None)

    def _is_ours(self) -> bool:
        """Tell whether what is merged was merged here, and not by a subclass."""
        return self._merge_state.record is not None or self._merge_state.is_empty

    def _merged_itself(self) -> bool:
        """Tell whether a subclass with a `train()` of its own has merged, its own delta perhaps."""
        return self.merged and not self._is_ours() and self._has_own_train()

    def _has_own_train(self) -> bool:
        return type(self).train is not MergingLayer.train

    def _has_adapter(self) -> bool:
        # The dictionary first: getattr takes ten times as long, but finds a computed A too. As in
        # loralib, an `r` that is set to 0 switches the adapter off.
        if self.__dict__["_parameters"].get("lora_A") is not None:
            return self.r > 0
        # To compute it may change it, as spectral norm does in train mode.
        exists = parametrize.is_parametrized(self, "lora_A")  # type: ignore[arg-type]
        return (exists or getattr(self, "lora_A", None) is not None) and self.r > 0

    def _register_hooks(self) -> None:
        """Register what follows loading and saving, once, whoever has built the layer."""
        module: Any = self
        if merge_after_load not in module._load_state_dict_post_hooks.values():
            module.register_load_state_dict_post_hook(merge_after_load)
        if remember_view not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(remember_view)

    def _look_up(self, x: Tensor, *names: str) -> list[Any]:
        """Return parameters by name, for a forward of `x`."""
        # Straight from the dictionary: nn.Module's lookups, a call each, take a twentieth of a
        # short step. What is parametrized is not there, and fx puts proxies before it.
        own = self.__dict__["_parameters"] if type(x) is Tensor else {}
        return [own[name] if name in own else getattr(self, name) for name in names]

    def _weight_owner(self) -> nn.Module:
        """Return the module that holds `weight`."""
        return self  # type: ignore[return-value]

    def _weight_key(self) -> str:
        """Return the weight's key in the layer's state."""
        return "weight"

    def _as_delta(self, weight: Tensor) -> Tensor:
        """Return the view of `weight` that has the rows and columns of the delta B A."""
        return weight

    def _fitted_factor(self) -> Tensor:
        """Return A for the weight as it is now."""
        return self.lora_A

    def _blocks(self) -> dict[str, Any]:
        """Return the arguments that describe a grouped weight to the functions."""
        return {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Give each layer a `forward` of its own: torch.compile counts recompilations by code.

        Subclasses elsewhere inherit it, as they do all else.
        """
        super().__init_subclass__(**options)
        is_public = cls.__module__.startswith("lora_fast.") and not cls.__name__.startswith("_")
        if is_public and cls.forward is MergingLayer.forward:
            cls.forward = _own_copy(MergingLayer.forward)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output for `x`, as the layer it replaces, and add the adapter's."""
        # As torch.jit.is_scripting(), without the call: a script has no attributes of the class.
        if hasattr(self, "_in_python"):
            return self._adapted_forward(x)
        else:
            return self._forward_in_script(x)

    def _adapted_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward_in_script(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """Return W + scaling B A (differentiable), or the weight itself where it is merged."""
        weight: Tensor = self._weight_owner().weight  # type: ignore[assignment]
        if self.merged or not self._has_adapter():
            return weight
        summands = self._as_delta(weight), self._fitted_factor(), self.lora_B
        if weight.dim() > 2:  # torch makes no kernels of the rows of uneven shards
            summands = tuple(map(sharded.replicated, summands))
        merged = functional.merged_weight(*summands, self.scaling, **self._blocks())
        return self._as_delta(merged)  # a transposition undoes itself

    @property
    def merge_weights(self) -> bool:
        """Whether `eval()` merges. Switching it off unmerges at once."""
        return self._merge_weights

    @merge_weights.setter
    def merge_weights(self, value: bool) -> None:
        if not value and self.__dict__.get("merged"):
            self._unmerge_adapter()
        self._merge_weights = value  # last: what was not unmerged is left to train()

    def train(self: Layer, mode: bool = True) -> Layer:
        """Set the mode; merge the adapter into the weight in eval mode, take it out in train mode.

        `eval()` of a merged layer merges anew what has changed of A, B or the scaling.

        Returns:
            The layer itself.
        """
        super().train(mode)  # type: ignore[misc]
        if self._merge_state.by_loading:
            outside_of_graphs(self._merged_by_eval)
        if self.merge_weights:
            if self.merged == mode:
                outside_of_graphs(self._unmerge_adapter if mode else self._merge_adapter)
            elif self.merged:
                outside_of_graphs(self._merge_anew)
        return self

    def _merged_by_eval(self) -> None:
        self._note(by_loading=False)

    def _merge_anew(self) -> None:
        if self._is_stale():
            self._unmerge_adapter()
            self._merge_adapter()

    def _obstacle(self) -> str | None:
        """Say why the weight must not be written to, if so."""
        owner = self._weight_owner()
        why = fsdp.why_not_merge(self, owner) or readers.why_not_merge(self, owner)
        # The ranks that hold the shards of a weight decide together.
        return sharded.agreed(fsdp.shard(owner), why)

    def _merge_adapter(self) -> None:
        # Signals wait for the end of this: what a handler raises is no reason to stay unmerged.
        with merge_lock, interrupts.held_back():
            if self.merged:
                return
            obstacle = self._obstacle() if self._has_adapter() else None
            if obstacle is not None:
                notices.obstacle(self, obstacle)
                return
            try:
                self._fold()
            except sharded.LostRankError:  # the other ranks may be merged
                raise
            except Exception as error:  # whatever it was: unmerged, the layer is right
                if not self.merged:  # the way back may fail too; merged, it is as right
                    notices.not_merged(self, error)

    def _merge_now(self) -> None:
        """Merge, or raise with the weight and the layer as they were."""
        with merge_lock, interrupts.held_back():
            self._fold()

    def _fold(self) -> None:
        if self._has_adapter():
            (why_not,) = merge_layers([self])
            if why_not is not None:
                raise OverflowError(why_not)
        else:  # as in loralib; but nothing must be subtracted of an adapter that comes later
            self._remember(True, None)
            self._note(is_empty=True)

    def _merge_arguments(self) -> tuple[Tensor, Tensor, Tensor, float]:
        return self._target_of_merge(), self.lora_A, self.lora_B, self.scaling

    def _target_of_merge(self) -> Tensor:
        owner = self._weight_owner()
        fsdp.show_shard(owner)
        # Not by the attribute, before which Ctrl-C may leave what attention was to read.
        weight: Any = owner._parameters.get("weight", owner.weight)
        return self._writable("merge", weight)

    def _unmerge_adapter(self) -> None:
        with merge_lock, interrupts.held_back():
            if self.__dict__.get("merged"):
                self._take_out()

    def _take_out(self) -> None:  # by itself: views of the weight must be gone before the lock is
        record = self._merge_state.record
        by_hand = self._has_adapter() and not self._merge_state.is_empty
        target = self._merged_target() if record is not None or by_hand else None
        try:
            if target is not None:
                self._restore(target, record)
            self._remember(False, None)
        except BaseException:
            if self.merged and target is not None and record is not None:
                settle(self, target, record)
            raise

    def _merged_target(self) -> Tensor:
        owner = self._weight_owner()
        fsdp.show_shard(owner)
        weight = readers.stored_weight(owner)
        if weight is None:
            raise RuntimeError(
                f"{self._described()}: the weight was decomposed, fused or quantized (by weight "
                "norm, say) while the adapter was merged into it, and the base weight cannot be "
                "restored; call train() before it, or leave the adapter merged"
            )
        if self._was_converted():
            is_dense = weight.layout is torch.strided
            kind = type(weight).__name__ if is_dense else f"tensor of layout {weight.layout}"
            raise RuntimeError(
                f"{self._described()}: the weight became a {kind} while the adapter was merged "
                "into it, and the base weight cannot be restored; call train() or "
                "lora_fast.unmerge(model) before converting it, or leave it merged"
            )
        return self._writable("unmerge", weight)

    def _writable(self, what: str, weight: Tensor) -> Tensor:
        """Return the weight as the delta lies, to be written to."""
        checks.not_faked(what, weight)
        self._take_own_memory(weight)
        if not sharded.is_dtensor(weight) or weight.is_inference():
            return self._as_delta(weight.detach())
        with torch.inference_mode(False), torch.no_grad():  # torch takes no views of DTensors there
            return self._as_delta(weight.detach())

    def _weight_version(self) -> tuple[int, ...] | None:
        """Return what changes with every write to the weight that torch counts."""
        weight = readers.stored_weight(self._weight_owner())
        return None if weight is None else sharded.version(weight)

    def _take_own_memory(self, weight: Tensor) -> None:
        """Leave to others the memory that they have not lent for being written to."""
        own = self.__dict__
        is_lent = "_is_lent" in own and own.pop("_is_lent")
        if "_is_moving" not in own:
            readers.take_own_memory(weight, is_lent=is_lent)

    def _remember(self, merged: bool, record: MergeRecord | None) -> None:
        """Set what belongs together, past `nn.Module.__setattr__`, which looks for parameters."""
        version = None if record is None else self._weight_version()
        marks = None if record is None else self._factor_marks()
        self.__dict__.update(merged=merged, _merge_state=MergeState(record, version, marks))
        torch.clear_autocast_cache()  # of what a weight that learns was before

    def _note(self, **changes: Any) -> None:
        """Change some of what the layer remembers of its last merge."""
        with merge_lock:  # else what another thread remembers meanwhile would be forgotten
            self.__dict__["_merge_state"] = self._merge_state._replace(**changes)

    def _described(self) -> str:
        """Return the layer in one line, whatever modules it holds."""
        owner: Any = self._weight_owner()
        parts = [self.extra_repr()] if owner is self else [owner.extra_repr(), self.extra_repr()]
        return f"{type(self).__name__}({', '.join(filter(None, parts))})"

    def extra_repr(self) -> str:
        """Return the layer's own settings and the adapter's."""
        base: str = super().extra_repr()  # type: ignore[misc]
        if not self._has_adapter():
            return base
        mine = f"r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"
        return f"{base}, {mine}" if base else mine


def _own_copy(function: Any) -> Any:
    """The function on a code object of its own."""
    copied = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return functools.update_wrapper(copied, function)


@contextmanager
def redrawing(layer: MergingLayer) -> Iterator[None]:
    """Take a merged adapter out of the weight while both are drawn, and merge what was drawn."""
    # Not by the attribute: torch's constructors draw before a layer has any.
    was_merged = layer.__dict__.get("merged", False)
    if was_merged:
        layer._unmerge_adapter()
    yield
    if was_merged:
        layer._merge_adapter()

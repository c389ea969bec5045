"""The weights of modules that FSDP manages: the shard to merge into, and the copies to leave alone.

FSDP2 (`fully_shard`, and `replicate`, its DDP) registers either a rank's shard or, from the root's
forward to its backward, a gathered copy. FSDP1 keeps the weights of several modules in one flat
parameter.
"""

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_fast.torch_internals import storage_id


def why_not_merge(layer: Any, owner: nn.Module) -> str | None:
    """Say why the weight of a layer, which `owner` holds, must not be written to, if so."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    weight: Any = owner._parameters.get("weight")
    if weight is None:  # with use_orig_params=False a view, under the same name
        weight = vars(owner).get("weight")
    base = getattr(weight, "_base", None)
    is_flat = getattr(weight, "_fsdp_flattened", False) or getattr(base, "_fsdp_flattened", False)
    if is_flat or _is_shown_whole(layer, owner):
        return "FSDP1 keeps the weight in a flat parameter; fully_shard (FSDP2) can merge"
    return None


def _is_shown_whole(layer: Any, owner: nn.Module) -> bool:
    """Tell whether FSDP1 shows a weight for a while, in `summon_full_params` or during a load.

    With use_orig_params=False it registers parameters then that bear no mark of it, but that share
    the memory of the flat one. (ZeRO's buckets are memory of several parameters, too.)
    """
    weight, lora_A = owner._parameters.get("weight"), layer._parameters.get("lora_A")
    if vars(owner).get("_fsdp_use_orig_params", True) or weight is None or lora_A is None:
        return False
    return storage_id(weight) == storage_id(lora_A)


def show_shard(owner: nn.Module) -> None:
    """Let FSDP2 register the shard of the weight of `owner` in place of a gathered copy.

    A backward through the copy, which FSDP2 would gather anew from the changed shard, gets
    autograd's own error instead of a wrong gradient.
    """
    found = _managers.of(owner)
    if found is None:
        return
    module, parameter = found
    gathered = getattr(parameter, "_unsharded_param", None)
    if gathered is not None and not gathered.is_inference():
        torch.autograd.graph.increment_version(gathered)
    groups = list(_groups(module))
    if any(getattr(group, "_all_gather_result", None) is not None for group in groups):
        module.unshard()  # what a backward that failed has begun to gather, of the weight of then
    module.reshard()


def shard(owner: nn.Module) -> Any:
    """Return the weight of `owner` as this rank holds it, also while a gathered copy is shown."""
    found = _managers.of(owner)
    return owner._parameters.get("weight") if found is None else found[1].sharded_param


_Manager = tuple[Any, Any]


class _Managers:
    """The FSDP2 module that manages the weight of a module, and FSDP2's own record of that weight.

    They are looked for again after FSDP2 has taken a module, or one of its modules is gone.
    """

    def __init__(self) -> None:
        self.modules: list[weakref.ref[nn.Module]] = []
        self.found: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], ...]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, owner: nn.Module) -> _Manager | None:
        """Return the manager of the weight of `owner`; None where FSDP2 has nothing to do."""
        if "torch.distributed.fsdp" not in sys.modules:
            return None
        modules = _states().keyrefs()
        if modules != self.modules:
            self.find()
            self.modules = modules
        module, parameter = (ref() for ref in self.found.get(owner, (_nothing, _nothing)))
        return None if module is None or parameter is None else (module, parameter)

    def find(self) -> None:
        """Bring them up to date."""
        self.found = weakref.WeakKeyDictionary()
        for module, parameter in _fsdp_parameters():
            info = parameter._module_info
            shared = zip(info.shared_modules, info.shared_param_names, strict=True)
            for holder, name in [(info.module, info.param_name), *shared]:
                if name == "weight":
                    self.found[holder] = (weakref.ref(module), weakref.ref(parameter))


def _nothing() -> None:
    return None


_managers = _Managers()


def _states() -> Any:
    """What torch's composable functions, FSDP2 among them, keep of the modules they were given.

    No public function lists them, and a scan of all objects fails after `gc.freeze()`.
    """
    return sys.modules["torch.distributed._composable_state"]._module_state_mapping


def _fsdp_parameters() -> Iterator[_Manager]:
    """All weights that FSDP2 manages in this process."""
    fsdp = sys.modules["torch.distributed.fsdp"]
    for reference in _states().keyrefs():
        module = reference()
        if not isinstance(module, fsdp.FSDPModule):
            continue
        for group in _groups(module):
            for parameter in group.fsdp_params:
                yield module, parameter


def _groups(module: Any) -> Iterator[Any]:
    """What FSDP2 gathers together of a module."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group]
    yield from (group for group in groups if group is not None)

"""The weights of modules that FSDP manages: the shard to merge into, and the copies to leave alone.

FSDP2 (`fully_shard`) registers either a rank's shard or, from the root's forward to its backward, a
gathered copy. FSDP1 keeps the weights of several modules in one flat parameter.
"""

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def why_not_merge(owner: nn.Module) -> str | None:
    """Say why the weight of `owner` must not be written to, if so."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    weight: Any = owner._parameters.get("weight")
    base = getattr(weight, "_base", None)
    if getattr(weight, "_fsdp_flattened", False) or getattr(base, "_fsdp_flattened", False):
        return "FSDP1 keeps the weight in a flat parameter; fully_shard (FSDP2) can merge"
    return None


def show_shard(owner: nn.Module) -> None:
    """Let FSDP2 register the shard of the weight of `owner` in place of a gathered copy.

    A backward through the copy, which FSDP2 would gather anew from the changed shard, gets
    autograd's own error instead of a wrong gradient.
    """
    found = _manager(owner)
    if found is None:
        return
    module, parameter = found
    gathered = getattr(parameter, "_unsharded_param", None)
    if gathered is not None and not gathered.is_inference():
        torch.autograd.graph.increment_version(gathered)
    module.reshard()


def shard(owner: nn.Module) -> Any:
    """Return the weight of `owner` as this rank holds it, also while a gathered copy is shown."""
    found = _manager(owner)
    return owner._parameters.get("weight") if found is None else found[1].sharded_param


_Manager = tuple[Any, Any]
# The FSDP2 module that manages the weight of a module, and FSDP2's own record of that weight.
_managers: "weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], ...]]" = (
    weakref.WeakKeyDictionary()
)


def _manager(owner: nn.Module) -> _Manager | None:
    # Not getattr, which looks through all that a module can hold before it gives up.
    if not owner.__dict__.get("_is_fsdp_managed_module", False):
        return None
    if owner not in _managers:
        _managers[owner] = ()  # a weight that FSDP2 was told to ignore
        for module, parameter in _fsdp_parameters():
            info = parameter._module_info
            for holder in (info.module, *info.shared_modules):
                _managers[holder] = (weakref.ref(module), weakref.ref(parameter))
    found = [ref() for ref in _managers[owner]]
    return (found[0], found[1]) if found else None


def _fsdp_parameters() -> Iterator[_Manager]:
    """All weights that FSDP2 manages in this process; no public function lists them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in gc.get_objects():
        if not issubclass(type(module), fsdp.FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.12
            groups = [state._fsdp_param_group]
        for group in groups:
            for parameter in group.fsdp_params if group is not None else ():
                if parameter._module_info.param_name == "weight":
                    yield module, parameter

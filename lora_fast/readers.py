"""Who else reads or owns a layer's weight: what a merge must not disturb.

A merge writes to the weight in place. That is wrong for a weight that other modules hold too or
that is computed anew for every forward; such a layer stays unmerged, which gives the same results.
"""

import gc
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import parametrize

from lora_fast import sharded
from lora_fast.torch_internals import Function, is_fake_tensor, storage_id, storage_uses, untraced


def why_not_merge(layer: Any, owner: nn.Module) -> str | None:
    """Say why the weight of `layer`, held by `owner`, must not be written to, if so."""
    if vars(layer).get("max_norm") is not None:  # getattr searches long for what is not there
        return "max_norm limits the rows of the base weight, not of the merged one"
    if "weight" not in owner._parameters:
        return "the weight is computed (parametrization, pruning or weight norm)"
    if _are_computed(layer, "lora_A", "lora_B"):
        return "the adapter is computed before each forward (pruning or weight norm)"
    if is_on_meta(owner):
        return "the weight is on the meta device or under FakeTensorMode, and holds no values"
    if _takes_no_writes(owner._parameters["weight"]):
        kind = type(owner._parameters["weight"]).__name__
        return f"the weight is a {kind}, into which nothing can be merged"
    uses = _uses(owner._parameters)
    if uses == _ALONE and _UNSHARED_STORAGE is not None:
        _holders.uses.pop(id(owner._parameters["weight"]), None)
        return None
    may_be_hidden = _holders.heed(owner._parameters, uses)
    if _is_tied(owner._parameters) or _shares_memory(owner._parameters):
        return "the weight is tied: another module holds it too"
    if may_be_hidden and _has_other_holders(owner._parameters):
        return "the weight may be tied: gc.freeze() hides who else holds it"
    return None


def _are_computed(layer: nn.Module, *names: str) -> bool:
    """Tell whether hooks compute parameters anew, in which there are old values until they do."""
    own, parameters = vars(layer), layer._parameters
    return any([name in own and name not in parameters for name in names])


def is_on_meta(owner: nn.Module) -> bool:
    """Tell whether the weight has no values yet, or has them elsewhere as accelerate's hooks do."""
    weight = owner._parameters.get("weight")
    return weight is not None and (weight.is_meta or is_fake_tensor(weight))


def _takes_no_writes(weight: Tensor | None) -> bool:
    """Tell whether a write to a weight is lost, as it may be to a quantized one's plain copy."""
    if weight is None or type(weight) is nn.Parameter or sharded.is_dtensor(weight):
        return False
    kind = type(weight)
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    try:
        copied = weight.detach().clone()
        return type(copied) is not kind or torch.equal(copied.add_(1), weight.detach())
    except Exception:  # of any kind, as it has ops of its own, or has not
        return True


def stored_weight(owner: nn.Module) -> Tensor | None:
    """Return the parameter that holds the weight's values, under whatever name it has now.

    Pruning and parametrizations that came after a merge keep them; None where they were decomposed.
    """
    for name in ("weight", "weight_orig"):
        if name in owner._parameters:
            return owner._parameters[name]
    if parametrize.is_parametrized(owner, "weight"):
        steps: Any = owner.parametrizations["weight"]  # type: ignore[index]
        if not any(hasattr(step, "right_inverse") for step in steps):
            return steps.original  # type: ignore[no-any-return]
    return None


def _references(parameters: dict[str, Any]) -> int:
    return sys.getrefcount(parameters["weight"])


_UNSHARED = _references({"weight": object()})
_UNSHARED_STORAGE = storage_uses(torch.empty(1))


def _uses(parameters: dict[str, Any]) -> tuple[int, int]:
    """How many hold a module's weight, and how many its memory, where there is some."""
    references = _references(parameters)  # before there is another
    weight = parameters["weight"]
    uses = storage_uses(weight) if _has_memory(weight) else _UNSHARED_STORAGE
    return references, uses or 0


def _uses_of_weights(layer: nn.Module) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the uses of the weight of a layer, or of that of a convolution in it, by its id."""
    for module in (layer, *layer._modules.values()):
        parameters = {} if module is None else vars(module).get("_parameters", {})
        if "weight" in parameters:
            yield id(parameters["weight"]), _uses(parameters)


_ALONE = (_UNSHARED, _UNSHARED_STORAGE or 0)


def _has_memory(weight: Any) -> bool:
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return False
    return not weight.is_meta and weight.numel() > 0


_FROZEN = gc.get_freeze_count()  # Python 3.12 begins with some


def _are_hidden() -> bool:
    """Tell whether there may be modules that a scan of all objects does not see.

    Not to be asked in each merge: the frozen objects are counted one by one.
    """
    return gc.get_freeze_count() > _FROZEN


class _Holders:
    """All modules of the process that hold parameters or buffers, as of the last scan.

    A scan of all objects takes tens of ms. It is made when a weight has more references than its
    module's, and made again only after a parameter was registered somewhere or a layer was copied,
    or where a weight has got more references since, as somebody may have put it into a module.
    """

    def __init__(self) -> None:
        self.is_stale = True
        self.all_reachable = False
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.count: dict[int, int] = {}
        self.uses: dict[int, tuple[int, int]] = {}
        self.places: dict[int, list[_Place]] = {}
        self.asked: set[int] = set()
        self.asked_by: object = None

    def heed(self, parameters: dict[str, Any], uses: tuple[int, int]) -> bool:
        """Scan if it is time to, before it is asked who else holds a weight with these uses.

        Returns:
            Whether there may be holders that no scan shows: then all that is not known is one.
        """
        key = id(parameters["weight"])
        if self.is_stale or any(map(operator.gt, uses, self.uses.get(key, _ALONE))):
            if _are_hidden():
                self.uses.pop(key, None)
                return True
            self.is_stale = True
            self.scan()
        self.uses[key] = uses
        return False

    def scan(self) -> None:
        """Bring up to date what modules there are, and who holds their tensors (by their ids)."""
        if not self.is_stale:
            return
        self.is_stale, self.all_reachable = _are_hidden(), False
        self.modules, self.count, self.uses, self.places = weakref.WeakSet(), {}, {}, {}
        objects, kinds = gc.get_objects(), _with_subclasses(nn.Module)
        # In C: there may be millions, few of them modules.
        are_modules = map(kinds.__contains__, map(type, objects))
        for candidate in itertools.compress(objects, are_modules):
            if any(map(candidate.__dict__.get, _DICTS)):
                self.modules.add(candidate)
                for tensor in set(map(id, _tensors(candidate))):
                    self.count[tensor] = self.count.get(tensor, 0) + 1
                if hasattr(type(candidate), "effective_weight"):
                    self.uses.update(_uses_of_weights(candidate))

    def confirm(self, found: Callable[[], bool]) -> bool:
        """Tell whether `found()`, also without the modules that nobody can reach any more."""
        self.scan()
        is_found = found()
        if is_found and not self.all_reachable:
            gc.collect()  # takes longer than the scan
            self.is_stale = True
            self.scan()
            self.all_reachable = not self.is_stale
            is_found = found()
        return is_found

    def in_memory_of(self, weight: Tensor) -> Iterator["_Place"]:
        """Yield where other tensors of the known modules lie in the memory of a weight.

        All are looked up anew but for the other layers of one model in its `eval()` or merge: since
        then a view may have gone and a module's tensor have come, by `a.data = b.data`.
        """
        key, model = id(weight), _who_asks()
        asked_by = None if model is None else id(model)
        del model  # it is one more reference
        if key in self.asked or asked_by is None or asked_by != self.asked_by:
            self.places, self.asked, self.asked_by = {}, set(), asked_by
            for tensor in itertools.chain.from_iterable(map(_tensors, self.modules)):
                place = _place(tensor)
                if place.start < place.end:
                    self.places.setdefault(storage_id(tensor), []).append(place)
        self.asked.add(key)
        return (p for p in self.places.get(storage_id(weight), ()) if p.tensor != key)


# The code within which all questions are of one model, by its name, and where it holds the model.
_PASSES = {nn.Module.train.__code__: "self"}


def one_pass(argument: str) -> Callable[[Function], Function]:
    """Decorate a function that asks for all layers of what it has under a name, at once."""

    def note(function: Function) -> Function:
        _PASSES[function.__code__] = argument
        return function

    return note


def name_of(layer: nn.Module) -> str:
    """Return the layer's name in the model whose layers are being merged; "" where it is alone."""
    model = _who_asks()
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((name for name, module in modules if module is layer), "")


def _who_asks() -> Any:
    """The model whose layers are being merged; None where it is a layer alone."""
    frame, found = sys._getframe(), None
    while frame is not None:
        if frame.f_code in _PASSES:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if found is None else found.f_locals.get(_PASSES[found.f_code])


class _Place(NamedTuple):
    """Where a tensor lies, without holding it: its id, its first and its last + 1 address."""

    tensor: int
    start: int
    end: int


def _with_subclasses(kind: Any) -> set[Any]:
    found, new = {kind}, [kind]
    while new:
        for subclass in new.pop().__subclasses__():
            if subclass not in found:
                found.add(subclass)
                new.append(subclass)
    return found


_DICTS = ("_parameters", "_buffers")


def _tensors(module: nn.Module) -> Iterator[Any]:
    own = vars(module)
    return itertools.chain(*[own[name].values() for name in _DICTS if own.get(name)])


_holders = _Holders()


@untraced
def forget_holders(*args: object) -> None:
    """Scan again when it is next asked who holds a parameter."""
    _holders.is_stale = True


def _is_tied(parameters: dict[str, Any]) -> bool:
    """Tell whether another module holds the same tensor."""
    if _references(parameters) <= _UNSHARED:  # only this dict does
        return False
    key = id(parameters["weight"])
    return _holders.confirm(lambda: _holders.count.get(key, 0) > 1)


def _shares_memory(parameters: dict[str, Any]) -> bool:
    """Tell whether a module holds another tensor in the same memory, as by `a.data = b.data`."""
    if not _has_memory(parameters["weight"]):
        return False
    if _UNSHARED_STORAGE is not None and storage_uses(parameters["weight"]) == _UNSHARED_STORAGE:
        return False

    def is_shared() -> bool:
        weight = parameters["weight"]
        mine = _place(weight)
        others = _holders.in_memory_of(weight)
        return any(it.start < mine.end and mine.start < it.end for it in others)

    return _holders.confirm(is_shared)


def _has_other_holders(parameters: dict[str, Any]) -> bool:
    """Tell whether anything, a module or not, holds a module's weight or its memory."""
    if _references(parameters) > _UNSHARED:
        return True
    weight = parameters["weight"]
    counted = _UNSHARED_STORAGE is not None and type(weight) is nn.Parameter
    return counted and storage_uses(weight) != _UNSHARED_STORAGE


def take_own_memory(weight: Tensor, *, is_lent: bool) -> None:
    """Move a weight out of memory in which others would see it merged, before it is written to.

    Args:
        weight: the parameter.
        is_lent: whether a state dict may hold its memory, of which it was loaded (`assign=True`) or
            which shows what was merged before a conversion.
    """
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return
    # Other processes (all memory of a GPU calls itself shared), and whoever loads the dict again.
    # An array of numpy, a file: torch did not make it, and does not tell who else holds it.
    storage = weight.untyped_storage()
    is_others = weight.is_cpu and (storage.is_shared() or not storage.resizable())
    del storage  # it is one more use
    if is_others or (is_lent and storage_uses(weight) != _UNSHARED_STORAGE):
        with torch.inference_mode(weight.is_inference()):  # as which it must go on
            weight.data = weight.data.clone()


def _place(tensor: Any) -> _Place:
    """The place of a tensor; an empty one for what has no elements in memory."""
    nowhere = _Place(id(tensor), 0, 0)
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout is not torch.strided:
        return nowhere
    if tensor.is_meta or tensor.numel() == 0:
        return nowhere
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a buffer that a transform of torch.func has in its hands
        return nowhere
    return _Place(id(tensor), start, start + (last + 1) * tensor.element_size())


register_module_parameter_registration_hook(forget_holders)

"""What a file says of a layer beside its values; what cannot be so is refused before a load.

The marks are those of `SavedState`: `lora_r`, `lora_scaling`, `lora_merged` and so on; and
`version`, which torch keeps for every module.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lora_fast.lora_layer import MergingLayer


def misfits(layer: MergingLayer, saved: dict[str, Any]) -> Iterator[str]:
    """Yield what of a layer's marks is damaged, or is not so of this layer.

    Args:
        layer: a layer with an adapter.
        saved: the marks that the file has for it, of any types.
    """
    here = {"lora_r": layer.r, "lora_scaling": layer._set_scaling()}
    for mark, (expected, is_right) in _MARKS.items():
        if mark not in saved:
            continue
        value, mine = saved[mark], here.get(mark)
        if not is_right(value):
            yield f"the file's {mark} must be {expected}, got {value!r:.60}"
        elif mine is not None and value != mine:
            name = mark.removeprefix("lora_")
            yield f"saved with {name}={value}, the layer has {mine}"


def wrong_version(saved: dict[str, Any], module: nn.Module | None) -> str | None:
    """Say what is wrong with the version of a module's state, which its own loading may compare.

    Args:
        saved: the marks that the file has for any module, of any types.
        module: the one that is to load it, which may have a version of another kind.
    """
    version = saved.get("version")
    if version is None or type(version) in (int, type(getattr(module, "_version", None))):
        return None
    return f"the file's version must be an integer, got {version!r:.60}"


def why_not_unmerged(
    layer: MergingLayer, state: dict[str, Any], prefix: str, saved: dict[str, Any]
) -> str | None:
    """Say why the adapter can't be taken out of a weight that was saved merged, if so.

    By its mark; or, where it has none, by what loading will take it for.

    Args:
        layer: the layer that is to load it.
        state: the file's values, under the names that the layer has for them.
        prefix: of the layer's names there.
        saved: the layer's marks, which do not misfit.
    """
    keys = [prefix + name for name in (layer._weight_key(), "lora_A", "lora_B")]
    if not all(key in state for key in keys):
        return None
    is_marked = layer._is_still_merged(state, prefix, saved)
    if not is_marked and "lora_merged" in saved:
        return None
    weight, lora_A, lora_B = (state[key].detach() for key in keys)
    scaling = layer._merged_scaling(state, prefix, saved)
    try:
        layer._without_delta(weight, lora_A, lora_B, scaling)
    except (TypeError, ValueError, OverflowError) as error:
        # The base weight may be here, and need not be computed.
        is_here = isinstance(error, OverflowError) and (
            layer._holds_what_is_here(state, prefix)
            or layer._is_mine_merged(state, prefix, is_marked)
        )
        if is_here or not (is_marked or _is_taken_for_merged(layer, state, prefix)):
            return None
        return f"its adapter can't be taken out of the saved weight: {error}"
    return None


def _is_taken_for_merged(layer: MergingLayer, state: dict[str, Any], prefix: str) -> bool:
    return layer._was_given_merged(state, prefix) or layer._is_rather_merged(state, prefix)


def _is_number(value: Any) -> bool:
    # An integer of more than 64 bits fits no tensor, and perhaps no float.
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_sample(value: Any) -> bool:
    return isinstance(value, list) and all(
        _are_numbers(element, 4) and all(0 <= place < 2**63 for place in element[:2])
        for element in value
    )


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_number, value))


_MARKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_r": ("an integer", lambda value: type(value) is int and _is_number(value)),
    "lora_scaling": ("a number", _is_number),
    "lora_merged": ("True or False", lambda value: type(value) is bool),
    "lora_sample": ("a list of elements, four numbers each", _is_sample),
    "lora_norms": ("a list of two numbers", lambda value: _are_numbers(value, 2)),
}

"""What a LoRA layer tells, where its results are right and yet not what somebody may expect."""

import logging

import torch

from lora_fast import caller, readers
from lora_fast.layer_part import LayerPart

_log = logging.getLogger("lora_fast.merge")


def is_new(layer: LayerPart, what: str) -> bool:
    """Tell whether a layer tells something for the first time, and note that it has."""
    told: set[str] = layer.__dict__.setdefault("_told", set())
    if what in told:
        return False
    told.add(what)
    return True


def obstacle(layer: LayerPart, why: str) -> None:
    """Log, once a layer, that `eval()` does not merge it: who exports its weight must know."""
    is_on_meta = readers.is_on_meta(layer._weight_owner())  # nobody exports that
    _log.log(
        logging.WARNING if is_new(layer, why) and not is_on_meta else logging.DEBUG,
        "%s stays unmerged in eval mode: %s. Its outputs are right, but its weight is the base "
        "weight alone; effective_weight() has the sum that eval() would have stored.",
        *(layer._described(), why),
    )


def not_merged(layer: LayerPart, error: Exception) -> None:
    """Warn, by its name in the model, that a layer could not be merged."""
    name = readers.name_of(layer)  # type: ignore[arg-type]
    what = f"{name}: {layer._described()}" if name else layer._described()
    caller.warn(
        f"{what} was not merged: {error}. It goes on unmerged, with the same results; "
        "merge_weights=False avoids the attempt.",
        RuntimeWarning,
    )


def no_gradient(layer: LayerPart) -> None:
    """Log, once a layer, that a merged forward gives A and B no gradient."""
    # First, so that no graph asks whether a layer without an adapter is merged.
    if torch.compiler.is_compiling() or not layer.merged or not torch.is_grad_enabled():
        return
    # A tracer has put its own object in the place of layer.lora_A.
    lora_A = layer.__dict__["_parameters"].get("lora_A")
    if lora_A is not None and lora_A.requires_grad and is_new(layer, "no gradient"):
        _log.warning(
            "%s computes with merged weights while gradients are enabled: lora_A and lora_B get "
            "none. Call train(), or set merge_weights=False; for inference use torch.no_grad().",
            layer._described(),
        )

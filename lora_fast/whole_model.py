"""Merging and unmerging all adapters of a model at once."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lora_fast import checks, interrupts, merging, readers, sharded
from lora_fast.interrupts import merge_lock
from lora_fast.lora_layer import MergingLayer
from lora_fast.record import MergeRecord
from lora_fast.restoring import merge_layers, settle
from lora_fast.torch_internals import outside_of_graphs

Layers = dict[str, MergingLayer]
# Weights from which a batch is merged, and Ctrl-C heard, before the next begins: at 1 ns a weight,
# which a slow CPU takes, after a fifteenth of a second.
_BATCH = 2**26


def merge(model: nn.Module, *, progress: bool = False) -> int:
    """Fold every adapter of `model` into its weight, whatever `merge_weights` says; all or nothing.

    Layers that are merged already stay so, but for those whose adapter has changed since: these are
    merged anew, unless FSDP2 or tensor parallel shards them: call `unmerge` first. `unmerge`
    restores the weights bit for bit; so does `train()` where `merge_weights` is set.

    Args:
        model: any module with LoRA layers.
        progress: whether to show a progress bar.

    Returns:
        The number of layers that were merged.

    Raises:
        ValueError: there is nothing to merge: no LoRA layer has an adapter, or all are merged.
        TypeError: `model` is no module.
        RuntimeError: a layer can't be merged, because its weight is tied, say, or would overflow,
            or its class has a `train()` and a `forward()` of its own. The message names it; every
            layer is as it was. The same holds for any other exception.
    """
    checks.module("merge", model, "named_modules")
    return outside_of_graphs(_merge, model, progress)


@readers.one_pass("model")
def _merge(model: nn.Module, progress: bool) -> int:
    with merge_lock:  # what is to be merged must be so until it is
        return _merge_layers(_adapted(model), progress)


def _merge_layers(layers: Layers, progress: bool) -> int:
    stale = {name: layer for name, layer in layers.items() if layer.merged and layer._is_stale()}
    todo = {name: m for name, m in layers.items() if not m.merged or name in stale}
    if not layers:
        raise ValueError("merge: the model has no LoRA layer with r > 0")
    if not todo:
        raise ValueError(
            f"merge: all {len(layers)} LoRA layers of the model are merged already; unmerge(model) "
            "or train() undoes it, also where the adapters of sharded layers have changed since"
        )
    obstacles = [(name, why) for name, layer in todo.items() if (why := _why_not(layer))]
    if obstacles:
        told = [f"{name or 'the model'}: {why}" for name, why in obstacles]
        raise RuntimeError("merge: nothing was merged. " + "; ".join(told))
    done: list[MergingLayer] = []
    records = {name: layer._merge_state.record for name, layer in stale.items()}
    try:
        with interrupts.held_back():
            for layer in stale.values():
                layer._unmerge_adapter()
        for batch in _shown(todo, "merge", progress):
            done += batch.values()
            _merge_batch(batch)
    except BaseException:
        # The stack goes on after an error, from the last to the first.
        with interrupts.held_back(), ExitStack() as each:
            for name, layer in stale.items():
                each.callback(_fold_again, layer, records[name])
            for layer in done:
                each.callback(layer._unmerge_adapter)
        raise
    return len(done)


def _why_not(layer: MergingLayer) -> str | None:
    """Say why a layer can't be merged, if so: by ours, which knows B A alone."""
    is_ours = type(layer).forward.__module__.startswith("lora_fast.")
    if layer._has_own_train() and not is_ours:
        return "its class has a train() and a forward() of its own, perhaps for another delta"
    return layer._obstacle()


def _fold_again(layer: MergingLayer, record: MergeRecord | None) -> None:
    if record is not None and not layer.merged:
        layer._fold_again(record)


def unmerge(model: nn.Module, *, progress: bool = False) -> int:
    """Take every merged adapter of `model` out of its weight, bit for bit; all or nothing.

    Args:
        model: any module with LoRA layers.
        progress: whether to show a progress bar.

    Returns:
        The number of layers that were unmerged.

    Raises:
        ValueError: there is nothing to unmerge: no LoRA layer is merged.
        TypeError: `model` is no module.
    """
    checks.module("unmerge", model, "named_modules")
    return outside_of_graphs(_unmerge, model, progress)


def _unmerge(model: nn.Module, progress: bool) -> int:
    with merge_lock:
        return _unmerge_layers(_merged(model), progress)


def _unmerge_layers(layers: Layers, progress: bool) -> int:
    if not layers:
        raise ValueError(
            "unmerge: no LoRA layer of the model is merged; merge(model) or eval() merges"
        )
    done: list[MergingLayer] = []
    try:
        for batch in _shown(layers, "unmerge", progress):
            done += batch.values()
            _unmerge_batch(batch)
    except BaseException:
        with interrupts.held_back(), ExitStack() as each:
            for layer in done:
                if not layer.merged and layer._has_adapter():
                    each.callback(layer._merge_now)
        raise
    return len(done)


def _merge_batch(batch: Layers) -> None:
    """Merge layers of one device and dtype together, on a GPU by one launch."""
    with interrupts.held_back():
        obstacles = merge_layers(list(batch.values()))
    for name, why in zip(batch, obstacles, strict=True):
        if why is not None:
            raise RuntimeError(f"merge: nothing was merged. {name or 'the model'}: {why}")


def _unmerge_batch(batch: Layers) -> None:
    """Unmerge layers likewise; those whose weight somebody changed, each by itself."""
    with interrupts.held_back():
        found = [(layer, _restorable(layer)) for layer in batch.values()]
        # Copies share a record, which serves one at a time.
        by_record = {id(pair[1]): (layer, *pair) for layer, pair in found if pair is not None}
        together = list(by_record.values())
        try:
            merging.unmerge_many([t for _, t, _ in together], [r for _, _, r in together])
            for layer, _, _ in together:
                layer._remember(False, None)
        except BaseException:
            for layer, target, record in together:
                if layer.merged:
                    settle(layer, target, record)
            raise
        for layer, _ in found:
            if layer.merged:
                layer._unmerge_adapter()


def _restorable(layer: MergingLayer) -> tuple[Tensor, MergeRecord] | None:
    """A merged weight and its record, if that is all it takes to restore it."""
    target, record = layer._merged_target(), layer._merge_state.record
    if record is None or record.spent or sharded.is_dtensor(target):
        return None
    return None if layer._was_written(target, record) else (target, record)


def _adapted(model: nn.Module) -> Layers:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and module._has_adapter()
    }


def _merged(model: nn.Module) -> Layers:
    """Also those whose adapter was switched off while it was merged."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer)
        and module.merged
        and (module._merge_state.record is not None or module._has_adapter())
    }


def _batches(layers: Layers) -> list[Layers]:
    """Layers whose weights have one device and dtype, up to a size."""
    batches: list[Layers] = []
    open_batches: dict[Any, Layers] = {}
    room: dict[Any, int] = {}
    for name, layer in layers.items():
        weight = readers.stored_weight(layer._weight_owner())
        if weight is None:  # which unmerging will refuse
            weight = layer.lora_A
        kind = (weight.device, weight.dtype)
        if room.get(kind, 0) <= 0:
            open_batches[kind] = {}
            batches.append(open_batches[kind])
            room[kind] = _BATCH
        open_batches[kind][name] = layer
        room[kind] -= weight.numel()
    return batches


def _shown(layers: Layers, what: str, progress: bool) -> Iterator[Layers]:
    """Yield layers in batches; show on request how many are done."""
    batches = _batches(layers)
    if not progress:
        yield from batches
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=len(layers), desc=what, unit="layer") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))

"""Merging and unmerging all adapters of a model at once."""

from collections.abc import Iterator

from torch import nn

from lora_fast.lora_layer import MergingLayer


def merge(model: nn.Module, *, progress: bool = False) -> int:
    """Fold every adapter of `model` into its weight, whatever `merge_weights` says; all or nothing.

    Layers that are merged already stay so. `unmerge` restores the weights bit for bit; so does
    `train()` where `merge_weights` is set.

    Args:
        model: any module with LoRA layers.
        progress: whether to show a progress bar.

    Returns:
        The number of layers that were merged.

    Raises:
        ValueError: there is nothing to merge: no LoRA layer has an adapter, or all are merged.
        RuntimeError: a layer can't be merged, because its weight is tied, say, or would overflow.
            The message names it; every layer is as it was. The same holds for any other exception.
    """
    layers = _adapted(model)
    todo = {name: layer for name, layer in layers.items() if not layer.merged}
    if not layers:
        raise ValueError("merge: the model has no LoRA layer with r > 0")
    if not todo:
        raise ValueError(f"merge: all {len(layers)} LoRA layers of the model are merged already")
    obstacles = [f"{name}: {why}" for name, layer in todo.items() if (why := layer._obstacle())]
    if obstacles:
        raise RuntimeError("merge: nothing was merged. " + "; ".join(obstacles))
    done: list[MergingLayer] = []
    try:
        for name, layer in _shown(todo, "merge", progress):
            done.append(layer)
            _merge_named(name, layer)
    except BaseException:
        for layer in done:
            layer._unmerge()
        raise
    return len(done)


def unmerge(model: nn.Module, *, progress: bool = False) -> int:
    """Take every merged adapter of `model` out of its weight, bit for bit; all or nothing.

    Args:
        model: any module with LoRA layers.
        progress: whether to show a progress bar.

    Returns:
        The number of layers that were unmerged.

    Raises:
        ValueError: there is nothing to unmerge: no LoRA layer is merged.
    """
    todo = {name: layer for name, layer in _adapted(model).items() if layer.merged}
    if not todo:
        raise ValueError("unmerge: no LoRA layer of the model is merged")
    done: list[MergingLayer] = []
    try:
        for _, layer in _shown(todo, "unmerge", progress):
            done.append(layer)
            layer._unmerge()
    except BaseException:
        for layer in done:
            if not layer.merged:
                layer._merge_now()
        raise
    return len(done)


def _merge_named(name: str, layer: MergingLayer) -> None:
    try:
        layer._merge_now()
    except OverflowError as error:
        raise RuntimeError(f"merge: nothing was merged. {name or 'the model'}: {error}") from error


def _adapted(model: nn.Module) -> dict[str, MergingLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and module._has_adapter()
    }


def _shown(
    layers: dict[str, MergingLayer], what: str, progress: bool
) -> Iterator[tuple[str, MergingLayer]]:
    pairs = list(layers.items())
    if not progress:
        yield from pairs
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(pairs, desc=what, unit="layer")

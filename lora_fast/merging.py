"""The merge of `eval()` and `train()` as functions, and which implementation runs it."""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor

from lora_fast import (
    checks,
    native,
    ops,
    reference,
    shapes,
    sharded,
    sums,
    torch_internals,
    versions,
)
from lora_fast.backend import Backend, choose_merge
from lora_fast.blocks import output_blocks
from lora_fast.native import Merge
from lora_fast.record import MergeRecord, are_same, some_of


def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    enable_lora: Iterable[object] | None = None,
    out_splits: Sequence[int] | None = None,
) -> MergeRecord:
    """W <- round(W + Delta) in place.

    Args:
        weight: (N, K) or a convolution's N-D weight, any strides; or a DTensor, of which each rank
            merges its own shard.
        lora_A: as for `merged_delta`.
        lora_B: as for `merged_delta`.
        scaling: factor of the update, lora_alpha / r.
        enable_lora: as for `merged_delta`.
        out_splits: as for `merged_delta`.

    Returns:
        The record with which `unmerge_` restores the weight bit for bit.

    Raises:
        ValueError: the factors do not fit the weight.
        TypeError: an argument is no tensor, no number or no list, where it must be one.
        RuntimeError: FakeTensorMode is active, under which nothing is written.
        OverflowError: a finite element would become infinite or NaN. The weight is as it was.

    Note:
        Accumulates in fp32 (fp64 for fp64) whatever autocast says, and rounds once. Infinities and
        NaN that the weight held before stay. Source: loralib/layers.py:126-141.
    """
    enable, widths = checks.blocks("merge_", enable_lora, out_splits)
    request = Merge(weight, lora_A, lora_B, scaling, enable, widths)
    try:
        merge_many([request])
        if request.record is not None:
            return request.record
    except BaseException:
        undo([request])
        raise
    raise OverflowError(reference.why_not_finite(weight, lora_A, lora_B))


def merge_many(requests: Sequence[Merge]) -> None:
    """`merge_` weights of one device and dtype, in one call of the native ops.

    Args:
        requests: the arguments of `merge_` for each; no two weights share memory. Each gets its
            record, or None where a finite element would become infinite or NaN; that weight is as
            it was. To be handed to `undo` after any error.

    Raises:
        ValueError: factors do not fit their weight.
    """
    for request in requests:
        if sharded.is_dtensor(request.weight):
            check = partial(_check, request)  # so that no rank waits for one that refuses
            sharded.together([request.weight], check, sharded.NOT_MERGED)
        else:
            _check(request)
    if any([request.weight.is_inference() for request in requests]):
        with torch.inference_mode():  # only there they may be written to
            _merge_checked(requests)
    else:
        _merge_checked(requests)


def undo(requests: Sequence[Merge]) -> None:
    """Unmerge what `merge_many` had merged when something came in between, each if it can be."""
    with ExitStack() as each:  # which goes on after an error, and raises it at its end
        for request in requests:
            if request.record is not None and not request.record.spent:
                each.callback(restore_, request.weight, request.record)


def _merge_checked(requests: Sequence[Merge]) -> None:
    numbers = [versions.current(request.weight) for request in requests]
    served: list[Merge] = []
    others: list[Merge] = []
    for request in requests:
        (served if _is_served(request) else others).append(request)
    if served:
        native.merge(served)
    for request in served:
        if request.record is not None and request.record.original is None:
            request.record.after = some_of(request.weight)
    for request in others:
        _merge_alone(request)
    for request, number in zip(requests, numbers, strict=True):
        record = request.record
        if record is not None and not record.of_shard:  # a DTensor counts by itself
            record.versions = versions.merged(request.weight, number)


def _check(request: Merge) -> None:
    """Refuse what can't be merged; of the rest take what nobody changes until it is undone."""
    weight, enable_lora, out_splits = request.weight, request.enable_lora, request.out_splits
    if type(request.scaling) is not float:
        checks.scaling("merge_", request.scaling)
        request.scaling = checks.number(request.scaling)
    if type(request.scaling) is float and not math.isfinite(request.scaling):
        raise ValueError(
            f"merge_: scaling must be finite, got {request.scaling}; look at lora_alpha and r"
        )
    if enable_lora is not None:
        request.enable_lora = list(enable_lora)
        request.out_splits = None if out_splits is None else list(out_splits)
    factors = (request.lora_A, request.lora_B)
    shapes.delta("merge_", weight, *factors, request.enable_lora, request.out_splits)
    checks.mergeable("merge_", weight, *factors)
    checks.not_faked("merge_", weight)
    for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
        if not torch_internals.has_memory(factor):  # reading it would end the process
            raise ValueError(f"merge_: {name} must hold its values, but its memory was freed")
    if weight.requires_grad:
        request.weight = weight.detach()
    if not sharded.is_dtensor(weight) and any(map(sharded.is_dtensor, factors)):
        with torch.no_grad():
            request.lora_A, request.lora_B = map(sharded.whole, factors)


def _is_served(request: Merge) -> bool:
    """Tell whether the native ops serve a request, and log what serves it."""
    weight, lora_A, lora_B = request.weight, request.lora_A, request.lora_B
    if sharded.is_dtensor(weight):  # whose shard comes here again
        return False
    chosen = choose_merge("merge_", lambda: native.why_not(weight, lora_A, lora_B))
    return chosen is Backend.NATIVE


@torch.no_grad()
def _merge_alone(request: Merge) -> None:
    weight, blocks = request.weight, (request.enable_lora, request.out_splits)
    if sharded.is_dtensor(weight):
        factors = (request.lora_A, request.lora_B)
        with suppress(OverflowError):
            request.record = sharded.merge_(weight, *factors, request.scaling, *blocks)
        return
    # What is merged is what is kept; see native._copy_factors.
    original = weight.clone()
    what = (request.lora_A.clone(), request.lora_B.clone(), request.scaling, *blocks)
    record = MergeRecord(original.shape, original.dtype, original, *what, is_native=False)
    request.record = record  # the copy is right before the merge, too
    try:
        reference.merge_beside_(original, weight, *what)
    except OverflowError:
        request.record = None
    except BaseException:
        with suppress(Exception):  # it may not even be written to
            if are_same(weight, original):
                request.record = None
        raise


@torch.no_grad()
def merge_again(weight: Tensor, record: MergeRecord) -> MergeRecord | None:
    """Merge into a weight what a record's merge did, by what did it: the sums have its bits.

    Args:
        weight: a plain tensor with the shape, dtype and device of the record.
        record: of any merge, spent or not.

    Returns:
        A record of this merge, or None where a finite element would become infinite or NaN.
    """
    request = Merge(weight, *record.arguments())
    if record.is_native and ops.load_native(weight.device.type) is None:  # from another process
        native.merge([request])
    else:
        _merge_alone(request)
    return request.record


def unmerge_(weight: Tensor, record: MergeRecord) -> None:
    """W <- the weight that `merge_` found, bit for bit.

    Args:
        weight: the tensor that was given to `merge_`.
        record: what `merge_` returned. It serves once.

    Raises:
        TypeError: `record` is something else.
        ValueError: the record was used before, or is not of a weight of this shape, dtype and
            device, or some elements of the weight are not what `merge_` has left: it was written to
            or merged again since, or is another. The weight is as it was.
        RuntimeError: csrc merged it, and was not built here.

    Note:
        What was merged into one weight several times is taken out in the opposite order. loralib
        subtracts, and rounds. Source: loralib/layers.py:126-141.
    """
    if not _is_as_left(_checked_local(weight, record), record):
        raise ValueError(
            "unmerge_: weight must be what merge_ has left, but it was written to or merged again "
            "since, or is another one; take out the last merge first, or write to it unmerged"
        )
    restore_(weight, record)


def _is_as_left(local: Tensor, record: MergeRecord) -> bool:
    """Tell whether a weight is as its merge has left it, of a native merge by some elements."""
    if local.is_meta:
        return True
    rows = _merged_rows(local, record)
    if record.after is not None:  # the way back leaves other blocks alone
        sampled = some_of(rows.expand_as(local)) if rows is not None else ...
        return are_same(some_of(local)[sampled], record.after[sampled])
    original = record.original
    if original is None or record.of_shard:
        return True
    if rows is not None and not are_same(*(t[~rows[:, 0]] for t in (local, original))):
        return False
    merged = (record.lora_A, record.lora_B, record.scaling)
    return sums.is_sum(local, original, *merged, **record.blocks())


def _merged_rows(local: Tensor, record: MergeRecord) -> Tensor | None:
    """Tell of each row of a grouped weight (N, 1) whether its block was merged; None for all."""
    if record.enable_lora is None or record.of_shard:
        return None
    found = output_blocks(local.shape[0], record.enable_lora, record.out_splits)
    parts = [torch.full((block.width, 1), block.enabled, device=local.device) for block in found]
    return torch.cat(parts)


def restore_(weight: Tensor, record: MergeRecord) -> None:
    """`unmerge_` of a weight that is known to be as it was merged."""
    unmerge_many([weight], [record])


def unmerge_many(weights: Sequence[Tensor], records: Sequence[MergeRecord]) -> None:
    """`unmerge_` weights of one device and dtype, in one call of the native ops."""
    local = [_checked_local(w, record) for w, record in zip(weights, records, strict=True)]
    numbers = [versions.current(weight) for weight in local]
    for weight in local:
        # If anything comes between the op and the end of this, the values will be looked at.
        versions.count(weight)
    if any([weight.is_inference() for weight in local]):
        with torch.inference_mode():
            native.unmerge(local, records)
    else:
        native.unmerge(local, records)
    for weight, part, record, number in zip(weights, local, records, numbers, strict=True):
        versions.restored(part, record.versions, number)
        sharded.count_version(weight)
        record.note_restored(part)


def _checked_local(weight: Tensor, record: MergeRecord) -> Tensor:
    """Return this rank's part of a weight; refuse what the record does not belong to."""
    checks.tensors("unmerge_", weight=weight)
    if not isinstance(record, MergeRecord):
        raise TypeError(
            f"unmerge_: record must be the MergeRecord that merge_ returned, got "
            f"{type(record).__name__}"
        )
    local = sharded.local(weight)
    record.check(local)
    checks.not_faked("unmerge_", local)
    reason = None if record.original is not None else ops.load_native(local.device.type)
    if reason is not None:
        raise RuntimeError(f"unmerge_: the weight was merged by the native ops, and {reason}")
    return local

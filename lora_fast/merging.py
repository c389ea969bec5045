"""The merge of `eval()` and `train()` as functions, and which implementation runs it."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lora_fast import checks, native, ops, reference, shapes, sharded, versions
from lora_fast.backend import Backend, choose_merge
from lora_fast.native import Done, Merge
from lora_fast.record import MergeRecord, some_of


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
        OverflowError: a finite element would become infinite or NaN. The weight is as it was.

    Note:
        Accumulates in fp32 (fp64 for fp64) whatever autocast says, and rounds once. Infinities and
        NaN that the weight held before stay. Source: loralib/layers.py:126-141.
    """
    enable, widths = checks.blocks("merge_", enable_lora, out_splits)
    done: Done = []
    try:
        merge_many([Merge(weight, lora_A, lora_B, scaling, enable, widths)], done)
        if done:
            return done[0][1]
    except BaseException:
        undo(done)
        raise
    raise OverflowError(reference.why_not_finite(weight, lora_A, lora_B))


@torch.no_grad()
def merge_many(requests: Sequence[Merge], done: Done) -> list[MergeRecord | None]:
    """`merge_` weights of one device and dtype, in one call of the native ops.

    Args:
        requests: the arguments of `merge_` for each; no two weights share memory.
        done: an empty list, to be handed to `undo` after any error.

    Returns:
        For each the record with which `unmerge_` restores the weight, or None where a finite
        element would become infinite or NaN; that weight is as it was.

    Raises:
        ValueError: factors do not fit their weight.
    """
    requests = [_checked(request) for request in requests]
    if any([request.weight.is_inference() for request in requests]):
        with torch.inference_mode():  # only there they may be written to
            return _merge_checked(requests, done)
    return _merge_checked(requests, done)


def undo(done: Done) -> None:
    """Unmerge what `merge_many` had merged when something came in between, each if it can be."""
    with ExitStack() as each:  # which goes on after an error, and raises it at its end
        for weight, record in done:
            if not record.spent:
                each.callback(unmerge_, weight, record)


def _merge_checked(requests: Sequence[Merge], done: Done) -> list[MergeRecord | None]:
    originals = [versions.current(request.weight) for request in requests]
    served = [i for i, request in enumerate(requests) if _is_served(request)]
    records: list[MergeRecord | None] = [None] * len(requests)
    if served:
        found = native.merge([requests[i] for i in served], done)
        for i, record in zip(served, found, strict=True):
            records[i] = record
            if record is not None and record.original is None:
                record.after = some_of(requests[i].weight)
    for i in sorted(set(range(len(requests))) - set(served)):
        records[i] = _merge_alone(requests[i], done)
    for request, record, original in zip(requests, records, originals, strict=True):
        if record is not None and not record.of_shard:  # a DTensor counts by itself
            record.versions = versions.merged(request.weight, original)
    return records


def _checked(request: Merge) -> Merge:
    weight, lora_A, lora_B, scaling, enable_lora, out_splits = request
    # A float, as nearly always; of a DTensor each rank is asked when the others hear the answer.
    if type(scaling) is not float and not sharded.is_dtensor(weight):
        checks.scaling("merge_", scaling)
        # A number of its own, as a tensor may change before the merge is undone.
        request = request._replace(scaling=checks.number(scaling))
    if enable_lora is not None:  # and lists of its own
        splits = None if out_splits is None else list(out_splits)
        request = request._replace(enable_lora=list(enable_lora), out_splits=splits)
    shapes.delta("merge_", weight, lora_A, lora_B, enable_lora, out_splits)
    checks.mergeable("merge_", weight, lora_A, lora_B)
    checks.not_faked("merge_", weight)
    if sharded.is_dtensor(weight) or not (sharded.is_dtensor(lora_A) or sharded.is_dtensor(lora_B)):
        return request
    return request._replace(lora_A=sharded.whole(lora_A), lora_B=sharded.whole(lora_B))


def _is_served(request: Merge) -> bool:
    """Tell whether the native ops serve a request, and log what serves it."""
    weight, lora_A, lora_B, *_ = request
    if sharded.is_dtensor(weight):  # whose shard comes here again
        return False
    chosen = choose_merge("merge_", lambda: native.why_not(weight, lora_A, lora_B))
    return chosen is Backend.NATIVE


def _merge_alone(request: Merge, done: Done) -> MergeRecord | None:
    weight, lora_A, lora_B, scaling, enable_lora, out_splits = request
    if sharded.is_dtensor(weight):
        try:
            record = sharded.merge_(*request)
        except OverflowError:
            return None
        done.append((weight, record))
        return record
    # What is merged is what is kept; see native._with_copies.
    original, lora_A, lora_B = weight.clone(), lora_A.clone(), lora_B.clone()
    what = (lora_A, lora_B, scaling, enable_lora, out_splits)
    record = MergeRecord(original.shape, original.dtype, original, *what, is_native=False)
    done.append((weight, record))  # the copy is right before the merge, too
    try:
        reference.merge_beside_(original, weight, *what)
    except OverflowError:
        done.pop()
        return None
    return record


@torch.no_grad()
def merge_again(weight: Tensor, record: MergeRecord) -> MergeRecord | None:
    """Merge into a weight what a record's merge did, by what did it: the sums have its bits.

    Args:
        weight: a plain tensor with the shape, dtype and device of the record.
        record: of any merge, spent or not.

    Returns:
        A record of this merge, or None where a finite element would become infinite or NaN.
    """
    what = (record.lora_A, record.lora_B, record.scaling, record.enable_lora, record.out_splits)
    request = Merge(weight, *what)
    if record.is_native and ops.load_native(weight.device.type) is None:  # from another process
        return native.merge([request])[0]
    return _merge_alone(request, [])


def unmerge_(weight: Tensor, record: MergeRecord) -> None:
    """W <- the weight that `merge_` found, bit for bit.

    Args:
        weight: the tensor that was given to `merge_`.
        record: what `merge_` returned. It serves once.

    Raises:
        TypeError: `record` is something else.
        ValueError: the record was used before, or is not of a weight of this shape, dtype and
            device. The weight is as it was.
        RuntimeError: csrc merged it, and was not built here.
    """
    unmerge_many([weight], [record])


@torch.no_grad()
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

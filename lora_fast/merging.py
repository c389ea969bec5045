"""The merge of `eval()` and `train()` as functions, and which implementation runs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fast import checks, compiled, ops, reference, sharded
from lora_fast.backend import Backend, decided, get_backend
from lora_fast.record import MergeRecord


@torch.no_grad()
def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    enable_lora: Sequence[bool] | None = None,
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
        OverflowError: a finite element would become infinite or NaN. The weight is as it was.

    Note:
        Accumulates in fp32 (fp64 for fp64) whatever autocast says, and rounds once. Infinities and
        NaN that the weight held before stay. Source: loralib/layers.py:131-140.
    """
    enable = None if enable_lora is None else [bool(e) for e in enable_lora]
    widths = None if out_splits is None else list(out_splits)
    checks.delta_shapes("merge_", weight, lora_A, lora_B, enable, widths)
    if sharded.is_dtensor(weight):
        return sharded.merge_(weight, lora_A, lora_B, scaling, enable, widths)
    lora_A, lora_B = sharded.whole(lora_A), sharded.whole(lora_B)
    if _chosen("merge_", weight, lora_A, lora_B) is Backend.COMPILED:
        request = compiled.Merge(weight.detach(), lora_A, lora_B, scaling, enable, widths)
        (record,) = compiled.merge([request])
        if record is None:
            raise OverflowError(reference.overflow_message(weight))
        return record
    original = reference.merge_(
        weight, lora_A, lora_B, scaling, enable_lora=enable, out_splits=widths
    )
    factors = (lora_A.clone(), lora_B.clone(), scaling)
    return MergeRecord(original.shape, original.dtype, original, *factors, enable, widths)


@torch.no_grad()
def unmerge_(weight: Tensor, record: MergeRecord) -> None:
    """W <- the weight that `merge_` found, bit for bit.

    Args:
        weight: the tensor that was given to `merge_`.
        record: what `merge_` returned. It serves once.

    Raises:
        TypeError: `record` is something else.
        ValueError: the record was used before, or is not of a weight of this shape, dtype and
            device. The weight is as it was.
    """
    if not isinstance(record, MergeRecord):
        raise TypeError(
            f"unmerge_: record must be the MergeRecord that merge_ returned, got "
            f"{type(record).__name__}"
        )
    local = sharded.local(weight)
    record.check(local)
    if record.original is not None:
        reference.unmerge_(local, record.original)
    else:
        reason = ops.load_compiled(local.device.type)
        if reason is not None:
            raise RuntimeError(f"unmerge_: the weight was merged by the compiled ops, and {reason}")
        compiled.unmerge([local.detach()], [record])
    sharded.count_version(weight)
    record.spent = True


def explain(device: str) -> tuple[str, str]:
    """Return the implementation of `merge_` and `unmerge_` on `device`, and why."""
    reason = "chosen by set_backend" if get_backend() == "reference" else ops.load_compiled(device)
    if reason is None:
        return Backend.COMPILED.value, "one pass, about a byte a weight while merged"
    return Backend.REFERENCE.value, f"keeps a copy of the weight: {reason}"


def _chosen(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Backend:
    if get_backend() == Backend.REFERENCE.value:
        return decided(op, Backend.REFERENCE, "chosen by set_backend")
    reason = compiled.why_not(weight, lora_A, lora_B)
    if reason is None:
        return decided(op, Backend.COMPILED, "plain tensors")
    return decided(op, Backend.REFERENCE, reason)

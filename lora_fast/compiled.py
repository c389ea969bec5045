"""Merges by the ops of csrc: one pass, and about a byte a weight as the way back.

`lora_fast.merging` sends here what the ops can serve, and everything else to
`lora_fast.reference`, which keeps a copy of the weight.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fast import ops, reference
from lora_fast.record import Code, MergeRecord

_log = logging.getLogger("lora_fast.merge")
# What the op returns in place of the length of an overflow list; csrc/merge.h.
_NOT_FINITE = -1
# Elements of one block, so that their indices fit an int32.
_MOST = 2**31 - 1
# The lists may take 0.06 bytes for each weight. Where they fill, a copy is not much dearer.
_LIST_BYTES = 0.06


class Merge(NamedTuple):
    """One weight and what is to be added to it; see `lora_fast.functional.merge_`."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    enable_lora: list[bool] | None = None
    out_splits: list[int] | None = None


def why_not(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Say why the ops can't serve these tensors, if so."""
    for tensor in (weight, lora_A, lora_B):
        # A parameter may be one of a subclass, which only its data shows.
        if type(tensor) is not Tensor and type(tensor.data) is not Tensor:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.dtype not in ops.COMPILED_DTYPES or tensor.layout is not torch.strided:
            return f"{tensor.dtype} tensors of layout {tensor.layout} are not served"
    if lora_A.shape[0] == 0:
        return "there is nothing to add: no rank, or no enabled block"
    if torch._debug_has_internal_overlap(weight) == 1:
        return "elements of the weight share memory"
    if weight.numel() > _MOST and weight.dim() != 2:
        return "more than 2**31 - 1 elements in other than two dimensions"
    return ops.load_compiled(weight.device.type)


def merge(requests: Sequence[Merge]) -> list[MergeRecord | None]:
    """Merge weights of one device and dtype, in one launch where the device has launches.

    Args:
        requests: merges that `why_not` has nothing against.

    Returns:
        A record for each, or None where a finite element would become infinite or NaN; that weight
        is as it was.
    """
    records: list[MergeRecord | None] = [None] * len(requests)
    left = {i: _new_job(request) for i, request in enumerate(requests)}
    while left:
        status = _run(ops.merge_, left.values())
        failed = {i for i, lengths in zip(left, status, strict=True) if min(lengths) < 0}
        # After a failure the op has put every weight back: go on with the others.
        for i, lengths in zip(list(left), status, strict=True):
            if not failed:
                records[i] = left.pop(i).record(lengths)
            elif i in failed:
                job = left.pop(i)
                records[i] = None if _NOT_FINITE in lengths else _merge_with_copy(job.request)
    return records


def unmerge(weights: Sequence[Tensor], records: Sequence[MergeRecord]) -> None:
    """Restore weights of one device and dtype that `merge` merged."""
    jobs = []
    for weight, record in zip(weights, records, strict=True):
        if record.original is not None:
            weight.copy_(record.original)
            continue
        factors = (record.lora_A, record.lora_B, record.scaling)
        request = Merge(weight, *factors, **record.blocks())
        jobs.append(_Job(request, _blocks(request), record.codes))
    if jobs:
        _run(ops.unmerge_, jobs)


class _Job(NamedTuple):
    """A merge, the blocks that its weight is cut into, and the code for each of them."""

    request: Merge
    blocks: Sequence[reference.DeltaBlock]
    codes: Sequence[Code]

    def record(self, lengths: Sequence[int]) -> MergeRecord:
        """Return the record of a merge whose overflow lists have these lengths."""
        codes = []
        for (code, index, value), n in zip(self.codes, lengths, strict=True):
            # Copies: a slice would keep all the room of a list that is nearly always empty.
            kept = (t[:n].clone() if n else t.new_empty(0) for t in (index, value))
            codes.append(Code(code, *kept))
        return _record(self.request, None, tuple(codes))


def _run(op: Callable[..., Tensor | None], jobs: Collection[_Job]) -> list[list[int]]:
    """Call `op` for all blocks of all jobs; return what it says of each job's blocks."""
    blocks = [block for job in jobs for block in job.blocks]
    codes = [code for job in jobs for code in job.codes]
    scalings = [float(job.request.scaling) for job in jobs for _ in job.blocks]
    status = op(*_columns(blocks), scalings, *_columns(codes))
    for job in jobs:
        _count_version(job.request.weight)
    lengths = iter([] if status is None else status.tolist())
    return [list(itertools.islice(lengths, len(job.blocks))) for job in jobs]


def _columns(rows: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    return map(list, zip(*rows, strict=True))


def _blocks(request: Merge) -> list[reference.DeltaBlock]:
    """The blocks of a weight that one product B A each covers, none over `_MOST` elements."""
    found = []
    for weight, lora_A, lora_B in reference.delta_blocks(
        request.weight, request.lora_A, request.lora_B, request.enable_lora, request.out_splits
    ):
        if weight.numel() <= _MOST:
            found.append((weight, lora_A, lora_B))
            continue
        rows = max(1, _MOST // weight.shape[1])
        parts = zip(weight.split(rows), lora_B.split(rows), strict=True)
        found += [(part, lora_A, part_B) for part, part_B in parts]
    return found


def _new_job(request: Merge) -> _Job:
    blocks = _blocks(request)
    codes = []
    for weight, _, _ in blocks:
        room = int(weight.numel() * _LIST_BYTES / (4 + weight.element_size()))
        index = torch.empty(room, dtype=torch.int32, device=weight.device)
        codes.append(
            Code(torch.empty_like(weight, dtype=torch.int8), index, weight.new_empty(room))
        )
    return _Job(request, blocks, codes)


def _merge_with_copy(request: Merge) -> MergeRecord | None:
    weight = request.weight
    _log.debug(
        "deltas far above the weights: keeping a copy of a %s %s weight",
        weight.dtype,
        tuple(weight.shape),
    )
    original = weight.clone()
    none = torch.empty(0, dtype=torch.int8, device=weight.device)
    no_code = Code(none, none.to(torch.int32), weight.new_empty(0))
    blocks = _blocks(request)
    (status,) = _run(ops.merge_, [_Job(request, blocks, [no_code] * len(blocks))])
    if min(status) < 0:
        weight.copy_(original)
        return None
    return _record(request, original, ())


def _record(request: Merge, original: Tensor | None, codes: tuple[Code, ...]) -> MergeRecord:
    lora_A, lora_B = request.lora_A.detach().clone(), request.lora_B.detach().clone()
    weight, settings = request.weight, (request.scaling, request.enable_lora, request.out_splits)
    return MergeRecord(weight.shape, weight.dtype, original, lora_A, lora_B, *settings, codes=codes)


def _count_version(weight: Tensor) -> None:
    """Let autograd see the write: a backward through the old values must not go unnoticed."""
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)

"""Merges by the ops of csrc: one pass, and about a byte a weight as the way back.

`lora_fast.merging` sends here what the ops can serve, and everything else to
`lora_fast.reference`, which keeps a copy of the weight.
"""

import functools
import itertools
import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_fast import ops, reference, torch_internals
from lora_fast.record import Code, MergeRecord

_log = logging.getLogger("lora_fast.merge")
# What merge_ tells in place of the length of an overflow list; csrc/merge.h.
_NOT_FINITE = -1
_NOT_DONE = -3  # it has not ended
# Elements of one block, so that their indices fit an int32.
_MOST = 2**31 - 1
# The lists may take 0.06 bytes for each weight. Where they fill, a copy is not much dearer.
_LIST_BYTES = 0.06


@dataclass(slots=True, eq=False)
class Merge:
    """One weight and what is to be added to it; see `lora_fast.functional.merge_`.

    Attributes:
        record: the way back, from when there is one: whoever asked for the merge undoes it by this
            after an error.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    enable_lora: list[bool] | None = None
    out_splits: list[int] | None = None
    record: MergeRecord | None = None


def why_not(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Say why the ops can't serve these tensors, if so."""
    for tensor in (weight, lora_A, lora_B):
        # A parameter may be one of a subclass, which only its data shows.
        if type(tensor) is not Tensor and type(tensor.data) is not Tensor:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.dtype not in ops.NATIVE_DTYPES or tensor.layout is not torch.strided:
            return f"{tensor.dtype} tensors of layout {tensor.layout} are not served"
        if tensor.is_neg():
            return "a tensor that torch negates when it is read"
    if lora_A.shape[0] == 0:
        return "there is nothing to add: no rank, or no enabled block"
    if torch_internals.may_overlap(weight):
        return "elements of the weight share memory"
    if weight.numel() > _MOST and weight.dim() != 2:
        return "more than 2**31 - 1 elements in other than two dimensions"
    return ops.load_native(weight.device.type)


def merge(requests: Sequence[Merge]) -> list[MergeRecord | None]:
    """Merge weights of one device and dtype, in one launch where the device has launches.

    Args:
        requests: merges that `why_not` has nothing against, of weights that ask for no gradient.
            Their A and B become copies: what is merged is what the record holds.

    Returns:
        The record of each, which the request has too; after an error what has none is not merged.
        None where a finite element would become infinite or NaN; that weight is as it was.
    """
    _copy_factors(requests)
    _merge(requests)
    return [request.record for request in requests]


def _merge(requests: Sequence[Merge]) -> None:
    jobs = [_new_job(request) for request in requests]
    status = _new_status(jobs)
    try:
        _run(ops.merge_, jobs, status)
        told = _of_jobs(jobs, status)
        if _is_done(status):
            for request, job, lengths in zip(requests, jobs, told, strict=True):
                request.record = _record(request, tuple(map(_trimmed, job.codes, lengths)))
            return
    except BaseException:  # no memory for a list, say
        if _is_done(status):
            told = _of_jobs(jobs, status)
            for request, job, lengths in zip(requests, jobs, told, strict=True):
                request.record = request.record or _record(request, _cut(job.codes, lengths))
        raise
    del jobs  # their codes are large, and what follows makes its own
    _merge_apart(requests, told)  # the op has put every weight back


def _merge_apart(requests: Sequence[Merge], status: Sequence[Sequence[int]]) -> None:
    """Merge together what can be, and with a copy what a code is not enough for."""
    # These first: they need most memory, and where there is none for the next of them, copying one
    # back takes none.
    for request, lengths in zip(requests, status, strict=True):
        if min(lengths) < 0 and _NOT_FINITE not in lengths:
            _merge_with_copy(request)
    together = [r for r, lengths in zip(requests, status, strict=True) if min(lengths) >= 0]
    if together:
        _merge(together)


def _merge_with_copy(request: Merge) -> None:
    weight = request.weight
    _log.debug(
        "deltas far above the weights: keeping a copy of a %s %s weight",
        weight.dtype,
        tuple(weight.shape),
    )
    original, job = weight.clone(), _codeless_job(request)
    try:
        status = _new_status([job])
        _run(ops.merge_, [job], status)
        if _is_done(status):
            request.record = _record(request, (), original)
            return
    except BaseException:
        if request.record is None:
            weight.copy_(original)
        raise
    weight.copy_(original)


def unmerge(weights: Sequence[Tensor], records: Sequence[MergeRecord]) -> None:
    """Restore weights of one device and dtype that `merge` merged: all, or after an error none."""
    pairs = list(zip(weights, records, strict=True))
    jobs = [_job_of(weight, record) for weight, record in pairs if record.original is None]
    status, copied = _new_status(jobs), []
    try:
        if jobs:
            _run(ops.unmerge_, jobs, status)
        for weight, record in pairs:
            if record.original is not None:
                copied.append((weight, record))
                weight.detach().copy_(record.original)
    except BaseException:
        if jobs and _is_done(status):
            _run(ops.merge_, jobs, _new_status(jobs))
        for weight, record in copied:
            _merge_back(weight.detach(), record)
        raise
    for record in records:
        _keep_until_read(record)


@torch.no_grad()
def _merge_back(weight: Tensor, record: MergeRecord) -> None:
    """Merge, by what merged it, a weight of which there is a copy, whether it is the copy now."""
    assert record.original is not None
    weight.copy_(record.original)
    request = Merge(weight, *record.arguments())
    if record.is_native and ops.load_native(weight.device.type) is None:
        job = _codeless_job(request)
        _run(ops.merge_, [job], _new_status([job]))
    else:
        reference.merge_beside_(record.original, weight, *record.arguments())


def _keep_until_read(record: MergeRecord) -> None:
    """Let what the GPU may still read outlive the record, where another stream made it."""
    if not record.lora_A.is_cuda:
        return
    lists = itertools.chain.from_iterable(record.codes)
    stream = torch.cuda.current_stream(record.lora_A.device)
    for tensor in (record.original, record.lora_A, record.lora_B, *lists):
        if tensor is not None:
            tensor.record_stream(stream)


Status: TypeAlias = "array[int]"  # of int64, one for each block of each job


class _Job(NamedTuple):
    """The blocks of a weight, each with its part of the record's A and B, and their codes."""

    blocks: Sequence[reference.DeltaBlock]
    scaling: float
    codes: Sequence[Code]


def _run(op: Callable[..., None], jobs: Sequence[_Job], status: Status) -> None:
    """Call `op` for all blocks of all jobs; at its end it tells in `status` of each block."""
    rows = [
        (*block, job.scaling, *code)
        for job in jobs
        for block, code in zip(job.blocks, job.codes, strict=True)
    ]
    op(*map(list, zip(*rows, strict=True)), torch.frombuffer(status, dtype=torch.int64))


def _new_status(jobs: Sequence[_Job]) -> Status:
    # Not a tensor's memory: to fill that takes torch longer than the op to merge a small weight.
    return array("q", [_NOT_DONE]) * sum([len(job.blocks) for job in jobs])


def _is_done(status: Status) -> bool:
    """Tell whether the op has done it; if not, it has changed no weight."""
    return min(status, default=_NOT_DONE) >= 0


def _of_jobs(jobs: Sequence[_Job], status: Status) -> list[list[int]]:
    """What the op told of each job's blocks."""
    told = iter(status)
    return [list(itertools.islice(told, len(job.blocks))) for job in jobs]


def _blocks(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> list[reference.DeltaBlock]:
    """The blocks of a weight that one product B A each covers, none over `_MOST` elements."""
    if weight.requires_grad:
        weight = weight.detach()
    blocks = reference.delta_blocks(weight, lora_A, lora_B, enable_lora, out_splits)
    if weight.numel() <= _MOST:
        return blocks
    found = []
    for block in blocks:
        rows = max(1, _MOST // block[0].shape[1])
        parts = zip(block[0].split(rows), block[2].split(rows), strict=True)
        found += [(part, block[1], part_B) for part, part_B in parts]
    return found


def _blocks_of(request: Merge) -> list[reference.DeltaBlock]:
    factors = (request.lora_A, request.lora_B)
    return _blocks(request.weight, *factors, request.enable_lora, request.out_splits)


def _new_job(request: Merge) -> _Job:
    blocks = _blocks_of(request)
    codes = []
    for weight, _, _ in blocks:
        code = torch.empty_like(weight, dtype=torch.int8)
        room = int(weight.numel() * _LIST_BYTES / (4 + weight.element_size()))
        codes.append(Code(code, *(_new_overflow(weight, room) if room else _no_overflow(weight))))
    return _Job(blocks, request.scaling, codes)


def _job_of(weight: Tensor, record: MergeRecord) -> _Job:
    """The job by which a weight was merged."""
    factors = (record.lora_A, record.lora_B)
    blocks = _blocks(weight, *factors, record.enable_lora, record.out_splits)
    return _Job(blocks, record.scaling, record.codes)


def _codeless_job(request: Merge) -> _Job:
    """A merge whose way back is a copy of the weight."""
    weight, blocks = request.weight, _blocks_of(request)
    no_code = Code(weight.new_empty(0, dtype=torch.int8), *_no_overflow(weight))
    return _Job(blocks, request.scaling, [no_code] * len(blocks))


def _copy_factors(requests: Sequence[Merge]) -> None:
    """Put copies in the place of A and B, on a GPU by one launch for all.

    What is merged is what the record holds, whatever another thread writes to A and B meanwhile,
    and the weight too where they share its memory. They are made before the op runs: without them,
    for want of memory, a merge could not be undone.
    """
    factors = [f.detach() for request in requests for f in (request.lora_A, request.lora_B)]
    copies = [torch.empty_like(factor) for factor in factors]
    torch._foreach_copy_(copies, factors)
    for request, lora_A, lora_B in zip(requests, copies[::2], copies[1::2], strict=True):
        request.lora_A, request.lora_B = lora_A, lora_B


def _trimmed(code: Code, length: int) -> Code:
    """A code whose list has this length, as nearly always none."""
    if length == code.overflow_index.numel():
        return code
    # Copies: a slice would keep all the room.
    lists = (code.overflow_index, code.overflow_value)
    kept = [t[:length].clone() for t in lists] if length else _no_overflow(code.overflow_value)
    return Code(code.code, *kept)


def _cut(codes: Sequence[Code], lengths: Sequence[int]) -> tuple[Code, ...]:
    """Codes with lists of these lengths, which share the memory of the long ones."""
    pairs = zip(codes, lengths, strict=True)
    return tuple(Code(c.code, c.overflow_index[:n], c.overflow_value[:n]) for c, n in pairs)


def _new_overflow(weight: Tensor, room: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(room, dtype=torch.int32), weight.new_empty(room)


def _no_overflow(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The empty list of a block, one for all: making it costs what merging a small layer does."""
    return _empty_overflow(weight.dtype, weight.device)


@functools.cache
def _empty_overflow(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        index = torch.empty(0, dtype=torch.int32, device=device)
        return index, torch.empty(0, dtype=dtype, device=device)


def _record(request: Merge, codes: tuple[Code, ...], original: Tensor | None = None) -> MergeRecord:
    weight = request.weight
    what = (request.lora_A, request.lora_B, request.scaling)
    blocks = (request.enable_lora, request.out_splits)
    return MergeRecord(weight.shape, weight.dtype, original, *what, *blocks, codes)

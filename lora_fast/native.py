"""Merges by the ops of csrc: one pass, and about a byte a weight as the way back.

`lora_fast.merging` sends here what the ops can serve, and everything else to
`lora_fast.reference`, which keeps a copy of the weight.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
        if tensor.dtype not in ops.NATIVE_DTYPES or tensor.layout is not torch.strided:
            return f"{tensor.dtype} tensors of layout {tensor.layout} are not served"
        if tensor.is_neg():
            return "a tensor that torch negates when it is read"
    if lora_A.shape[0] == 0:
        return "there is nothing to add: no rank, or no enabled block"
    overlap = torch_internals.internal_overlap(weight)
    if overlap == 1 or (overlap == 2 and _overlaps(weight)):  # 2: torch has not looked closely
        return "elements of the weight share memory"
    if weight.numel() > _MOST and weight.dim() != 2:
        return "more than 2**31 - 1 elements in other than two dimensions"
    return ops.load_native(weight.device.type)


def _overlaps(weight: Tensor) -> bool:
    """Tell whether a step in one dimension may land among the elements of smaller steps."""
    reach = 0
    sizes = zip(weight.stride(), weight.shape, strict=True)
    for stride, size in sorted(pair for pair in sizes if pair[1] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


Done = list[tuple[Tensor, MergeRecord]]
"""Weights that are merged, each with its record: what whoever made the list undoes after an error.
It is added to as soon as there is a record, so that an error on the way back loses none."""


def merge(requests: Sequence[Merge], done: Done | None = None) -> list[MergeRecord | None]:
    """Merge weights of one device and dtype, in one launch where the device has launches.

    Args:
        requests: merges that `why_not` has nothing against.
        done: where each merge is noted; after an error what is not in it is not merged.

    Returns:
        A record for each, or None where a finite element would become infinite or NaN; that weight
        is as it was.
    """
    done = [] if done is None else done
    requests = _with_copies(requests)
    jobs = list(map(_new_job, requests))
    status, known = _new_status(jobs), len(done)
    try:
        _run(ops.merge_, jobs, status)
        lengths = _of_jobs(jobs, status)
        if min(map(min, lengths)) >= 0:
            records = [job.record(found) for job, found in zip(jobs, lengths, strict=True)]
            done += [(job.request.weight, r) for job, r in zip(jobs, records, strict=True)]
            return list(records)
    except BaseException:  # no memory for a list, say
        if _is_done(status) and len(done) == known:
            cut = [job.cut(n) for job, n in zip(jobs, _of_jobs(jobs, status), strict=True)]
            done += [(job.request.weight, _record(job, tuple(job.codes))) for job in cut]
        raise
    del jobs  # their codes are large, and what follows makes its own
    return _merge_apart(requests, lengths, done)  # the op has put every weight back


def _merge_apart(
    requests: Sequence[Merge], status: Sequence[Sequence[int]], done: Done
) -> list[MergeRecord | None]:
    """Merge together what can be, and with a copy what a code is not enough for."""
    together = [i for i, lengths in enumerate(status) if min(lengths) >= 0]
    records: list[MergeRecord | None] = [None] * len(requests)
    # These first: they need most memory, and where there is none for the next of them, copying one
    # back takes none.
    for i, lengths in enumerate(status):
        if min(lengths) < 0 and _NOT_FINITE not in lengths:
            records[i] = _merge_with_copy(requests[i], done)
    if together:
        for i, record in zip(together, merge([requests[i] for i in together], done), strict=True):
            records[i] = record
    return records


def unmerge(weights: Sequence[Tensor], records: Sequence[MergeRecord]) -> None:
    """Restore weights of one device and dtype that `merge` merged: all, or after an error none."""
    jobs = [_job_of(weight, record) for weight, record in zip(weights, records, strict=True)]
    coded = [job for job in jobs if job.original is None]
    status, copied = _new_status(coded), []
    try:
        if coded:
            _run(ops.unmerge_, coded, status)
        for job, record in zip(jobs, records, strict=True):
            if job.original is not None:
                copied.append((job, record.is_native))
                job.request.weight.copy_(job.original)
    except BaseException:
        if coded and _is_done(status):
            _run(ops.merge_, coded, _new_status(coded))
        for job, is_native in copied:
            _merge_back(job, is_native)
        raise
    for record in records:
        _keep_until_read(record)


def _merge_back(job: "_Job", is_native: bool) -> None:
    """Merge, by what merged it, a weight of which there is a copy, whether it is the copy now."""
    assert job.original is not None
    job.request.weight.copy_(job.original)
    if is_native and ops.load_native(job.original.device.type) is None:
        _run(ops.merge_, [job], _new_status([job]))
    else:
        reference.merge_beside_(job.original, *job.request)


def _keep_until_read(record: MergeRecord) -> None:
    """Let what the GPU may still read outlive the record, where another stream made it."""
    if not record.lora_A.is_cuda:
        return
    lists = itertools.chain.from_iterable(record.codes)
    stream = torch.cuda.current_stream(record.lora_A.device)
    for tensor in (record.original, record.lora_A, record.lora_B, *lists):
        if tensor is not None:
            tensor.record_stream(stream)


class _Job(NamedTuple):
    """A merge of the record's own A and B, the blocks of its weight, and the code for each."""

    request: Merge
    blocks: Sequence[reference.DeltaBlock]
    codes: Sequence[Code]
    original: Tensor | None = None

    def cut(self, lengths: Sequence[int]) -> "_Job":
        """Return the job with lists of these lengths, which share the memory of the long ones."""
        pairs = zip(self.codes, lengths, strict=True)
        return self._replace(
            codes=[Code(c.code, c.overflow_index[:n], c.overflow_value[:n]) for c, n in pairs]
        )

    def record(self, lengths: Sequence[int]) -> MergeRecord:
        """Return the record of a merge whose overflow lists have these lengths."""
        codes = tuple(map(_trimmed, self.codes, lengths))
        return _record(self, codes)


def _run(op: Callable[..., None], jobs: Sequence[_Job], status: Tensor) -> None:
    """Call `op` for all blocks of all jobs; at its end it tells in `status` of each block."""
    rows = [
        (*block, float(job.request.scaling), *code)
        for job in jobs
        for block, code in zip(job.blocks, job.codes, strict=True)
    ]
    op(*map(list, zip(*rows, strict=True)), status)


def _new_status(jobs: Sequence[_Job]) -> Tensor:
    count = sum([len(job.blocks) for job in jobs])
    return torch.full((count,), _NOT_DONE, dtype=torch.int64, device="cpu")


def _is_done(status: Tensor) -> bool:
    """Tell whether the op has done it; if not, it has changed no weight."""
    return min(status.tolist(), default=_NOT_DONE) >= 0


def _of_jobs(jobs: Sequence[_Job], status: Tensor) -> list[list[int]]:
    """What the op told of each job's blocks."""
    told = iter(status.tolist())
    return [list(itertools.islice(told, len(job.blocks))) for job in jobs]


def _blocks(request: Merge) -> list[reference.DeltaBlock]:
    """The blocks of a weight that one product B A each covers, none over `_MOST` elements."""
    weight, lora_A, lora_B, _, enable_lora, out_splits = request
    if weight.requires_grad:
        weight = weight.detach()
    found = []
    for block in reference.delta_blocks(weight, lora_A, lora_B, enable_lora, out_splits):
        if block[0].numel() <= _MOST:
            found.append(block)
            continue
        rows = max(1, _MOST // block[0].shape[1])
        parts = zip(block[0].split(rows), block[2].split(rows), strict=True)
        found += [(part, block[1], part_B) for part, part_B in parts]
    return found


def _new_job(request: Merge) -> _Job:
    blocks = _blocks(request)
    codes = []
    for weight, _, _ in blocks:
        code = torch.empty_like(weight, dtype=torch.int8)
        room = int(weight.numel() * _LIST_BYTES / (4 + weight.element_size()))
        codes.append(Code(code, *(_new_overflow(weight, room) if room else _no_overflow(weight))))
    return _Job(request, blocks, codes)


def _job_of(weight: Tensor, record: MergeRecord) -> _Job:
    """The job by which a weight was merged."""
    factors = (record.lora_A, record.lora_B, record.scaling)
    request = Merge(weight, *factors, record.enable_lora, record.out_splits)
    if record.original is not None:
        return _codeless_job(request, record.original)
    return _Job(request, _blocks(request), record.codes)


def _codeless_job(request: Merge, original: Tensor) -> _Job:
    """A merge whose way back is a copy of the weight."""
    weight, blocks = request.weight, _blocks(request)
    no_code = Code(weight.new_empty(0, dtype=torch.int8), *_no_overflow(weight))
    return _Job(request, blocks, [no_code] * len(blocks), original)


def _with_copies(requests: Sequence[Merge]) -> list[Merge]:
    """The requests with copies of A and B, on a GPU by one launch for all.

    What is merged is what the record holds, whatever another thread writes to A and B meanwhile,
    and the weight too where they share its memory. They are made before the op runs: without them,
    for want of memory, a merge could not be undone.
    """
    factors = [factor for request in requests for factor in (request.lora_A, request.lora_B)]
    copies = [torch.empty_like(factor) for factor in factors]
    torch._foreach_copy_(copies, factors)
    pairs = zip(requests, copies[::2], copies[1::2], strict=True)
    return [Merge(request.weight, a, b, *request[3:]) for request, a, b in pairs]


def _trimmed(code: Code, length: int) -> Code:
    """A code whose list has this length, as nearly always none."""
    if length == code.overflow_index.numel():
        return code
    # Copies: a slice would keep all the room.
    lists = (code.overflow_index, code.overflow_value)
    kept = [t[:length].clone() for t in lists] if length else _no_overflow(code.overflow_value)
    return Code(code.code, *kept)


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


def _merge_with_copy(request: Merge, done: Done) -> MergeRecord | None:
    weight = request.weight
    _log.debug(
        "deltas far above the weights: keeping a copy of a %s %s weight",
        weight.dtype,
        tuple(weight.shape),
    )
    original = weight.clone()
    (request,) = _with_copies([request])
    job, known = _codeless_job(request, original), len(done)
    try:
        status = _new_status([job])
        _run(ops.merge_, [job], status)
        if _is_done(status):
            record = _record(job, ())
            done.append((weight, record))
            return record
    except BaseException:
        if len(done) == known:
            weight.copy_(original)
        raise
    weight.copy_(original)
    return None


def _record(job: _Job, codes: tuple[Code, ...]) -> MergeRecord:
    weight, lora_A, lora_B, scaling, enable_lora, out_splits = job.request
    what = (weight.shape, weight.dtype, job.original, lora_A, lora_B)
    return MergeRecord(*what, scaling, enable_lora, out_splits, codes=codes)

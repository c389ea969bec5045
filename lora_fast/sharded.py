"""Merging DTensor weights (FSDP2, tensor parallel): every rank merges the shard that it holds."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_fast import reference, versions
from lora_fast.blocks import output_blocks
from lora_fast.record import MergeRecord
from lora_fast.torch_internals import storage_id

Result = TypeVar("Result")

NOT_MERGED = "merge_: it failed on another rank, whose error says why; no rank is merged"


class LostRankError(RuntimeError):
    """Another rank did not answer what all are asked together."""


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether `tensor` is a DTensor, without importing torch.distributed for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded_tensor(value: Any) -> bool:
    """Tell whether `value` is what FSDP1 gives for SHARDED_STATE_DICT, which is no DTensor."""
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    return module is not None and isinstance(value, module.ShardedTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (a collective for a DTensor); a plain tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def replicated(tensor: Any) -> Any:
    """`tensor` whole on every rank, a DTensor still, differentiable; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, which every rank holds whole, in shards as `other`, if that is a DTensor."""
    if not is_dtensor(other) or is_dtensor(tensor):
        return tensor
    return _distributed(tensor, other.device_mesh, other.placements)  # type: ignore[attr-defined]


class Part(NamedTuple):
    """What the delta of this rank's shard is made of; the arguments of `functional.merge_`."""

    lora_A: Tensor
    lora_B: Tensor
    enable_lora: list[bool] | None = None
    out_splits: list[int] | None = None


@torch.no_grad()
def merge_(
    weight: Any,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> MergeRecord:
    """As `functional.merge_`, for a DTensor; the record is of this rank's shard.

    The ranks refuse together, so that no rank is merged where another is not.
    """
    from lora_fast import merging  # which sends DTensors here

    part = _part(weight, whole(lora_A), whole(lora_B), enable_lora, out_splits)
    shard = local(weight)
    blocks: dict[str, Any] = {"enable_lora": part.enable_lora, "out_splits": part.out_splits}
    record, error = None, None
    try:
        record = merging.merge_(shard, part.lora_A, part.lora_B, scaling, **blocks)
    except Exception as caught:
        error = caught
    if not weight.is_meta:
        try:
            _refuse_together(weight, part, error)
        except Exception:
            if record is not None:
                merging.restore_(shard, record)
            raise
    if record is None:
        assert error is not None
        raise error
    count_version(weight)
    record.of_shard = True
    return record


def count_version(weight: Tensor) -> None:
    """Let autograd see a write to the shard: it looks at the DTensor, not at what that holds."""
    if is_dtensor(weight):
        versions.count(weight)


def version(weight: Any) -> tuple[int, ...] | None:
    """Return what changes with every write to a weight or to its shard, where torch counts them.

    And with other memory through `weight.data = ...`; a write through `.data` counts nowhere.
    """
    if weight.is_inference():
        return None
    # A DTensor's and its shard's count separately.
    shard = local(weight)
    return weight._version, shard._version, storage_id(shard)


def agreed(weight: Any, reason: str | None) -> str | None:
    """Why not to merge: this rank's reason, or that another rank of a DTensor's has one."""
    is_obstacle = on_any_rank(weight, reason is not None)
    return reason or ("another rank has an obstacle, and says which" if is_obstacle else None)


def on_any_rank(weight: Any, mine: bool) -> bool:
    """Tell whether any rank of a DTensor says yes; every rank must ask. Others answer alone."""
    if not is_dtensor(weight) or weight.is_meta:
        return mine
    return _votes(weight, mine)[0] > 0


def _votes(weight: Any, *mine: bool) -> list[float]:
    """How many ranks say yes to each question; every rank of the weight must ask them."""
    mesh = weight.device_mesh
    votes = torch.tensor([float(vote) for vote in mine], device=mesh.device_type)
    try:
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(votes, group=group)
        found: list[float] = votes.tolist()
    except RuntimeError as error:
        raise LostRankError(f"the ranks could not agree: {error}") from error
    return found


def together(values: Iterable[Any], function: Callable[[], Result], refusal: str) -> Result:
    """Call a function that exchanges nothing; raise on every rank if it raises on any.

    Args:
        values: among them the DTensors whose ranks call this; the same on all.
        function: what to call.
        refusal: the message where it was another rank's call that raised.
    """
    error = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    is_refused = error is not None
    meshes = {v.device_mesh: v for v in values if is_dtensor(v)}
    for value in meshes.values():
        is_refused = on_any_rank(value, is_refused)
    if error is not None:
        raise error
    if is_refused:
        raise RuntimeError(refusal)
    return result


def _refuse_together(weight: Any, part: Part, error: Exception | None) -> None:
    """Raise on every rank where any rank has an error."""
    overflows, errors = _votes(weight, isinstance(error, OverflowError), error is not None)
    if error is not None:
        raise error
    if overflows > 0:
        raise OverflowError(reference.why_not_finite(weight, part.lora_A, part.lora_B))
    if errors > 0:
        raise RuntimeError(NOT_MERGED)


def _part(
    weight: Any,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> Part:
    """Take from A and B what the shard needs."""
    rows = _indices(weight, 0)
    if weight.dim() > 2:
        return _conv_part(weight, rows, lora_A, lora_B)
    lora_A = lora_A[:, _indices(weight, 1)]
    if enable_lora is None:
        return Part(lora_A, lora_B[rows])
    if rows.numel() == 0:
        return Part(lora_A[:0], lora_B[:0, :0])
    kept_A, kept_B, enable, splits = [lora_A[:0]], [lora_B[:0]], [], []
    for block in output_blocks(weight.shape[0], enable_lora, out_splits):
        mine = rows[(rows >= block.begin) & (rows < block.end)] - block.begin
        if mine.numel() == 0:
            continue
        enable.append(block.enabled)
        splits.append(mine.numel())
        if block.enabled:
            block_A, block_B = block.factors(lora_A, lora_B)
            kept_A.append(block_A)
            kept_B.append(block_B[mine])
    return Part(torch.cat(kept_A), torch.cat(kept_B), enable, splits)


def _conv_part(weight: Any, rows: Tensor, lora_A: Tensor, lora_B: Tensor) -> Part:
    whole_rows = all(p.is_replicate() or p.dim == 0 for p in weight.placements)
    if whole_rows and lora_B.shape[0] % weight.shape[0] == 0:
        each = lora_B.shape[0] // weight.shape[0]
        offsets = torch.arange(each, device=rows.device)
        return Part(lora_A, lora_B[(rows[:, None] * each + offsets).flatten()])
    # The channels of a grouped convolution share rows of B: its small delta is formed here.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = reference.merged_delta(lora_A.to(dtype), lora_B.to(dtype), 1.0).view(weight.shape)
    mine = local(_distributed(delta, weight.device_mesh, weight.placements)).flatten(1)
    return Part(torch.eye(mine.shape[1], dtype=dtype, device=mine.device), mine)


def _indices(weight: Any, dim: int) -> Tensor:
    """Where in dimension `dim` of the whole weight this rank's shard lies, in ascending order."""
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    for placement in weight.placements:
        if placement.is_partial():
            raise ValueError(
                "merge_: the ranks hold parts of a sum (Partial) in the place of the weight; "
                "redistribute it to Shard or Replicate first"
            )
        if placement.is_replicate() or placement.dim != dim:
            placements.append(Replicate())
        elif hasattr(placement, "split_factor"):  # FSDP2 over tensor parallel
            placements.append(type(placement)(0, split_factor=placement.split_factor))
        else:
            placements.append(Shard(0))
    mesh = weight.device_mesh
    every = torch.arange(weight.shape[dim], device=mesh.device_type)
    return local(_distributed(every, mesh, placements))


def _distributed(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
    """A DTensor of what every rank holds whole: each takes its slice, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None)

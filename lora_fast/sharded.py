"""Merging DTensor weights (FSDP2, tensor parallel): every rank merges the shard that it holds."""

import sys

import torch
from torch import Tensor

from lora_fast import reference


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether `tensor` is a DTensor, without importing torch.distributed for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (a collective for a DTensor); a plain tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    enable_lora: list[bool] | None = None,
    out_splits: list[int] | None = None,
) -> Tensor:
    """As `reference.merge_`, on this rank's shard of `weight`; `lora_A` and `lora_B` are whole.

    The ranks refuse an overflow together, so that no rank is merged where another is not.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    shard = weight.to_local()
    original = shard.clone()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = reference.merged_delta(
        lora_A.to(dtype),
        lora_B.to(dtype),
        scaling,
        enable_lora=enable_lora,
        out_splits=out_splits,
    ).view(weight.shape)
    replicated = DTensor.from_local(delta, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # From replicated to sharded each rank takes its slice; nothing is sent.
    shard.copy_(shard.to(dtype) + replicated.redistribute(placements=placements).to_local())
    overflowed = torch.tensor(
        0.0 if reference.finite_where(shard, original) else 1.0, device=shard.device
    )
    votes = DTensor.from_local(overflowed, mesh, [Partial()] * mesh.ndim, run_check=False)
    if votes.full_tensor().item() > 0.0:
        shard.copy_(original)
        raise OverflowError(
            f"the merged weight does not fit {weight.dtype}: some of its elements overflow"
        )
    return original

"""A few elements of a weight, merged and not: by them a state shows which of the two it holds.

What `state_dict()` returns are views. Taken in eval mode and written to a file after `train()`, it
says that it is merged, and holds the base weight.
"""

from typing import Any

import torch
from torch import Tensor

from lora_fast import reference

Sample = list[list[float]]
"""For each element: the block of the delta, where in it, the merged value, the base value."""

_TRIED, _KEPT = 64, 8
_STEP = 2654435761  # a prime, so that it goes through a matrix of any width in no pattern


@torch.no_grad()
def taken(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, **blocks: Any) -> Sample:
    """Take a sample of a merged weight.

    Args:
        weight: the merged weight, as for `lora_fast.functional.merge_`.
        lora_A: what was merged into it, as for `merge_`.
        lora_B: likewise.
        scaling: likewise.
        blocks: `enable_lora` and `out_splits`, likewise.

    Returns:
        The elements that the delta changes most, of those that were looked at; none where it
        changes none beyond rounding.
    """
    found: Sample = []
    eps = torch.finfo(weight.dtype).eps
    for number, (part, a, b) in enumerate(_parts(weight, lora_A, lora_B, blocks)):
        if part.numel() == 0:
            continue
        at = torch.unique(torch.arange(_TRIED, device=part.device) * _STEP % part.numel())
        rows, cols = at // a.shape[1], at % a.shape[1]
        delta = scaling * (b[rows].double() * a[:, cols].t().double()).sum(1)
        merged = _elements(part, at)
        base = merged - delta
        shows = delta.abs() > 8 * eps * (merged.abs() + base.abs())
        columns = (at[shows].double(), merged[shows], base[shows])
        found += [[float(number), *element] for element in torch.stack(columns, 1).tolist()]
    return sorted(found, key=lambda e: -abs(e[2] - e[3]))[:_KEPT]


@torch.no_grad()
def is_base(
    sample: Sample, weight: Tensor, like: torch.dtype, lora_A: Tensor, lora_B: Tensor, **blocks: Any
) -> bool:
    """Tell whether a weight, whose sample was taken merged, is the base weight now.

    Args:
        sample: from `taken`.
        weight: the weight as it is now, perhaps in another dtype.
        like: the dtype in which it was merged.
        lora_A: of the shape that was merged.
        lora_B: likewise.
        blocks: as for `taken`.
    """
    if not sample or not weight.is_floating_point():
        return False
    eps = max(torch.finfo(weight.dtype).eps, torch.finfo(like).eps)
    parts = _parts(weight, lora_A, lora_B, blocks)
    differs = False
    for number, at, merged, base in sample:
        if int(number) >= len(parts) or int(at) >= parts[int(number)][0].numel():
            return False  # of a layer with other blocks
        part = parts[int(number)][0]
        value = float(_elements(part, torch.tensor([int(at)], device=part.device))[0])
        room = 2 * eps * (abs(merged) + abs(base))
        if not abs(value - base) <= room:
            return False
        differs = differs or abs(value - merged) > room
    return differs


def _parts(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, blocks: dict[str, Any]
) -> list[reference.DeltaBlock]:
    enable, splits = blocks.get("enable_lora"), blocks.get("out_splits")
    return reference.delta_blocks(weight, lora_A, lora_B, enable, splits)


def _elements(part: Tensor, at: Tensor) -> Tensor:
    """Elements by their number in the order of the indices, however they lie in memory."""
    return part[torch.unravel_index(at, part.shape)].double()

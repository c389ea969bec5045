"""A few elements of a weight, merged and not: by them a state shows which of the two it holds.

What `state_dict()` returns are views. Taken in eval mode and written to a file after `train()`, it
says that it is merged, and holds the base weight.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from lora_fast import reference
from lora_fast.record import some_of

Sample = list[list[float]]
"""For each element: the block of the delta, where in it, the merged value, the base value."""

_TRIED, _KEPT = 64, 8
_NEAR = 0.7  # of the delta's norm, assumed: how far an average of merged weights may be from one
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
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
def norms(lora_A: Tensor, lora_B: Tensor) -> list[float]:
    """Return the norms of the factors, which tell what was merged where no element of it shows."""
    return [float(torch.linalg.vector_norm(factor.double())) for factor in (lora_A, lora_B)]


def are_other(then: list[float], lora_A: Tensor, lora_B: Tensor) -> bool:
    """Tell whether factors, perhaps in another dtype, are others than those with these norms."""
    pairs = zip(then, norms(lora_A, lora_B), strict=True)
    return any(abs(now - before) > 0.1 * before for before, now in pairs)


@torch.no_grad()
def compared(
    sample: Sample,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    like: torch.dtype,
    **blocks: Any,
) -> Literal["merged", "base", "other"] | None:
    """Tell what a weight, whose sample was taken merged, is now; None where the sample can't tell.

    Args:
        sample: from `taken`.
        weight: the weight as it is now, perhaps in another dtype.
        lora_A: as it is now; the sample tells nothing where A and B no longer make the delta that
            it has, as the whole layer was changed, to another size, say.
        lora_B: likewise.
        scaling: that of the merge.
        like: the dtype in which it was merged.
        blocks: as for `taken`.

    Returns:
        "merged" also for an average of merged weights, which is nearer to them than the delta is
        large.
    """
    found = _found(sample, weight, lora_A, lora_B, blocks)
    if not found or not like.is_floating_point:
        return None
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    values, products = torch.tensor(found, **kind).unbind(1)
    merged, base = torch.tensor([element[2:] for element in sample], **kind).unbind(1)
    eps = max(torch.finfo(dtype).eps for dtype in (weight.dtype, like))
    room = 2 * eps * (merged.abs() + base.abs())
    is_off = (values - merged).abs() > room
    if bool(((values - base).abs() <= room).all() and is_off.any()):
        return "base"
    norm, delta = torch.linalg.vector_norm, merged - base
    if norm(values - merged) <= _NEAR * norm(delta) + norm(room):
        return "merged"
    # The weight alone was changed: else the places of the sample may be of other elements.
    fits = norm(scaling * products - delta) <= 0.1 * norm(delta) + norm(room)
    return "other" if fits else None


@torch.no_grad()
def is_of(
    sample: Sample,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    **blocks: Any,
) -> bool:
    """Tell whether a weight is the very one of which a sample was taken, merged with these factors.

    Args:
        sample: from `taken`.
        weight: as for `taken`.
        lora_A: likewise.
        lora_B: likewise.
        scaling: likewise.
        blocks: likewise.
    """
    for some in (sample[:1], sample):  # as a first difference is the rule
        found = _found(some, weight, lora_A, lora_B, blocks)
        if len(found) != len(some):
            return False
        for (value, product), (_, _, merged, base) in zip(found, some, strict=True):
            delta = merged - base
            if value != merged or abs(scaling * product - delta) > 0.1 * abs(delta):
                return False
    return bool(sample)


def fingerprint(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return some elements of a weight, and a sum of the bits of all of them, on its device."""
    parts = torch.view_as_real(weight) if weight.is_complex() else weight
    return some_of(weight), parts.view(_INTEGERS[parts.itemsize]).sum()


def has_fingerprint(weight: Tensor, then: tuple[Tensor, Tensor]) -> bool:
    """Tell whether a weight is still what it was, perhaps in another dtype or elsewhere."""
    now = fingerprint(weight)
    which = 1 if then[0].dtype is weight.dtype else 0  # a conversion leaves of all bits none
    return torch.equal(then[which].to(now[which]), now[which])


def _found(
    sample: Sample, weight: Tensor, lora_A: Tensor, lora_B: Tensor, blocks: dict[str, Any]
) -> list[tuple[float, float]]:
    """The elements of the sample as they are now, and those of B A; none of other blocks."""
    if not weight.is_floating_point() or lora_A.is_complex() or lora_B.is_complex():
        return []
    parts = _parts(weight, lora_A, lora_B, blocks)
    found = []
    for number, at, *_ in sample:
        if int(number) >= len(parts) or int(at) >= parts[int(number)][0].numel():
            return []
        part, a, b = parts[int(number)]
        row, col = divmod(int(at), a.shape[1])
        value = _elements(part, torch.tensor([int(at)], device=part.device))[0]
        found.append((float(value), float(b[row].double() @ a[:, col].double())))
    return found


def _parts(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, blocks: dict[str, Any]
) -> list[reference.DeltaBlock]:
    enable, splits = blocks.get("enable_lora"), blocks.get("out_splits")
    return reference.delta_blocks(weight, lora_A, lora_B, enable, splits)


def _elements(part: Tensor, at: Tensor) -> Tensor:
    """Elements by their number in the order of the indices, however they lie in memory."""
    return part[torch.unravel_index(at, part.shape)].double()

"""Is a weight the sum of another and a delta, whoever added them up and rounded the sum?"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_fast import reference
from lora_fast.autocast import no_autocast

# Elements of a weight that are looked at together, as a first difference ends the search. A GPU
# waits for the host after each.
_CHUNK = {"cpu": 2**20, "cuda": 2**24}
# Of a product in fp32 that a GPU may have made of TF32's 10 bits, then or now.
_TF32 = 2.0**-9

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def is_sum(
    weight: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    **blocks: Any,
) -> bool:
    """Tell whether weight = base + scaling B A, within what rounding may make of it.

    Args:
        weight: as for `lora_fast.functional.merge_`.
        base: the same shape and device; perhaps another dtype.
        lora_A: as for `merge_`.
        lora_B: as for `merge_`.
        scaling: as for `merge_`.
        blocks: `enable_lora` and `out_splits`, as for `merge_`.

    Note:
        The bound is that of r products and the base summed in any order, and of a delta rounded to
        the weight's dtype before and after it is scaled, as loralib does. Nothing within it is
        refused: a layer that takes its own merged weight for another's loses bits of its base.
        Infinities and NaN equal themselves. False where `merge_` makes no such sum, as of integers.
    """
    if not _are_mergeable(weight, base, lora_A, lora_B):
        return False
    with no_autocast(weight):
        return _are_sums(weight, base, _factors(lora_A, lora_B, blocks), scaling)


@torch.no_grad()
def is_nearer_to_sum(
    weight: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    **blocks: Any,
) -> bool:
    """Tell whether weight - base is about scaling B A, as where some rounding errors add up.

    |weight - base - scaling B A| < 1/4 min(|weight - base|, |scaling B A|), by Frobenius' norm of
    the blocks that have a delta. Another base differs from this one in a direction that has nothing
    to do with the delta's, or not at all.

    Args:
        weight: as for `is_sum`.
        base: as for `is_sum`.
        lora_A: as for `is_sum`.
        lora_B: as for `is_sum`.
        scaling: as for `is_sum`.
        blocks: as for `is_sum`.
    """
    if not _are_mergeable(weight, base, lora_A, lora_B):
        return False
    wide = _wide(weight, base, lora_A, lora_B)
    squares = [0.0, 0.0, 0.0]
    with no_autocast(weight):
        for parts in _chunks(weight, base, _factors(lora_A, lora_B, blocks)):
            total, summand, b, a = (part.to(wide) for part in parts)
            change, delta = total - summand, float(scaling) * (b @ a)
            for i, found in enumerate((change - delta, change, delta)):
                squares[i] += float(torch.linalg.vector_norm(found)) ** 2
    return squares[0] < 0.0625 * min(squares[1:])


def _are_mergeable(weight: Tensor, base: Tensor, *factors: Tensor) -> bool:
    """Tell whether `merge_` may have made a sum of these dtypes, or somebody has converted it."""
    if not all(t.is_floating_point() or t.is_complex() for t in (weight, base)):
        return False
    return base.is_complex() or all(factor.is_floating_point() for factor in factors)


def _wide(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: fp32, or what is needed to hold all of these."""
    wide = torch.float32
    for tensor in tensors:
        if not (tensor.is_floating_point() and tensor.itemsize == 1):  # fp8, which is not promoted
            wide = torch.promote_types(wide, tensor.dtype)
    return wide


def _eps(tensor: Tensor) -> float:
    is_rounded = tensor.is_floating_point() or tensor.is_complex()
    return torch.finfo(tensor.dtype).eps if is_rounded else 0.0


def _factors(lora_A: Tensor, lora_B: Tensor, blocks: dict[str, Any]) -> tuple[Any, ...]:
    return lora_A, lora_B, blocks.get("enable_lora"), blocks.get("out_splits")


def _are_sums(weight: Tensor, base: Tensor, factors: Any, scaling: float) -> bool:
    return all(_is_sum(*parts, float(scaling)) for parts in _chunks(weight, base, factors))


def _chunks(weight: Tensor, base: Tensor, factors: Any) -> Iterator[_Parts]:
    """Yield rows of both weights and of B, and A, for each block that has a delta."""
    pairs = zip(
        reference.delta_blocks(weight, *factors),
        reference.delta_blocks(base, *factors),
        strict=True,
    )
    for (sums, block_A, block_B), (summands, _, _) in pairs:
        shape = (block_B.shape[0], block_A.shape[1])
        rows = max(1, _CHUNK.get(weight.device.type, 2**20) // max(1, shape[1]))
        parts = [t.split(rows) for t in (sums.reshape(shape), summands.reshape(shape), block_B)]
        for total, summand, part_B in zip(*parts, strict=True):
            yield total, summand, part_B, block_A


def _is_sum(weight: Tensor, base: Tensor, b: Tensor, a: Tensor, scaling: float) -> bool:
    wide = _wide(base)
    infos = [torch.finfo(t.dtype) for t in (weight, base)]
    eps, eps_of_sums = max(info.eps for info in infos), torch.finfo(wide).eps
    # What lies between two subnormal numbers, by which any of the roundings may miss.
    step = max(info.smallest_normal * info.eps for info in infos)
    # And what a CPU may have flushed to zero, then or now (`torch.set_flush_denormal`).
    step += torch.finfo(wide).smallest_normal * (a.shape[0] + 2)
    eps_of_factors = max(_eps(t) for t in (a, b))  # perhaps rounded since the sum
    if weight.is_cuda and wide is torch.float32:
        eps_of_factors = max(eps_of_factors, _TF32)

    def compared(wide: torch.dtype, unit: float) -> tuple[Tensor, Tensor]:
        """Whether it is the sum, and whether that could be told, in numbers of this unit."""
        total, summand, left, right = (t.to(wide) for t in (weight, base, b, a))
        total, summand, left = total * unit, summand * unit, left * unit
        delta = scaling * (left @ right)
        products = abs(scaling) * (left.abs() @ right.abs())
        allowed = eps * (total.abs() + 3 * delta.abs()) + step * unit * (abs(scaling) + 2)
        allowed += (a.shape[0] + 3) * eps_of_sums * (summand.abs() + products)
        allowed += eps_of_factors * products
        is_known = allowed.isfinite()
        return ((total - summand - delta).abs() <= allowed) & is_known, is_known

    near, is_known = compared(wide, 1.0)
    if not is_known.all():  # of numbers near the largest that the weight can hold
        near |= ~is_known & compared(torch.float64, 2.0**-64)[0]
    weight, base = weight.to(wide), base.to(wide)
    same = (weight == base) & weight.isinf() | weight.isnan() & base.isnan()
    return bool((near | same).all())

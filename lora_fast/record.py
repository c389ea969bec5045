"""What `merge_` leaves behind so that `unmerge_` can restore the weight bit for bit."""

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fast.versions import Versions


class Code(NamedTuple):
    """The way back for one block of a weight, in about a byte an element.

    Attributes:
        code: int8, the block's shape: how many representable numbers lie between the original
            weight and what subtracting the delta gives; -128 where the list has the weight itself.
        overflow_index: int32, where in the block the elements of the list are.
        overflow_value: their original values.
    """

    code: Tensor
    overflow_index: Tensor
    overflow_value: Tensor

    def nbytes(self) -> int:
        """Return the memory that it takes."""
        return sum(t.numel() * t.element_size() for t in self)


class Place(NamedTuple):
    """Where a weight lies: from byte `start` to `end` of memory that is not kept alive."""

    storage: "weakref.ref[torch.UntypedStorage]"
    start: int
    end: int

    @classmethod
    def of(cls, weight: Tensor) -> "Place":
        """Return the place of a weight."""
        return cls(weakref.ref(weight.untyped_storage()), *extent(weight))

    def holds(self, weight: Tensor) -> bool:
        """Tell whether a weight lies here, or some of it."""
        start, end = extent(weight)
        is_here = self.storage() is weight.untyped_storage()
        return is_here and start < self.end and self.start < end


def extent(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 byte of a tensor's elements in its storage."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, (start + last + 1) * size


@dataclass(eq=False)
class MergeRecord:
    """The way back to the original weight: a copy of it, or a code for each merged block.

    Each is equal to itself alone.

    Attributes:
        shape: of the weight (of this rank's shard for a DTensor).
        dtype: of the weight.
        original: a copy of the weight, or None.
        codes: one for each merged block where there is no copy.
        lora_A: copy of A at the time of the merge.
        lora_B: copy of B at the time of the merge.
        scaling: lora_alpha / r at the time of the merge.
        enable_lora: enabled blocks of a grouped weight, or None.
        out_splits: widths of the blocks, or None for equal ones.
        spent: whether it has served.
        restored: the memory in which it has. Clones of a merged layer share its record, and each
            has a weight of its own to restore.
        of_shard: whether all of this is of one rank's shard of a DTensor.
        is_native: whether csrc merged it; the sums of torch's own products have other bits.
        versions: the weight's numbers for autograd, if the old one can be taken back.
        after: where there is no copy, some elements of the merged weight (see `some_of`).
        evidence: by what a state shows that its weight is merged, once it was asked for.
    """

    shape: torch.Size
    dtype: torch.dtype
    original: Tensor | None = field(repr=False)
    lora_A: Tensor = field(repr=False)
    lora_B: Tensor = field(repr=False)
    scaling: float
    enable_lora: list[bool] | None
    out_splits: list[int] | None
    codes: tuple[Code, ...] = field(default=(), repr=False)
    spent: bool = False
    restored: tuple[Place, ...] = field(default=(), repr=False)
    of_shard: bool = False
    is_native: bool = True
    versions: Versions | None = None
    after: Tensor | None = field(default=None, repr=False)
    evidence: dict[str, Any] | None = field(default=None, repr=False)

    def check(self, weight: Tensor) -> None:
        """Refuse a weight that this is not the record of, and a second use."""
        if self.spent:
            raise ValueError("unmerge_: the record was used before: the weight is not merged")
        if self.shape != weight.shape or self.dtype != weight.dtype:
            raise ValueError(
                f"unmerge_: the record is of a {self.dtype} weight of shape {tuple(self.shape)}, "
                f"got a {weight.dtype} weight of shape {tuple(weight.shape)}"
            )
        if weight.layout is not torch.strided:
            raise TypeError(
                f"unmerge_: weight must be dense, got layout {weight.layout}; unmerge the tensor "
                "that merge_ was given"
            )
        if self.lora_A.device != weight.device:
            raise ValueError(
                f"unmerge_: the record is on {self.lora_A.device}, the weight on {weight.device}; "
                "move the weight back (remove the hooks that offload it, say) to unmerge it"
            )

    def has_restored(self, weight: Tensor) -> bool:
        """Tell whether the memory of this weight is what it has restored."""
        return any(place.holds(weight) for place in self.restored)

    def note_restored(self, weight: Tensor) -> None:
        """Note that this weight has its original bits again, by this record."""
        self.spent = True
        alive = (place for place in self.restored if place.storage() is not None)
        self.restored = (*alive, Place.of(weight))

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled or copied: places are of this process, and cannot be."""
        return {**vars(self), "restored": ()}

    def arguments(self) -> tuple[Tensor, Tensor, float, list[bool] | None, list[int] | None]:
        """Return what was merged: the arguments of `merge_` after the weight."""
        return self.lora_A, self.lora_B, self.scaling, self.enable_lora, self.out_splits

    def blocks(self) -> dict[str, Any]:
        """Return the arguments that describe a grouped weight to the functions."""
        return {"enable_lora": self.enable_lora, "out_splits": self.out_splits}

    def nbytes(self) -> int:
        """Return the memory that it takes, A and B aside."""
        copied = 0 if self.original is None else self.original.numel()
        size = 0 if self.original is None else self.original.element_size()
        return copied * size + sum(code.nbytes() for code in self.codes)


def are_same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one device hold the same numbers, or NaN in the same places."""
    if torch.equal(a, b):
        return True
    if a.shape != b.shape or a.dtype is not b.dtype or a.itemsize == 1:  # isnan takes no fp8
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


_EACH_WAY = 8


def some_of(weight: Tensor) -> Tensor:
    """Return a copy of up to 8 x 8 elements (4 of the same in each further dimension).

    By them a weight that was written to while merged shows whether it is the original again: the
    codes alone do not tell, as the next weight's rounding is like this one's.
    """
    sizes, strides = [], []
    for d, (size, stride) in enumerate(zip(weight.shape, weight.stride(), strict=True)):
        step = -(-size // (_EACH_WAY if d < 2 else 2)) or 1
        sizes.append(-(-size // step))
        strides.append(stride * step)
    # By one view, as slices make one for each dimension: this is part of every merge.
    return weight.as_strided(sizes, strides, weight.storage_offset()).clone()

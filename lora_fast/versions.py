"""What autograd is told of a merge: a new number for the state of the weight, then the old one.

torch counts the writes to a tensor, and refuses a backward through values that were written over.
A merged weight gets a number that no tensor had before; with its original bits it gets its old
number, so that a forward before `eval()` and a backward after `train()` fit.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fast import torch_internals

# Counting alone never gets here; the numbers have 32 bits.
_FIRST, _LAST = 2**31, 2**32 - 2**16
_numbers = itertools.count(_FIRST)  # of which a thread gets one in one step


class Versions(NamedTuple):
    """The numbers of a weight before its merge and after it."""

    original: int
    merged: int


def count(weight: Tensor) -> None:
    """Let autograd see a write that torch does not count by itself."""
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def current(weight: Tensor) -> int | None:
    """Return the number of a weight's state, None where torch counts none."""
    return None if weight.is_inference() else weight._version


def merged(weight: Tensor, original: int | None) -> Versions | None:
    """Let autograd see a merge.

    Args:
        weight: the merged weight.
        original: its number before, from `current`.

    Returns:
        What `restored` needs; None where the number can't be taken back.
    """
    number = next(_numbers)
    # Past _FIRST it was written to while merged, and counts on: a number might come twice.
    if (
        original is None
        or original >= _FIRST
        or number >= _LAST
        or torch_internals.set_versions is None
    ):
        count(weight)
        return None
    torch_internals.set_versions((weight,), (number,))
    return Versions(original, number)


def restored(weight: Tensor, versions: Versions | None, before: int | None) -> None:
    """Let autograd see that a weight has its original bits again: by its number of then, if it may.

    Args:
        weight: the restored weight.
        versions: what `merged` returned.
        before: its number just before it was restored. Another than it was merged under belongs to
            a copy of the weight, or somebody wrote to it.
    """
    if (
        versions is not None
        and before == versions.merged
        and torch_internals.set_versions is not None
    ):
        torch_internals.set_versions((weight,), (versions.original,))
    else:
        count(weight)

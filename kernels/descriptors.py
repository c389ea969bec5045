"""Descriptors for the tensor memory accelerator, kept for the next call with the same memory.

To make one takes the host longer than to launch a kernel; and a weight stays where it is, while
the allocator gives activations the same memory step after step.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class _Memory(NamedTuple):
    """What a descriptor needs to know of its tensor, whose memory it does not keep from freeing."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def _kept(
    kind: Any,
    memory: _Memory,
    shape: torch.Size,
    strides: tuple[int, ...],
    block: tuple[int, ...],
    *layout: Any,
) -> Any:
    return kind(memory, list(shape), list(strides), list(block), *layout)


def tiled(matrix: Tensor, *block: int) -> TensorDescriptor:
    """A matrix as the accelerator reads and writes it, in blocks."""
    return descriptor(TensorDescriptor, matrix, block)


def descriptor(kind: Any, matrix: Tensor, block: tuple[int, ...], *layout: Any) -> Any:
    """The descriptor of a class of Triton's: its tensor, shape, strides, block and more."""
    if not matrix.is_cuda:  # interpreted or compiled only: those look at the tensor
        return kind(matrix, matrix.shape, matrix.stride(), list(block), *layout)
    memory = _Memory(matrix.data_ptr(), matrix.dtype)
    return _kept(kind, memory, matrix.shape, matrix.stride(), block, *layout)

"""Descriptors for the tensor memory accelerator, kept for the next call with the same memory.

To make one takes the host longer than to launch a kernel; and a weight stays where it is, while
the allocator gives activations the same memory step after step.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def descriptor_fits(tensor: Tensor) -> bool:
    """Can the accelerator read this matrix: rows contiguous, base and pitch on 16 bytes?

    Rows that overlap, as those of an expanded gradient do, are outside of its contract.
    """
    pitch, step = tensor.stride()
    return (
        step == 1
        and pitch >= tensor.shape[1]
        and pitch * tensor.itemsize % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


class Memory(NamedTuple):
    """What a descriptor needs to know of its tensor, whose memory it does not keep from freeing."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """As a tensor's."""
        return self.address


def tiled(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A matrix as the accelerator reads and writes it, in blocks of [rows, cols]."""
    return described(_tiled, matrix, rows, cols)


def _tiled(base: Any, shape: Any, strides: Any, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(base, shape, strides, [rows, cols])


def described(make: Callable[..., Any], matrix: Tensor, rows: int, cols: int) -> Any:
    """What `make` makes of a matrix, its shape and strides, and the block [rows, cols]."""
    if not matrix.is_cuda:  # interpreted or compiled only: those look at the tensor
        return make(matrix, matrix.shape, matrix.stride(), rows, cols)
    address, dtype = matrix.data_ptr(), matrix.dtype
    return _kept(make, address, dtype, matrix.shape, matrix.stride(), rows, cols)


@lru_cache(maxsize=4096)
def _kept(
    make: Callable[..., Any],
    address: int,
    dtype: torch.dtype,
    shape: torch.Size,
    strides: tuple[int, ...],
    rows: int,
    cols: int,
) -> Any:
    return make(Memory(address, dtype), list(shape), list(strides), rows, cols)

"""The operands of the Hopper kernel as its copy engine and its wgmma read them."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lora_fast.kernels.descriptors import Memory
from lora_fast.kernels.primitives import descriptor_fits


def rank_operand(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """`operand` (rows, R) as the accelerator can read it, copied with zeros behind R if need be."""
    operand = operand.to(dtype)
    if descriptor_fits(operand) or descriptor_fits(operand.t()):
        return operand
    return pad(operand, (0, -operand.shape[1] % 8)).contiguous()


def describe(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A matrix in blocks of [rows, cols], each in the layout that wgmma reads."""
    if not matrix.is_cuda:  # compiled only, which looks at the tensor
        layout = shared_layout(rows, cols, matrix.dtype)
        return TensorDescriptor.from_tensor(matrix, [rows, cols], layout)
    return _kept(matrix.data_ptr(), matrix.dtype, matrix.shape, matrix.stride(), rows, cols)


@lru_cache(maxsize=4096)
def _kept(
    address: int,
    dtype: torch.dtype,
    shape: torch.Size,
    strides: tuple[int, ...],
    rows: int,
    cols: int,
) -> TensorDescriptor:
    memory, layout = Memory(address, dtype), shared_layout(rows, cols, dtype)
    return TensorDescriptor(memory, list(shape), list(strides), [rows, cols], layout)


def shared_layout(rows: int, cols: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory."""
    element = gl.float16 if dtype is torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([rows, cols], element)


def describe_factor(b: Tensor, cols: int, depth: int, is_kn: bool) -> TensorDescriptor:
    """The second factor of a product, (N, K) in memory or, with `is_kn`, (K, N)."""
    return describe(b.t(), depth, cols) if is_kn else describe(b, cols, depth)

"""The operands of the Hopper kernel as its copy engine and its wgmma read them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lora_fast.kernels.descriptors import described, descriptor_fits


def rank_operand(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """`operand` (rows, R) as the accelerator can read it, copied with zeros behind R if need be."""
    operand = operand.to(dtype)
    if descriptor_fits(operand) or descriptor_fits(operand.t()):
        return operand
    return pad(operand, (0, -operand.shape[1] % 8)).contiguous()


def describe(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A matrix in blocks of [rows, cols], each in the layout that wgmma reads."""
    return described(_laid_out, matrix, rows, cols)


def _laid_out(base: Any, shape: Any, strides: Any, rows: int, cols: int) -> TensorDescriptor:
    element = gl.float16 if base.dtype is torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], element)
    return TensorDescriptor(base, shape, strides, [rows, cols], layout)


def describe_factor(b: Tensor, cols: int, depth: int, is_kn: bool) -> TensorDescriptor:
    """The second factor of a product, (N, K) in memory or, with `is_kn`, (K, N)."""
    return describe(b.t(), depth, cols) if is_kn else describe(b, cols, depth)

"""What torch asks of an operator that launches kernels: precision, device, outputs of its own."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 for fp32 operands only where torch's own matmul is allowed to use it."""
    if dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if _has_tf32() else "ieee"


@cache
def _has_tf32() -> bool:
    """Tell whether Triton knows TF32 here: of AMD's chips on MI300 alone."""
    if torch.version.hip is None:
        return True
    return bool(torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx942"))


def as_own(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a new tensor another shape, as no view: autograd refuses writes to an op's views."""
    if y.dim() == len(shape):
        return y
    return torch.ops.aten._unsafe_view.default(y, shape)  # type: ignore[no-any-return]


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current one, wherever the data is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()

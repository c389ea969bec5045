from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels.descriptors import descriptor_fits, tiled


def matrix(rows: int, cols: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(rows * cols + 16, dtype=dtype)[: rows * cols].view(rows, cols)


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (matrix(4, 8), True),
        (matrix(4, 8, torch.float32), True),
        (matrix(4, 24)[:, :5], True),  # the pitch counts, not the width
        (matrix(1, 8), True),
        (matrix(4, 7), False),
        (matrix(4, 12), False),
        (matrix(4, 4, torch.float32), True),
        (matrix(4, 16)[:, 1:9], False),
        (matrix(4, 16)[:, 8:], True),
        (matrix(4, 16)[:, ::2], False),
        (matrix(8, 8).t(), False),
        (matrix(1, 8).expand(4, 8), False),  # dY of a sum over rows
        (torch.zeros((), dtype=torch.float16).expand(4, 8), False),
        (torch.zeros(64, dtype=torch.float16).as_strided((4, 16), (8, 1)), False),
        (matrix(4, 1), False),
    ],
    ids=lambda value: f"{tuple(value.shape)}{value.stride()}" if hasattr(value, "stride") else "",
)
def test_what_the_tensor_memory_accelerator_can_read(tensor: torch.Tensor, fits: bool) -> None:
    assert descriptor_fits(tensor) == fits


@dataclass
class OnGpu:
    """What `described` asks of a matrix in a GPU's memory."""

    address: int = 4096
    dtype: torch.dtype = torch.float16
    shape: tuple[int, int] = (64, 32)
    strides: tuple[int, int] = (32, 1)
    is_cuda = True

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, int]:
        return self.strides


def test_a_descriptor_serves_the_same_memory_alone() -> None:
    first = tiled(OnGpu(), 16, 32)
    assert tiled(OnGpu(), 16, 32) is first
    assert (first.base.data_ptr(), first.base.dtype) == (4096, torch.float16)
    assert (first.shape, first.strides, first.block_shape) == ([64, 32], [32, 1], [16, 32])
    others = [
        tiled(OnGpu(address=8192), 16, 32),
        tiled(OnGpu(dtype=torch.bfloat16), 16, 32),
        tiled(OnGpu(shape=(32, 32)), 16, 32),
        tiled(OnGpu(strides=(64, 1)), 16, 32),
        tiled(OnGpu(), 32, 32),
        tiled(OnGpu(), 16, 16),
    ]
    kinds = {(d.base, *d.shape, *d.strides, *d.block_shape) for d in (first, *others)}
    assert len(kinds) == 7

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels.descriptors import descriptor_fits


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

"""Sizes of ranks, grids and tiles, and the one setting that may make fp32 products less exact."""

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels.lora_gemm import descriptor_fits
from lora_fast.kernels.primitives import MAX_BLOCK_R, chunk_length, dot_precision, rank_blocks


@pytest.fixture(autouse=True)
def precision_as_before() -> Iterator[None]:
    generic, matmul = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    # The old names first: they refuse to be read where only the new ones were set.
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = generic
    torch.backends.cuda.matmul.fp32_precision = matmul


def set_allow_tf32(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def set_matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_everything(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"  # no word of its own: the general one
    torch.backends.fp32_precision = value


@pytest.mark.parametrize(
    ("allow", "refuse"),
    [
        (lambda: set_allow_tf32(True), lambda: set_allow_tf32(False)),
        (lambda: set_matmul("tf32"), lambda: set_matmul("ieee")),
        (lambda: set_everything("tf32"), lambda: set_everything("ieee")),
        (
            lambda: torch.set_float32_matmul_precision("high"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
        (
            lambda: torch.set_float32_matmul_precision("medium"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
    ],
    ids=["allow_tf32", "matmul.fp32_precision", "fp32_precision", "high", "medium"],
)
def test_tf32_where_torch_allows_it(allow: Callable[[], None], refuse: Callable[[], None]) -> None:
    refuse()
    assert dot_precision(torch.float32) == "ieee"
    allow()
    assert dot_precision(torch.float32) == "tf32"
    assert dot_precision(torch.float16) == dot_precision(torch.bfloat16) == "ieee"
    refuse()
    assert dot_precision(torch.float32) == "ieee"


def test_tf32_is_off_by_default() -> None:
    set_everything("none")
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, (16, 1)), (16, (16, 1)), (17, (32, 1)), (33, (64, 1)), (64, (64, 1)), (65, (64, 2)),
     (128, (64, 2)), (129, (64, 3)), (512, (64, 8))],
)  # fmt: skip
def test_rank_blocks(rank: int, expected: tuple[int, int]) -> None:
    assert rank_blocks(rank) == expected
    assert expected[0] <= MAX_BLOCK_R


@pytest.mark.parametrize("length", [1, 65535 * 1024, 65535 * 1024 + 1, 2**31 - 2**16])
def test_a_long_axis_fits_the_grid(length: int) -> None:
    chunk = chunk_length(length, 1024)
    assert -(-length // chunk) <= 65535
    assert chunk % 1024 == 0
    assert (chunk == 1024) == (length <= 65535 * 1024)


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

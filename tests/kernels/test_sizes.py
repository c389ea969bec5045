"""Sizes of ranks and grids."""

import pytest

from lora_fast.kernels.sizes import MAX_BLOCK_R, chunk_length, rank_blocks


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

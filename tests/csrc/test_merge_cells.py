"""The passes over cells on the CPU: where they stop, the weights are served one by one instead.

A cell is 4 or 8 rows of two vectors, a tile 8 rows of 256 columns; see csrc/merge_cpu_cells.h.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_fast import functional

N, K = 11, 300  # rows that fill no cell, columns that fill no tile and no cell
DTYPES = [torch.float32, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32}
# In the first and last row of a cell, and beyond the last whole one; in the first and second cell,
# at the end of a tile, and behind the last whole cell.
ROWS, COLUMNS = [0, 3, 4, 7, 8, 10], [0, 31, 40, 255, 256, 299]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()]).clone()


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set of this machine."""
    monkeypatch.setenv("LORA_FAST_CPU_ISA", request.param)
    try:
        functional.merge_(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param


def column_of_large_weights(col: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, A and B whose delta is 1e36 in one column of weights as large, 0 elsewhere."""
    weight = torch.randn(N, K)
    weight[:, col] = 1e36 * (1 + torch.rand(N))
    weight[1, col] = 1e-3  # whose code does not fit, so the list has it
    lora_A = torch.zeros(2, K)
    lora_A[:, col] = 1e18
    return weight.to(dtype), lora_A, torch.full((N, 2), 0.5e18)


@pytest.mark.parametrize("col", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_merged_before_an_overflow_is_taken_back(
    isa: str, dtype: torch.dtype, row: int, col: int
) -> None:
    weight, lora_A, lora_B = column_of_large_weights(col, dtype)
    before = bits(weight)
    record = functional.merge_(weight, lora_A, lora_B, 1.0)
    assert record.codes[0].places.tolist() == [K + col]
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)

    weight[row, col] = torch.finfo(dtype).max  # a bf16 sum that only its rounding makes infinite
    before = bits(weight)
    with pytest.raises(OverflowError):
        functional.merge_(weight, lora_A, lora_B, 1.0)
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_sets_write_the_same_codes(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (1 + torch.rand(N, K)).mul_(torch.randn(N, K).sign()).to(dtype)
    weight[torch.randint(N, (9,)), torch.randint(K, (9,))] = 1e-6  # whose codes do not fit
    weight[torch.randint(N, (30,)), torch.randint(K, (30,))] = torch.inf
    weight[torch.randint(N, (30,)), torch.randint(K, (30,))] = -torch.nan
    weight[torch.randint(N, (5,)), torch.randint(K, (5,))] = -0.0
    args = (torch.randn(5, K) * 0.1, torch.randn(N, 5) * 0.1, 0.7)
    merged, before = weight.clone(), bits(weight)
    record = functional.merge_(merged, *args)
    assert record.codes[0].places.numel() > 0

    monkeypatch.setenv("LORA_FAST_CPU_ISA", "portable")
    expected = weight.clone()
    plain = functional.merge_(expected, *args)
    monkeypatch.setenv("LORA_FAST_CPU_ISA", isa)
    assert torch.equal(bits(merged), bits(expected))
    assert torch.equal(record.codes[0].code, plain.codes[0].code)
    functional.unmerge_(merged, record)
    assert torch.equal(bits(merged), before)


@pytest.mark.parametrize("col", COLUMNS)
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7F800001, -1, 0x7F800000])
def test_a_factor_that_is_no_number_refuses_the_merge(isa: str, pattern: int, col: int) -> None:
    # A NaN with all bits set (CUDA's own) wraps to -0 where it is rounded as a number is.
    lora_A = torch.zeros(1, K)
    lora_A.view(torch.int32)[0, col] = pattern
    for dtype in DTYPES:
        weight = torch.zeros(N, K, dtype=dtype)
        with pytest.raises(OverflowError):
            functional.merge_(weight, lora_A, torch.ones(N, 1), 1.0)
        assert torch.equal(bits(weight), torch.zeros_like(bits(weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_at_the_ends_of_the_range(isa: str, dtype: torch.dtype) -> None:
    """Ties, the last step before infinity, and subnormals, against torch's own rounding."""
    weight = torch.zeros(8, 64, dtype=dtype)
    patterns = [0x00000001, 0x00008000, 0x00018000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x007FFFFF]
    delta = torch.zeros(64)
    delta.view(torch.int32)[: len(patterns)] = torch.tensor(patterns, dtype=torch.int32)
    delta[32 : 32 + len(patterns)] = -delta[: len(patterns)]
    expected = delta.to(dtype).expand(8, 64)
    original = functional.merge_(weight, delta[None], torch.ones(8, 1), 1.0)
    assert torch.equal(weight, expected)
    functional.unmerge_(weight, original)
    assert torch.equal(bits(weight), torch.zeros_like(bits(weight)))

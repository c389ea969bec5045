"""The passes over cells on the CPU: where they stop, the weights are served one by one instead.

A cell is 4 or 8 rows of two vectors, a tile 8 rows of 256 columns; see csrc/merge_cpu_cells.h.
"""

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
    assert record.codes[0].overflow_index.tolist() == [K + col]
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
    assert record.codes[0].overflow_index.numel() > 0

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
def test_weights_that_are_no_numbers_take_any_factor(isa: str, dtype: torch.dtype) -> None:
    # The sums are NaN in the rows that a tile lacks, too, which are none of its business.
    memory = torch.zeros(N + 8, K, dtype=dtype)
    weight = memory[:N].fill_(torch.inf)
    weight[::2] = torch.nan
    before = bits(memory)
    record = functional.merge_(weight, torch.full((1, K), torch.inf), torch.ones(N, 1), 1.0)
    assert torch.equal(bits(memory), before)
    functional.unmerge_(weight, record)
    assert torch.equal(bits(memory), before)


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


def same_in_every_set(
    isa: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 0.5
) -> None:
    """Merge copies by a set and by the portable loops, compare all bits, and unmerge them."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for name in (isa, "portable"):
            patch.setenv("LORA_FAST_CPU_ISA", name)
            merged = weight.clone()
            results.append((merged, functional.merge_(merged, lora_A, lora_B, scaling)))
        (merged, record), (expected, plain) = results
        assert torch.equal(bits(merged), bits(expected))
        for mine, other in zip(record.codes, plain.codes, strict=True):
            assert torch.equal(mine.code, other.code)
        # Each undoes what the other did.
        functional.unmerge_(merged, plain)
        patch.setenv("LORA_FAST_CPU_ISA", isa)
        functional.unmerge_(expected, record)
    assert torch.equal(bits(merged), bits(weight))
    assert torch.equal(bits(expected), bits(weight))


def numbers(rows: int, cols: int, exponent: int) -> Tensor:
    """bf16 numbers of either sign from 2^exponent to 2^(exponent + 1)."""
    number = (1 + torch.rand(rows, cols)) * torch.randn(rows, cols).sign()
    return torch.ldexp(number.double(), torch.tensor(exponent)).to(torch.bfloat16)


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
@pytest.mark.parametrize(
    "exponent",
    [
        -4,
        -56,  # the least whose products' last bits are no subnormals
        -60,
        -133,  # factors that are subnormal
        42,  # the most whose sums can't be infinite, if the large ones below are counted
        48,
    ],
)
def test_sums_of_bf16_factors_are_added_in_order(isa: str, exponent: int, rank: int) -> None:
    lora_A, lora_B = numbers(rank, K, exponent), numbers(N, rank, exponent)
    if rank > 4:  # two that cancel: what the sums lose beside them shows in weights of their size
        lora_A[3] = lora_A[4] = numbers(1, K, exponent + 10)[0]
        lora_B[:, 3] = numbers(1, N, exponent + 9)[0]
        lora_B[:, 4] = -lora_B[:, 3]
    same_in_every_set(isa, numbers(N, K, max(2 * exponent, -130)), lora_A, lora_B)


@pytest.mark.parametrize("exponents", [(-56, -56), (-57, -56), (-56, -57), (-100, -13)], ids=str)
def test_a_sum_of_bf16_factors_that_is_subnormal_counts(
    isa: str, exponents: tuple[int, int]
) -> None:
    step = 2.0**-7
    ones_A, ones_B = torch.ones(1, K), torch.ones(N, 1)
    # (1 + u)^2 - (1 + 2 u) = u^2, the least sum there can be.
    lora_A = torch.cat([ones_A + step, ones_A + 2 * step]) * 2.0 ** exponents[0]
    lora_B = torch.cat([ones_B + step, -ones_B], 1) * 2.0 ** exponents[1]
    weight = torch.full((N, K), 2.0**-125).to(torch.bfloat16)
    factors = lora_A.to(torch.bfloat16), lora_B.to(torch.bfloat16)
    merged = weight.clone()
    functional.merge_(merged, *factors, 0.5)
    assert torch.equal(merged.double(), weight.double() + 2.0 ** (sum(exponents) - 15))
    same_in_every_set(isa, weight, *factors)


def test_subnormal_factors_count(isa: str) -> None:
    weight = numbers(N, K, -20)
    for lora_A, lora_B in [
        (numbers(2, K, -130), numbers(N, 2, 110)),
        (numbers(2, K, 110), numbers(N, 2, -130)),
    ]:
        same_in_every_set(isa, weight, lora_A, lora_B)


def test_factors_that_bf16_cannot_hold(isa: str) -> None:
    weight = numbers(N, K, -3)
    lora_A, lora_B = numbers(4, K, -1).float(), numbers(N, 4, -1).float()
    same_in_every_set(isa, weight, lora_A, lora_B)
    # One number of one column tile, or of one row of tiles, is enough.
    lora_A[3, 290] *= 1 + 2.0**-12
    weight[:, 290] = -(lora_B @ lora_A)[:, 290] / 2
    same_in_every_set(isa, weight, lora_A, lora_B)
    lora_A[3, 290] = 0
    lora_B[9, 0] *= 1 + 2.0**-12
    weight[9] = -(lora_B @ lora_A)[9] / 2
    same_in_every_set(isa, weight, lora_A, lora_B)


@pytest.mark.parametrize("small", [0.0, -0.0, 2.0**-130, -(2.0**-130), 2.0**-126])
def test_weights_that_are_or_become_zero_or_subnormal(isa: str, small: float) -> None:
    weight = numbers(N, K, -3)
    weight[:, 3::8] = small
    lora_A, lora_B = numbers(2, K, -1), numbers(N, 2, -1)
    lora_A[:, 1::16] = 0  # these stay as they are
    same_in_every_set(isa, weight, lora_A, lora_B)
    # delta = +-2^-125
    lora_A, lora_B = torch.full((1, K), 2.0**-40), torch.full((N, 1), 2.0**-40)
    lora_B[::2] *= -1
    weight[:] = small
    weight[:, ::3] = 2.0**-125 * (1 - 2.0**-5)  # becomes -2^-130 in every other row
    same_in_every_set(isa, weight, lora_A.bfloat16(), lora_B.bfloat16(), 2.0**-45)


@pytest.mark.parametrize("col", COLUMNS)
def test_bf16_factors_that_make_a_weight_infinite_are_refused(isa: str, col: int) -> None:
    for factor in (2.0**30, torch.inf, torch.nan):
        weight = torch.ones(N, K, dtype=torch.bfloat16)
        weight[:, col] = torch.finfo(torch.bfloat16).max
        before = bits(weight)
        lora_A = torch.zeros(1, K, dtype=torch.bfloat16)
        lora_A[0, col] = factor
        lora_B = torch.full((N, 1), 2.0**30, dtype=torch.bfloat16)
        with pytest.raises(OverflowError):
            functional.merge_(weight, lora_A, lora_B, 2.0**60)  # a delta of the last step
        assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("col", COLUMNS)
def test_half_a_step_beyond_the_largest_bf16_number_is_infinite(isa: str, col: int) -> None:
    weight = torch.ones(N, K, dtype=torch.bfloat16)
    weight[:, col] = torch.finfo(torch.bfloat16).max
    before = bits(weight)
    lora_A = torch.zeros(1, K)
    lora_A[0, col] = 2.0**60
    with pytest.raises(OverflowError):
        functional.merge_(weight, lora_A, torch.full((N, 1), 2.0**59), 1.0)
    assert torch.equal(bits(weight), before)
    functional.merge_(weight, lora_A, torch.full((N, 1), 2.0**58), 1.0)
    assert torch.equal(bits(weight), before)  # rounds down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_distances_that_no_code_holds(isa: str, dtype: torch.dtype) -> None:
    """W + 1 is 1, and 1 - 1 is 0: the distance is the pattern of W, of a negative W one more."""
    weight = torch.full((16, 512), 2.0).to(dtype)
    patterns = torch.arange(124, 132)
    stored = weight.view(INTEGERS[dtype.itemsize])
    sign = torch.iinfo(stored.dtype).min
    for row, pattern in enumerate(patterns.tolist()):
        stored[row, 37 * row] = pattern
        stored[8 + row, 37 * row] = sign + pattern
    before = bits(weight)
    record = functional.merge_(weight, torch.ones(1, 512), torch.ones(16, 1), 1.0)
    listed = sorted(record.codes[0].overflow_index.tolist())
    places = torch.arange(8) * 549  # row * 512 + 37 * row
    expected = [*places[patterns > 127].tolist(), *(places[patterns > 126] + 8 * 512).tolist()]
    assert listed == expected
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)

"""The maths in plain torch against rows computed by hand, which share no bug with an oracle."""

import pytest
import torch
from torch import Tensor

from lora_fast import reference, scripting

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_is(actual: Tensor, expected: list[object], dtype: torch.dtype) -> None:
    """Small integers: every dtype holds them and their sums exactly."""
    assert actual.dtype is dtype
    assert actual.tolist() == expected


def test_lora_linear(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2], [0, -1]], dtype=dtype)
    weight = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=dtype)
    lora_A, lora_B = (torch.tensor(t, dtype=dtype) for t in ([[1, 1]], [[1], [0], [2]]))
    bias = torch.tensor([0, 1, 0], dtype=dtype)
    # x W^T = 1 2 3 and 0 -1 -1; x A^T = 3 and -1, twice that times B = 6 0 12 and -2 0 -4.
    y = reference.lora_linear(x, weight, lora_A, lora_B, 2.0, bias)
    assert_is(y, [[7, 3, 15], [-2, 0, -5]], dtype)
    assert_is(reference.lora_linear(x[0], weight, lora_A, lora_B, 2.0), [7, 2, 15], dtype)
    everything_dropped = reference.lora_linear(x, weight, lora_A, lora_B, 2.0, bias, 1.0, True)
    assert_is(everything_dropped, [[1, 3, 3], [0, 0, -1]], dtype)


def test_lora_merged_linear(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2]], dtype=dtype)
    weight = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=dtype)
    lora_A, lora_B = (torch.tensor(t, dtype=dtype) for t in ([[1, 1], [1, -1]], [[1], [2]]))
    # Blocks 0 and 2: x A_0^T = 3, x A_1^T = -1.
    enable = [True, False, True]
    y = reference.lora_merged_linear(x, weight, lora_A, lora_B, 2.0, enable_lora=enable)
    assert_is(y, [[1 + 2 * 3 * 1, 2, 3 + 2 * -1 * 2]], dtype)
    y = reference.lora_merged_linear(
        *(x, weight, lora_A[:1], lora_B, 2.0), enable_lora=[False, True], out_splits=[1, 2]
    )
    assert_is(y, [[1, 2 + 2 * 3 * 1, 3 + 2 * 3 * 2]], dtype)


def test_lora_embedding(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    lora_A, lora_B = torch.tensor([[5, 7]], dtype=dtype), torch.tensor([[1], [2]], dtype=dtype)
    y = reference.lora_embedding(torch.tensor([1, 0]), weight, lora_A, lora_B, 2.0)
    assert_is(y, [[3 + 14, 4 + 28], [1 + 10, 2 + 20]], dtype)


def test_lora_conv(dtype: torch.dtype) -> None:
    x = torch.tensor([[[1, 2, 3]]], dtype=dtype)
    weight = torch.tensor([[[1, 2]]], dtype=dtype)
    lora_A = torch.tensor([[1, 0], [0, 1]], dtype=dtype)
    lora_B = torch.tensor([[1, 2]], dtype=dtype)
    # The kernel 1 2 becomes 1 2 + 3 (1 2) = 4 8.
    y = reference.lora_conv(x, weight, lora_A, lora_B, 3.0)
    assert_is(y, [[[1 * 4 + 2 * 8, 2 * 4 + 3 * 8]]], dtype)


def test_merged_delta_and_weight(dtype: torch.dtype) -> None:
    lora_A, lora_B = torch.tensor([[3, 4]], dtype=dtype), torch.tensor([[1], [2]], dtype=dtype)
    assert_is(reference.merged_delta(lora_A, lora_B, 2.0), [[6, 8], [12, 16]], dtype)
    blocks = {"enable_lora": [False, True], "out_splits": [1, 2]}
    delta = reference.merged_delta(lora_A, lora_B, 2.0, **blocks)
    assert_is(delta, [[0, 0], [6, 8], [12, 16]], dtype)
    weight = torch.tensor([[1, 1], [2, 2], [3, 3]], dtype=dtype)
    merged = reference.merged_weight(weight, lora_A, lora_B, 2.0, **blocks)
    assert_is(merged, [[1, 1], [8, 10], [15, 19]], dtype)


def test_merge_and_unmerge(dtype: torch.dtype) -> None:
    lora_A, lora_B = torch.tensor([[3, 4]], dtype=dtype), torch.tensor([[1], [2]], dtype=dtype)
    weight = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    original = reference.merge_(weight, lora_A, lora_B, 2.0)
    assert_is(weight, [[7, 10], [15, 20]], dtype)
    reference.unmerge_(weight, original)
    assert_is(weight, [[1, 2], [3, 4]], dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scaling", [0.3, 3.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_script_scales_what_the_reference_scales(dtype: torch.dtype, scaling: float) -> None:
    s = torch.randn(5, 3).to(dtype)
    found, rest = torch.jit.script(scripting._scaled_s)(s, scaling)
    expected, its_rest = reference.scaled_s(s, scaling)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    assert rest == its_rest

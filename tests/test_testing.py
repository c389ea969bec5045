"""The budget of `lora_fast.testing`: what it lets pass, what it catches, and what it then says."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import assert_within_budget, budget_used, error_budget, randomize_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product(dtype: torch.dtype, m: int = 65, k: int = 130, n: int = 33) -> tuple[Tensor, Tensor]:
    """A matrix product in `dtype` and in fp64."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    return a @ b, a.double() @ b.double()


def test_randomize_fills_every_adapter_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {
            "linear": lora.Linear(40, 60, r=8),
            "merged": lora.MergedLinear(40, 60, r=8, enable_lora=[True, False]),
            "table": lora.Embedding(90, 40, r=8),
            "conv": lora.Conv2d(8, 8, 3, r=4),
            "lora_like": nn.Linear(3, 3),
        }
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert randomize_(model, std=0.25) is model
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] in ("lora_A", "lora_B"):
            assert 0.2 < parameter.std().item() < 0.3, name
            assert parameter.requires_grad
            assert parameter.is_leaf
        else:
            assert torch.equal(parameter, before[name]), name


def test_randomize_makes_the_update_visible_and_follows_the_seed() -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(randomize_(lora.Linear(5, 4, r=2)))
    x = torch.randn(3, 5)
    assert torch.equal(layers[0](x), layers[1](x))
    plain = nn.functional.linear(x, layers[0].weight, layers[0].bias)
    assert (layers[0](x) - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_by_hand(dtype: torch.dtype) -> None:
    oracle = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    eager = oracle.to(dtype)
    eager[2] = -4.0 * (1.0 - 4.0 * eps)
    rounding = oracle.abs() * eps / 2
    error = torch.tensor([0.0, 0.0, 16.0 * eps], dtype=torch.float64)
    order = 16.0 * 4.0 * (2**-52 if dtype is torch.float64 else 2**-23)
    largest, rms = error_budget(eager, oracle)
    assert largest == pytest.approx(2.0 * (16.0 * eps + 2.0 * eps + order))
    root = [math.sqrt(t.square().mean().item()) for t in (error, rounding)]
    assert rms == pytest.approx(2.0 * (sum(root) + order))
    assert error_budget(eager, oracle, factor=6.0) == pytest.approx((3.0 * largest, 3.0 * rms))


def test_the_budget_of_nothing_is_nothing() -> None:
    assert error_budget(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_itself_and_the_rounded_oracle_pass(dtype: torch.dtype) -> None:
    eager, oracle = product(dtype)
    assert_within_budget(eager, eager, oracle)
    assert_within_budget(oracle.to(dtype), eager, oracle)
    assert_within_budget(oracle.to(dtype), oracle.to(dtype), oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_off_by_two_percent_fails(dtype: torch.dtype) -> None:
    eager, oracle = product(dtype)
    with pytest.raises(AssertionError, match=r"result: largest error .* \(budget .*\), root mean"):
        assert_within_budget((oracle * 1.02).to(dtype), eager, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_fails_and_is_pointed_at(dtype: torch.dtype) -> None:
    eager, oracle = product(dtype)
    actual = eager.clone()
    actual[7, 3] += 1.0
    got, want = actual[7, 3].item(), oracle[7, 3].item()
    expected = (
        re.escape("dA: largest error ") + ".*" + re.escape(f"; at [7, 3] got {got}, oracle {want}")
    )
    with pytest.raises(AssertionError, match=expected):
        assert_within_budget(actual, eager, oracle, what="dA")


def test_small_errors_everywhere_fail_by_their_root_mean_square() -> None:
    """No element is over eager's largest error, but eager has it once and not everywhere."""
    oracle = torch.full((100, 100), 1.0, dtype=torch.float64)
    eager = oracle.float()
    eager[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="root mean square"):
        assert_within_budget(oracle.float() + 9e-4, eager, oracle)
    assert_within_budget(eager, eager, oracle)


def test_the_factor_widens_the_budget() -> None:
    oracle = torch.full((8,), 1.0, dtype=torch.float64)
    eager, actual = oracle.float() + 1e-4, oracle.float() - 5e-4
    with pytest.raises(AssertionError):
        assert_within_budget(actual, eager, oracle)
    assert_within_budget(actual, eager, oracle, factor=6.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_another_dtype_fails(dtype: torch.dtype) -> None:
    eager, oracle = product(torch.float32)
    with pytest.raises(AssertionError, match=rf"expected torch.float32 \(65, 33\), got {dtype}"):
        assert_within_budget(eager.to(dtype), eager, oracle)


@pytest.mark.parametrize("shape", [(33, 65), (1, 65, 33), (65 * 33,)], ids=str)
def test_another_shape_fails(shape: tuple[int, ...]) -> None:
    eager, oracle = product(torch.float32)
    with pytest.raises(AssertionError, match=re.escape(f"(65, 33), got torch.float32 {shape}")):
        assert_within_budget(eager.reshape(shape), eager, oracle)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_unexpected_nan_or_infinity_fails(value: float) -> None:
    eager, oracle = product(torch.float32)
    actual = eager.clone()
    actual[2, 2] = value
    with pytest.raises(AssertionError, match="infinities or NaN are not where the oracle has them"):
        assert_within_budget(actual, eager, oracle)


def test_a_missing_infinity_fails_and_one_that_belongs_there_passes() -> None:
    eager, oracle = product(torch.float32)
    oracle[2, 2] = math.inf
    with pytest.raises(AssertionError, match="infinities"):
        assert_within_budget(eager, eager, oracle)
    eager[2, 2] = math.inf
    assert_within_budget(eager, eager, oracle)


def test_the_other_sign_of_infinity_fails() -> None:
    eager, oracle = product(torch.float32)
    oracle[2, 2], eager[2, 2] = math.inf, math.inf
    actual = eager.clone()
    actual[2, 2] = -math.inf
    with pytest.raises(AssertionError, match="infinities"):
        assert_within_budget(actual, eager, oracle)


def test_nan_in_the_place_of_an_infinity_fails() -> None:
    eager, oracle = product(torch.float32)
    oracle[2, 2], eager[2, 2] = math.inf, math.inf
    actual = eager.clone()
    actual[2, 2] = math.nan
    with pytest.raises(AssertionError, match="infinities"):
        assert_within_budget(actual, eager, oracle)


def test_without_a_finite_eager_result_there_is_no_budget() -> None:
    oracle = torch.full((4,), 7e4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="eager PyTorch overflows, so there is no budget"):
        assert_within_budget(torch.full((4,), 6e4).half(), oracle.half(), oracle)


def test_zeros_where_the_oracle_is_zero() -> None:
    zero = torch.zeros(3, 3)
    assert_within_budget(zero, zero, zero.double())
    with pytest.raises(AssertionError):
        assert_within_budget(zero + 1e-30, zero, zero.double())


def test_scalars_and_empty_tensors() -> None:
    one = torch.ones(())
    assert_within_budget(one, one, one.double())
    with pytest.raises(AssertionError, match=re.escape("at [] got 2.0, oracle 1.0")):
        assert_within_budget(one + 1, one, one.double())
    assert_within_budget(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3).double())
    with pytest.raises(AssertionError, match="expected"):
        assert_within_budget(torch.empty(0, 4), torch.empty(0, 3), torch.empty(0, 3).double())


def test_tensors_that_require_grad() -> None:
    eager, oracle = product(torch.float32)
    assert_within_budget(eager.requires_grad_(), eager, oracle.requires_grad_())


@pytest.mark.parametrize("wrong", [None, [nn.Linear(2, 2)], nn.Linear], ids=repr)
def test_what_is_no_module_is_named(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^randomize_: module must be a torch\.nn\.Module, got"):
        randomize_(wrong)


@pytest.mark.parametrize("function", [assert_within_budget, budget_used])
@pytest.mark.parametrize("argument", ["actual", "eager", "oracle"])
def test_what_is_no_tensor_is_named(function: Any, argument: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("actual", "eager", "oracle"), torch.ones(3))
    arguments[argument] = 1.5
    name = function.__name__
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be a tensor, got 1.5 of type f"):
        function(**arguments)
    if argument != "actual":
        del arguments["actual"]
        with pytest.raises(TypeError, match=f"^error_budget: {argument} must be a tensor, got 1.5"):
            error_budget(**arguments)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1)], ids=str)
def test_an_oracle_of_another_shape_is_no_oracle(shape: tuple[int, ...]) -> None:
    y, oracle = torch.ones(2, 3), torch.ones(shape, dtype=torch.float64)
    message = re.escape(f"oracle must have the shape of eager, (2, 3), got {shape}")
    with pytest.raises(ValueError, match=message):
        error_budget(y, oracle)
    for check in (assert_within_budget, budget_used):
        with pytest.raises(ValueError, match=message):
            check(y, y, oracle)

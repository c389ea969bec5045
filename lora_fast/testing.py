"""What tests and measurements of LoRA code need; above all a derived, not chosen, error budget.

The budget comes from PyTorch itself: the answer in float64 is the oracle, and an implementation may
be off by twice what eager PyTorch is off in the same dtype, plus one rounding of the result and
what the order of a sum is worth in the accumulator's precision.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_fast import checks

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def randomize_(module: Module, std: float = 0.5) -> Module:
    """Fill every `lora_A` and `lora_B` with N(0, std^2): a fresh adapter changes nothing.

    Args:
        module: any module.
        std: standard deviation.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no module.
    """
    checks.module("randomize_", module, "named_parameters", "module")
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith("lora_"):
            parameter.normal_(std=std)
    return module


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Return what `forward` keeps for backward, in bytes, every storage once.

    Args:
        forward: runs the forward pass.
        known: tensors that are there anyway, parameters and inputs, which do not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    sizes: dict[int, int] = {}
    kept = []  # a storage that is freed could lend its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


# Terms cancel and sums have no fixed order: on one processor or another eager PyTorch is itself off
# by up to this many eps of the accumulator times the largest element, and by luck by nothing.
_ORDER_OF_SUMS = 16


@torch.no_grad()
def error_budget(eager: Tensor, oracle: Tensor, *, factor: float = 2.0) -> tuple[float, float]:
    """Return how far an implementation may be from `oracle`: largest and root mean square error.

    Args:
        eager: the result of plain PyTorch in the dtype under test.
        oracle: the result in float64.
        factor: multiple of eager's own error (and of one rounding) that is allowed.

    Returns:
        Bounds for the largest and the root mean square absolute error.

    Raises:
        TypeError: one of them is no tensor.
        ValueError: their shapes differ.
    """
    _check_oracle("error_budget", eager, oracle)
    wide = oracle.double()
    error = (eager.double() - wide).abs()
    # Eager may be right by luck where little is added up; a rounding of the result is always due.
    rounding = wide.abs() * torch.finfo(eager.dtype).eps / 2
    accumulator = torch.promote_types(eager.dtype, torch.float32)
    order = _ORDER_OF_SUMS * torch.finfo(accumulator).eps * _largest(wide.abs())
    largest = _largest(error + rounding) + order
    return factor * largest, factor * (_rms(error) + _rms(rounding) + order)


@torch.no_grad()
def assert_within_budget(
    actual: Tensor, eager: Tensor, oracle: Tensor, *, factor: float = 2.0, what: str = "result"
) -> None:
    """Fail unless `actual` is as near to `oracle` as `error_budget` demands.

    Args:
        actual: the result under test.
        eager: the result of plain PyTorch in the same dtype, from the same inputs.
        oracle: the result in float64.
        factor: as for `error_budget`.
        what: name of the result, for the message.

    Raises:
        AssertionError: shape or dtype differ from `eager`, or an error is over the budget. The
            message gives both errors, both budgets and where the largest error is.
        TypeError: one of them is no tensor.
        ValueError: the shape of `oracle` differs.
    """
    checks.tensors("assert_within_budget", actual=actual)
    _check_oracle("assert_within_budget", eager, oracle)
    _check_kind(actual, eager, what)
    if actual.numel() == 0:
        return
    error, (largest, rms) = _error_and_budget(actual, eager, oracle, factor, what)
    if _largest(error) <= largest and _rms(error) <= rms:
        return
    flat = int(error.argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)]
    raise AssertionError(
        f"{what}: largest error {_largest(error):.3e} (budget {largest:.3e}), root mean square "
        f"{_rms(error):.3e} (budget {rms:.3e}); at {at} got {actual[tuple(at)].item()}, "
        f"oracle {oracle[tuple(at)].item()}"
    )


@torch.no_grad()
def budget_used(actual: Tensor, eager: Tensor, oracle: Tensor, *, factor: float = 2.0) -> float:
    """Return the error of `actual` as a part of `error_budget`: 1 is the most that is allowed.

    Args:
        actual: as for `assert_within_budget`.
        eager: likewise.
        oracle: likewise.
        factor: likewise.

    Raises:
        AssertionError: there is no error to tell: shape, dtype, infinities or NaN differ.
        TypeError: one of them is no tensor.
        ValueError: the shape of `oracle` differs.
    """
    checks.tensors("budget_used", actual=actual)
    _check_oracle("budget_used", eager, oracle)
    _check_kind(actual, eager, "result")
    if actual.numel() == 0:
        return 0.0
    error, budgets = _error_and_budget(actual, eager, oracle, factor, "result")
    pairs = zip((_largest(error), _rms(error)), budgets, strict=True)
    return max(0.0 if e == 0.0 else e / b if b else math.inf for e, b in pairs)


def _check_oracle(function: str, eager: Tensor, oracle: Tensor) -> None:
    checks.tensors(function, eager=eager, oracle=oracle)
    if oracle.shape != eager.shape:
        raise ValueError(
            f"{function}: oracle must have the shape of eager, {tuple(eager.shape)}, got "
            f"{tuple(oracle.shape)}"
        )


def _check_kind(actual: Tensor, eager: Tensor, what: str) -> None:
    if actual.shape != eager.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{what}: expected {eager.dtype} {tuple(eager.shape)}, got {actual.dtype} "
            f"{tuple(actual.shape)}"
        )


def _error_and_budget(
    actual: Tensor, eager: Tensor, oracle: Tensor, factor: float, what: str
) -> tuple[Tensor, tuple[float, float]]:
    """The error of every element, and the budgets of the largest and the root mean square."""
    finite = oracle.isfinite()
    special = torch.where(finite, torch.zeros_like(oracle), oracle)
    found = torch.where(actual.isfinite(), torch.zeros_like(oracle), actual.to(oracle.dtype))
    if not torch.equal(found.nan_to_num(2.0), special.nan_to_num(2.0)):
        raise AssertionError(f"{what}: infinities or NaN are not where the oracle has them")
    if not eager.isfinite()[finite].all():
        raise AssertionError(f"{what}: eager PyTorch overflows, so there is no budget")
    zero = torch.zeros((), dtype=torch.float64, device=oracle.device)
    wide = torch.where(finite, oracle.double(), zero)
    error = (torch.where(finite, actual.double(), zero) - wide).abs()
    clean = torch.where(finite, eager, zero.to(eager.dtype))
    return error, error_budget(clean, wide, factor=factor)


def _largest(error: Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt()) if error.numel() else 0.0

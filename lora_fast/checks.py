"""Which arguments can be served, but for their shapes: one copy, for functions, layers and merges.

Every refusal names the argument, what was expected and what came.
"""

import numbers
import operator
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from lora_fast import torch_internals


def tensors(op: str, bias: Any = None, **named: Any) -> None:
    """Refuse arguments that are no tensors, nor stand for one; `bias` may be None.

    Where calls are short, the checks of shapes ask only when they fail.
    """
    if bias is not None:
        named["bias"] = bias
    for name, value in named.items():
        if not hasattr(type(value), "__torch_function__"):
            raise TypeError(
                f"{op}: {name} must be a tensor, got {value!r:.60} of type {_kind(value)}"
            )


def module(op: str, model: Any, method: str) -> None:
    """Refuse a model that is no module, nor wraps one: it has no such method."""
    if isinstance(model, type) or not callable(getattr(model, method, None)):
        what = f"the class {model.__name__}" if isinstance(model, type) else _kind(model)
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {what}; give the model itself, not its "
            "state or its class"
        )


def _kind(value: Any) -> str:
    return type(value).__name__


def mergeable(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Refuse a weight that holds no fractions or cannot hold the delta, and other devices."""
    if not weight.is_complex():
        for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            if not tensor.is_floating_point():
                raise TypeError(
                    f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}"
                )
    if weight.device != lora_A.device or weight.device != lora_B.device:
        raise ValueError(
            f"{op}: weight, lora_A and lora_B must be on one device, got {weight.device}, "
            f"{lora_A.device} and {lora_B.device}"
        )


def not_faked(op: str, weight: Tensor) -> None:
    """Refuse a weight with values under FakeTensorMode, where nothing is written to it."""
    if torch_internals.mode_count() == 0:
        return
    if torch_internals.in_fake_mode() and type(weight) in (Tensor, torch.nn.Parameter):
        raise RuntimeError(f"{op}: under FakeTensorMode nothing is written; leave the mode first")


def _is_number(value: Any) -> bool:
    if torch.compiler.is_compiling():  # it may be a symbol, which is not to be asked
        return True
    # An array of several numbers claims to be one, too.
    return isinstance(value, SupportsFloat) and getattr(value, "ndim", 0) == 0


def rank(r: Any) -> int:
    """`r` as an int; refuse what is no integer."""
    # loralib takes False for 0, which is what nn.Linear(4, 8, False) becomes here.
    found = None if r is True else integer(r)
    if found is None:
        raise TypeError(f"r must be an integer, got {r!r} of type {_kind(r)}")
    return found


def integer(value: Any) -> int | None:
    """An integer of any type, NumPy's say, as an int; None for what is none."""
    try:
        return operator.index(value)
    except TypeError:  # from a tensor of fractions too, which has the method
        return None


def adapter(r: Any, alpha: Any, dropout: Any) -> int:
    """The rank of an adapter; refuse settings that it cannot have."""
    rate("lora_dropout", dropout)
    found = rank(r)
    if found > 0:
        lora_alpha(alpha)
    return found


def lora_alpha(alpha: Any) -> None:
    """Refuse a scale of the update that is no number."""
    if not _is_number(alpha):
        raise TypeError(f"lora_alpha must be a number, got {alpha!r} of type {_kind(alpha)}")


def scaling_of(alpha: Any, r: int) -> Any:
    """`alpha / r`, a plain float if it is a number; what is trained or traced stays what it is."""
    found = alpha / r
    # No compiler takes NumPy's numbers, or fractions, for constants.
    is_number = type(found) is not float and isinstance(found, (numbers.Real, Decimal))
    return float(found) if is_number else found


def scaling(op: str, value: Any) -> None:
    """Refuse a factor of the update that is neither a number nor a tensor."""
    if not hasattr(type(value), "__torch_function__") and not _is_number(value):
        raise TypeError(
            f"{op}: scaling must be a number or a tensor, got {value!r:.60} of type {_kind(value)}"
        )


def number(scaling: Any) -> float:
    """A factor of the update as a number; it may be a tensor that is trained."""
    return float(scaling.detach() if isinstance(scaling, Tensor) else scaling)


def no_input_kept() -> RuntimeError:
    """What a double backward needs and an implementation that keeps less does not have."""
    return RuntimeError(
        "lora_linear: with lora_A frozen a GPU's forward does not keep x, which create_graph=True "
        "needs for the gradient of lora_B; run it under lora_fast.use_backend('reference')"
    )


def rate(what: str, p: Any) -> None:
    """Refuse a rate of dropout that is no number in [0, 1]; `what` is how a message calls it."""
    if type(p) is not float and not _is_number(p):  # the second question takes long
        raise TypeError(f"{what} must be a number, got {p!r} of type {_kind(p)}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{what} must be between 0 and 1, got {p}")


def blocks(
    op: str, enable_lora: Any, out_splits: Any
) -> tuple[list[bool] | None, list[int] | None]:
    """`enable_lora` and `out_splits` as lists; None stays None."""
    if enable_lora is None and out_splits is not None:
        raise ValueError(
            f"{op}: out_splits={out_splits!r} must come with enable_lora, which says for each of "
            "these blocks whether it has an adapter, got enable_lora=None"
        )
    enable = None if enable_lora is None else enabled(op, enable_lora)
    return enable, None if out_splits is None else widths(op, out_splits)


def enabled(op: str, enable_lora: Any) -> list[bool]:
    """`enable_lora` as a list of bools, whatever its entries' truth values come from."""
    is_one = isinstance(enable_lora, (str, bytes)) or getattr(enable_lora, "ndim", 1) == 0
    if is_one or not isinstance(enable_lora, Iterable):
        raise TypeError(
            f"{op}: enable_lora must have an entry for each block of the output, True where it "
            f"has an adapter, got {enable_lora!r}"
        )
    return [bool(e) for e in enable_lora]


def widths(op: str, out_splits: Any) -> list[int]:
    """`out_splits` as a list of ints; refuse what are no integers."""
    is_one = not isinstance(out_splits, Collection) or getattr(out_splits, "ndim", 1) == 0
    found = [] if is_one else [_width(width) for width in out_splits]
    if is_one or any(width is None for width in found):
        raise TypeError(
            f"{op}: out_splits must be None or a list of integers, one for each block, got "
            f"{out_splits!r}"
        )
    return found


def _width(value: Any) -> Any:
    is_symbol = isinstance(value, torch.SymInt)  # stays one, for sizes that a graph leaves open
    return value if type(value) is int or is_symbol else integer(value)

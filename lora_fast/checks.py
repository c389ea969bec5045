"""Which arguments can be served, but for their shapes: one copy, for functions, layers and merges.

Every refusal names the argument, what was expected and what came.
"""

import math
import numbers
import operator
from collections.abc import Collection, Iterable, Mapping, Set
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, SupportsFloat, TypeGuard

import torch
from torch import Tensor

from lora_fast import torch_internals


class InputTypeError(TypeError, RuntimeError):
    """An argument of a dtype that does not fit: torch's own layers raise RuntimeError there."""


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


def module(op: str, model: Any, method: str, name: str = "model") -> None:
    """Refuse a model that is no module, nor wraps one: it has no such method."""
    if isinstance(model, type) or not callable(getattr(model, method, None)):
        what = f"the class {model.__name__}" if isinstance(model, type) else _kind(model)
        raise TypeError(
            f"{op}: {name} must be a torch.nn.Module, got {what}; give the model itself, not its "
            "state or its class"
        )


def path(op: str, value: Any) -> Path:
    """`value` as a path; refuse what names no file, an open one say."""
    try:
        return Path(value)
    except TypeError:
        raise TypeError(
            f"{op}: path must be a str or an os.PathLike, got {value!r:.60} of type "
            f"{_kind(value)}; give the file's name, bytes by way of os.fsdecode"
        ) from None


def _kind(value: Any) -> str:
    return type(value).__name__


_AUTOCAST = frozenset((torch.float32, torch.float16, torch.bfloat16))
"""What autocast converts."""
_SUMMED = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
"""What a merge can add to and round to, but for complex numbers."""


def mergeable(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Refuse a weight that holds no fractions or cannot hold the delta, and other devices."""
    if weight.dtype not in _SUMMED or lora_A.dtype not in _SUMMED or lora_B.dtype not in _SUMMED:
        _refuse_sum(op, weight, lora_A, lora_B)
    if weight.layout is not torch.strided or not weight.is_contiguous():
        _refuse_layout(op, weight)
    if weight.device != lora_A.device or weight.device != lora_B.device:
        raise ValueError(
            f"{op}: weight, lora_A and lora_B must be on one device, got {weight.device}, "
            f"{lora_A.device} and {lora_B.device}"
        )


def _refuse_sum(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if weight.is_complex():
        return
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")
    if weight.dtype not in _SUMMED:
        raise TypeError(
            f"{op}: weight must have a dtype that torch adds in, as float32 or bfloat16, got "
            f"{weight.dtype}; convert it, merge, and convert the sum back"
        )


def _refuse_layout(op: str, weight: Tensor) -> None:
    if weight.layout is not torch.strided:
        raise TypeError(
            f"{op}: weight must be dense, got layout {weight.layout}; merge into weight.to_dense()"
        )
    if torch_internals.overlaps(weight):
        raise ValueError(
            f"{op}: weight must have memory of its own for each element, got shape "
            f"{tuple(weight.shape)} with strides {weight.stride()}; merge into weight.clone()"
        )


def one_dtype(op: str, of: str, other: Any, **named: Any) -> None:
    """Refuse tensors of which torch makes no product or sum with `other`, which is called `of`.

    As `dtypes`, asked when a call has failed. What is no tensor is left to whoever takes it.
    """
    for name, tensor in named.items():
        if not (isinstance(tensor, Tensor) and isinstance(other, Tensor)):
            continue
        if tensor.dtype is other.dtype:
            continue
        is_cast = tensor.dtype in _AUTOCAST and other.dtype in _AUTOCAST
        kind = tensor.device.type
        if is_cast and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            continue
        raise InputTypeError(
            f"{op}: {name} must have the dtype of {of}, {other.dtype}, got {tensor.dtype}; "
            f"{_conversion(name, tensor, other)}{', or use torch.autocast' if is_cast else ''}"
        )


def dtypes(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **named: Any) -> None:
    """Refuse what is `named` in another dtype than the weight's, and an A or B without fractions.

    Asked when a call has failed: torch names no argument, and where nothing fails it takes time.
    """
    one_dtype(op, "weight", weight, **named)
    if not weight.is_floating_point() and not weight.is_complex():
        raise InputTypeError(f"{op}: weight must have a floating-point dtype, got {weight.dtype}")
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not factor.is_floating_point() and not (factor.is_complex() and weight.is_complex()):
            raise InputTypeError(
                f"{op}: {name} must have a floating-point dtype to be used with a weight of "
                f"{weight.dtype}, got {factor.dtype}; {_conversion(name, factor, weight)}"
            )


def _conversion(name: str, tensor: Tensor, other: Tensor) -> str:
    if tensor.is_complex() and not other.is_complex():
        return f"take {name}.real"
    return f"convert it with {name}.to({other.dtype})"


def not_faked(op: str, weight: Tensor) -> None:
    """Refuse a weight under FakeTensorMode, where nothing is written to it."""
    if torch_internals.mode_count() == 0:
        return
    is_plain = type(weight) in (Tensor, torch.nn.Parameter)
    if torch_internals.in_fake_mode() and (is_plain or torch_internals.is_fake_tensor(weight)):
        raise RuntimeError(f"{op}: under FakeTensorMode nothing is written; leave the mode first")


def _is_number(value: Any) -> bool:
    if torch.compiler.is_compiling():  # it may be a symbol, which is not to be asked
        return True
    # An array of several numbers claims to be one, too.
    return isinstance(value, SupportsFloat) and getattr(value, "ndim", 0) == 0


def _of_torch(what: str, value: Any) -> None:
    """Refuse numbers that torch's functions do not take."""
    # Of NumPy's, an array can be written to.
    is_array = hasattr(value, "__setitem__") and not isinstance(value, Tensor)
    if is_array or isinstance(value, (Decimal, Fraction)):
        raise TypeError(f"{what} must be a float, got {value!r} of type {_kind(value)}; convert it")


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
    """Refuse a scale of the update that is no number, or no finite one."""
    if not _is_number(alpha):
        raise TypeError(f"lora_alpha must be a number, got {alpha!r} of type {_kind(alpha)}")
    # What is trained or traced is not asked for its value.
    if isinstance(alpha, (numbers.Real, Decimal)) and not math.isfinite(alpha):
        raise ValueError(f"lora_alpha must be finite, got {alpha}")


def scaling_of(alpha: Any, r: int) -> Any:
    """`alpha / r`, a plain float if it is a number; what is trained or traced stays what it is."""
    found = alpha / r
    # No compiler takes NumPy's numbers, or fractions, for constants.
    is_number = type(found) is not float and isinstance(found, (numbers.Real, Decimal))
    return float(found) if is_number else found


def scaling(op: str, value: Any, n: int | None = None, x: Tensor | None = None) -> None:
    """Refuse a factor of the update that is neither a number nor a tensor of one element or `n`.

    With an `x` of which each row is updated, whatever multiplies these rows fits, as in loralib.
    Without `n` any tensor is left to `number`.
    """
    if not isinstance(value, Tensor):
        if not hasattr(type(value), "__torch_function__") and not _is_number(value):
            raise TypeError(
                f"{op}: scaling must be a number or a tensor, got {value!r:.60} of type "
                f"{_kind(value)}"
            )
        _of_torch(f"{op}: scaling", value)
        return
    if value.is_complex() and not (x is None or x.is_complex()):
        raise TypeError(f"{op}: scaling must be real for real tensors, got {value.dtype}")
    shape = tuple(value.shape)
    if n is None or not shape or isinstance(shape[-1], Tensor):  # traced by torch.jit
        return
    if len(shape) == 1:
        fits = shape[0] == 1 or shape[0] == n
    elif x is None or x.is_nested:
        fits = len(shape) == 2 and value.numel() == 1
    else:
        rows = zip(shape[-2::-1], reversed(x.shape[:-1]), strict=False)
        fits = len(shape) <= x.dim() and shape[-1] in (1, n) and all(s in (1, m) for s, m in rows)
    if not fits:
        each = f" or {n} in a row, one for each output feature" if n > 1 else ""
        raise ValueError(f"{op}: scaling must be one number{each}, got a tensor of shape {shape}")


def number(scaling: Any) -> float:
    """A factor of the update as a number; it may be a tensor that is trained."""
    if not isinstance(scaling, Tensor):
        return float(scaling)
    if scaling.numel() != 1:
        raise ValueError(
            "scaling must be one number to be merged, got a tensor of shape "
            f"{tuple(scaling.shape)}; multiply the rows of lora_B by it, with scaling 1.0"
        )
    return float(scaling.detach())


def no_input_kept() -> RuntimeError:
    """What a double backward needs and an implementation that keeps less does not have."""
    return RuntimeError(
        "lora_linear: with lora_A frozen a GPU's forward does not keep x, which create_graph=True "
        "needs for the gradient of lora_B; run it under lora_fast.use_backend('reference')"
    )


def rate(what: str, p: Any) -> None:
    """Refuse a rate of dropout that is no number in [0, 1]; `what` is how a message calls it."""
    # The last question takes long. True is an argument in the wrong place, False says none.
    if type(p) is not float and (p is True or not _is_number(p)):
        raise TypeError(f"{what} must be a number, got {p!r} of type {_kind(p)}")
    if type(p) is not float:
        _of_torch(what, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{what} must be between 0 and 1, got {p}")


def rate_and_scaling(op: str, dropout_p: Any, factor: Any, n: int, x: Tensor) -> None:
    """Refuse a rate of dropout or a factor of the update of `x` that a call cannot have."""
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        rate(f"{op}: dropout_p", dropout_p)
    if type(factor) is not float:
        scaling(op, factor, n, x)


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
    # A list, as nearly always, is not asked whether it is one.
    if type(enable_lora) is not list and not in_order(enable_lora):
        raise TypeError(
            f"{op}: enable_lora must have an entry for each block of the output, True where it "
            f"has an adapter, as a list has them, got {enable_lora!r}"
        )
    return [bool(e) for e in enable_lora]


def in_order(values: Any) -> TypeGuard[Iterable[Any]]:
    """Tell whether these are the entries themselves, one after the other."""
    if isinstance(values, (str, bytes, bytearray, Mapping, Set)) or getattr(values, "ndim", 1) == 0:
        return False
    return isinstance(values, Iterable)


def widths(op: str, out_splits: Any) -> list[int]:
    """`out_splits` as a list of ints; refuse what are no integers."""
    is_list = type(out_splits) is list
    is_list = is_list or (isinstance(out_splits, Collection) and in_order(out_splits))
    found = [_width(width) for width in out_splits] if is_list else []
    if not is_list or any(width is None for width in found):
        raise TypeError(
            f"{op}: out_splits must be None or a list of integers, one for each block, got "
            f"{out_splits!r}"
        )
    return found


def size(op: str, **named: Any) -> None:
    """Refuse a number of features that is no integer, or negative."""
    for name, value in named.items():
        found = _width(value)
        if found is None:
            raise TypeError(
                f"{op}: {name} must be an integer, got {value!r:.60} of type {_kind(value)}"
            )
        if found < 0:
            raise ValueError(f"{op}: {name} must not be negative, got {value}")


def _width(value: Any) -> Any:
    is_symbol = isinstance(value, torch.SymInt)  # stays one, for sizes that a graph leaves open
    return value if type(value) is int or is_symbol else integer(value)

"""Which shapes fit each other: one copy, for the functions, the layers and the ops' fakes.

Every refusal names the argument, what was expected and what came.
"""

from typing import Any

import torch
from torch import Tensor

from lora_fast.blocks import Spans, spans
from lora_fast.checks import InputTypeError, integer, tensors


class InputError(ValueError, RuntimeError):
    """An input of a shape that does not fit: torch's own layers raise RuntimeError there."""


def linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    """Refuse shapes that do not fit `lora_linear`."""
    try:
        # Size by size: a torch.Size takes longer to make than all comparisons.
        if weight.dim() == lora_A.dim() == lora_B.dim() == 2 and x.dim() > 0:
            n, k = weight.size(0), weight.size(1)
            if isinstance(n, Tensor):  # torch.jit traces sizes, and warns where they are compared
                return
            fits = x.size(-1) == k == lora_A.size(1)
            fits = fits and lora_B.size(0) == n and lora_B.size(1) == lora_A.size(0)
            if fits and (bias is None or (bias.dim() == 1 and bias.size(0) == n)):
                return
    except AttributeError:  # no tensors
        pass
    _refuse_linear(x, weight, lora_A, lora_B, bias)


def _refuse_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> None:
    tensors("lora_linear", bias, weight=weight, lora_A=lora_A, lora_B=lora_B)
    n, k = _matrix("lora_linear", weight)
    features("lora_linear", x, weight)
    a, b = tuple(lora_A.shape), tuple(lora_B.shape)
    if len(a) != 2 or a[1] != k:
        raise ValueError(f"lora_linear: lora_A must be (r, {k}), got {a}")
    if b != (n, a[0]):
        raise ValueError(
            f"lora_linear: lora_B must be ({n}, {a[0]}) to fit weight {tuple(weight.shape)} and "
            f"lora_A {a}, got {b}"
        )
    _bias_shape("lora_linear", bias, n)


def features(op: str, x: Tensor, weight: Tensor) -> None:
    """Refuse an `x` of another width than the columns of a matrix."""
    if weight.dim() == 2 and not x.is_nested and (x.dim() == 0 or x.size(-1) != weight.size(1)):
        raise InputError(
            f"{op}: x must have {weight.size(1)} features in its last dimension, as weight "
            f"{tuple(weight.shape)} expects, got shape {tuple(x.shape)}"
        )


def merged_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    enable_lora: list[bool],
    out_splits: list[int] | None,
) -> Spans:
    """Refuse shapes that do not fit `lora_merged_linear`; return where the adapters add."""
    op = "lora_merged_linear"
    try:
        if weight.dim() == lora_A.dim() == lora_B.dim() == 2 and x.dim() > 0:
            n, k = weight.size(0), weight.size(1)
            if isinstance(n, Tensor):  # traced by torch.jit
                return spans(n, enable_lora, out_splits)
            splits(op, n, enable_lora, out_splits)
            found = spans(n, enable_lora, out_splits)
            fits = x.size(-1) == k == lora_A.size(1)
            fits = fits and lora_A.size(0) == lora_B.size(1) * len(found)
            fits = fits and lora_B.size(0) == sum([hi - lo for lo, hi in found])
            if fits and (bias is None or (bias.dim() == 1 and bias.size(0) == n)):
                return found
    except AttributeError:  # no tensors
        pass
    tensors(op, bias, weight=weight, lora_A=lora_A, lora_B=lora_B)
    n, k = _matrix(op, weight)
    features(op, x, weight)
    grouped_factors(op, (n, k), lora_A, lora_B, enable_lora, out_splits)
    _bias_shape(op, bias, n)
    return spans(n, enable_lora, out_splits)


def grouped_factors(
    op: str,
    shape: tuple[int, int],
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: list[bool],
    out_splits: list[int] | None,
) -> None:
    """Refuse A and B that do not fit the enabled blocks of an (N, K) weight."""
    n, k = shape
    widths = splits(op, n, enable_lora, out_splits)
    adapted = spans(n, enable_lora, out_splits)
    groups, rows = len(adapted), sum(hi - lo for lo, hi in adapted)
    if lora_B.dim() != 2 or lora_B.shape[0] != rows:
        raise ValueError(
            f"{op}: lora_B must be ({rows}, r), the rows of the enabled blocks of {widths}, "
            f"got {tuple(lora_B.shape)}"
        )
    if tuple(lora_A.shape) != (lora_B.shape[1] * groups, k):
        raise ValueError(
            f"{op}: lora_A must be ({lora_B.shape[1]} * {groups}, {k}), a rank block for each "
            f"enabled output block, got {tuple(lora_A.shape)}"
        )


def splits(
    op: str, out_features: int, enable_lora: list[bool], out_splits: list[int] | None
) -> list[int]:
    """Width of every output block, after checking that the blocks make up `out_features`."""
    if len(enable_lora) == 0:
        raise ValueError(
            f"{op}: enable_lora must have an entry for each block of the output, got an empty "
            "list; for no adapter at all use r=0 or enable_lora=[False]"
        )
    if out_splits is None:
        if out_features % len(enable_lora):
            raise ValueError(
                f"{op}: the length of enable_lora ({len(enable_lora)}) must divide out_features "
                f"({out_features}); give out_splits for blocks of unequal width"
            )
        return [out_features // len(enable_lora)] * len(enable_lora)
    if (
        len(out_splits) != len(enable_lora)
        or sum(out_splits) != out_features
        or min(out_splits) < 1
    ):
        raise ValueError(
            f"{op}: out_splits must be {len(enable_lora)} positive widths, one for each entry of "
            f"enable_lora, that sum to out_features={out_features}, got {list(out_splits)}"
        )
    return list(out_splits)


def embedding(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Refuse tensors that do not fit `lora_embedding`."""
    dtype = input.dtype
    if dtype is not torch.int64 and dtype is not torch.int32:
        raise InputTypeError(
            f"lora_embedding: input must hold integer indices, int64 or int32, got {dtype}; "
            "convert with input.long()"
        )
    try:
        if weight.dim() == lora_A.dim() == lora_B.dim() == 2:
            num, dim = weight.size(0), weight.size(1)
            if isinstance(num, Tensor):  # traced by torch.jit
                return
            if lora_A.size(1) == num and lora_B.size(0) == dim and lora_B.size(1) == lora_A.size(0):
                return
    except AttributeError:  # no tensors
        pass
    tensors("lora_embedding", weight=weight, lora_A=lora_A, lora_B=lora_B)
    num, dim = _matrix("lora_embedding", weight)
    a, b = tuple(lora_A.shape), tuple(lora_B.shape)
    if len(a) != 2 or a[1] != num:
        raise ValueError(f"lora_embedding: lora_A must be (r, {num}), got {a}")
    raise ValueError(f"lora_embedding: lora_B must be ({dim}, {a[0]}), got {b}")


def padding_idx(op: str, index: int | None, weight: Tensor) -> None:
    """Refuse a padding index that is no row of the table; it may count from the end."""
    if index is not None:
        padding_row(op, index, weight.size(0))


def padding_row(op: str, index: Any, num: Any) -> None:
    """Refuse a padding index that is none of `num` rows."""
    if type(index) is not int and integer(index) is None:
        raise TypeError(f"{op}: padding_idx must be an integer or None, got {index!r:.60}")
    if isinstance(num, Tensor):  # traced by torch.jit
        return
    if not -num <= index < num:
        raise ValueError(
            f"{op}: padding_idx must be within the {num} rows of weight, from {-num} to {num - 1}, "
            f"got {index}"
        )


def delta(
    op: str,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> None:
    """Refuse a weight that the delta of A and B does not cover exactly."""
    try:
        if enable_lora is None and _covers(weight, lora_A, lora_B):
            return
    except AttributeError:  # no tensors
        pass
    tensors(op, weight=weight, lora_A=lora_A, lora_B=lora_B)
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"{op}: lora_A and lora_B must have two dimensions, got {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}"
        )
    if enable_lora is not None:
        n, k = _matrix(op, weight)
        if isinstance(n, Tensor):  # traced by torch.jit
            return
        grouped_factors(op, (n, k), lora_A, lora_B, enable_lora, out_splits)
        return
    raise ValueError(
        f"{op}: lora_B {tuple(lora_B.shape)} @ lora_A {tuple(lora_A.shape)} does not give a "
        f"delta for a weight of shape {tuple(weight.shape)}"
    )


def factors(
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: list[bool] | None,
    out_splits: list[int] | None,
) -> int:
    """Refuse factors that do not fit each other or the blocks, for `merged_delta`; return N."""
    op = "merged_delta"
    tensors(op, lora_A=lora_A, lora_B=lora_B)
    if enable_lora is not None and lora_A.dim() > 0 and lora_B.dim() > 0:
        if out_splits is None and not any(enable_lora):
            raise ValueError(
                f"{op}: enable_lora enables no block, so B does not tell the blocks' width; "
                "give out_splits"
            )
        equal = lora_B.shape[0] // max(1, sum(enable_lora)) * len(enable_lora)
        shape = (equal if out_splits is None else sum(out_splits), lora_A.shape[-1])
        grouped_factors(op, shape, lora_A, lora_B, enable_lora, out_splits)
        return shape[0]
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(
            f"{op}: lora_B must be (N, r) and lora_A (r, K), got "
            f"{tuple(lora_B.shape)} and {tuple(lora_A.shape)}"
        )
    return lora_B.shape[0]


def conv(weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    """Refuse tensors that do not fit `lora_conv`."""
    if isinstance(weight, Tensor) and weight.dim() not in (3, 4, 5):
        raise ValueError(
            "lora_conv: weight must have one to three kernel dimensions, got shape "
            f"{tuple(weight.shape)}"
        )
    delta("lora_conv", weight, lora_A, lora_B, None, None)
    if bias is not None:
        tensors("lora_conv", bias)
        _bias_shape("lora_conv", bias, weight.shape[0])


def conv_input(x: Tensor, weight: Tensor, groups: Any) -> None:
    """Refuse groups and an `x` that do not fit the kernel, when a convolution has failed."""
    known = integer(groups)
    if known is None or known < 1 or weight.shape[0] % known:
        raise InputError(
            f"lora_conv: groups must be a positive integer that divides the {weight.shape[0]} "
            f"output channels, got {groups!r:.60}"
        )
    d, channels = weight.dim() - 2, weight.shape[1] * known
    if x.dim() not in (d + 1, d + 2) or x.shape[-d - 1] != channels:
        raise InputError(
            f"lora_conv: x must be (batch, {channels}, *space) or ({channels}, *space), with {d} "
            f"dimensions of space, as weight {tuple(weight.shape)} and groups={known} expect, got "
            f"shape {tuple(x.shape)}"
        )


def _covers(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        return False
    n, k = lora_B.size(0), lora_A.size(1)
    if isinstance(n, Tensor):  # traced by torch.jit
        return True
    if lora_B.size(1) != lora_A.size(0):
        return False
    if weight.dim() == 2:
        return weight.size(0) == n and weight.size(1) == k
    return weight.dim() > 2 and weight.numel() == n * k


def _matrix(op: str, weight: Tensor) -> torch.Size:
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"{op}: weight must have two dimensions, got shape {tuple(shape)}")
    return shape


def _bias_shape(op: str, bias: Tensor | None, n: int) -> None:
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{op}: bias must have shape ({n},), got {tuple(bias.shape)}")

"""The matrix products of the eager ops: torch's, but where those take many times as long.

Thin ones, of low ranks, are made transposed. And torch multiplies 16-bit matrices on a CPU by
oneDNN where oneDNN has kernels (of bf16 with AVX-512, of fp16 with AVX512-FP16), and elsewhere by
loops of its own. These took 17 to 55 times as long as a conversion and a product in fp32: dX of 16
and 512 rows, 768 to 4096 features in bf16, torch 2.13, two threads of an EPYC of family 25 model 1,
2026-11-30. Here no more is converted at a time than the result takes room, or what is summed over
the rows of a batch, but 2^18 numbers in any case; sums are in fp32, and results are rounded once.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import torch_internals

# Elements that are converted at a time, however small the result: 1 MiB in fp32. With an eighth of
# that a forward took 1.1 to 4.6 times as long, with four times that .5 to 1.4 times: 8 to 256 rows,
# 768 to 4096 features in bf16, one thread of an EPYC of family 25 model 17 with AVX2, 2026-12-01.
_LEAST = 2**18
# Rows up to which the loops of torch are as fast, where both factors lie as they are summed, by one
# thread and by several: on that machine 4 (768 features) to 7 (4096), and by two threads 11 to 20
# in bf16, up to 32 in fp16. Sums shorter than this, of low ranks, one thread makes in any case. And
# multiply-adds where they do not lie so: two threads of an EPYC of family 25 model 1, 2026-11-30.
_FEW_ROWS, _FEW_ROWS_OF_SEVERAL_THREADS = 5, 16
_SHORT_SUM = 256
_FEW = 2**15
# Columns for which a product may be made in less time as its transposition, in fp32 and float64, by
# MKL in torch 2.13. On AMD's CPUs dS = dY B and dB = dY^T S of 64 to 2048 rows and 768 and 4096
# features in a third to a 28th of it, with 16 columns in as much: an EPYC of family 25 model 1, one
# thread, 2026-12-01. On Intel's only a sum over many rows, as dB is, in .3 to 1.05 of it from 128
# rows on; one over 16 in up to 3.3 times, dS in .8 to 2.9 times as long: a Xeon of family 6 model
# 167, one and two threads, 2026-12-01. One column takes as long either way.
THIN = range(2, 9)
_MANY_ROWS = 128


@functools.cache
def slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that torch multiplies by loops of its own on this CPU."""
    kinds = (torch.bfloat16, torch.float16)
    return frozenset(dtype for dtype in kinds if torch_internals.multiplies_in_loops(dtype))


def are_slow(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether torch would multiply these by loops of its own."""
    if x.dtype is torch.float32 or not x.is_cpu or torch.compiler.is_compiling():
        return False  # compiled autograd traces a backward
    if x.dtype not in slow_dtypes():
        return False
    if any([t is not None and t.dtype is not x.dtype for t in others]):
        return False  # torch has no product of two dtypes, and says so
    # For vmap over gradients and for their tangents torch has rules for its own products alone.
    return not _is_transformed(x, *others) and torch.autograd.forward_ad._current_level < 0


def _loops_serve(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape, b.shape[1]
    return m * k * n <= _FEW or (m <= _few_rows(k) and a.stride(1) == b.stride(0) == 1)


def _few_rows(summed: int) -> int:
    is_alone = summed < _SHORT_SUM or torch.get_num_threads() == 1
    return _FEW_ROWS if is_alone else _FEW_ROWS_OF_SEVERAL_THREADS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`.

    Args:
        x: (M, K).
        weight: (N, K), any strides.
        bias: (N,) or None.

    Returns:
        (M, N), contiguous.
    """
    if not are_slow(x, weight, bias) or _loops_serve(x, weight.t()):
        return F.linear(x, weight, bias)
    (m, k), n = x.shape, weight.shape[0]
    y, bias = x.new_empty((m, n)), None if bias is None else bias.float()
    room = max(y.numel(), _room(x, weight, y) // 2)  # a forward over the formula makes few copies
    for rows in _parts(m, k, room):
        wide = x[rows].float()
        for cols in _parts(n, k + wide.shape[0], room):
            bias_part = None if bias is None else bias[cols]
            y[rows, cols] = F.linear(wide, weight[cols].float(), bias_part)
    return y


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`.

    Args:
        a: (M, K), any strides.
        b: (K, N), any strides.

    Returns:
        (M, N), contiguous.
    """
    if are_slow(a, b) and not _loops_serve(a, b):
        return _mm_in_fp32(a, b, 1.0)
    is_wide = b.dtype in (torch.float32, torch.float64) and b.is_cpu
    if is_wide and b.stride(1) == 1 and _is_transposed(a, b):
        return (b.t() @ a.t()).t().contiguous()
    return a @ b


def _is_transposed(a: Tensor, b: Tensor) -> bool:
    """Tell whether `a @ b` is so thin that its transposition is made in less time.

    Along the rows of that a BLAS has more than a vector to do.
    """
    if b.shape[1] not in THIN or a.shape[0] <= b.shape[1]:
        return False
    is_over_rows = a.stride(0) == 1 and a.shape[1] >= _MANY_ROWS
    return torch_internals.HAS_MKL_ON_AMD or is_over_rows


def mm_over_rows(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """`scaling * (a.t() @ b)`, the gradient of a parameter: a sum over the rows of a batch.

    Args:
        a: (M, N), any strides.
        b: (M, K), any strides.
        scaling: as of `scaled_mm`.

    Returns:
        (N, K), contiguous. It may be much smaller than a and b, of which autograd over the plain
        formula makes copies: so here parts of theirs may be large.
    """
    if are_slow(a, b) and not _loops_serve(a.t(), b):
        return _mm_in_fp32(a.t(), b, scaling, max(a.numel(), b.numel()))
    return mm(a.t(), b) if scaling == 1.0 else scaled_mm(a.t(), b, scaling)


def scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`scaling * (a @ b)`, in fp16 with the factor before the rounding.

    There what is yet to be scaled may be too large or too small. In bf16 oneDNN takes longer to
    scale a product than another operation does.
    """
    if are_slow(a, b) and not _loops_serve(a, b):
        return _mm_in_fp32(a, b, scaling)
    if a.dtype is not torch.float16:
        return mm(a, b).mul_(scaling)
    if _is_transformed(a, b):
        return mm(a * scaling, b)
    # Nothing, which beta=0 keeps from being read, but not under vmap.
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _mm_in_fp32(a: Tensor, b: Tensor, scaling: float, room: int = 0) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    y = a.new_empty((m, n))
    room = max(room, _room(a, b, y))
    for rows in _parts(m, n, room):
        left = a[rows]
        shape = (left.shape[0], n)
        is_transposed = _is_transposed(left, b)
        sums = a.new_zeros(shape[::-1] if is_transposed else shape, dtype=torch.float32)
        sums = sums.t() if is_transposed else sums
        for steps in _parts(k, n + left.shape[0], room):
            _add_counted_(sums, left[:, steps].float(), b[steps].float(), scaling)
        y[rows] = sums
    return y


def add_mm_(y: Tensor, a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """`y += scaling * (a @ b)`, in the shapes of `mm`, any strides."""
    if are_slow(y, a, b) and not _loops_serve(a, b):
        wide = b.float()
        for rows in _parts(y.shape[0], 2 * y.shape[1] + a.shape[1], y.numel()):
            y[rows] = torch.addmm(y[rows].float(), a[rows].float(), wide, alpha=scaling)
        return y
    return _add_counted_(y, a, b, scaling)


def _add_counted_(y: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`addmm_`, also for a FlopCounterMode, which takes that for no product."""
    is_traced = torch.compiler.is_compiling()  # by compiled autograd
    if not is_traced and torch_internals.mode_count() > 0 and not _is_transformed():
        return torch.addmm(y, a, b, alpha=scaling, out=y)
    return y.addmm_(a, b, alpha=scaling)


def _room(a: Tensor, b: Tensor, y: Tensor) -> int:
    """The numbers of the result, or of many rows that are multiplied by a low rank's factor.

    Autograd over the plain formula makes copies of such rows, too.
    """
    return max(y.numel(), a.numel() if 4 * b.numel() <= a.numel() else 0)


def _parts(length: int, width: int, room: int) -> Iterator[slice]:
    """Slices of a dimension, each so short that `width` times as much takes a third of some room.

    So do two operands two thirds of it, in fp32, of which a number takes twice the room. It is
    that of this many numbers of 16 bits.
    """
    step = max(1, max(room // 6, _LEAST) // max(1, width))
    return (slice(i, i + step) for i in range(0, length, step))


def _is_transformed(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    if torch_internals.functorch_level() is not None:
        return True
    return any([t is not None and torch_internals.is_batched_by_autograd(t) for t in tensors])


def differentiable_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`scaled_mm` with gradients, of any order."""
    if _is_transformed(a, b):
        return a @ b * scaling
    if not torch.is_grad_enabled():
        return scaled_mm(a, b, scaling)
    return _ScaledMM.apply(a, b, scaling)  # type: ignore[no-any-return]


class _ScaledMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.set_materialize_grads(False)
        ctx.scaling = scaling
        return scaled_mm(a, b, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,), (a, b) = grads, ctx.saved_tensors
        if dy is None:
            return None, None, None
        multiply = differentiable_mm if torch.is_grad_enabled() else scaled_mm
        need_a, need_b = ctx.needs_input_grad[:2]
        return (
            multiply(dy, b.t(), ctx.scaling) if need_a else None,
            multiply(a.t(), dy, ctx.scaling) if need_b else None,
            None,
        )

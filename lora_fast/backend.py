"""Which implementation runs: what this machine can do, and the one choice that is the user's.

`auto` takes the fastest implementation that can serve the call and says why at DEBUG on the logger
`lora_fast.dispatch`; a forced backend that cannot serve it raises.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_fast import delta, ops, products, torch_internals
from lora_fast.autocast import autocasts

_log = logging.getLogger("lora_fast.dispatch")


class Backend(Enum):
    """An implementation of an op."""

    TRITON = "triton"
    """The fused kernels in `lora_fast.kernels`."""
    EAGER = "eager"
    """`lora_fast.eager`: torch's own kernels, with a backward written by hand."""
    EAGER_LORA_FIRST = "eager_lora_first"
    """`lora_fast.lora_first`: the same in the fewest launches, for a GPU with little to compute."""
    NATIVE = "native"
    """The merge in C++ and CUDA, from csrc."""
    REFERENCE = "reference"
    """`lora_fast.reference`: plain differentiable torch."""


BackendName = Literal["auto", "triton", "reference"]
_CHOICES: tuple[BackendName, ...] = get_args(BackendName)
_TRITON_OPS = frozenset({"lora_linear", "lora_merged_linear", "lora_embedding", "merged_weight"})
# Elements from which the eager Linear's faster dropout on a CPU outweighs its calls from Python:
# fp32, p = 0.1, 256 to 1024 features, one thread of an EPYC of family 25 model 1, 2026-11-27.
_MANY_DROPPED = 2**16
# Indices up to which torch's loops add the update of a look-up as soon as products in fp32: 1024
# features, one and two threads of an EPYC of family 25 model 17 with AVX2, 2026-12-01.
_FEW_LOOKED_UP = 8
# M N K of a Linear up to which eager mode leaves it to torch: on an H200 50 us of the tensor cores
# for each of the two large products of a step, for which the host launches seven fused kernels.
# With dropout the fused kernels save more, so the limit is lower: this many elements of x.
# Both are reckoned from the rates in docs/targets.md; no GPU has measured them.
_FEW_OPERATIONS = 2**34
_FEW_DROPPED = 2**21
_MOST_DECODE_ROWS = 64  # MAX_M of kernels/decode_configs.py; kernels are imported when they run
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHOSEN = "chosen by set_backend"
_PRODUCTS_IN_FP32 = "products in fp32, as this CPU has no instructions for 16 bits"
_TENSOR_SCALING = "scaling is a tensor, which may want a gradient"
_INDEX_DTYPES = (torch.int64, torch.int32)
# Ops whose input and weight, the first two tensors, must have one dtype.
_ONE_DTYPE_OPS = frozenset({"lora_linear", "lora_merged_linear"})


def _find_triton() -> bool:
    """Tell whether there is a triton to import, without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # a finder that blocks it, or a stand-in without a spec
        return False


# Once, because torch.compile cannot trace the search.
_TRITON_FOUND = _find_triton()


def _checked(name: str, source: str) -> BackendName:
    if name not in _CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(_CHOICES)}, got {name!r}")
    return name


_selected = _checked(os.environ.get("LORA_FAST_BACKEND") or "auto", "LORA_FAST_BACKEND")


def set_backend(name: BackendName) -> None:
    """Choose the implementation of every op in this process.

    Args:
        name: `"auto"` (the fastest that can serve the call), `"triton"` (the fused kernels or an
            error) or `"reference"` (plain PyTorch). The environment variable `LORA_FAST_BACKEND`
            sets the value that a process starts with. What has no fused kernel is served under
            `"triton"` as under `"auto"`: merges and the dense matrices of `merged_delta` and of a
            `merged_weight` with blocks.

    Raises:
        ValueError: `name` is none of these.
    """
    global _selected
    _selected = _checked(name, "backend")


def get_backend() -> BackendName:
    """Return the chosen backend: `"auto"`, `"triton"` or `"reference"`."""
    return _selected


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Choose the backend for the body of a `with` statement, then go back.

    The choice is the process's, not the thread's: backward runs in threads of its own.

    Args:
        name: as for `set_backend`.

    Raises:
        ValueError: `name` is not a backend.
    """
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def choose(
    op: str, *tensors: Tensor | None, drops: bool = False, scaling: object = None
) -> Backend:
    """Return the implementation that serves this call of `op`.

    Args:
        op: name of the function in `lora_fast.functional`.
        tensors: its tensor arguments, the input first.
        drops: whether the call draws a dropout mask.
        scaling: its factor of the update.

    Raises:
        RuntimeError: the forced backend cannot serve the call.
    """
    return decided(op, *choice(op, tensors, drops, scaling))


def choice(
    op: str, tensors: tuple[Tensor | None, ...], drops: bool = False, scaling: object = None
) -> tuple[Backend, str]:
    """What `choose` returns, and why."""
    if _selected == "reference":
        return Backend.REFERENCE, _CHOSEN
    x = tensors[0]
    on_gpu = x is not None and x.is_cuda
    why_eager = _why_eager(op, tensors, drops)
    if _selected == "auto" and not on_gpu and why_eager is None:
        return Backend.REFERENCE, "not a CUDA tensor"
    special = _TENSOR_SCALING if isinstance(scaling, Tensor) else _needs_reference(tensors)
    if _selected == "triton":
        reason = special or _why_not_triton(op, tensors)
        if reason:
            raise ForcedInVainError(op, reason)
        return Backend.TRITON, _CHOSEN
    if special:
        return Backend.REFERENCE, special
    if why_eager is not None and not on_gpu:
        return Backend.EAGER, why_eager
    reason = _why_not_triton(op, tensors)
    if reason is None and op == "lora_linear" and _launching_outlasts(tensors, drops):
        return Backend.EAGER_LORA_FIRST, "torch launches sooner than so little is computed"
    reason = reason or _why_torch_is_as_fast(op, tensors)
    if reason is None:
        return Backend.TRITON, "plain CUDA tensors"
    # `_needs_reference` left what is compiled and autocast to the kernels.
    if why_eager is None or x is None or torch.compiler.is_compiling() or autocasts(x):
        return Backend.REFERENCE, reason
    return Backend.EAGER, reason


def served_by_torch(op: str, reason: str) -> None:
    """Log that plain torch serves a call that no kernel can.

    Raises:
        RuntimeError: the kernels were forced.
    """
    if _selected == "triton":
        raise ForcedInVainError(op, reason)
    decided(op, Backend.REFERENCE, _CHOSEN if _selected == "reference" else reason)


def choose_merge(op: str, why_not: Callable[[], str | None]) -> Backend:
    """Return the implementation that serves a merge or an unmerge.

    Args:
        op: "merge_" or "unmerge_".
        why_not: says why the native ops can't serve it, if so.
    """
    return decided(op, *merge_choice(why_not))


def merge_choice(why_not: Callable[[], str | None]) -> tuple[Backend, str]:
    """What `choose_merge` returns, and why."""
    reason = _CHOSEN if _selected == "reference" else why_not()
    return (Backend.NATIVE, "plain tensors") if reason is None else (Backend.REFERENCE, reason)


class ForcedInVainError(RuntimeError):
    """The forced backend cannot serve a call; `reason` says why."""

    def __init__(self, op: str, reason: str) -> None:
        super().__init__(
            f"{op}: backend 'triton' was forced but cannot run: {reason}. "
            "Use set_backend('auto') to let other implementations serve such calls."
        )
        self.reason = reason


def decided(op: str, backend: Backend, reason: str) -> Backend:
    """Log a decision and return it."""
    # Dynamo can't trace the logger. It is asked for alone, as that takes half as long.
    if not torch.compiler.is_dynamo_compiling() and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s -> %s: %s", op, backend.value, reason)
    return backend


def _needs_reference(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Say why only ordinary differentiable torch code can serve the call, if so."""
    x = tensors[0]
    # The fused operators trace as one node each and cast by themselves under autocast.
    fusable = x is not None and (x.is_cuda or _selected == "triton")
    compiles = torch.compiler.is_compiling()
    if compiles and (torch_internals.is_exporting() or not fusable):
        return "traced by torch.compile or torch.export"
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not nn.Parameter:
            return f"a {type(t).__name__} is not a plain tensor"
    if x is not None and x.is_nested:
        return "a nested tensor"
    if x is not None and x.layout is not torch.strided:
        return "a sparse tensor"
    if x is not None and x.is_complex() and _selected != "triton":  # which names the dtype
        return "complex numbers"
    if compiles:  # which can trace one question, not the other
        is_transformed = any(t is not None and torch_internals.is_batched(t) for t in tensors)
    else:
        is_transformed = torch_internals.functorch_level() is not None
    if is_transformed:
        return "inside a functorch transform"
    if compiles:
        return None
    for t in tensors:  # any() would make a generator, in every call
        if t is not None and (t.is_neg() or t._is_zerotensor()):
            return "a tensor that torch negates or fills when it is read"
    if torch_internals.is_tracing():
        return "traced by torch.jit"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    # A counter alone is no reason: it may be on in one pass of a checkpoint and off in the other.
    # Others are: they may keep what a product gave, to which `eager` goes on adding.
    if torch_internals.mode_count() > 0 and (fusable or not torch_internals.only_counted()):
        return "inside a TorchDispatchMode"
    if x is not None and not fusable and autocasts(x):
        return "autocast"
    return None


def _why_not_triton(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    x = tensors[0]
    assert x is not None
    if not x.is_cuda and not (x.device.type == "cpu" and ops.interpreted()):
        return f"the input is on {x.device}, the kernels need CUDA (or TRITON_INTERPRET=1)"
    if x.is_cuda and _is_too_old(x.device):
        return "the kernels need a GPU of compute capability 8.0 or later"
    looks_up = op == "lora_embedding"
    if looks_up and x.dtype not in _INDEX_DTYPES:
        return f"indices of dtype {x.dtype} are not int64 or int32"
    for t in tensors[1:] if looks_up else tensors:
        if t is not None and t.dtype not in _TRITON_DTYPES:
            return f"dtype {t.dtype} is not fp32, fp16 or bf16"
        if t is not None and t.device != x.device:
            return f"tensors on {x.device} and {t.device}"
        if t is not None and t is not x and t.numel() == 0:
            return f"a parameter of shape {tuple(t.shape)} is empty"
    weight = tensors[1] if op in _ONE_DTYPE_OPS else None
    if weight is not None and weight.dtype != x.dtype and not autocasts(x):
        return f"x is {x.dtype} and weight {weight.dtype}"
    return None if _TRITON_FOUND else "triton is not installed"


def _is_too_old(device: torch.device) -> bool:
    """Tell whether a GPU has too little shared memory for the kernels' tiles (Turing: 64 KiB)."""
    return _lacks_shared_memory(device)


# A graph takes the answer for a constant, in the place of tracing the question to the driver: what
# torch.compiler.assume_constant_result does, which would import all of the compiler.
_is_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _lacks_shared_memory(device: torch.device) -> bool:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


def _why_eager(op: str, tensors: tuple[Tensor | None, ...], drops: bool) -> str | None:
    """Say why a dropout, products and a backward by hand beat torch's on a CPU, if they do."""
    if op == "lora_merged_linear":
        return "one backward by hand for all blocks"
    x = tensors[0]
    if op == "lora_embedding":
        weight = tensors[1]
        if x is None or weight is None or not products.are_slow(weight):
            return None
        # Asked last: a graph may leave the size open.
        return _PRODUCTS_IN_FP32 if x.numel() > _FEW_LOOKED_UP else None
    if op != "lora_linear" or x is None or not x.is_cpu:
        return None
    # In fp32 torch's products are as fast as the call of a backward in Python.
    if x.dtype is torch.float32 and not drops:
        return None
    if x.layout is not torch.strided or x.is_nested:
        return None
    if torch.compiler.is_compiling() or torch_internals.is_tracing():
        return None
    if drops and x.numel() >= _MANY_DROPPED and x.is_contiguous():
        return "a dropout that keeps a byte of each number"
    if products.are_slow(x):  # but for the products of one row with a matrix as it lies
        return _PRODUCTS_IN_FP32 if x.requires_grad or x.numel() > x.shape[-1] else None
    if x.dtype is not torch.float32 and x.dim() > 0 and delta.op_pays(x):
        return "few rows of 16 bits, to which one native op adds the update"
    return None


def _launching_outlasts(tensors: tuple[Tensor | None, ...], drops: bool) -> bool:
    """Tell whether the host takes longer to launch the fused kernels than a GPU to compute."""
    if torch.compiler.is_compiling():  # a graph is launched at once
        return False
    x, weight, _, _, bias = tensors
    assert x is not None and weight is not None
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype) or autocasts(x):
        return False
    (n, k), elements = weight.shape, x.numel()
    if elements * n > _FEW_OPERATIONS or (drops and elements > _FEW_DROPPED):
        return False
    # For a few rows, no dropout and no gradient there is one fused launch. What drops must not ask
    # for gradients: a checkpoint runs it without any first, and again with the same draws.
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return drops or learns or elements > _MOST_DECODE_ROWS * k


def _why_torch_is_as_fast(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Say why the fused kernel, which could serve the call, would not pay."""
    # A compiled graph launches the kernel at no more cost than torch's own.
    if op != "merged_weight" or torch.compiler.is_compiling():
        return None
    from lora_fast.kernels.plans import merged_weight_pays

    pays = merged_weight_pays(*(t for t in tensors if t is not None))
    return None if pays else "a small weight, torch is as fast"


def has_triton() -> bool:
    """Tell whether triton is installed, without importing it."""
    return _TRITON_FOUND


def has_kernel(op: str) -> bool:
    """Tell whether there is a fused kernel for an op."""
    return op in _TRITON_OPS

"""Contracts of the lora_fast operators: schema, fake, and which function runs where.

Nothing optional is imported here; a backend is imported when its entry first runs.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_fast import shapes, torch_internals
from lora_fast.blocks import from_edges

torch.library.define(
    "lora_fast::lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "float dropout_p, Tensor? seed, int[]? edges=None) -> (Tensor y, Tensor s, Tensor mask)",
)
torch.library.define(
    "lora_fast::lora_linear_bwd",
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? s, Tensor? mask, "
    "float scaling, float dropout_p, bool[5] needs, ScalarType bias_dtype, int[]? edges=None, "
    "float s_scaling=1.0) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)",
)

torch.library.define(
    "lora_fast::lora_embedding_fwd",
    "(Tensor input, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
)
torch.library.define(
    "lora_fast::lora_embedding_bwd",
    "(Tensor dy, Tensor input, Tensor lora_A, Tensor lora_B, float scaling, int? padding_idx, "
    "bool scale_grad_by_freq, bool scatter, bool[2] needs) -> (Tensor dA, Tensor dB)",
)
torch.library.define(
    "lora_fast::merged_weight",
    "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
)

torch.library.define(
    "lora_fast::merge_",
    "(Tensor(a!)[] weight, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, Tensor(b!)[] code, "
    "Tensor(c!)[] overflow_index, Tensor(d!)[] overflow_value, Tensor(e!) status) -> ()",
)
torch.library.define(
    "lora_fast::unmerge_",
    "(Tensor(a!)[] weight, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, Tensor[] code, "
    "Tensor[] overflow_index, Tensor[] overflow_value, Tensor(b!) status) -> ()",
)

torch.library.define(
    "lora_fast::dropout_",
    "(Tensor x, Tensor(a!) dropped, Tensor(b!) keep, Tensor(c!) state, float keep_rate, "
    "float scale) -> ()",
)


torch.library.define(
    "lora_fast::lora_delta_fwd_",
    "(Tensor x, Tensor lora_A, Tensor lora_B, float scaling, int[] edges, Tensor(a!) y, "
    "Tensor(b!) s) -> bool",
)
torch.library.define(
    "lora_fast::lora_delta_bwd_",
    "(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? s, Tensor? keep, float scaling, "
    "float keep_scale, int[] edges, Tensor(a!)? dx, Tensor(b!)? dA, Tensor(c!)? dB) -> bool",
)


@torch.library.register_fake("lora_fast::lora_linear_fwd")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    edges: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if edges is None:
        shapes.linear(x, weight, lora_A, lora_B, bias)
    else:
        splits = from_edges(edges, weight.shape[0])
        shapes.merged_linear(x, weight, lora_A, lora_B, bias, *splits)
    rows = math.prod(x.shape[:-1])
    mask_shape = (0,) if seed is None else (rows, (x.shape[-1] + 7) // 8)
    return (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((rows, lora_A.shape[0])),
        x.new_empty(mask_shape, dtype=torch.uint8),
    )


@torch.library.register_fake("lora_fast::lora_linear_bwd")
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    bias_dtype: torch.dtype,
    edges: list[int] | None = None,
    s_scaling: float = 1.0,
) -> tuple[Tensor, ...]:
    n, k = dy.shape[-1], lora_A.shape[1]
    shapes = ((*dy.shape[:-1], k), (n, k), (n,), lora_A.shape, lora_B.shape)
    dtypes = (dy.dtype, dy.dtype, bias_dtype, lora_A.dtype, lora_B.dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


@torch.library.register_fake("lora_fast::lora_embedding_fwd")
def _(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    shapes.embedding(input, weight, lora_A, lora_B)
    return weight.new_empty((*input.shape, weight.shape[1]))


@torch.library.register_fake("lora_fast::lora_embedding_bwd")
def _(
    dy: Tensor,
    input: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    scatter: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    r, num = lora_A.shape
    dA_shape = (r, num) if scatter else (input.numel(), r)
    return (
        lora_A.new_empty(dA_shape if needs[0] else 0),
        lora_B.new_empty((dy.shape[-1], r) if needs[1] else 0),
    )


@torch.library.register_fake("lora_fast::merged_weight")
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    shapes.delta("merged_weight", weight, lora_A, lora_B, None, None)
    return torch.empty_like(weight)


@torch.library.register_fake("lora_fast::merge_")
def _(weight: list[Tensor], *args: Any) -> None:
    return None


@torch.library.register_fake("lora_fast::unmerge_")
def _(weight: list[Tensor], *args: Any) -> None:
    return None


@torch.library.register_fake("lora_fast::dropout_")
def _(x: Tensor, *args: Any) -> None:
    return None


@torch.library.register_fake("lora_fast::lora_delta_fwd_")
def _(x: Tensor, *args: Any) -> bool:
    return False


@torch.library.register_fake("lora_fast::lora_delta_bwd_")
def _(dy: Tensor, *args: Any) -> bool:
    return False


@functools.cache
def _kernel(op: str) -> Callable[..., Any]:
    """The launcher of a Triton op: the function named like the op, in the file named like it."""
    return cast(Callable[..., Any], getattr(importlib.import_module(f"lora_fast.kernels.{op}"), op))


def launcher(op: str, tensor: Tensor) -> Callable[..., Any]:
    """What runs an op below autograd: its launcher, or the op where more than that watches.

    To go through torch's dispatcher takes the host as long as to launch a kernel.

    Args:
        op: its name.
        tensor: an argument, by which a tracer, a mode or a transform shows itself.
    """
    if is_plain(tensor):
        return _kernel(op)
    return KERNEL_OPS[op]


def is_plain(tensor: Tensor) -> bool:
    """Tell that no tracer, mode, transform or subclass has a part in what is done to a tensor.

    Nor forward-mode differentiation, which may begin between a forward and its backward.
    """
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and type(tensor) in _PLAIN_TYPES
        and torch_internals.mode_count() == 0
        and torch_internals.dispatch_keys(tensor).raw_repr() in _plain_keys(tensor.device.type)
    )


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of tensors of which nothing is to be known but their device."""
    found = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            found.append(
                torch_internals.dispatch_keys(torch.empty(0, device=device_type)).raw_repr()
            )
    return frozenset(found)


def interpreted() -> bool:
    """Tell whether Triton interprets its kernels, so that they run on a CPU, by its own rule."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _registered_with_kernel(op: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return _kernel(op)(*args)

    def interpret(*args: Any) -> Any:
        if not interpreted():
            raise RuntimeError(
                f"lora_fast::{op} got CPU tensors, which its kernels serve only with "
                "TRITON_INTERPRET=1 set before Triton is imported; use CUDA tensors, or "
                "use_backend('reference')"
            )
        return _kernel(op)(*args)

    torch.library.impl(f"lora_fast::{op}", "cuda", launch)
    torch.library.impl(f"lora_fast::{op}", "cpu", interpret)
    return cast(Callable[..., Any], getattr(torch.ops.lora_fast, op).default)


# Bound once, as those below: resolving torch.ops.* takes time.
KERNEL_OPS = {
    op: _registered_with_kernel(op)
    for op in (
        *("lora_linear_fwd", "lora_linear_bwd"),
        *("lora_embedding_fwd", "lora_embedding_bwd"),
        "merged_weight",
    )
}
"""The ops that a Triton kernel serves."""

merge_ = torch.ops.lora_fast.merge_.default
unmerge_ = torch.ops.lora_fast.unmerge_.default
dropout_ = torch.ops.lora_fast.dropout_.default
lora_delta_fwd_ = torch.ops.lora_fast.lora_delta_fwd_.default
lora_delta_bwd_ = torch.ops.lora_fast.lora_delta_bwd_.default

NATIVE_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
"""Dtypes that the ops of csrc serve."""


@functools.cache
def load_native(device_type: str) -> str | None:
    """Load the library with the ops of csrc for a device; return why it can't be, if so."""
    module = {"cpu": "lora_fast._C", "cuda": "lora_fast._C_cuda"}.get(device_type)
    if module is None:
        return f"there are no native ops for {device_type} tensors"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return (
            f"{module} can't be loaded ({error}); install again with a compiler at hand and "
            f"LORA_FAST_BUILD={device_type}, which says what is missing"
        )
    return None

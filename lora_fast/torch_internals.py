"""What torch tells under no public name, all of it here: where to look when torch changes.

What FSDP2 keeps to itself is in `lora_fast.fsdp`.
"""

import contextlib
import platform
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")

# Names of the functions themselves, as a call in between would take as long as the answer.
mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many TorchDispatchModes are active (FakeTensorMode, make_fx's, ...)."""


def only_counted() -> bool:
    """Tell whether no TorchDispatchMode is active but FlopCounterMode, which reads shapes alone."""
    module = sys.modules.get("torch.utils.flop_counter")
    counter = getattr(module, "_FlopCounterMode", None)
    stack = range(mode_count())
    return all(type(torch._C._get_dispatch_stack_at(i)) is counter for i in stack)


functorch_level = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of torch.func that is active, or None."""

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""`torch.jit.is_tracing`, for what is not scripted."""

autocasts_anything: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for a CPU, a CUDA device or one of several others."""

is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
"""Whether vmap hides a dimension of a tensor; unlike the level, torch.compile traces it."""

is_batched_by_autograd: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether `torch.autograd.grad(is_grads_batched=True)` hides a dimension, which is no transform."""

dispatch_keys = torch._C._dispatch_keys
"""What takes part in a call with this tensor; `raw_repr()` makes a number of it."""

set_versions: Callable[[tuple[Tensor, ...], tuple[int, ...]], None] | None = getattr(
    torch._C._autograd, "_unsafe_set_version_counter", None
)
"""Sets the numbers by which autograd sees writes to tensors."""

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)

_internal_overlap: Callable[[Tensor], int] = torch._debug_has_internal_overlap


def may_overlap(tensor: Tensor) -> bool:
    """Tell whether a step in one dimension may land among the elements of smaller steps."""
    found = _internal_overlap(tensor)
    if found != 2:  # torch has looked closely
        return found == 1
    reach = 0
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in sizes if pair[1] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def overlaps(tensor: Tensor) -> bool:
    """Tell whether elements share memory, by all of their places where strides don't tell."""
    if not may_overlap(tensor):
        return False
    if _internal_overlap(tensor) == 1:
        return True
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size)
    return bool(places.unique().numel() < places.numel())


def multiplies_in_loops(dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies matrices of a 16-bit dtype on this CPU without oneDNN.

    Only of x86-64: elsewhere nobody has measured what it does instead.
    """
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{names[dtype]}_supported", None)
    return platform.machine() in ("x86_64", "AMD64") and ask is not None and not ask()


def _is_amd() -> bool:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as text:
        return "AuthenticAMD" in text.readline() + text.readline()
    return "AuthenticAMD" in platform.processor()  # Windows


HAS_MKL_ON_AMD = torch.backends.mkl.is_available() and _is_amd()
"""Whether products of float32 and float64 are MKL's, on a CPU for which it was not written."""


def untraced(function: Function) -> Function:
    """Return a function that torch calls by itself, a global hook, kept from torch.compile.

    What `torch.compiler.disable` does, which would import all of the compiler.
    """
    with contextlib.suppress(AttributeError, TypeError):  # then it is traced, as far as that goes
        found: Any = torch._C._dynamo.eval_frame
        strategy = found._FrameExecStrategy(found._FrameAction.SKIP, found._FrameAction.DEFAULT)
        found.set_code_exec_strategy(function.__code__, strategy)
    return function


def outside_of_graphs(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of which torch.compile can trace nothing: its graph ends before."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def in_fake_mode() -> bool:
    """Tell whether FakeTensorMode is active."""
    key = torch._C._TorchDispatchModeKey.FAKE
    return torch._C._get_dispatch_mode(key) is not None


def is_fake_tensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of FakeTensorMode's, which holds no values."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def is_exporting() -> bool:
    """Tell whether torch.export traces."""
    # torch.compile of torch 2.11 takes is_exporting() for true, but not the flag behind it.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def storage_id(tensor: Tensor) -> int:
    """Return what the views of one memory have in common, even where there is no memory yet."""
    if tensor.layout is not torch.strided:  # which has several memories, and no views
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements can be read: not where its storage was given up."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
        return True
    try:
        return tensor.untyped_storage().nbytes() != 0
    except RuntimeError:  # of a transform, say, which has no storage to be asked for
        return True


def storage_uses(tensor: Tensor) -> int | None:
    """Return how many tensors and storages hold a tensor's memory, None where torch can't tell."""
    return None if _use_count is None else _use_count(storage_id(tensor))

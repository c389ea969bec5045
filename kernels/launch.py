"""Launches of a kernel that do the work of the first launch only once.

Triton's own launch binds the arguments, specialises on each of them and looks the compiled kernel
up by a string made of all that, every time. Here the compiled kernel is found by a tuple, and
launched as `CompiledKernel.__getitem__` launches it, with addresses in the place of tensors.
"""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

CACHE_SIZE = 4096  # per kernel
# Whoever takes its place (the compile report, a tracer) wants to see every launch.
_RUN = JITFunction.run


def specialised(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What of the arguments decides which compiled kernel serves them, or more; and the arguments.

    Triton looks at the dtype of a tensor and whether its address is a multiple of 16, at the width
    and divisibility of an integer and whether it is 1, and at the type alone of a float.
    Integers stand for themselves here: there are few shapes, and to divide them takes longer.
    A tensor is passed as its address, which the driver need not be asked for then.
    """
    key: list[Any] = []
    values: list[Any] = []
    for arg in args:
        kind = type(arg)
        value = arg
        if kind is Tensor or kind is Parameter:  # isinstance is slow for parameters
            value = arg.data_ptr()
            key += arg.dtype, value % 16
        elif kind is int:
            key.append(arg)
        elif kind is tuple:
            # Strides are all integers; other tuples may hold anything.
            if arg and type(arg[0]) is int:
                key.append(arg)
            else:
                inner, members = specialised(arg)
                key.append(tuple(inner))
                value = tuple(members)
        elif kind.__name__ == "TensorDescriptor":  # Triton's own, and that of Gluon
            key += kind, arg.base.dtype, *arg.block_shape, getattr(arg, "layout", None)
        else:
            key.append(kind if kind is float else (arg, kind) if kind is bool else arg)
        values.append(value)
    return key, values


def without_calls(hook: Any) -> Any:
    """A hook of Triton's launches, or None where nobody has hung anything on it."""
    return hook if getattr(hook, "calls", True) else None


class Launch:
    """What the sizes, strides and dtypes of a call decide about one launch; made once for each.

    Attributes:
        grid: one to three sizes.
        constants: the kernel's constexpr arguments and Triton's options.
        prepared: by device, what runs where the address of every tensor is a multiple of 16.
    """

    __slots__ = ("constants", "grid", "prepared")

    def __init__(self, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.grid, self.constants = grid, constants
        self.prepared: dict[int, tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, todo: Launch, *args: Any) -> None:
    """Run a kernel as `kernel[todo.grid](*args, **todo.constants)`, at the least cost to the host.

    All integers among the arguments, strides and dtypes of the tensors and which of them are None
    must follow from what `todo` was made of.
    """
    if type(kernel) is PreparedKernel:
        kernel.run(todo, args)
    else:
        kernel[todo.grid](*args, **todo.constants)


def addresses(args: tuple[Any, ...]) -> tuple[list[Any], int]:
    """The arguments with tensors as their addresses, and the bits that are set in any of these."""
    values, bits = [], 0
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            arg = arg.data_ptr()
            bits |= arg
        elif kind is tuple and arg and type(arg[0]) is not int:
            members, more = addresses(arg)
            arg = tuple(members)
            bits |= more
        values.append(arg)
    return values, bits


class PreparedKernel:
    """A kernel under `triton.jit`, launched as `kernel[grid](*args, **constants)` like any other.

    Positional are all arguments that are not constexpr: tensors on the current device, descriptors,
    numbers, None, and tuples of these, where one that begins with an integer holds only integers.
    By name: the constexpr ones, last in the signature, and Triton's options (`num_warps`, ...).
    Triton's settings (`TRITON_DEBUG`, ...) are read when a kernel is prepared.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.prepared: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """The kernel on a grid of one to three sizes."""
        return partial(self.launch, grid)

    def run(self, todo: Launch, args: tuple[Any, ...]) -> None:
        """Like `launch`, for a launch that was made before."""
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        found = todo.prepared.get(device)
        if found is not None and JITFunction.run is _RUN and not self.kernel.pre_run_hooks:
            values, bits = addresses(args)
            if not bits % 16:
                start(found, todo.grid, driver.get_current_stream(device), args, values)
                return
        key = self.launch(todo.grid, *args, **todo.constants)
        if key in self.prepared and not addresses(args)[1] % 16:
            todo.prepared[device] = self.prepared[key]

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        """Run on the current device and stream; return the key of what ran."""
        if JITFunction.run is not _RUN or self.kernel.pre_run_hooks:
            self.kernel[grid](*args, **constants)
            return None
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        special, values = specialised(args)
        key = (device, *constants, *constants.values(), *special)
        found = self.prepared.get(key)
        if found is None:
            self.prepare(key, grid, args, constants)
        else:
            start(found, grid, driver.get_current_stream(device), args, values)
        return key

    def prepare(
        self, key: tuple[Any, ...], grid: tuple[int, ...], args: Any, constants: dict[str, Any]
    ) -> None:
        """Run, compiled if need be, and note what served the arguments."""
        compiled = self.kernel[grid](*args, **constants)
        if isinstance(compiled, CompiledKernel):  # a hook may have kept Triton from compiling
            if len(self.prepared) >= CACHE_SIZE:
                self.prepared.clear()
            names = self.kernel.arg_names[len(args) :]
            self.prepared[key] = compiled, tuple(constants[name] for name in names)


def start(
    found: tuple[Any, tuple[Any, ...]],
    grid: tuple[int, ...],
    stream: int,
    args: tuple[Any, ...],
    values: list[Any],
) -> None:
    """Launch a compiled kernel. `values`: the arguments with addresses in the place of tensors."""
    compiled, constants = found
    runtime, metadata = triton.knobs.runtime, None
    enter = without_calls(runtime.launch_enter_hook)
    leave = without_calls(runtime.launch_exit_hook)
    if enter is not None or leave is not None:
        metadata = compiled.launch_metadata(grid, stream, *args, *constants)
    compiled.run(
        *(*grid, 1, 1)[:3],
        *(stream, compiled.function, compiled.packed_metadata, metadata, enter, leave),
        *values,
        *constants,
    )


def prepared(kernel: Any) -> Any:
    """Decorate a kernel under `triton.jit`: launch it through `PreparedKernel` where that serves.

    An interpreted kernel stays as it is; so does one for AMD, whose compiler specialises on the
    size of a tensor's storage as well.
    """
    serves = isinstance(kernel, JITFunction) and torch.version.hip is None
    return PreparedKernel(kernel) if serves else kernel

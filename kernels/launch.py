"""Launches of a kernel that do the work of the first launch only once.

Triton's own launch binds the arguments, specialises on each of them and looks the compiled kernel
up by a string made of all that, every time. Here the compiled kernel is found by a tuple, and
launched as `CompiledKernel.__getitem__` launches it, with addresses in the place of tensors.
"""

import functools
import operator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

CACHE_SIZE = 4096  # per kernel
_TENSORS = frozenset((Tensor, Parameter))
# Whoever takes its place (the compile report, a tracer) wants to see every launch.
_RUN = JITFunction.run


def specialised(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Return a key by which the kernel compiled for these arguments is found, and its values.

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
        tensors: where among the arguments tensors are; `nested`: tuples that hold some.
    """

    __slots__ = ("constants", "grid", "nested", "prepared", "tensors")

    def __init__(self, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.grid, self.constants = grid, constants
        self.prepared: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self.tensors: tuple[int, ...] = ()
        self.nested: tuple[int, ...] = ()

    def note(self, device: int, found: tuple[Any, tuple[Any, ...]], args: tuple[Any, ...]) -> None:
        """Keep what was prepared for these arguments."""
        kinds = [type(arg) for arg in args]
        self.tensors = tuple(i for i, kind in enumerate(kinds) if kind in _TENSORS)
        self.nested = tuple(
            i for i, kind in enumerate(kinds) if kind is tuple and holds_tensor(args[i])
        )
        self.prepared[device] = found

    def addresses(self, args: tuple[Any, ...]) -> tuple[list[Any], int]:
        """The arguments with tensors as addresses, and the bits that are set in any of these."""
        values, bits = list(args), 0
        for i in self.tensors:
            address = values[i].data_ptr()
            values[i] = address
            bits |= address
        for i in self.nested:
            values[i], more = nested_addresses(values[i])
            bits |= more
        return values, bits


def holds_tensor(arg: Any) -> bool:
    """Is it a tensor, or a tuple that holds one at any depth?"""
    return type(arg) in _TENSORS or (type(arg) is tuple and any(map(holds_tensor, arg)))


def nested_addresses(arg: Any) -> tuple[Any, int]:
    """Like `Launch.addresses`, of one argument at any depth."""
    if type(arg) in _TENSORS:
        address = arg.data_ptr()
        return address, address
    if type(arg) is not tuple or not arg:
        return arg, 0
    members, bits = zip(*map(nested_addresses, arg), strict=True)
    return members, functools.reduce(operator.or_, bits)


def launch(kernel: Any, planned: Launch, *args: Any) -> None:
    """Run a kernel as `kernel[planned.grid](*args, **planned.constants)`, at less cost.

    All integers among the arguments, strides and dtypes of the tensors and which of them are None
    must follow from what `planned` was made of.
    """
    if type(kernel) is PreparedKernel:
        kernel.run(planned, args)
    else:
        kernel[planned.grid](*args, **planned.constants)


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

    def run(self, planned: Launch, args: tuple[Any, ...]) -> None:
        """Like `launch`, for a launch that was made before."""
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        found = planned.prepared.get(device)
        if found is not None and JITFunction.run is _RUN and not self.kernel.pre_run_hooks:
            values, bits = planned.addresses(args)
            if not bits % 16:
                start(found, planned.grid, driver.get_current_stream(device), args, values)
                return
        key = self.launch(planned.grid, *args, **planned.constants)
        found = self.prepared.get(key)
        if found is not None and not nested_addresses(args)[1] % 16:
            planned.note(device, found, args)

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

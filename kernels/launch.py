"""Launches of a kernel that do the work of the first launch only once.

Triton's own launch binds the arguments, specialises on each of them and looks the compiled kernel
up by a string made of all that, every time. Here the compiled kernel is found by a tuple, and
launched through `CompiledKernel.__getitem__`, as in Triton's tutorials.
"""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

CACHE_SIZE = 4096  # per kernel
# Whoever takes its place (the compile report, a tracer) wants to see every launch.
_RUN = JITFunction.run


def specialised(args: tuple[Any, ...]) -> list[Any]:
    """What of the arguments decides which compiled kernel serves them, or more than that.

    Triton looks at the dtype of a tensor and whether its address is a multiple of 16, at the width
    and divisibility of an integer and whether it is 1, and at the type alone of a float.
    Integers stand for themselves here: there are few shapes, and to divide them takes longer.
    """
    key: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:  # isinstance is slow for parameters
            key += arg.dtype, arg.data_ptr() % 16
        elif kind is tuple:
            # Strides are all integers; other tuples may hold anything.
            key.append(arg if arg and type(arg[0]) is int else tuple(specialised(arg)))
        elif kind is TensorDescriptor:
            key += kind, arg.base.dtype, *arg.block_shape
        else:
            key.append(kind if kind is float else (arg, kind) if kind is bool else arg)
    return key


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

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Run on the current device and stream."""
        if JITFunction.run is not _RUN or self.kernel.pre_run_hooks:
            self.kernel[grid](*args, **constants)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, *constants, *constants.values(), *specialised(args))
        found = self.prepared.get(key)
        if found is not None:
            compiled, values = found
            stream = driver.get_current_stream(device)
            compiled[(*grid, 1, 1)](*args, *values, stream=stream)
            return
        compiled = self.kernel[grid](*args, **constants)
        if isinstance(compiled, CompiledKernel):  # a hook may have kept Triton from compiling
            if len(self.prepared) >= CACHE_SIZE:
                self.prepared.clear()
            names = self.kernel.arg_names[len(args) :]
            self.prepared[key] = compiled, tuple(constants[name] for name in names)


def prepared(kernel: Any) -> Any:
    """Decorate a kernel under `triton.jit`: launch it through `PreparedKernel` where that serves.

    An interpreted kernel stays as it is; so does one for AMD, whose compiler specialises on the
    size of a tensor's storage as well.
    """
    serves = type(kernel) is JITFunction and torch.version.hip is None
    return PreparedKernel(kernel) if serves else kernel

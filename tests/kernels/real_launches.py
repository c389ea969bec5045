"""Every prepared launch beside Triton's own of the same arguments, byte for byte; no GPU.

    python real_launches.py FOLDER_OF_LIBCUDA [--wrong]

Kernels are compiled for an H200, and Triton's own launcher launches them into a libcuda that takes
notes (noting_libcuda.c). Prints how many launches were compared, by the way that they were
prepared, and how many differ. `--wrong` misplaces every argument of the prepared ones.
"""

import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver

from lora_fast.kernels import (
    configs,
    descriptors,
    hopper_launch,
    hopper_operands,
    launch,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import compile_calls

ARCH = configs.ARCHITECTURES["sm_90"]
# One of each kernel and of each kind of argument: blocks, masks, bias, descriptors, counters.
CHOSEN = (
    *("bfloat16 M=8192 r=16 forward split dropout", "bfloat16 M=8192 r=16 forward one_pass"),
    *("bfloat16 M=8192 r=16 2 blocks forward split", "bfloat16 M=16 r=16 forward lora_first"),
    *("bfloat16 M=8192 r=16 backward fused dropout", "bfloat16 M=16 r=16 backward fused"),
    "bfloat16 M=8192 r=16 2 blocks backward fused",
    *("bfloat16 M=8192 r=16 forward split specialised", "bfloat16 M=16 r=16 forward decode"),
    *("bfloat16 M=8192 r=16 embedding by frequency", "bfloat16 r=16 merged weight channels_last"),
)
ROWS = 264  # in the place of 8192, which only plans look at


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory in the place of a tensor without any."""
    return torch.zeros([ROWS if n == 8192 else n for n in shape], dtype=dtype)


def argument_sizes(compiled: Any) -> list[int]:
    """The bytes of each argument, which the kernel's PTX declares."""
    head = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?", head)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


class Comparison:
    """Follows prepared launches, and repeats each in Triton's own way."""

    def __init__(self, library: ctypes.CDLL, wrong: bool) -> None:
        self.notes = (ctypes.c_ubyte * (1 << 16)).in_dll(library, "notes")
        self.noted = ctypes.c_int.in_dll(library, "noted")
        self.sizes = (ctypes.c_int * 512).in_dll(library, "sizes")
        self.arguments = ctypes.c_int.in_dll(library, "arguments")
        self.wrong = wrong
        self.running: list[tuple[Any, dict[str, Any], str]] = []
        self.counts = {"found by its launch": 0, "found by its arguments": 0, "different": 0}
        self.start = launch.start
        launch.start = self.compare
        for name, way in (("run", "found by its launch"), ("launch", "found by its arguments")):
            setattr(launch.PreparedKernel, name, self.following(name, way))

    def following(self, name: str, way: str) -> Any:
        """A method of PreparedKernel that says who runs."""
        method = getattr(launch.PreparedKernel, name)

        def follow(kernel: Any, first: Any, *args: Any, **constants: Any) -> Any:
            self.running.append((kernel.kernel, constants or vars_of(first), way))
            try:
                return method(kernel, first, *args, **constants)
            finally:
                self.running.pop()

        return follow

    def compare(self, found: Any, grid: Any, stream: Any, args: Any, values: Any) -> None:
        """Launch both ways."""
        kernel, constants, way = self.running[-1]
        sizes = argument_sizes(found[0])
        self.sizes[: len(sizes)] = sizes
        self.arguments.value = len(sizes)
        if self.wrong:
            values = [v + 16 if type(v) is int else v for v in values]
        prepared = self.note(lambda: self.start(found, grid, stream, args, values))
        own = self.note(lambda: kernel[grid](*args, **constants))
        self.arguments.value = 0  # of a kernel that is yet to be compiled we know none
        if len(own) < sum(sizes):
            raise RuntimeError("the libcuda of the tests has noted no launch")
        self.counts[way] += 1
        self.counts["different"] += prepared != own

    def note(self, run: Any) -> bytes:
        """What a launch hands to the driver."""
        self.noted.value = 0
        run()
        return bytes(self.notes[: self.noted.value])


def vars_of(first: Any) -> dict[str, Any]:
    """The constants of a `Launch`; none of a grid."""
    return getattr(first, "constants", {})


def main(folder: str, wrong: bool) -> None:
    """Make the chosen calls three times each: compiled, found by arguments, found by launch."""
    library = ctypes.CDLL(os.path.join(folder, "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 7
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)

    def kept(make: Any, matrix: Tensor, rows: int, cols: int) -> Any:
        parts = (matrix.data_ptr(), matrix.dtype, matrix.shape, matrix.stride())
        return descriptors._kept(make, *parts, rows, cols)

    # As on a GPU, where these tensors would be.
    descriptors.described = hopper_operands.described = kept
    hopper_launch.check_hopper = lambda *args: None
    compile_calls.meta = tensor
    comparison = Comparison(library, wrong)
    made = set()
    for calls in compile_calls.CALLS:
        for case in calls(ARCH, False):
            if case.words in CHOSEN:
                made.add(case.words)
                for _ in range(3):
                    case.launch(ARCH)
    print(json.dumps({**comparison.counts, "missing": sorted(set(CHOSEN) - made)}))


if __name__ == "__main__":
    main(sys.argv[1], "--wrong" in sys.argv)

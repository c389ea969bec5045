"""Compile the kernels for GPUs that are not here and tell what they take.

    python bench/compile_report.py [--all] [--jobs N] [--out FOLDER]

For every kernel: registers, stack, spills, shared memory against the chip's limit, and on NVIDIA
chips how often tensor-core (HGMMA, HMMA, UTCHMMA) and bulk-copy (UTMALDG) instructions appear and
how many instructions the main loop has. Exits 1 on a stack frame, a spill, a kernel that does not
fit its chip or does not compile, or a large product without tensor-core instructions (HGMMA on
sm_90). Needs no GPU; must not be interpreted. What is compiled stands in compile_calls.py; results
stay in Triton's cache.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from tqdm import tqdm  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime.cache import get_cache_manager

from compile_calls import Case, cases
from harness.results import markdown, write
from lora_fast.commands import positive
from lora_fast.kernels import configs

TOOLS = Path(nvidia_driver.__file__).parent / "bin"
MMA = ("HGMMA", "UTCHMMA", "HMMA")
READER = Path(__file__).read_bytes()  # a part of the cache's key: other code reads other things


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes; `failure` instead where it does not compile."""

    arch: str
    kernel: str
    dtype: str
    tile: str
    case: str
    limit: int
    shared: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    mma: str = ""
    bulk_copies: int = 0
    loop: int | None = None
    digest: str = ""
    failure: str = ""

    def cells(self) -> dict[str, Any]:
        """Return the columns of the table."""
        hidden = ("digest", "failure")
        cells = {k: v for k, v in vars(self).items() if k not in hidden}
        return cells | {"loop": "" if self.loop is None else self.loop}

    def problems(self) -> Iterator[str]:
        """Say what is wrong with the kernel."""
        if self.failure:
            yield f"does not compile\n{self.failure}"
        if self.stack:
            yield f"{self.stack} bytes of stack"
        if self.spills:
            yield f"{self.spills} spills"
        if self.shared > self.limit:
            yield f"{self.shared} bytes of shared memory, the chip has {self.limit}"
        if self.is_large_product() and not self.mma:
            yield "no tensor-core instructions"
        elif self.is_large_product() and self.arch == "sm_90" and "HGMMA" not in self.mma:
            yield "no HGMMA"

    def is_large_product(self) -> bool:
        """Is it a product of 16-bit numbers in tiles for many rows? A warpgroup takes 64."""
        block_m = re.search(r"\bM(\d+)", self.tile)
        is_large = block_m is not None and int(block_m.group(1)) >= 64
        return self.kernel.startswith("lora_gemm") and self.dtype in ("bf16", "fp16") and is_large


class Compiling:
    """Makes every launch compile its kernel for `target`, and keeps what came out."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.kernels: list[Any] = []

    def __enter__(self) -> "Compiling":
        """Take the place of Triton's driver and of its launches."""
        self.run = triton.runtime.jit.JITFunction.run
        triton.runtime.driver.set_active(self)

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = self.run(function, *args, grid=grid, warmup=True, **kwargs)
            self.kernels.append(kernel)
            return kernel

        triton.runtime.jit.JITFunction.run = compile_only
        return self

    def __exit__(self, *error: object) -> None:
        """Let launches launch again."""
        triton.runtime.jit.JITFunction.run = self.run

    def get_current_target(self) -> GPUTarget:
        """Answer for Triton's driver."""
        return self.target

    def get_current_device(self) -> int:
        """Answer for Triton's driver: a device for each target, whose kernels are kept apart."""
        return hash(self.target) % 2**31

    def get_current_stream(self, device: int) -> int:
        """Answer for Triton's driver."""
        return 0


def target(arch: str) -> GPUTarget:
    """Return Triton's name for an architecture."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compiled(case: Case) -> list[Row]:
    """Compile the kernels of a case; a row for each, or one that tells why there is none."""
    arch = configs.ARCHITECTURES[case.arch]
    with Compiling(target(case.arch)) as compiling:
        try:
            case.launch(arch)
        except Exception as error:
            whole = "".join(traceback.format_exception(error))
            return [Row(case.arch, "?", "", "", case.words, arch.shared_memory, failure=whole)]
    return [row(case, kernel, arch.shared_memory) for kernel in compiling.kernels]


def row(case: Case, kernel: Any, limit: int) -> Row:
    """Return what one compiled kernel takes."""
    source, metadata = kernel.src, kernel.metadata
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    tiles = [
        name.removeprefix("BLOCK_") + str(value)
        for name, value in constants.items()
        if name.startswith(("BLOCK_", "CHUNK_"))
    ]
    stages = constants.get("STAGES", metadata.num_stages)  # of a ring that a kernel makes itself
    tile = " ".join((*tiles, f"warps{metadata.num_warps} stages{stages}"))
    dtype = re.search("bf16|fp16|fp32", str(next(iter(source.signature.values()))))
    return Row(
        *(case.arch, metadata.name, dtype.group() if dtype else "", tile, case.words),
        *(limit, metadata.shared),
        **usage(kernel),
        digest=kernel.hash,
    )


def usage(kernel: Any) -> dict[str, Any]:
    """Return registers, stack, spills and instructions of a kernel.

    Kept beside the kernel in Triton's cache: to disassemble takes as long as to compile.
    """
    cache = get_cache_manager(hashlib.sha256(kernel.hash.encode() + READER).hexdigest())
    known = cache.get_file("usage.json")
    if known is not None:
        return dict(json.loads(Path(known).read_text()))
    is_nvidia = "cubin" in kernel.asm
    found = nvidia_usage(kernel.asm["cubin"]) if is_nvidia else amd_usage(kernel.asm["amdgcn"])
    cache.put(json.dumps(found), "usage.json", binary=False)
    return found


def amd_usage(assembly: str) -> dict[str, Any]:
    """Read what a kernel takes out of its assembly."""

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[-1])

    mfma = assembly.count("v_mfma")
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalars spill into vector registers, not memory
        "mma": f"MFMA {mfma}" if mfma else "",
    }


def nvidia_usage(cubin: bytes) -> dict[str, Any]:
    """Read what a kernel takes out of its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.findall(rf"\b{key}:(\d+)", text)[-1]) for key in ("REG", "STACK", "LOCAL")
    )
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9.]*)([^;]*);", text)
    names = [name.partition(".")[0] for _, name, _ in instructions]
    mma = {name: names.count(name) for name in MMA if name in names}
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": sum(name in ("STL", "LDL") for name in names),
        "mma": " ".join(f"{name} {count}" for name, count in mma.items()),
        "bulk_copies": names.count("UTMALDG"),
        "loop": main_loop(instructions),
    }


def main_loop(instructions: list[tuple[str, str, str]]) -> int | None:
    """Return the length of the shortest loop that has tensor-core instructions."""
    position = {int(address, 16): i for i, (address, _, _) in enumerate(instructions)}
    lengths = []
    for i, (_, name, operands) in enumerate(instructions):
        goal = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        start = position.get(int(goal.group(1), 16)) if goal else None
        if start is not None and start < i:
            body = [n.partition(".")[0] for _, n, _ in instructions[start : i + 1]]
            if any(name in MMA for name in body):
                lengths.append(len(body))
    return min(lengths) if lengths else None


def report(chosen: list[Case], jobs: int) -> list[Row]:
    """Compile the cases in parallel; each kernel once, with the words of its first case."""
    rows: dict[tuple[str, str, str], Row] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for found in tqdm(pool.map(compiled, chosen), total=len(chosen), unit="case"):
            for one in found:
                rows.setdefault((one.arch, one.digest, one.failure), one)
    return sorted(rows.values(), key=lambda one: (one.arch, one.kernel, one.dtype, one.tile))


def main() -> None:
    """Compile, print, write, and exit 1 if a kernel is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration of every chip")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    rows = report(cases(everything=arguments.all), arguments.jobs)
    table = [one.cells() for one in rows]
    print(markdown(table))
    if arguments.out is not None:
        facts = {"triton": triton.__version__, "kernels": len(table)}
        write(arguments.out, "compile_report", facts, table)
    wrong = [(one, problem) for one in rows for problem in one.problems()]
    for one, problem in wrong:
        print(f"{one.arch} {one.kernel} [{one.tile}] ({one.case}): {problem}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

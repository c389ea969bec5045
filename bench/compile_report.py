"""Compile the kernels for GPUs that are not here and tell what they take.

    python bench/compile_report.py [--all] [--jobs N] [--out FOLDER]

For every kernel: registers, stack, spills, shared memory against the chip's limit, and on NVIDIA
chips how often tensor-core (HGMMA, HMMA, UTCHMMA) and bulk-copy (UTMALDG) instructions appear and
how many instructions the main loop has. Exits 1 on a stack frame, a spill, a kernel that does not
fit its chip, or a large product on sm_90 without HGMMA. Needs no GPU; must not be interpreted.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from harness import markdown, write
from tqdm import tqdm  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver

from lora_fast.kernels import configs
from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd

TOOLS = Path(nvidia_driver.__file__).parent / "bin"
MMA = ("HGMMA", "UTCHMMA", "HMMA")


@dataclass(frozen=True)
class Case:
    """One call, forward and backward, in one way of running it."""

    arch: str
    dtype: torch.dtype
    rows: int
    rank: int
    dropout: bool
    impl: configs.ForwardImpl
    input_grad: configs.InputGradImpl

    def describe(self) -> str:
        """Return the case in a few words."""
        dtype = str(self.dtype).removeprefix("torch.")
        p = "dropout" if self.dropout else "no dropout"
        return f"{dtype} M={self.rows} r={self.rank} {p}"


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


def compiled(case: Case) -> list[dict[str, Any]]:
    """Compile the kernels of a case; a line for each."""
    arch = configs.ARCHITECTURES[case.arch]
    n = k = 4096
    meta: dict[str, Any] = {"device": "meta", "dtype": case.dtype}
    x, dy = torch.empty(case.rows, k, **meta), torch.empty(case.rows, n, **meta)
    weight, bias = torch.empty(n, k, **meta), torch.empty(n, **meta)
    lora_a, lora_b = torch.empty(case.rank, k, **meta), torch.empty(n, case.rank, **meta)
    p, seed = (0.1, torch.empty(1, device="meta", dtype=torch.int64)) if case.dropout else (0, None)
    sizes = (arch, case.rows, n, k, case.rank, case.dtype)
    forward = replace(configs.forward_plan(*sizes, case.dropout), impl=case.impl)
    gemm = configs.gemm_config(arch, case.rows, case.dtype, one_pass=case.impl == "one_pass")
    backward = replace(configs.backward_plan(*sizes), input_grad=case.input_grad, library_sb=False)
    with Compiling(target(case.arch)) as compiling:
        _, s, mask = lora_linear_fwd(
            *(x, weight, bias, lora_a, lora_b, 1.0, p, seed), plan=replace(forward, gemm=gemm)
        )
        lora_linear_bwd(
            *(dy, x, weight, lora_a, lora_b, s, mask if case.dropout else None, 1.0, p),
            *([True] * 5, case.dtype),
            plan=backward,
        )
    return [line(case, kernel, arch.shared_memory) for kernel in compiling.kernels]


def line(case: Case, kernel: Any, limit: int) -> dict[str, Any]:
    """Return what one compiled kernel takes."""
    found: dict[str, Any] = {
        "arch": case.arch,
        "kernel": kernel.metadata.name,
        "case": case.describe(),
        "shared": kernel.metadata.shared,
        "limit": limit,
    }
    if "cubin" in kernel.asm:
        return found | _nvidia(kernel.asm["cubin"])
    text = kernel.asm["amdgcn"]
    numbers = {
        name: int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])
        for name, key in (("registers", "vgpr_count"), ("stack", "private_segment_fixed_size"),
                          ("spills", "vgpr_spill_count"))
    }  # fmt: skip
    return found | numbers | {"mma": text.count("v_mfma"), "bulk copies": 0, "loop": ""}


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
    )
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9.]*)([^;]*);", sass)
    names = [name.partition(".")[0] for _, name, _ in instructions]
    mma = {name: names.count(name) for name in MMA if name in names}
    spills = sum(name in ("STL", "LDL") for name in names)
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": spills,
        "mma": " ".join(f"{name} {count}" for name, count in mma.items()) or 0,
        "bulk copies": names.count("UTMALDG"),
        "loop": main_loop(instructions),
    }


def main_loop(instructions: list[tuple[str, str, str]]) -> int | str:
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
    return min(lengths) if lengths else ""


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def problems(row: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong with a kernel."""
    for key in ("stack", "spills"):
        if row[key]:
            yield f"{row[key]} {'bytes of stack' if key == 'stack' else 'spills'}"
    if row["shared"] > row["limit"]:
        yield f"{row['shared']} bytes of shared memory, the chip has {row['limit']}"
    is_large = "lora_gemm" in row["kernel"] and "M=8192" in row["case"]
    needs_hgmma = row["arch"] == "sm_90" and is_large and "float32" not in row["case"]
    if needs_hgmma and "HGMMA" not in str(row["mma"]):
        yield "no HGMMA"


def cases(*, everything: bool) -> list[Case]:
    """Return every kernel's default configuration on sm_80 and sm_90, or the whole matrix."""
    half, small, large = torch.bfloat16, 16, 8192
    plans: list[tuple[configs.ForwardImpl, configs.InputGradImpl]]
    plans = [("one_pass", "fused"), ("split", "fused"), ("lora_first", "lora_first")]
    archs = list(configs.ARCHITECTURES) if everything else ["sm_80", "sm_90"]
    dtypes = (half, torch.float16, torch.float32) if everything else (half,)
    ranks = (16, 64, 256) if everything else (16,)
    found = []
    for arch in archs:
        for dtype in dtypes:
            for rank in ranks:
                for rows in (small, large):
                    for impl, grad in plans:
                        if impl == "one_pass" and rank > configs.MAX_BLOCK_R:
                            continue
                        for dropout in (False,) if impl == "one_pass" else (False, True):
                            found.append(Case(arch, dtype, rows, rank, dropout, impl, grad))
    return found


def main() -> None:
    """Compile, print, write, and exit 1 if a kernel is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration of every chip")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    chosen = cases(everything=arguments.all)
    rows: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for found in tqdm(pool.map(compiled, chosen), total=len(chosen), unit="case"):
            for row in found:
                rows.setdefault(str(row), row)
    table = sorted(rows.values(), key=lambda row: (row["arch"], row["kernel"], row["case"]))
    print(markdown(table))
    if arguments.out is not None:
        facts = {"triton": triton.__version__, "kernels": len(table)}
        write(arguments.out, "compile_report", facts, table)
    wrong = [(row, problem) for row in table for problem in problems(row)]
    for row, problem in wrong:
        print(f"{row['arch']} {row['kernel']} ({row['case']}): {problem}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""The compile report can fail: each thing that it is to find, made on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).parents[1] / "bench"
MADE = """
import sys
sys.path.insert(0, sys.argv[1])
from functools import partial
import compile_report
from compile_calls import BF16, Case, Sizes, linear_forward
from lora_fast.kernels.configs import GemmConfig

def case(arch, words, *tile, warps, stages):
    gemm = GemmConfig(*tile, num_warps=warps, num_stages=stages)
    sizes = Sizes(BF16, 8192, 16)
    launch = partial(linear_forward, sizes=sizes, impl="split", dropout=False, gemm=gemm)
    return Case(arch, words, launch)

made = [
    case("sm_90", "few warps", 64, 64, 32, warps=2, stages=2),
    case("sm_89", "many stages", 128, 128, 64, warps=8, stages=8),
    case("sm_80", "odd tile", 128, 96, 32, warps=8, stages=2),
    case("sm_80", "few registers", 128, 256, 32, warps=4, stages=2),
]
compile_report.cases = lambda everything: made
sys.argv = ["compile_report", "--jobs", "1"]
compile_report.main()
"""


@pytest.mark.slow
def test_what_it_finds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MADE, str(BENCH)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    found = [line for line in done.stderr.splitlines() if line.startswith("sm_")]
    for arch, words, problem in (
        ("sm_90", "few warps", "no HGMMA"),
        ("sm_89", "many stages", "bytes of shared memory, the chip has 101376"),
        ("sm_80", "odd tile", "does not compile"),
        ("sm_80", "few registers", "spills"),
    ):
        lines = [x for x in found if x.startswith(arch) and f"({words})" in x and problem in x]
        assert lines, f"{problem} was not found: {done.stderr}"
    assert not [line for line in found if "lora_shrink_kernel" in line]

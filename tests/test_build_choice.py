"""What LORA_FAST_BUILD asks for and the building environment lacks is named in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A torch for CPUs, or one with CUDA, as setup.py sees it, and the toolkit that torch has found.
SETUP = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = {cuda!r}, {home!r}
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("cuda", "home", "missing"),
    [
        (None, None, "a torch with CUDA"),
        ("13.0", None, "the CUDA toolkit"),
        ("13.0", "elsewhere", "nvcc"),
    ],
)
def test_cuda_without_cuda(
    cuda: str | None, home: str | None, missing: str, tmp_path: Path
) -> None:
    shutil.copy(Path(__file__).parents[1] / "setup.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(cuda=cuda, home=home)],
        cwd=tmp_path,
        env=os.environ | {"LORA_FAST_BUILD": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"LORA_FAST_BUILD=cuda needs {missing}")

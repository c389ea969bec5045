"""What Triton's own launcher hands to the driver, for prepared launches and for Triton's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda that takes notes."""
    if torch.cuda.is_available():
        pytest.skip("torch has loaded a GPU's own libcuda before this one")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("libcuda")
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    command = [compiler, "-shared", "-fPIC", f"-I{headers}", str(HERE / "noting_libcuda.c")]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return folder


def compared(libcuda: Path, *words: str) -> dict[str, Any]:
    """How many launches were compared and differ; in a process, as they take Triton's driver."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(libcuda), "TRITON_CACHE_DIR": str(libcuda)}
    command = [sys.executable, str(HERE / "real_launches.py"), str(libcuda), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_prepared_launches_hand_over_what_those_of_triton_do(libcuda: Path) -> None:
    found = compared(libcuda)
    assert found["missing"] == []
    assert found["found by its launch"] > 20
    assert found["found by its arguments"] > 5
    assert found["different"] == 0
    # The same with every argument misplaced, so that the comparison is seen to look.
    wrong = compared(libcuda, "--wrong")
    assert wrong["different"] > 20

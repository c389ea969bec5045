"""What the CUDA merge moves in vectors: none lies across its own grid, where a GPU stops."""

import ctypes
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_vectors_lie_on_their_grid(size: int, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source, out = Path(__file__).with_name("merge_layout.cpp"), tmp_path / "layout.so"
    subprocess.run([compiler, "-std=c++20", "-fPIC", "-shared", source, "-o", out], check=True)
    is_aligned = ctypes.CDLL(str(out)).is_aligned
    vector, served = min(16, 4 * size), 0
    for first, cols, gap in product(range(0, 5 * size, size), range(5, 14), range(6)):
        stride, at = cols + gap, 4096 + first
        args = (ctypes.c_void_p(at), *map(ctypes.c_int64, (3, cols, stride, size)))
        if not is_aligned(*args):
            assert first % vector or cols % 4 or stride % 4
            continue
        served += 1
        assert cols % 4 == 0
        assert all((at + size * (row * stride)) % vector == 0 for row in range(3))
    assert served > 0

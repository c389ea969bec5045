"""The element arithmetic that the CPU and CUDA kernels share, over all bit patterns."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ALL = {**HALVES, "float32": torch.float32, "float64": torch.float64}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp("merge_math") / "merge_math.so"
    source = Path(__file__).with_name("merge_math.cpp")
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, source, "-o", out], check=True)
    return ctypes.CDLL(str(out))


def call(library: ctypes.CDLL, name: str, *tensors: Tensor, scaling: float | None = None) -> int:
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    pointers: list[Any] = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    if scaling is not None:
        pointers.append(ctypes.c_double(scaling))
    return int(function(*pointers, ctypes.c_int64(tensors[0].numel())))


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("name", HALVES)
def test_widen_every_pattern(name: str, library: ctypes.CDLL) -> None:
    half = all_patterns(HALVES[name])
    got = torch.empty(2**16)
    call(library, f"widen_{name}", half, got)
    expected = half.float()
    number = ~half.isnan()
    assert torch.equal(got[number].view(torch.int32), expected[number].view(torch.int32))
    assert got[~number].isnan().all()


@pytest.mark.parametrize("name", HALVES)
def test_round_what_was_widened_and_its_neighbours_and_midpoints(
    name: str, library: ctypes.CDLL
) -> None:
    dtype = HALVES[name]
    values = all_patterns(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    candidates = [values, middles]
    for towards in (float("inf"), float("-inf")):
        candidates += [v.nextafter(torch.tensor(towards)) for v in (values, middles)]
    wide = torch.cat([*candidates, torch.randn(10_000) * 1e-6, torch.tensor([float("inf"), 1e30])])
    got = torch.empty(wide.numel(), dtype=dtype)
    call(library, f"round_{name}", wide.contiguous(), got)
    assert torch.equal(got.view(torch.int16), wide.to(dtype).view(torch.int16))


@pytest.mark.parametrize("name", HALVES)
def test_order_is_the_order_of_the_numbers(name: str, library: ctypes.CDLL) -> None:
    half = all_patterns(HALVES[name])
    words, back = torch.empty(2**16, dtype=torch.int32), torch.empty_like(half)
    call(library, f"order_{name}", half, words, back)
    assert torch.equal(back.view(torch.int16), half.view(torch.int16))
    finite = half.isfinite()
    order = words[finite].sort().indices
    ranked = half[finite][order].float()
    assert (ranked[1:] >= ranked[:-1]).all()
    assert torch.equal(words[finite][order].diff().unique(), torch.tensor([1], dtype=torch.int32))
    zeros = torch.tensor([0.0, -0.0], dtype=HALVES[name])
    two, unused = torch.empty(2, dtype=torch.int32), torch.empty_like(zeros)
    call(library, f"order_{name}", zeros, two, unused)
    assert two.tolist() == [0, -1]


@pytest.mark.parametrize("name", ALL)
def test_order_of_wide_numbers_is_undone(name: str, library: ctypes.CDLL) -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, -1e-40])]).to(ALL[name])
    words = torch.empty(values.numel(), dtype=torch.int64 if name == "float64" else torch.int32)
    back = torch.empty_like(values)
    call(library, f"order_{name}", values, words, back)
    assert torch.equal(back, values)


@pytest.mark.parametrize("size", [1e-8, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("name", ALL)
def test_the_quick_path_agrees_and_every_code_leads_back(
    name: str, size: float, library: ctypes.CDLL
) -> None:
    dtype = ALL[name]
    weights = all_patterns(dtype) if name in HALVES else torch.randn(2**16).to(dtype)
    weights[:3] = torch.tensor([float("inf"), float("-inf"), 0.0], dtype=dtype)
    compute = torch.float64 if name == "float64" else torch.float32
    for scaling in (1.0, -0.37):
        acc = (torch.randn(2**16) * size).to(compute)
        assert call(library, f"disagreements_{name}", weights, acc, scaling=scaling) == 0

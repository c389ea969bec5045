"""The CUDA merge without a GPU: csrc/merge_cuda.cu compiled for the CPU, a thread for each of its.

Its results must be those of the CPU ops, bit for bit; `test_merge_cuda.py` asks the same of a GPU.
"""

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast import native, ops

FOLDER = Path(__file__).parent / "cuda_on_cpu"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INF = float("inf")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The ops, under a name of their own."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    at = Path(torch.__file__).parent
    out = tmp_path_factory.mktemp("cuda_on_cpu") / "merge.so"
    included = [
        at / "include",
        at / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", f"-I{FOLDER}"]
    flags += [word for folder in included for word in ("-isystem", str(folder))]
    flags += ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    libraries = [f"-L{at / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [compiler, *flags, str(FOLDER / "merge.cpp"), "-o", str(out), *libraries]
    subprocess.run(command, check=True)
    schemas = torch.library.Library("lora_fast_on_cpu", "DEF")
    for op in (ops.merge_, ops.unmerge_):
        schemas.define(str(op._schema).removeprefix("lora_fast::"))
    torch.ops.load_library(str(out))
    yield torch.ops.lora_fast_on_cpu
    del schemas


@pytest.fixture
def on_cpu(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `native` call what the fixture returns, as often as it likes."""

    def swap() -> None:
        monkeypatch.setattr(ops, "merge_", library.merge_.default)
        monkeypatch.setattr(ops, "unmerge_", library.unmerge_.default)

    return swap


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def copies(merge: native.Merge) -> native.Merge:
    """The same request on memory of its own, laid out alike."""
    weight = torch.empty_strided(
        merge.weight.shape, merge.weight.stride(), dtype=merge.weight.dtype
    ).copy_(merge.weight)
    return replace(merge, weight=weight)


def assert_like_the_cpu(merges: list[native.Merge], on_cpu: Any) -> list[Any]:
    """Merge both ways, compare all that is left behind, take back; return the records."""
    there = [copies(merge) for merge in merges]
    before = [merge.weight.clone() for merge in merges]
    expected = native.merge(merges)
    on_cpu()
    records = native.merge(there)
    for here, yours, mine, other in zip(merges, there, expected, records, strict=True):
        assert torch.equal(bits(here.weight), bits(yours.weight))
        assert (mine is None) == (other is None)
        if mine is None or other is None:
            continue
        assert (mine.original is None) == (other.original is None)
        for code, found in zip(mine.codes, other.codes, strict=True):
            assert torch.equal(code.code, found.code)
            listed = [
                dict(zip(c.overflow_index.tolist(), bits(c.overflow_value).tolist(), strict=True))
                for c in (code, found)
            ]
            assert listed[0] == listed[1]
    kept = [(m.weight, r) for m, r in zip(there, records, strict=True) if r is not None]
    native.unmerge([weight for weight, _ in kept], [record for _, record in kept])
    for merge, original in zip(there, before, strict=True):
        assert torch.equal(bits(merge.weight), bits(original))
    return records


def request(
    n: int, k: int, r: int, dtype: torch.dtype, layout: str = "rows", size: float = 0.3
) -> native.Merge:
    weight = torch.randn(n, k).to(dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "every_second":
        weight = torch.randn(n, 2 * k).to(dtype)[:, ::2]
    elif layout == "padded":
        weight = torch.randn(n, k + 4).to(dtype)[:, :k]
    return native.Merge(weight, torch.randn(r, k) * size, torch.randn(n, r) * size, 0.7)


@pytest.mark.parametrize("layout", ["rows", "transposed", "every_second", "padded"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (33, 300, 3), (130, 257, 8), (64, 128, 16), (70, 132, 37)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(dtype: torch.dtype, shape: Any, layout: str, on_cpu: Any) -> None:
    assert_like_the_cpu([request(*shape, dtype, layout)], on_cpu)


@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_of_every_dtype(dtype: torch.dtype, factor: torch.dtype, on_cpu: Any) -> None:
    merge = request(40, 72, 5, dtype)
    merge = replace(merge, lora_A=merge.lora_A.to(factor), lora_B=merge.lora_B.to(factor))
    assert_like_the_cpu([merge], on_cpu)


@pytest.mark.parametrize("layout", ["rows", "every_second"])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_weight_of_16_bits(dtype: torch.dtype, size: float, layout: str, on_cpu: Any) -> None:
    merge = request(256, 256, 3, dtype, layout, size)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)[torch.randperm(2**16)]
    merge.weight.copy_(patterns.view(dtype).view(256, 256))
    assert_like_the_cpu([merge], on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_small_weights_keep_their_bits(dtype: torch.dtype, on_cpu: Any) -> None:
    merge = request(96, 160, 4, dtype)
    flat = merge.weight.view(-1)
    for value in (INF, -INF, float("nan"), 0.0, -0.0, torch.finfo(dtype).tiny / 2):
        flat[torch.randperm(flat.numel())[:20]] = value
    assert_like_the_cpu([merge], on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_longer_than_a_block_gathers(dtype: torch.dtype, on_cpu: Any) -> None:
    merge = request(2600, 160, 2, dtype, size=3.0)
    merge.weight.mul_(10)[100:106] = (
        0  # not a distance that a code can tell from what is left of the delta
    )
    (record,) = assert_like_the_cpu([merge], on_cpu)
    assert record.original is None
    assert sum(code.overflow_index.numel() for code in record.codes) > 512


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_full_list_takes_all_back_and_keeps_a_copy(dtype: torch.dtype, on_cpu: Any) -> None:
    small = request(200, 136, 4, dtype)
    small.weight.mul_(1e-6)
    (record,) = assert_like_the_cpu([small], on_cpu)
    assert record.original is not None


def test_an_overflow_leaves_its_weight_and_merges_the_others(on_cpu: Any) -> None:
    merges = [request(130, 140, 2, torch.half) for _ in range(3)]
    merges[1] = replace(merges[1], scaling=1e6)
    records = assert_like_the_cpu(merges, on_cpu)
    assert [record is None for record in records] == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_weights_than_a_launch_takes(dtype: torch.dtype, on_cpu: Any) -> None:
    layouts = ["rows", "transposed", "every_second"]
    merges = [request(4 + i, 8 * (1 + i % 3), 1 + i % 5, dtype, layouts[i % 3]) for i in range(110)]
    assert_like_the_cpu(merges, on_cpu)


def test_the_blocks_of_a_grouped_weight(on_cpu: Any) -> None:
    weight, enable = torch.randn(3 * 48, 56).bfloat16(), [True, False, True]
    lora_A, lora_B = torch.randn(2 * 4, 56), torch.randn(2 * 48, 4)
    merge = native.Merge(weight, lora_A, lora_B, 0.5, enable, [48] * 3)
    (record,) = assert_like_the_cpu([merge], on_cpu)
    assert len(record.codes) == 2


def test_the_weight_of_a_convolution(on_cpu: Any) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(8, 6, 3, 3).to(memory_format=layout)
        merge = native.Merge(weight, torch.randn(4, 18), torch.randn(24, 4), 2.0)
        assert_like_the_cpu([merge], on_cpu)

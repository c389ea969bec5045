"""merge_ and unmerge_ on a GPU: the bits of the CPU, in both directions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast import functional, native, ops
from lora_fast.testing import randomize_

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def cuda_ops() -> None:
    """Skip, with the reason, where the CUDA ops were not built."""
    reason = ops.load_native("cuda")
    if reason is not None:
        pytest.skip(reason)


def request(n: int, k: int, r: int, dtype: torch.dtype, transposed: bool = False) -> Any:
    weight = torch.randn(n, k).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    lora_A, lora_B = torch.randn(r, k) * 0.3, torch.randn(n, r) * 0.3
    return native.Merge(weight, lora_A, lora_B, 0.7)


def on_gpu(merge: Any) -> Any:
    weight = torch.empty_like(merge.weight, device="cuda").copy_(merge.weight)
    return replace(merge, weight=weight, lora_A=merge.lora_A.cuda(), lora_B=merge.lora_B.cuda())


def overflow_of(code: Any) -> dict[int, float]:
    return dict(zip(code.overflow_index.tolist(), code.overflow_value.tolist(), strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (t.cpu().contiguous().view(integers) for t in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 300, 3), (130, 257, 8), (256, 512, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_cpu(dtype: torch.dtype, shape: Any, transposed: bool) -> None:
    here = request(*shape, dtype, transposed)
    there, before = on_gpu(here), here.weight.clone()
    (cpu_record,), (gpu_record,) = native.merge([here]), native.merge([there])
    assert same_bits(here.weight, there.weight)
    for mine, yours in zip(cpu_record.codes, gpu_record.codes, strict=True):
        assert torch.equal(mine.code, yours.code.cpu())
        assert overflow_of(mine) == overflow_of(yours)
    native.unmerge([there.weight], [gpu_record])
    assert same_bits(there.weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_small_weights_in_one_call(dtype: torch.dtype) -> None:
    merges = [on_gpu(request(8 + i, 40 - i % 7, 1 + i % 5, dtype)) for i in range(130)]
    before = [m.weight.clone() for m in merges]
    records = native.merge(merges)
    assert all(not same_bits(m.weight, b) for m, b in zip(merges, before, strict=True))
    native.unmerge([m.weight for m in merges], records)
    assert all(same_bits(m.weight, b) for m, b in zip(merges, before, strict=True))


def test_an_overflow_leaves_its_weight_and_merges_the_others() -> None:
    merges = [on_gpu(request(300, 512, 2, torch.half)) for _ in range(3)]
    merges[1] = replace(merges[1], scaling=1e6)
    before = [m.weight.clone() for m in merges]
    records = native.merge(merges)
    assert [record is None for record in records] == [False, True, False]
    assert same_bits(merges[1].weight, before[1])
    kept = [0, 2]
    native.unmerge([merges[i].weight for i in kept], [records[i] for i in kept])
    assert all(same_bits(m.weight, b) for m, b in zip(merges, before, strict=True))


def test_deltas_far_above_the_weights_keep_a_copy() -> None:
    merge = on_gpu(request(128, 128, 4, torch.float32))
    merge.weight.mul_(1e-6)
    before = merge.weight.clone()
    (record,) = native.merge([merge])
    assert record.original is not None
    native.unmerge([merge.weight], [record])
    assert same_bits(merge.weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_that_moves_while_it_is_merged(dtype: torch.dtype) -> None:
    layer = randomize_(lora.MergedLinear(40, 24, r=3, enable_lora=[1, 0, 1], dtype=dtype))
    before = layer.weight.detach().clone()
    for device in ("cuda", "cpu", "cuda"):
        layer.eval().to(device)
        assert layer.merged
        assert layer.weight.device.type == device
    layer.train()
    assert same_bits(layer.weight.detach(), before)


def test_strided_weights() -> None:
    wide = torch.randn(60, 90, device="cuda")
    before = wide.clone()
    lora_A, lora_B = torch.randn(2, 30, device="cuda"), torch.randn(60, 2, device="cuda")
    record = functional.merge_(wide[:, 1:61:2], lora_A, lora_B, 0.5)
    assert same_bits(wide[:, ::2].clone(), before[:, ::2].clone())
    functional.unmerge_(wide[:, 1:61:2], record)
    assert same_bits(wide, before)


def test_an_unmerge_on_another_stream_than_the_merge() -> None:
    """The codes' memory is not given to others before that stream has read it."""
    weight, lora_A, lora_B = (
        torch.randn(s, device="cuda") for s in ((512, 512), (4, 512), (512, 4))
    )
    before = weight.clone()
    record = functional.merge_(weight, lora_A, lora_B, 0.5)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        native.unmerge([weight], [record])  # unmerge_ would look at the weight, and wait
    del record
    others = [torch.full_like(weight, 77, dtype=torch.int8) for _ in range(8)]
    torch.cuda.synchronize()
    assert len(others) == 8
    assert same_bits(weight, before)

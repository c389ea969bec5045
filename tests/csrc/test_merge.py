"""merge_ and unmerge_ of csrc: values against float64, and the way back bit for bit."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora_fast as lora
from lora_fast import functional, native, ops, reference
from lora_fast.testing import assert_within_budget, randomize_

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["rows", "transposed", "columns", "offset", "every_second"]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, to compare NaN and signed zeros too."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).clone()


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of equal values that lies otherwise in memory."""
    n, k = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "columns":
        wide = values.new_zeros((n, k + 5))
        wide[:, 2 : 2 + k] = values
        return wide[:, 2 : 2 + k]
    if layout == "offset":
        flat = values.new_zeros(n * k + 1)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(n, k)
    if layout == "every_second":
        wide = values.new_zeros((2 * n, 2 * k))
        wide[::2, ::2] = values
        return wide[::2, ::2]
    return values.contiguous()


def factors(n: int, k: int, r: int, dtype: torch.dtype, std: float = 0.3) -> tuple[Tensor, Tensor]:
    return (torch.randn(r, k) * std).to(dtype), (torch.randn(n, r) * std).to(dtype)


def oracle(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    delta = scaling * (lora_B.double() @ lora_A.double())
    return weight.double() + delta.view(weight.shape)


def eager(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    merged = weight.clone()
    reference.merge_(merged, lora_A, lora_B, scaling)
    return merged


def check_cycle(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Any:
    """Merge, compare with float64, unmerge, compare the bits; returns the record."""
    before = bits(weight)
    args = (lora_A, lora_B, scaling)
    exact, plain = oracle(weight, *args), eager(weight, *args)
    record = functional.merge_(weight, *args)
    assert_within_budget(weight, plain, exact)
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)
    return record


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 1), (33, 300, 3), (130, 257, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_odd_sizes(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    n, k, r = shape
    weight = laid_out(torch.randn(n, k).to(dtype), layout)
    record = check_cycle(weight, *factors(n, k, r, dtype), 0.7)
    assert record.original is None  # it was the native merge


@pytest.mark.parametrize("layout", ["columns", "every_second"])
def test_what_lies_between_the_elements_is_not_touched(layout: str) -> None:
    weight = laid_out(torch.randn(30, 40), layout)
    base = weight._base
    assert base is not None
    outside = torch.ones_like(base, dtype=torch.bool)
    laid = torch.as_strided(outside, weight.shape, weight.stride(), weight.storage_offset())
    laid.fill_(False)
    base[outside] = 5.0
    functional.merge_(weight, *factors(30, 40, 4, torch.float32), 1.0)
    assert (base[outside] == 5.0).all()


@pytest.mark.parametrize("rank", [2, 8, 15, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks(dtype: torch.dtype, rank: int) -> None:
    check_cycle(torch.randn(40, 70).to(dtype), *factors(40, 70, rank, dtype, 0.1), 1.3)


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_another_dtype(dtype: torch.dtype, adapter: torch.dtype) -> None:
    weight = torch.randn(20, 30).to(dtype)
    before = bits(weight)
    args = (*factors(20, 30, 4, adapter), 0.5)
    exact, plain = oracle(weight, *args), eager(weight, *args)
    record = functional.merge_(weight, *args)
    assert_within_budget(weight, plain, exact)
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)


def test_strided_factors() -> None:
    lora_A, lora_B = factors(20, 30, 4, torch.float32)
    check_cycle(torch.randn(20, 30), lora_A.t().contiguous().t(), lora_B.flip(0).t().clone().t(), 1)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_weights(shape: tuple[int, int]) -> None:
    weight = torch.empty(shape)
    record = functional.merge_(weight, *factors(*shape, 2, torch.float32), 1.0)
    functional.unmerge_(weight, record)
    assert record.spent
    assert record.nbytes() == 0
    assert weight.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: lora.Linear(40, 24, r=3, fan_in_fan_out=True, **kw),
        lambda **kw: lora.MergedLinear(40, 24, r=3, enable_lora=[True, False, True], **kw),
        lambda **kw: lora.MergedLinear(
            40, 24, r=3, enable_lora=[1, 0, 1], out_splits=[16, 4, 4], fan_in_fan_out=True, **kw
        ),
        lambda **kw: lora.Embedding(50, 24, r=3, **kw),
        lambda **kw: lora.Conv1d(6, 8, 3, r=2, **kw),
        lambda **kw: lora.Conv2d(6, 8, 3, r=2, groups=2, **kw),
        lambda **kw: lora.Conv2d(6, 8, 3, r=2, **kw).to(memory_format=torch.channels_last),
        lambda **kw: lora.Conv3d(2, 4, 2, r=2, **kw),
    ],
    ids=["linear_t", "merged", "merged_ragged_t", "embedding", "conv1d", "conv2d_g", "conv2d_cl",
         "conv3d"],
)  # fmt: skip
def test_a_thousand_cycles_of_every_layer(make: Any, dtype: torch.dtype) -> None:
    """A, B and the scaling change in between; 35 cycles for each of 32 cases."""
    layer = randomize_(make(dtype=dtype), 0.2)
    weight = layer._weight_owner().weight
    before, strides = bits(weight), weight.stride()
    for i in range(35):
        layer.eval()
        assert layer.merged
        assert not torch.equal(bits(weight), before)
        randomize_(layer, 0.02 * (i + 1))
        layer.scaling = 0.1 * (i + 1)
        layer.train()
        assert torch.equal(bits(weight), before)
    assert layer._weight_owner().weight.stride() == strides


ADVERSARIAL = {
    "zeros": lambda: torch.zeros(16, 24),
    "negative_zeros": lambda: -torch.zeros(16, 24),
    "denormals": lambda: torch.randn(16, 24) * 1e-40,
    "far_apart": lambda: torch.randn(16, 24) * 10.0 ** torch.randint(-30, 30, (16, 24)),
    "not_finite": lambda: torch.randn(16, 24).index_put(
        (torch.arange(4), torch.arange(4)),
        torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0]),
    ),
}


@pytest.mark.parametrize("std", [1e-30, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_weights(name: str, dtype: torch.dtype, std: float) -> None:
    weight = ADVERSARIAL[name]().to(dtype)
    before = bits(weight)
    lora_A, lora_B = factors(16, 24, 2, torch.float32, std**0.5)
    if dtype is torch.float16 and std > 100:
        lora_B = lora_B * 0.1
    try:
        record = functional.merge_(weight, lora_A, lora_B, 1.0)
    except OverflowError:
        assert torch.equal(bits(weight), before)
        return
    finite = before.view(dtype).isfinite()
    assert torch.equal(bits(weight)[~finite], before[~finite])
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)


@given(
    n=st.integers(1, 40), k=st.integers(1, 40), r=st.integers(1, 9), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
    size=st.floats(-6, 3), scaling=st.floats(-4, 4),
)  # fmt: skip
def test_any_weight_comes_back(
    n: int, k: int, r: int, seed: int, dtype: torch.dtype, layout: str, size: float, scaling: float
) -> None:
    torch.manual_seed(seed)
    weight = laid_out((torch.randn(n, k) * 10.0 ** torch.randint(-3, 3, (n, k))).to(dtype), layout)
    before = bits(weight)
    try:
        record = functional.merge_(weight, *factors(n, k, r, dtype, 10 ** (size / 2)), scaling)
    except OverflowError:
        assert torch.equal(bits(weight), before)
        return
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)


# Overflow and memory


@pytest.mark.parametrize("where", [(0, 0), (150, 33), (299, 511)], ids=str)
def test_an_overflow_leaves_the_bits(where: tuple[int, int]) -> None:
    weight = torch.randn(300, 512).half()
    weight[where] = 65504.0
    before = bits(weight)
    lora_A, lora_B = torch.ones(1, 512), torch.full((300, 1), 40.0)
    with pytest.raises(OverflowError, match="float16"):
        functional.merge_(weight, lora_A, lora_B, 1.0)
    assert torch.equal(bits(weight), before)


def test_one_of_several_that_overflows_stays_and_the_others_merge() -> None:
    weights = [torch.randn(40, 50).half() for _ in range(3)]
    before = [bits(w) for w in weights]
    scalings = [1.0, 1e5, 1.0]
    requests = [
        native.Merge(w, *factors(40, 50, 2, torch.half), s)
        for w, s in zip(weights, scalings, strict=True)
    ]
    records = native.merge(requests)
    assert [record is None for record in records] == [False, True, False]
    assert torch.equal(bits(weights[1]), before[1])
    kept = [0, 2]
    assert all(not torch.equal(bits(weights[i]), before[i]) for i in kept)
    native.unmerge([weights[i] for i in kept], [records[i] for i in kept])
    assert all(torch.equal(bits(w), b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_most_a_byte_and_a_tenth_for_each_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(512, 512).to(dtype)
    record = functional.merge_(weight, *factors(512, 512, 8, dtype, 0.1), 1.0)
    assert record.original is None
    assert record.nbytes() <= 1.1 * weight.numel()


def test_blocks_without_an_adapter_cost_nothing() -> None:
    weight = torch.randn(96, 64)
    record = functional.merge_(
        weight, torch.randn(2, 64) * 0.1, torch.randn(32, 2) * 0.1, 1.0,
        enable_lora=[False, True, False],
    )  # fmt: skip
    assert record.nbytes() <= 1.1 * 32 * 64


def test_deltas_far_above_the_weights_keep_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(128, 128) * 1e-6
    before = bits(weight)
    with caplog.at_level(logging.DEBUG, "lora_fast.merge"):
        record = functional.merge_(weight, *factors(128, 128, 4, torch.float32, 1.0), 1.0)
    assert record.original is not None
    assert "keeping a copy" in caplog.text
    functional.unmerge_(weight, record)
    assert torch.equal(bits(weight), before)


# What must not matter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(70, 530).to(dtype)
    args = (*factors(70, 530, 13, dtype), 0.9)
    expected = weight.clone()
    functional.merge_(expected, *args)
    threads = torch.get_num_threads()
    for isa in ("portable", "avx2", "avx512", "avx512_bf16"):
        monkeypatch.setenv("LORA_FAST_CPU_ISA", isa)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            merged = weight.clone()
            try:
                record = functional.merge_(merged, *args)
            except RuntimeError as error:
                assert "LORA_FAST_CPU_ISA" in str(error)  # not on this machine
                break
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(bits(merged), bits(expected))
            functional.unmerge_(merged, record)
            assert torch.equal(bits(merged), bits(weight))


def test_autocast_and_flushed_denormals_do_not_matter() -> None:
    weight, args = torch.randn(20, 30) * 1e-38, (*factors(20, 30, 2, torch.float32, 1e-19), 1.0)
    expected = weight.clone()
    functional.merge_(expected, *args)
    before = bits(weight)
    try:
        torch.set_flush_denormal(True)
        with torch.autocast("cpu", torch.bfloat16):
            record = functional.merge_(weight, *args)
        assert torch.equal(bits(weight), bits(expected))
        functional.unmerge_(weight, record)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_layer_finds_its_way_back(carry: Any) -> None:
    layer = randomize_(lora.Linear(30, 20, r=3, dtype=torch.bfloat16))
    before = bits(layer.weight)
    layer.eval()
    other = carry(layer)
    randomize_(other)
    for module in (other, layer):
        module.train()
        assert torch.equal(bits(module.weight), before)


def test_autograd_sees_the_write() -> None:
    weight = torch.randn(4, 5)
    x = torch.randn(3, 5, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    functional.merge_(weight, *factors(4, 5, 2, torch.float32), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Bad input


def test_a_record_serves_once_and_for_its_own_weight() -> None:
    weight = torch.randn(6, 5)
    record = functional.merge_(weight, *factors(6, 5, 2, torch.float32), 1.0)
    for wrong, what in ((torch.randn(5, 6), "shape"), (torch.randn(6, 5).double(), "float64")):
        before = bits(wrong)
        with pytest.raises(ValueError, match=what):
            functional.unmerge_(wrong, record)
        assert torch.equal(bits(wrong), before)
    with pytest.raises(ValueError, match="record is on cpu, the weight on meta"):
        functional.unmerge_(weight.to("meta"), record)
    functional.unmerge_(weight, record)
    before = bits(weight)
    with pytest.raises(ValueError, match="used before"):
        functional.unmerge_(weight, record)
    with pytest.raises(TypeError, match="MergeRecord"):
        functional.unmerge_(weight, None)  # type: ignore[arg-type]
    assert torch.equal(bits(weight), before)


def test_shapes_that_do_not_fit() -> None:
    weight = torch.randn(6, 5)
    before = bits(weight)
    for lora_A, lora_B in (
        (torch.randn(2, 4), torch.randn(6, 2)),
        (torch.randn(2, 5), torch.randn(7, 2)),
        (torch.randn(3, 5), torch.randn(6, 2)),
    ):
        with pytest.raises(ValueError, match=r"\(6, 5\)"):
            functional.merge_(weight, lora_A, lora_B, 1.0)
    assert torch.equal(bits(weight), before)


def test_the_op_checks_what_reaches_it() -> None:
    """Whoever calls the op directly gets an error, not a crash."""
    weight, code = torch.randn(6, 5), torch.empty(6, 5, dtype=torch.int8)
    index, value = torch.empty(0, dtype=torch.int32), torch.empty(0)
    lora_A, lora_B = factors(6, 5, 2, torch.float32)
    status = torch.zeros(1, dtype=torch.int64)
    good = [[weight], [lora_A], [lora_B], [1.0], [code], [index], [value], status]
    for at, wrong in (
        (0, [torch.ones(6, 5, dtype=torch.int32)]),
        (0, [torch.randn(6, 4)]),
        (1, [torch.randn(3, 5)]),
        (3, [1.0, 2.0]),
        (4, [torch.empty(6, 5)]),
        (5, [torch.empty(3, dtype=torch.int32)]),
        (7, torch.zeros(2, dtype=torch.int64)),
        (7, torch.zeros(1)),
    ):
        with pytest.raises(RuntimeError):
            ops.merge_(*[*good[:at], wrong, *good[at + 1 :]])
    with pytest.raises(RuntimeError, match="overflow_index"):
        outside = [torch.tensor([30], dtype=torch.int32)]
        ops.unmerge_(*good[:5], outside, [torch.empty(1)], status)
